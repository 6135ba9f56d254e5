"""benchmarks/pictures/attention.py makes the committed picture of docs/guides/attention, but for the weights."""

from __future__ import annotations

from pathlib import Path

import matplotlib  # noqa: F401  # this file is left out where the extras are not installed
import numpy as np
import timm
import torch
from PIL import Image

from benchmarks.pictures.attention import FOLDER, SIZE, build, main, photograph, write


def small_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=14, depth=2, num_classes=0)


def test_the_picture_shows_what_the_committed_one_shows(tmp_path: Path) -> None:
    """A smaller model has other heads, but the photograph stands in the same place."""
    committed = np.asarray(Image.open(FOLDER / "astronaut.png").convert("RGB")).astype(float)
    found = np.asarray(Image.open(write(tmp_path, small_vit())).convert("RGB")).astype(float)
    assert committed.shape[1] == found.shape[1] == 1040
    first = (slice(80, 260), slice(12, 195))  # the panel of the photograph
    assert np.abs(committed[first] - found[first]).mean() < 6
    assert np.abs(committed[first] - committed[first].mean()).mean() > 30
    assert (FOLDER / "astronaut.png").stat().st_size < 300_000


def test_the_picture_of_the_readme_is_the_last_row() -> None:
    whole, row = (Image.open(FOLDER / name).convert("RGB") for name in ("astronaut.png", "consistency.png"))
    assert row.width == whole.width
    assert row.tobytes() == whole.crop((0, whole.height - row.height, *whole.size)).tobytes()


def test_the_photograph_fits_the_patches() -> None:
    photo = photograph()
    assert photo.shape == (3, SIZE, SIZE)
    assert SIZE % 14 == 0
    assert photo.min() >= 0
    assert photo.max() <= 1


def test_the_command_reads_weights_of_another_size(tmp_path: Path, capsys) -> None:
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=70).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = build(tmp_path / "weights.pth")
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert main(["--weights", str(tmp_path / "weights.pth"), "--folder", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made" / "astronaut.png").exists()
    assert "weights.pth, which may have seen masks" in capsys.readouterr().out
