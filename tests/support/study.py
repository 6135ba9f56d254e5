"""A tiny photo set, a tiny backbone of random weights and made-up results for the tests of the study."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from benchmarks.study.counts import ImageCounts
from benchmarks.study.scoring import RAW
from benchmarks.study.settings import PROPAGATIONS, STARTS, Cell
from benchmarks.study.store import write_json
from tests.support.photo_folder import write_photo_folder

SIZE = 56  # 4 x 4 patches
NAMES = ["background", "cat", "cow", "dog", "horse", "person", "sheep"]
LABELS = {"a": [1], "b": [3], "c": [1, 3], "d": [2], "e": [1, 2], "f": [3, 5], "g": [4], "h": [6, 1], "i": [2, 3]}
SPLITS = {"train": "a b c d e", "dev": "f g h i", "test": "b c i"}


def tiny_vit(_: str, pretrained: bool, img_size: int, num_classes: int) -> VisionTransformer:
    """In place of timm.create_model: twelve blocks, as the study's, of width 24."""
    assert not pretrained
    return VisionTransformer(img_size, 14, num_classes=num_classes, embed_dim=24, depth=12, num_heads=2)


def make_photos(root: Path, background: bool = True) -> Path:
    return write_photo_folder(root, NAMES if background else NAMES[1:], LABELS, SPLITS)


def git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


def freeze(results: Path, cells: list[Cell], commit: bool = True) -> None:
    entries = [
        {"plan": "primary", "setting": asdict(c.setting), "reading": asdict(c.reading), "seeds": [c.seed]}
        for c in cells
    ]
    write_json(results / "frozen.json", {"cells": entries})
    if commit:
        git(results, "init")
        git(results, "add", "frozen.json")
        git(results, "commit", "-m", "frozen")


def made_counts(seed: int, quality: float, images: int = 12, classes: int = 3) -> ImageCounts:
    """``quality``: the share of the pixels of each class that is right. Masks depend on ``seed`` alone."""
    truth = np.random.default_rng(seed).integers(20, 100, (images, classes))
    correct = np.floor(truth * quality).astype(np.int64)
    wrong = truth - correct
    return ImageCounts(correct + np.roll(wrong, 1, axis=1), correct, truth)


def made_record(cell: Cell, quality: float, mean_ap: float = 0.8, readings: Mapping[Any, float] = {}) -> dict[str, Any]:
    """What a cell writes, with maps of a known quality. ``readings`` overrides the mIoU of some of them."""
    counts = made_counts(cell.seed, quality)
    maps = {
        "miou": counts.miou(),
        "threshold": 0.3,
        "oracle": counts.miou(),
        "oracle_threshold": 0.3,
        "curve": [0.1] * 100,
        "per_class_iou": [0.5, None, 0.25],
        "false_positive": 0.2,
        "false_negative": 0.3,
        "multi_label": 0.1,
        "counts": counts.pack(),
    }
    found = [
        {
            "start": start,
            "propagation": name,
            "miou": readings.get((start, name), quality / 2),
            "threshold": 0.3,
        }
        for start in STARTS
        for name in (RAW, *PROPAGATIONS)
    ]
    return {
        "setting": asdict(cell.setting),
        "seed": cell.seed,
        "split": cell.split,
        "reading": asdict(cell.reading),
        "names": ["background", "cat", "dog"],
        "mean_ap": mean_ap,
        "entropies": [[0.5, 0.6]],
        "raw": maps,
        "propagated": maps,
        "readings": found,
        "training": {"cpu_seconds": 400.0, "peak_memory": 2**30},
        "scoring": {"cpu_seconds": 40.0},
    }
