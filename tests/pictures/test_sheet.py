"""Contact sheets mark what is wrong, name what they show, and hold one page at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import colormaps
from PIL import Image, ImageDraw

from acr_reg.integrations.formats.masks import voc_palette
from acr_reg.metrics import LabelMeanIoU
from acr_reg.pictures.sheet import (
    CONFUSED,
    ERRORS,
    FALSE,
    MISSED,
    SheetImage,
    contact_sheet,
    find_errors,
    image_miou,
)

# Of two classes and background: every pair of predicted (rows) and true (columns) ids 0, 1, 2, 255.
PREDICTED, TRUE = np.meshgrid([0, 1, 2, 255], [0, 1, 2, 255], indexing="ij")
WRONG = [
    [0, MISSED, MISSED, 0],
    [FALSE, 0, CONFUSED, 0],
    [FALSE, CONFUSED, 0, 0],
    [MISSED, MISSED, MISSED, 0],
]
SCALE = 16  # pixels of a panel of 64 for one of these


def toy(name: str = "toy", **shown: object) -> SheetImage:
    return SheetImage(name, Image.new("RGB", (4, 4), "white"), **shown)  # type: ignore[arg-type]


def page_of(*images: SheetImage, panel: int = 64, **options: object) -> npt.NDArray[np.uint8]:
    [page] = contact_sheet(images, panel=panel, **options)  # type: ignore[arg-type]
    return np.asarray(page)


def on_white(colour: tuple[int, int, int], opacity: int, white: int = 255) -> npt.NDArray[np.integer]:
    return np.rint(white + (np.array(colour, int) - white) * opacity / 255).astype(int)


def places(page: npt.NDArray[np.uint8], colour: npt.NDArray[np.integer]) -> set[tuple[int, int]]:
    rows, columns = np.nonzero((np.abs(page.astype(int) - colour) <= 1).all(-1))
    return set(zip(rows.tolist(), columns.tolist(), strict=True))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts that are drawn."""
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, *args: object, **options: object) -> None:
        texts.append(text)
        draw(self, xy, text, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


# ---------------------------------------------------------------- what is wrong


def test_every_pair_of_a_prediction_and_a_truth_is_right_false_missed_or_confused() -> None:
    np.testing.assert_array_equal(find_errors(PREDICTED, TRUE), WRONG)


def test_without_background_a_wrong_class_is_just_that() -> None:
    expected = [[0, CONFUSED, CONFUSED, 0], [CONFUSED, 0, CONFUSED, 0], [CONFUSED, CONFUSED, 0, 0], [MISSED] * 3 + [0]]
    np.testing.assert_array_equal(find_errors(PREDICTED, TRUE, background=False), expected)


@pytest.mark.parametrize("ignored", [254, 300, 0])
def test_another_id_is_ignored_if_asked(ignored: int, written: list[str]) -> None:
    def moved(ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        return np.where(ids == 255, ignored, ids + 1)

    expected = find_errors(PREDICTED, TRUE, background=False)
    np.testing.assert_array_equal(find_errors(moved(PREDICTED), moved(TRUE), False, ignored), expected)
    page = page_of(toy(labels=moved(PREDICTED), mask=moved(TRUE)), background=False, ignore_index=ignored)
    assert "ignored" in written
    assert f"id {ignored}" not in written
    usual = page_of(toy(labels=np.where(PREDICTED == 255, 255, PREDICTED + 1)), background=False)
    assert len(places(page, on_white((90, 90, 90), 110))) >= len(places(usual, on_white((90, 90, 90), 110)))


def test_without_an_ignored_id_255_is_a_class_like_any_other(written: list[str]) -> None:
    assert find_errors(PREDICTED, TRUE, ignore_index=None)[0, 3] == MISSED
    assert find_errors(PREDICTED, TRUE, ignore_index=None)[3, 1] == CONFUSED
    page_of(toy(labels=PREDICTED, mask=TRUE), ignore_index=None)
    assert "id 255" in written
    assert "ignored" not in written


def test_wrong_pixels_are_marked_at_their_places_and_no_others() -> None:
    page = page_of(toy(labels=PREDICTED, mask=TRUE))
    marked = {kind: places(page, on_white(colour, 225, white=180)) for kind, (_, colour) in ERRORS.items()}
    top = min(row for found in marked.values() for row, _ in found)
    left = min(column for found in marked.values() for _, column in found)
    for kind in ERRORS:
        expected = {
            (top + i, left + j) for i in range(64) for j in range(64) if np.array(WRONG)[i // SCALE, j // SCALE] == kind
        }
        assert marked[kind] == expected


def test_a_thin_error_of_a_large_image_still_colours_the_panel() -> None:
    mask = np.zeros((900, 900), int)
    labels = mask.copy()
    labels[450] = 1
    image = SheetImage("thin", Image.new("RGB", (900, 900), "white"), labels=labels, mask=mask)
    page = page_of(image).astype(int)
    reddish = page[..., 0] - page[..., 2] > 10
    assert (reddish.sum(axis=1) >= 64).any()


def test_the_colours_of_errors_differ_for_people_with_colour_blindness() -> None:
    """Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB; distances in CIELAB, where
    10 is seen at a glance. Greys are those of the photo below."""
    matrices = {
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
        "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    colours = (
        np.array([*(colour for _, colour in ERRORS.values()), *((grey, grey, grey) for grey in (80, 110, 150, 180))])
        / 255
    )
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for name, matrix in {"none": np.eye(3), **matrices}.items():
        xyz = (linear @ np.array(matrix).T).clip(0, 1) @ to_xyz.T / to_xyz.sum(1)
        f = np.cbrt(xyz)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(len(lab))
        assert distances[:3].min() > 20, f"{name}: {distances.round()}"


@pytest.mark.parametrize("ignore_index", [255, 7, 0, None])
@pytest.mark.parametrize("seed", range(3))
def test_the_miou_is_the_one_of_evaluate(seed: int, ignore_index: int | None) -> None:
    rng = np.random.default_rng(seed)
    labels, mask = (rng.choice([0, 1, 2, 3, 7, 255], (6, 9), p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]) for _ in range(2))
    metric = LabelMeanIoU(256, ignore_index)
    metric.update(labels, mask)
    assert image_miou(labels, mask, ignore_index) == pytest.approx(metric.compute().miou, abs=1e-12)


def test_the_miou_is_none_where_all_is_ignored() -> None:
    assert np.isnan(image_miou(TRUE, np.full((4, 4), 255)))


# ---------------------------------------------------------------- what is drawn


def test_classes_have_the_colours_of_voc_and_background_is_clear() -> None:
    ids = np.zeros((4, 4), int)
    ids[1, 2:] = 15
    image = SheetImage("dark", Image.new("RGB", (4, 4), "black"), labels=ids)
    grey = round(0.3 * 255)  # of a black photo below

    def seen(page: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
        return len(places(page, on_white(colour, 170, white=grey)))

    page = page_of(image)
    assert 0.6 * 2 * SCALE**2 < seen(page, tuple(voc_palette()[15])) <= 2 * SCALE**2  # the class's name hides some
    assert 0.9 * 14 * SCALE**2 < seen(page, (grey, grey, grey)) <= 14 * SCALE**2
    without = page_of(image, background=False)
    assert 0.7 * 14 * SCALE**2 < seen(without, (0, 0, 0)) <= 14 * SCALE**2


def test_a_heat_map_runs_from_0_to_1_and_without_background_over_the_values_of_the_image() -> None:
    low, high = (np.rint(255 * np.array(colormaps["plasma"](end)[:3])) for end in (0.0, 1.0))
    full, faint = on_white(tuple(high), round(0.8 * 255)), on_white(tuple(low), round(0.15 * 255))
    half = np.zeros((4, 4), np.float32)
    half[:2] = 0.5
    assert not places(page_of(toy(cams={1: half})), full) - places(page_of(toy()), full)
    assert len(places(page_of(toy(cams={1: half * 2})), full)) >= 8 * SCALE**2
    page = page_of(toy(cams={0: half - 3, 1: half - 2.5}), background=False)
    assert len(places(page, full)) >= 8 * SCALE**2
    assert len(places(page, faint)) >= 8 * SCALE**2


def test_a_constant_map_is_drawn() -> None:
    page_of(toy(cams={3: np.full((4, 4), 2.0)}), background=False)


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "NaN"), (np.inf, "infinite"), (1.5, r"0 to 1\.5"), (-0.1, r"-0\.1 to 0")]
)
def test_maps_that_are_not_in_0_to_1_are_refused_by_name(value: float, said: str) -> None:
    cam = np.zeros((4, 4))
    cam[1, 1] = value
    with pytest.raises(ValueError, match=f"toy: .*{said}"):
        page_of(toy(cams={1: cam}))


def test_names_of_classes_errors_and_images_are_written(written: list[str]) -> None:
    names = ["background", "cow", "horse"]
    page_of(
        toy("2007_000032", cams={2: TRUE / 255}, labels=PREDICTED, mask=TRUE),
        panel=160,
        names=names,
        notes=["24 of 99"],
    )
    captions = {
        "2007_000032",
        "photo",
        "labels",
        "mask",
        f"mIoU {image_miou(PREDICTED, TRUE):.3f}",
        "24 of 99",
    }
    legend = {"cow", "horse", "ignored", "class map: 0 to 1", *(name for name, _ in ERRORS.values())}
    assert captions | legend <= set(written)
    assert "background" not in written
    assert written.count("horse") >= 3  # of its heat map, in its region, in the legend


def test_a_class_without_a_name_is_shown_by_its_id(written: list[str]) -> None:
    page_of(toy(labels=PREDICTED), names=["background", "cow"])
    assert "id 2" in written
    assert "id 0" not in written


def test_the_legend_names_what_the_page_shows_and_no_more(written: list[str]) -> None:
    page_of(toy(labels=np.ones((4, 4), int)))
    assert "ignored" not in written
    assert not {name for name, _ in ERRORS.values()} & set(written)
    written.clear()
    page_of(toy(labels=np.ones((4, 4), int), mask=TRUE), background=False)
    assert ERRORS[CONFUSED][0] in written
    assert ERRORS[FALSE][0] not in written


@pytest.mark.parametrize("name", ["a b&<c>'\"", "日本語 🐄", "é" * 400, "\u202eright to left", "line\nbreak\x00", ""])
def test_odd_names_of_images_and_classes_are_drawn(name: str, written: list[str]) -> None:
    page = page_of(toy(name, labels=PREDICTED), names=["", name, name])
    assert page.shape[1] < 700
    assert not any("\n" in text or "\x00" in text for text in written)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (37, 53), (200, 64)])
def test_images_of_any_shape_are_drawn(size: tuple[int, int]) -> None:
    height, width = size
    ids = np.arange(height * width).reshape(size) % 300
    image = SheetImage("i", Image.new("RGB", (width, height)), {1: ids / 300}, labels=ids, mask=ids[::-1, ::-1])
    page_of(image)


@pytest.mark.parametrize("number", [256, 509, 510, 765])
@pytest.mark.parametrize("background", [True, False])
def test_an_id_above_255_is_drawn_neither_as_ignored_nor_as_background(
    number: int, background: bool, written: list[str]
) -> None:
    page = page_of(toy(labels=np.full((4, 4), number)), background=background)
    assert f"id {number}" in written
    assert "ignored" not in written
    assert not places(page, on_white(tuple(voc_palette()[255]), 170))
    colours = voc_palette()[1:255]
    assert any(len(places(page, on_white(tuple(colour), 170))) > 0.5 * (4 * SCALE) ** 2 for colour in colours)


# ---------------------------------------------------------------- pages


def test_only_the_images_of_one_page_are_read_at_a_time() -> None:
    read = []

    def images() -> Iterator[SheetImage]:
        for number in range(5):
            read.append(number)
            yield toy(str(number))

    pages = contact_sheet(images(), per_page=2)
    assert read == []
    for count in (2, 4, 5):
        next(pages)
        assert len(read) == count
    assert next(pages, None) is None


def test_no_image_makes_no_page() -> None:
    assert list(contact_sheet([])) == []


def test_panels_that_fill_more_than_a_line_go_on_in_the_next(written: list[str]) -> None:
    image = toy("many", cams={number: np.zeros((4, 4)) for number in range(1, 8)})
    narrow, wide = (page_of(image, columns=columns) for columns in (3, 8))
    assert written.count("many (continued)") == 2
    assert [text for text in written if text.startswith("id ")] == [f"id {number}" for number in range(1, 8)] * 2
    assert narrow.shape[0] > 2 * wide.shape[0]


def test_images_stand_side_by_side_as_long_as_there_is_room() -> None:
    sheets = [page_of(*[toy(str(i), labels=TRUE) for i in range(count)], columns=8) for count in (4, 5)]
    assert sheets[0].shape[1] == sheets[1].shape[1]
    assert sheets[0].shape[0] < sheets[1].shape[0]


@pytest.mark.parametrize(("option", "value"), [("columns", 0), ("per_page", 0), ("panel", 31)])
def test_a_sheet_without_room_is_refused_at_once(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        contact_sheet([], **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["labels", "mask", "cams"])
def test_arrays_of_another_size_are_refused_by_name(what: str) -> None:
    other = np.zeros((4, 5), int)
    with pytest.raises(ValueError, match=rf"toy: {what}.*\(4, 5\).*4x4"):
        toy(**{what: {3: other} if what == "cams" else other})
