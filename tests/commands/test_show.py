"""The command `python -m acr_reg show`, by its main function in this process (importing torch takes seconds)."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from acr_reg.__main__ import main
from acr_reg.commands import models, show
from acr_reg.commands.show import OF_MODEL, OF_SHEET, add_arguments, input_size
from acr_reg.integrations.formats import save_cams
from acr_reg.integrations.formats.masks import save_mask
from acr_reg.metrics import CamMeanIoU, LabelMeanIoU

NAMES = ["2007_000032", "a.b (1)", "日本"]
SIZES = [(20, 30), (24, 16), (9, 9)]


class Result(NamedTuple):
    code: object
    out: str
    err: str


class Run:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        try:
            code: object = main(["show", *map(str, arguments)])
        except SystemExit as exit_by_argparse:
            code = exit_by_argparse.code
        return Result(code, *self.capsys.readouterr())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts of a sheet."""
    texts: list[str] = []

    def text(self: ImageDraw.ImageDraw, xy: object, text: str, *args: object, **options: object) -> None:
        texts.append(text)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


class Data:
    """Photos of several kinds, with class maps, label maps, masks and a list, of classes 1 and 15 of VOC."""

    def __init__(self, folder: Path) -> None:
        self.photos, self.cams, self.labels, self.masks = (folder / n for n in ("photos", "cams", "labels", "masks"))
        for each in (self.photos, self.cams, self.labels, self.masks):
            each.mkdir()
        self.list = folder / "list.txt"
        self.list.write_text("\n".join(NAMES).replace(" ", "_"), encoding="utf-8")
        self.ids = [name.replace(" ", "_") for name in NAMES]
        self.folder, self.sheet = folder, folder / "sheet.png"
        rng = np.random.default_rng(0)
        self.metric = CamMeanIoU(21)
        self.predicted: list[npt.NDArray[np.integer]] = []
        self.truth: list[npt.NDArray[np.integer]] = []
        for i, (name, size) in enumerate(zip(self.ids, SIZES, strict=True)):
            pixels = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
            mask = rng.choice([0, 1, 15, 255], size)
            maps = {k: ((mask == k + 1) * 0.4 + rng.random(size) * 0.6).astype(np.float32) for k in (0, 14)}
            if i == 0:  # turned by EXIF
                exif = Image.Exif()
                exif[0x0112] = 6
                pixels.transpose(Image.Transpose.ROTATE_90).save(self.photos / f"{name}.JPG", exif=exif)
            elif i == 1:
                pixels.convert("L").save(self.photos / f"{name}.Png")
            else:
                pixels.convert("CMYK").save(self.photos / f"{name}.tif")
            save_cams(self.cams / f"{name}.{'npz' if i else 'npy'}", maps)
            labels = np.where(rng.random(size) < 0.7, mask, 1)
            save_mask(self.labels / f"{name}.png", labels)
            save_mask(self.masks / f"{name}.png", mask)
            self.metric.update(np.stack([maps[0], maps[14]]), mask, [1, 15])
            self.predicted.append(labels)
            self.truth.append(mask)

    def options(self, kind: str = "cams") -> list[object]:
        return [f"--{kind}", getattr(self, kind), "--photos", self.photos, "--list", self.list, "--output", self.sheet]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def assert_user_error(result: Result, *patterns: str) -> None:
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    for pattern in patterns:
        assert re.search(pattern, result.err, re.DOTALL), f"no {pattern!r} in {result.err!r}"


# ---------------------------------------------------------------- contact sheets


def test_class_maps_are_drawn_as_heat_maps(data: Data, run: Run, written: list[str]) -> None:
    result = run(*data.options(), "--names", "voc")
    assert (result.code, result.out, result.err) == (0, f"{data.sheet}\n", "")
    assert written.count("aeroplane") == written.count("person") == 3
    assert set(data.ids) <= set(written)
    with Image.open(data.sheet) as page:
        assert page.format == "PNG"
        assert page.width >= 6 * 160


def test_at_a_threshold_the_colours_of_the_classes_are_drawn(data: Data, run: Run, written: list[str]) -> None:
    result = run(*data.options(), "--threshold", 0.5)
    assert (result.code, result.out) == (0, f"{data.sheet}\nbackground threshold 0.5\n")
    assert written.count("labels") == 3
    assert "background threshold 0.5" in written
    assert not [text for text in written if text.startswith(("class map", "mIoU"))]


def test_with_masks_the_best_threshold_is_the_one_of_evaluate(data: Data, run: Run, written: list[str]) -> None:
    result = run(*data.options(), "--masks", data.masks)
    scores = data.metric.compute()
    assert scores.best_threshold is not None and scores.best_threshold > 0
    how = (
        f"background threshold {scores.best_threshold:.4g}, the best of these images (mIoU {scores.best_miou:.4f} over"
    )
    assert result.code == 0 and how in result.out
    assert any(text.startswith(how) for text in written)
    assert sum(text.startswith("mIoU 0.") for text in written) == 3


def test_masks_without_a_known_pixel_need_a_threshold(data: Data, run: Run, written: list[str]) -> None:
    for name, truth in zip(data.ids, data.truth, strict=True):
        save_mask(data.masks / f"{name}.png", np.full_like(truth, 255))
    assert_user_error(run(*data.options(), "--masks", data.masks), "no known pixel.*--threshold")
    assert run(*data.options(), "--masks", data.masks, "--threshold", 0.5).code == 0
    assert "mIoU nan" in written


def test_label_maps_are_drawn_with_the_miou_of_each_image(data: Data, run: Run, written: list[str]) -> None:
    result = run(*data.options("labels"), "--masks", data.masks)
    assert (result.code, result.out) == (0, f"{data.sheet}\n")
    for labels, mask in zip(data.predicted, data.truth, strict=True):
        metric = LabelMeanIoU(21)
        metric.update(labels, mask)
        assert f"mIoU {metric.compute().miou:.3f}" in written
    assert "ignored" in written


def test_without_background_the_highest_map_wins(data: Data, run: Run, written: list[str]) -> None:
    assert run(*data.options(), "--no-background", "--names", "voc").code == 0
    assert {"labels", "aeroplane", "person"} <= set(written)
    written.clear()
    assert run(*data.options(), "--no-background", "--draw", "heat", "--names", "voc").code == 0
    assert "labels" not in written
    assert "class map: lowest to highest value of the image" in written


@pytest.mark.parametrize("ignored", [254, 20, "none"])
def test_another_id_is_ignored_if_asked(data: Data, run: Run, written: list[str], ignored: int | str) -> None:
    for folder, all_ids in ((data.labels, data.predicted), (data.masks, data.truth)):
        for name, ids in zip(data.ids, all_ids, strict=True):
            save_mask(folder / f"{name}.png", np.where(ids == 255, 16 if ignored == "none" else ignored, ids))
    options = ["--masks", data.masks, "--ignore-index", ignored]
    assert run(*data.options("labels"), *options).code == 0
    assert ("ignored" in written) == (ignored != "none")
    assert ("id 16" in written) == (ignored == "none")
    for labels, mask in zip(data.predicted, data.truth, strict=True):
        metric = LabelMeanIoU(21)
        if ignored == "none":
            labels, mask = (np.where(ids == 255, 16, ids) for ids in (labels, mask))
        metric.update(labels, mask)
        assert f"mIoU {metric.compute().miou:.3f}" in written
    found = re.search(r"mIoU ([0-9.]+) over all", run(*data.options(), *options).out)
    assert found is not None
    if ignored != "none":
        assert float(found[1]) == pytest.approx(data.metric.compute().best_miou, abs=1e-4)


@pytest.mark.parametrize("value", ["x", "1.5", ""])
def test_what_is_no_ignored_id_is_named(data: Data, run: Run, value: str) -> None:
    assert_user_error(run(*data.options(), "--ignore-index", value), f"--ignore-index.*'{value}' is no id")


def test_masks_with_another_ending_are_found_as_evaluate_finds_them(data: Data, run: Run, written: list[str]) -> None:
    for name, mask in zip(data.ids, data.truth, strict=True):
        (data.masks / f"{name}.png").unlink()
        Image.fromarray(mask.astype(np.uint8)).save(data.masks / f"{name}.TIF")
    assert run(*data.options("labels"), "--masks", data.masks).code == 0
    assert written.count("mask") == 3


def test_heat_maps_can_stand_beside_masks(data: Data, run: Run, written: list[str]) -> None:
    assert run(*data.options(), "--masks", data.masks, "--draw", "heat").code == 0
    assert written.count("mask") == 3
    assert "labels" not in written


def test_an_image_without_a_class_is_all_background(data: Data, run: Run, written: list[str]) -> None:
    save_cams(data.cams / f"{data.ids[1]}.npz", {})
    assert run(*data.options(), "--threshold", 0.3, "--masks", data.masks).code == 0
    assert run(*data.options()).code == 0


def test_the_first_images_are_shown_and_the_rest_is_counted(data: Data, run: Run, written: list[str]) -> None:
    (data.cams / f"{data.ids[2]}.npz").unlink()  # of an image that is not shown
    result = run(*data.options(), "--first", 2)
    left_out = "1 of 3 images are left out. Show more by --first N, or --all."
    assert (result.code, result.out) == (0, f"{data.sheet}\n{left_out}\n")
    assert any("the first 2 of 3 images" in text for text in written)
    assert data.ids[2] not in written


@pytest.mark.parametrize("amount", [["--all"], ["--first", 3], ["--first", 99]])
def test_many_images_make_pages(data: Data, run: Run, monkeypatch: pytest.MonkeyPatch, amount: list[object]) -> None:
    monkeypatch.setattr(show, "FIRST", 2)
    result = run(*data.options(), *amount)
    pages = [data.folder / "sheet_1.png", data.folder / "sheet_2.png"]
    assert (result.code, result.out) == (0, "".join(f"{page}\n" for page in pages))
    assert sorted(data.folder.glob("*.png")) == pages


def test_a_bad_file_on_a_later_page_leaves_nothing_behind_and_an_old_sheet_as_it_was(
    data: Data, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "FIRST", 1)
    (data.folder / "sheet_1.png").write_text("old")
    (data.photos / f"{data.ids[2]}.tif").write_bytes((data.photos / f"{data.ids[2]}.tif").read_bytes()[:150])
    before = sorted(data.folder.iterdir())
    assert_user_error(run(*data.options(), "--all"), data.ids[2])
    assert sorted(data.folder.iterdir()) == before
    assert (data.folder / "sheet_1.png").read_text() == "old"


def test_all_missing_files_are_named_together(data: Data, run: Run) -> None:
    for name in data.ids[:2]:
        next(data.photos.glob(f"{name[:3]}*")).unlink()
    assert_user_error(run(*data.options()), rf"--photos .*2 of 3 files.*{data.ids[0]}\.jpg")
    (data.cams / f"{data.ids[2]}.npz").unlink()
    (data.masks / f"{data.ids[0]}.png").unlink()
    data.list.write_text(data.ids[2], encoding="utf-8")
    assert_user_error(run(*data.options()), rf"--cams .*1 of 1 files.*{data.ids[2]}\.npy")
    data.list.write_text(f"{data.ids[2]}\nother", encoding="utf-8")
    assert_user_error(run(*data.options("labels")), r"--photos .*1 of 2 files.*other\.jpg")


def test_label_maps_given_as_class_maps_and_the_reverse_are_named(data: Data, run: Run) -> None:
    data.cams, data.labels = data.labels, data.cams
    assert_user_error(run(*data.options()), "--cams .* holds label maps.*--labels")
    assert_user_error(run(*data.options("labels")), "--labels .* holds class maps.*--cams")


def test_missing_masks_and_label_maps_are_named(data: Data, run: Run) -> None:
    (data.masks / f"{data.ids[0]}.png").unlink()
    (data.labels / f"{data.ids[1]}.png").unlink()
    assert_user_error(run(*data.options(), "--masks", data.masks), rf"--masks .*1 of 3 files.*{data.ids[0]}\.png")
    assert_user_error(run(*data.options("labels")), r"--labels .*1 of 3 files")


def test_the_kind_of_folder_is_told_where_it_was_taken_for_the_other(data: Data, run: Run) -> None:
    data.cams, data.labels = data.labels, data.cams
    assert_user_error(run(*data.options()), r"--cams .*labels holds label maps \(\.png\).*as --labels")
    assert_user_error(run(*data.options("labels")), r"--labels .*cams holds class maps.*as --cams")


def test_masks_are_found_by_their_own_names_in_the_list(data: Data, run: Run) -> None:
    for name in data.ids:
        (data.masks / f"{name}.png").rename(data.masks / f"{name}_truth.png")
    data.list.write_text("\n".join(f"photos/{name}.jpg masks/{name}_truth.png" for name in data.ids), encoding="utf-8")
    assert run(*data.options("labels"), "--masks", data.masks).code == 0


def test_two_photos_of_one_image_are_named(data: Data, run: Run) -> None:
    Image.new("RGB", (30, 20)).save(data.photos / f"{data.ids[0]}.png")
    assert_user_error(run(*data.options()), rf"--photos .*{data.ids[0]}\.JPG, {data.ids[0]}\.png.*one")


@pytest.mark.parametrize("option", ["photos", "cams", "labels", "masks"])
def test_what_is_no_folder_is_named(data: Data, run: Run, option: str) -> None:
    options = [*data.options("labels" if option == "labels" else "cams"), "--masks", data.masks]
    options[options.index(f"--{option}") + 1] = data.folder / "none"
    assert_user_error(run(*options), rf"--{option} .*none is not a folder")


def test_other_sizes_are_errors_by_name_and_resize_draws_them(data: Data, run: Run, written: list[str]) -> None:
    halves = np.repeat([[1, 15]], 40, axis=0)  # ids between them would be wrong
    save_cams(data.cams / f"{data.ids[0]}.npy", {14: np.ones((5, 7))})
    assert_user_error(run(*data.options()), rf"{data.ids[0]}\.npy is 5x7.*JPG is 20x30.*--resize")
    save_mask(data.labels / f"{data.ids[0]}.png", halves[:10].repeat(15, axis=1))
    assert_user_error(run(*data.options("labels")), rf"{data.ids[0]}\.png is 10x30.*JPG is 20x30.*--resize")
    save_mask(data.masks / f"{data.ids[0]}.png", halves.repeat(30, axis=1))
    masks = ["--masks", data.masks]
    assert_user_error(run(*data.options(), *masks, "--draw", "heat"), r"JPG is 20x30.*png is 40x60.*--resize")
    assert not data.sheet.exists()
    for options in (data.options(), [*data.options("labels"), *masks], [*data.options(), *masks]):
        assert run(*options, "--resize").code == 0
    assert "mIoU 1.000" in written  # the label map, enlarged to its mask


def test_names_come_from_the_file_with_the_labels(data: Data, run: Run, written: list[str]) -> None:
    names = data.folder / "image_labels.json"
    names.write_text(json.dumps({"classes": ["background", "boat", *"x" * 13, "cow"], "labels": {}}))
    assert run(*data.options(), "--names", names).code == 0
    assert {"boat", "cow"} <= set(written)
    names.write_text(json.dumps(["boat"]))
    assert_user_error(run(*data.options(), "--names", names), r"--names .*image_labels\.json holds no list")


def test_a_file_of_too_few_names_is_told_which_ids_it_leaves_out(data: Data, run: Run, written: list[str]) -> None:
    names = data.folder / "names.txt"
    names.write_text("background\nboat\n")
    for kind in ("cams", "labels"):
        result = run(*data.options(kind), "--names", names)
        assert result.code == 0
        assert re.search(r"names\.txt has names of ids 0 to 1, not of 15\.\n$", result.err)
        assert run(*data.options(kind), "--names", "voc").err == run(*data.options(kind)).err == ""
    assert "id 15" in written and "boat" in written


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--threshold", "1.5"], r"--threshold is 1\.5.*\[0, 1\]"),
        (["--threshold", "nan"], r"--threshold is nan.*\[0, 1\]"),
        (["--threshold", "0.5", "--no-background"], "--threshold .*--no-background"),
        (["--threshold", "0.5", "--draw", "heat"], "--threshold .*--draw heat"),
        (["--draw", "classes"], "--threshold.*--masks"),
        (["--first", "0"], "--first is 0"),
        (["--first", "2", "--all"], "--first 2 .*--all"),
        (["--columns", "0"], "--columns is 0"),
        (["--panel", "8"], "--panel is 8.*32"),
        (["--panel", "99999999"], "--panel is 99999999.*4096"),
        (["--names", "none.txt"], r"--names none\.txt cannot be read"),
        (["--output", "sheet.jpg"], r"--output sheet\.jpg .*\.png"),
        (["--output", "none/sheet.png"], "--output .*folder none does not exist"),
        (["--format", "irn"], r"format psa, not irn"),
        (["--labels", "labels"], "--cams or --labels.*MODEL and PHOTO"),
        (["--weights", "w.pth"], "--weights does not go with --cams.*MODEL and PHOTO"),
        (["timm:vit_tiny_patch16_224"], "MODEL does not go with --cams"),
    ],
)
def test_options_that_cannot_be_are_named(data: Data, run: Run, changed: list[str], said: str) -> None:
    assert_user_error(run(*data.options(), *changed), said)
    assert not data.sheet.exists()


@pytest.mark.parametrize("option", [["--threshold", "0"], ["--draw", "heat"], ["--format", "psa"]])
def test_what_is_for_class_maps_does_not_go_with_label_maps(data: Data, run: Run, option: list[str]) -> None:
    assert_user_error(run(*data.options("labels"), *option), f"{option[0]} .*--labels")


@pytest.mark.parametrize("option", ["photos", "list"])
def test_what_a_sheet_needs_is_named(data: Data, run: Run, option: str) -> None:
    options = data.options()
    at = options.index(f"--{option}")
    assert_user_error(run(*options[:at], *options[at + 2 :]), f"needs --{option}")


@pytest.mark.parametrize("arguments", [[], ["--photos", "x"], ["timm:vit_tiny_patch16_224"], ["--view", "hflip"]])
def test_without_one_of_the_two_uses_both_are_said(run: Run, arguments: list[str]) -> None:
    assert_user_error(run(*arguments), "--cams or --labels", "MODEL and PHOTO")


def test_bad_lists_and_files_are_named(data: Data, run: Run) -> None:
    (data.masks / f"{data.ids[1]}.png").write_text("no image")
    assert_user_error(run(*data.options("labels"), "--masks", data.masks), rf"masks.*{re.escape(data.ids[1])}\.png")
    Image.new("RGB", (16, 24), (1, 2, 3)).save(data.masks / f"{data.ids[1]}.png")
    assert_user_error(run(*data.options("labels"), "--masks", data.masks), r"colours.*VOC")
    np.savez(data.cams / f"{data.ids[1]}.npz", **{"0": np.full((24, 16), 2.0)})
    assert_user_error(run(*data.options()), rf"{re.escape(data.ids[1])}: .*2 to 2.*\[0, 1\]")
    assert_user_error(run(*data.options(), "--threshold", 0.5), rf"{re.escape(data.ids[1])}.*2 to 2.*\[0, 1\]")
    save_cams(data.cams / f"{data.ids[1]}.npz", {})
    assert_user_error(run(*data.options(), "--no-background"), rf"{re.escape(data.ids[1])}.*no map")
    data.list.write_text("a b c")
    assert_user_error(run(*data.options()), "--list .*line 1")
    data.list.write_text("")
    assert_user_error(run(*data.options()), "--list .*empty")


def test_each_option_belongs_to_one_use_and_has_a_default_that_can_be_told_from_a_value() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = vars(parser.parse_args([]))
    assert sorted([*OF_SHEET, *OF_MODEL, "output"]) == sorted(args)
    assert all(value is None or value is False or value == [] for value in args.values())


# ---------------------------------------------------------------- attention

TINY = ["timm:vit_tiny_patch16_224", "--set", "img_size=48", "--set", "depth=2"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The arguments of show_attention, which is called all the same."""
    found: dict[str, object] = {}
    show_attention = show.show_attention

    def see(model: nn.Module, image: Tensor, pixels: Tensor, view: object, **options: object) -> object:
        found.update(options, model=model, image=image, pixels=pixels, view=view)
        return show_attention(model, image, pixels, view, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(show, "show_attention", see)
    return found


def test_the_attention_of_a_model_is_drawn(run: Run, photo: Path, tmp_path: Path, given: dict[str, object]) -> None:
    output = tmp_path / "out.png"
    result = run(*TINY[:1], photo, *TINY[1:], "--output", output, "--view", "rot90", "--layer", 0, "--patch", 2, 1)
    assert (result.code, result.out) == (0, f"{output}\n")
    assert re.search(r"timm:vit_tiny\w+ has random weights.*--weights", result.err)
    with Image.open(output) as picture:
        assert picture.width > 600
    assert (str(given["view"]), given["layer"], given["patch"]) == ("Rotate90(1)", 0, (2, 1))
    image, pixels = given["image"], given["pixels"]
    assert isinstance(image, Tensor) and isinstance(pixels, Tensor)
    assert image.shape == (1, 3, 48, 48)
    torch.testing.assert_close(image[0], pixels * 2 - 1)  # as timm knows of this model: mean and std 0.5
    cut = Image.open(photo).crop((15, 0, 75, 60)).resize((48, 48), Image.Resampling.BICUBIC)
    assert np.abs(pixels.movedim(0, -1).numpy() * 255 - np.asarray(cut)).max() <= 12  # the middle of the photo


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        (["--no-normalization"], [0, 0, 0], [1, 1, 1]),
        (["--mean", 0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]),
        (["--mean", 0, 0, 0, "--std", 0.1, 0.2, 0.4], [0, 0, 0], [0.1, 0.2, 0.4]),
    ],
)
def test_the_photo_is_normalised_as_asked(
    run: Run,
    photo: Path,
    tmp_path: Path,
    given: dict[str, Tensor],
    options: list[object],
    mean: list[float],
    std: list[float],
) -> None:
    assert run(*TINY[:1], photo, *TINY[1:], *options, "--output", tmp_path / "out.png").code == 0
    expected = (given["pixels"] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(given["image"][0], expected)


OWN = """
import torch
class Vit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 32, 8, 8)
        self.block = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    def tokens(self, images):
        return self.block(self.patch(images).flatten(2).mT)
    def forward(self, images):
        raise RuntimeError("not here")
"""


def test_a_model_of_the_users_own_is_normalised_as_for_imagenet_and_called_by_its_method(
    run: Run, photo: Path, tmp_path: Path, given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_for_show.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    assert_user_error(run("own_for_show:Vit", "photo.jpg"), r"Vit .*\(3, 224, 224\).*not here")
    assert not (tmp_path / "attention.png").exists()
    result = run("own_for_show:Vit", "photo.jpg", "--method", "tokens", "--size", 32, 48)
    assert (result.code, result.out, result.err) == (0, "attention.png\n", "")
    mean, std = (torch.tensor(show.IMAGENET[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(given["image"][0], (given["pixels"] - mean) / std)
    assert given["image"].shape == (1, 3, 32, 48)


def test_the_size_is_the_one_that_the_model_was_built_for() -> None:
    built = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=1)
    assert tuple(input_size(built)) == (32, 64)
    assert tuple(input_size(timm.create_model("pvt_v2_b0"))) == (224, 224)
    assert tuple(input_size(nn.Linear(1, 1))) == (224, 224)


def test_weights_are_loaded(run: Run, photo: Path, tmp_path: Path, given: dict[str, nn.Module]) -> None:
    """tests/commands/test_models.py has the forms of checkpoints."""
    state = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2).state_dict()
    torch.save({"model": state}, tmp_path / "w.pth")
    options = ["--weights", tmp_path / "w.pth", "--output", tmp_path / "out.png"]
    result = run(*TINY[:1], photo, *TINY[1:], *options)
    assert (result.code, result.err) == (0, "")
    torch.testing.assert_close(given["model"].state_dict()["head.weight"], state["head.weight"])
    torch.save({}, tmp_path / "w.pth")
    assert_user_error(run(*TINY[:1], photo, *TINY[1:], *options), "--weights .*does not fit VisionTransformer")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "3", "4", "5"], "--size 3 4 5"),
        (["--size", "0"], "--size 0"),
        (["--size", "99999"], "--size 99999 .*1 to 4096"),
        (["--view", "half"], "view of 24 x 24 px.*--set dynamic_img_size=True"),
        (["--class-token", "3"], r"--class-token 3 does not exist"),
        (["--modules", "zz"], "--modules by names"),
        (["--prefix-tokens", "9"], "--prefix-tokens 9 was given"),
        (["--no-normalization", "--std", "1", "1", "1"], "--no-normalization .*--mean or --std"),
        (["--std", "0", "1", "1"], "--std .*0"),
        (["--layer", "7"], "layer"),
        (["--patch", "9", "9"], "patch"),
        (["--method", "nothing"], "no method nothing"),
        (["--size", "40"], r"VisionTransformer.*\(3, 40, 40\)"),
        (["--list", "x"], "MODEL does not go with --list"),
    ],
)
def test_options_of_the_attention_that_cannot_be_are_named(
    run: Run, photo: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    output = tmp_path / "out.png"
    result = run(*TINY[:1], photo, *TINY[1:], *options, "--output", output)
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert re.search(said, result.err, re.DOTALL), result.err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_photos_and_models_that_cannot_be_read_are_named(run: Run, photo: Path, tmp_path: Path) -> None:
    assert_user_error(run(TINY[0], tmp_path / "none.jpg"), r"photo .*none\.jpg")
    photo.write_text("no image")
    assert_user_error(run(TINY[0], photo), r"photo .*photo\.jpg")
    assert_user_error(run("vit", photo), "SOURCE:NAME|photo")


def test_the_sheet_of_maps_agrees_with_evaluate(data: Data, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(*data.options(), "--masks", data.masks)
    file = data.folder / "scores.json"
    options = ["--cams", data.cams, "--masks", data.masks, "--list", data.list, "--classes", 21, "--json", file]
    assert main(["evaluate", *map(str, options)]) == 0
    scores = json.loads(file.read_text())
    assert (
        f"threshold {scores['best_threshold']:.4g}, the best of these images (mIoU {scores['best_miou']:.4f}"
        in result.out
    )


def test_the_views_are_those_of_check() -> None:
    assert set(models.VIEWS) == {"hflip", "vflip", "rot90", "half"}
