"""A tiny photo set, a tiny backbone of random weights and made-up results for the tests of the study."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from acr_reg.demo.record import write_json
from benchmarks.study.counts import ImageCounts
from benchmarks.study.photos import Places
from benchmarks.study.scoring import RAW
from benchmarks.study.settings import NETWORKS, SETS, Cell, Reading, Setting, base
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


def make_places(root: Path) -> Places:
    """VOC's folder has a background, MSRC's has none; weights are drawn at random."""
    make_photos(root / "data" / SETS["voc"].folder)
    make_photos(root / "data" / SETS["msrc"].folder, background=False)
    torch.manual_seed(0)
    state = tiny_vit("", False, SIZE, 0).state_dict()
    # First weights attend to all alike; larger ones make maps that differ.
    larger = {name: value * (3 if "qkv.weight" in name else 1) for name, value in state.items()}
    np.savez(root / "weights.npz", **{name: value.numpy() for name, value in larger.items()})
    return Places(root / "data", root / "weights.npz", root / "cache")


def tiny(condition: str, weight: float = 0.0, cam_weight: float = 0.0, **other: object) -> Setting:
    return base("voc", condition, weight, cam_weight, **{"size": SIZE, "epochs": 2, "batch_size": 2, **other})


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
    network = NETWORKS[cell.setting.network]
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
        "agreement": 0.7,
    }
    found = [
        {
            "start": start,
            "propagation": name,
            "miou": readings.get((start, name), quality / 2),
            "threshold": 0.3,
        }
        for start in network.starts
        for name in (RAW, *network.spread)
    ]
    return {
        "setting": asdict(cell.setting),
        "seed": cell.seed,
        "split": cell.split,
        "reading": asdict(cell.reading),
        "names": ["background", "cat", "dog"],
        "mean_ap": mean_ap,
        "entropies": [[0.5, 0.6]],
        **dict.fromkeys(network.maps, maps),
        "readings": found,
        "training": {"cpu_seconds": 400.0, "peak_memory": 2**30},
        "scoring": {"cpu_seconds": 40.0},
    }


def made_results(results: Path, split: str = "dev") -> None:
    """Over two seeds "both" is better by 0.1 of the pixels of each class at weight 0.5, and loses mAP at 1.5."""
    for seed in (0, 1):
        for condition, weight, quality, mean_ap in (
            ("two", 0.0, 0.5, 0.8),
            ("both", 0.5, 0.6, 0.799),
            ("both", 1.5, 0.55, 0.7),
            ("misreported", 0.5, 0.45, 0.79),
        ):
            cell = Cell(base("voc", condition, weight), seed, split, Reading())
            readings = {(-2, RAW): 0.9, (-2, "last"): 0.95} if condition == "both" and weight == 0.5 else {}
            write_json(results / cell.file, made_record(cell, quality, mean_ap, readings))
