"""benchmarks/pictures/attention.py makes the committed picture of docs/guides/attention, but for the weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib  # noqa: F401  # this file is left out where the extras are not installed
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from acr_reg.demo.photos import pretrained
from benchmarks.pictures.attention import FOLDER, SIZE, build, main, photograph

SMALL = {"num_classes": 0, "depth": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model for images of another size."""
    path = tmp_path_factory.mktemp("attention") / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model(pretrained.NAME, img_size=70, **SMALL).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))


def test_the_command_reads_weights_and_shows_what_the_committed_picture_shows(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A smaller model has other heads, but the photograph stands in the same place."""
    assert main(["--weights", str(weights), "--folder", str(tmp_path)]) == 0
    assert "weights.pth, which may have seen masks" in capsys.readouterr().out
    committed, found = (
        np.asarray(Image.open(folder / "astronaut.png").convert("RGB")).astype(float) for folder in (FOLDER, tmp_path)
    )
    assert committed.shape[1] == found.shape[1] == 1040
    first = (slice(80, 260), slice(12, 195))  # the panel of the photograph
    assert np.abs(committed[first] - found[first]).mean() < 6
    assert np.abs(committed[first] - committed[first].mean()).mean() > 30
    assert (FOLDER / "astronaut.png").stat().st_size < 300_000


def test_weights_of_another_size_are_read(weights: Path) -> None:
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(build(weights).state_dict()[name], torch.load(weights)[name])


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
