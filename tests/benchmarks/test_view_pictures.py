"""benchmarks/pictures/views.py makes every picture of docs/guides/views.md, and each shows what alignment does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib  # noqa: F401  # this file is left out where the extras are not installed
import pytest
import torch
from PIL import Image

from benchmarks.marked_page import filled
from benchmarks.pictures.views import FOLDER, KINDS, MARKER, PAGE, Comparison, table, write
from tests.support.paths import ROOT

EXACT = [name for name, kind in KINDS.items() if kind.exact]
TERMS = ("affinity", "cam")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("views")
    return folder, write(folder, list(KINDS), dpi=20)


def test_a_picture_of_every_kind_is_made(made: tuple[Path, dict[str, dict[str, float]]]) -> None:
    folder, numbers = made
    assert {path.stem for path in folder.iterdir()} == set(KINDS) == set(numbers)
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.width == 280
            assert len(picture.convert("RGB").getcolors() or ()) > 50


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_brings_rows_and_class_maps_together(made, kind: str) -> None:
    numbers = made[1][kind]
    for term in TERMS:
        before, after = numbers[f"{term}_before"], numbers[f"{term}_after"]
        assert after < (1e-5 if kind in EXACT else 0.8 * before)
        assert before > 0.03


def test_most_kinds_are_exact() -> None:
    assert len(EXACT) >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_committed_numbers_are_these(made, kind: str) -> None:
    committed = json.loads((FOLDER / "views.json").read_text(encoding="utf-8"))
    assert set(committed) == set(KINDS)
    assert made[1][kind] == pytest.approx(committed[kind], abs=1e-3)


@pytest.mark.parametrize("kind", EXACT)
def test_the_aligned_row_is_drawn_as_the_images_own(kind: str) -> None:
    panels = Comparison(KINDS[kind]).panels(0)
    torch.testing.assert_close(panels["after"].picture, panels["own"].picture)
    assert (panels["before"].picture - panels["own"].picture).abs().max() > 0.3


def test_the_page_shows_every_picture_and_no_other() -> None:
    page = (ROOT / "docs" / "guides" / "views.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(views/(\w+)\.png\)", page)
    assert sorted(shown) == sorted(KINDS)
    assert {path.stem for path in FOLDER.glob("*.png")} == set(KINDS)
    for path in FOLDER.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width == 1400
        assert path.stat().st_size < 250_000


def test_the_table_of_the_page_is_current() -> None:
    committed = json.loads((FOLDER / "views.json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert set(committed) == set(KINDS)
    assert filled(page, MARKER, table(committed)) == page
