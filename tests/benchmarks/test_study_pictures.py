"""Pictures of the study: which photos and networks they show, and that the flip is undone in what they compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks.study import __main__ as study
from benchmarks.study.cells import Bench
from benchmarks.study.page.pictures import affinities, chosen_cells, draw_curves, first_photos, query_patch
from benchmarks.study.page.report import appendix
from benchmarks.study.photos import Photos, Places
from benchmarks.study.settings import SETS, Cell, base
from tests.support.study import SIZE, make_photos, tiny_vit

CONDITIONS = {"two": 0.0, "both": 0.5, "misreported": 0.5}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", tiny_vit)
        for name in ("voc", "msrc"):
            patch.setitem(SETS, name, replace(SETS[name], size=SIZE, epochs=1))
            make_photos(folder / "data" / SETS[name].folder, background=name == "voc")
        state = tiny_vit("", False, SIZE, 0).state_dict()
        np.savez(folder / "weights.npz", **{name: value.numpy() for name, value in state.items()})
        yield Places(folder / "data", folder / "weights.npz", folder / "cache")


@pytest.fixture(scope="module", params=["voc", "msrc"])
def bench(request: pytest.FixtureRequest, places: Places, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(places, tmp_path_factory.mktemp("results"), say=lambda _: None)
    for condition, weight in CONDITIONS.items():
        bench.run(Cell(base(request.param, condition, weight), 0))
    return bench


def test_pictures_are_drawn_and_the_page_shows_them(bench: Bench, tmp_path: Path):
    photos = next(path.name for path in bench.results.iterdir())
    folder = tmp_path / "study"
    options = ["--data", str(bench.places.data), "--weights", str(bench.places.weights)]
    options += ["--cache", str(bench.places.cache), "--results", str(bench.results)]
    assert study.main(["pictures", "--set", photos, "--output", str(folder), *options]) == 0
    curves = ["curves"] if photos == "voc" else []  # without a background there is no threshold
    expected = sorted(f"{photos}_{name}.png" for name in ["cams", "affinities", *curves])
    assert sorted(path.name for path in folder.iterdir()) == expected
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 22) or ()) > 100
    page = appendix(bench.results, photos, folder)
    assert all(f"(study/{name})" in page for name in expected)
    assert "(study/" not in appendix(bench.results, photos)


def test_pictures_show_what_dev_chose_and_photos_of_a_shuffle(bench: Bench, places: Places):
    photos = next(path.name for path in bench.results.iterdir())
    cells = chosen_cells(bench.results, photos)
    assert {name: cell.setting.weight for name, cell in cells.items()} == CONDITIONS
    assert {(cell.seed, cell.split) for cell in cells.values()} == {(0, "dev")}
    chosen = first_photos(Photos(photos, SIZE, 6, places), 3)
    assert len(set(chosen.tolist())) == 3 and chosen.max() < 4
    if photos == "msrc":
        assert not draw_curves(bench.results / "curves.png", bench.results, photos, "")


def test_rows_of_the_flip_are_shown_where_those_of_the_photo_are(places: Places):
    photos = Photos("voc", SIZE, 6, places)
    model = photos.upper(0).eval()
    tokens = torch.randn(1, 17, 24).expand(2, 2, -1, -1)
    own, undone = affinities(model, tokens, photos)
    mirrored = torch.arange(16).reshape(4, 4).flip(1).flatten()
    torch.testing.assert_close(undone, own[:, mirrored][:, :, mirrored])


def test_the_patch_is_in_the_middle_of_the_smallest_class():
    mask = np.full((40, 60), 1, np.uint8)
    mask[0:40, 15:45] = 2
    mask[10:30, 0:60] = 3  # two rows of four patches
    mask[:10] = 255
    mask[:, :5] = 255
    assert query_patch(mask, [2, 3], (4, 4)) in (13, 14)  # of the rest of class 2, in the last row
    assert query_patch(mask, [1, 3], (4, 4)) == 15
    assert query_patch(mask, [3], (4, 4)) in (5, 6, 9, 10)
