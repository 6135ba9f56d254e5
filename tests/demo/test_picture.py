"""The picture of a run: what is coloured, and how."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from acr_reg.demo.comparison import Picture
from acr_reg.demo.picture import RIGHT, WRONG, draw, panels

MASK = np.array([[1, 1, 0, 255], [2, 2, 0, 0]], np.uint8)
# Class 1 is highest in the left column, class 2 in the others.
MAPS = np.array([[[1.0, 0.1, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0]], [[0.0, 0.95, 0.7, 0.9], [0.0, 0.95, 0.7, 0.0]]])


def picture() -> Picture:
    return Picture(np.full((2, 4, 3), 100, np.uint8), MASK, [1, 2], {"without ACR": MAPS, "with ACR": MAPS})


def nearest(panel: np.ndarray) -> list[str]:
    """Of every pixel: R, right; W, wrong; or a dot, where no colour is nearer than the grey photo."""
    grey = np.full(3, 0.25 + 0.7 * 100 / 255)
    colours = np.stack([to_rgb(RIGHT), to_rgb(WRONG), grey])
    closest = np.abs(panel[:, :, None] - colours).sum(-1).argmin(-1)
    return ["".join("RW."[index] for index in row) for row in closest]


@pytest.mark.parametrize(("background", "coloured"), [(True, ["RWW.", "WRW."]), (False, ["RWW.", "WRWW"])])
def test_maps_are_coloured_by_the_truth_and_unknown_pixels_stay_grey(background: bool, coloured: list[str]) -> None:
    shown = panels(picture(), background)
    assert list(shown) == ["photo", "truth", "without ACR", "with ACR"]
    assert nearest(shown["truth"]) == ["RR..", "RR.."]
    assert nearest(shown["with ACR"]) == coloured


def test_a_higher_map_has_a_stronger_colour() -> None:
    panel = panels(picture(), True)["with ACR"]
    strong, weak = (np.abs(panel[0, column] - to_rgb(WRONG)).sum() for column in (1, 2))
    assert strong < weak


@pytest.mark.parametrize("present", [[1, 2], []])
def test_the_picture_is_written_with_a_row_for_each_image(tmp_path: Path, present: list[int]) -> None:
    shown = picture()
    maps = {name: maps[: len(present)] for name, maps in shown.maps.items()}
    one = Picture(shown.image, shown.mask, present, maps)
    sizes = []
    for count in (1, 3):
        draw(tmp_path / "demo.png", [one] * count, ["background", "cat", "dog"], True, "A title " * 30, dpi=40)
        with Image.open(tmp_path / "demo.png") as written:
            sizes.append(written.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] - sizes[0][1] > 2 * 30
