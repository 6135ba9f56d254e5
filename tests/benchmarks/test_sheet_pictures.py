"""benchmarks/pictures/sheet.py makes the committed contact sheets, but for the training of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acr_reg.pictures.sheet import ERRORS
from benchmarks.pictures.sheet import FOLDER, PICTURES, main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    assert main(["--quick", "--folder", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_picture_shows_the_same_scenes(made: Path, name: str) -> None:
    committed, found = (np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for folder in (FOLDER, made))
    assert committed.shape == found.shape
    scene = (slice(60, 150), slice(20, 120))  # the photo of the first scene
    assert np.abs(committed[scene].astype(int) - found[scene]).mean() < 6
    assert committed[scene].std() > 20
    assert (FOLDER / f"{name}.png").stat().st_size < 300_000


def test_the_colours_of_errors_are_in_the_palette() -> None:
    with Image.open(FOLDER / "sheet.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or ()}
    assert {colour for _, colour in ERRORS.values()} <= colours
