"""Folders of class maps become folders of pseudo labels, by one rule, at the photos' sizes, with the maps' scores."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from acr_reg.integrations.convert import convert_cams, convert_to_labels, score_dev_list
from acr_reg.integrations.formats import FORMATS, load_cams, save_cams
from acr_reg.integrations.formats.labels import pseudo_labels
from acr_reg.integrations.formats.masks import read_mask, save_mask
from acr_reg.integrations.scoring import find_samples, read_list, score_labels
from acr_reg.metrics import LabelMeanIoU

NAMES = ["2007_000032", "2007_000039", "2007_000063"]
SIZES = [(9, 14), (12, 8), (10, 10)]


def quiet(source, target, *args, **options):
    return convert_to_labels(source, target, *args, progress=False, **options)


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    made = {}
    for name, size, classes in zip(NAMES, SIZES, [(0, 14), (3,), (14, 0, 3)], strict=True):
        made[name] = {number: np.round(rng.random(size, dtype=np.float32), 2) for number in classes}
    return made


@pytest.fixture
def cams(tmp_path, maps):
    (tmp_path / "cams").mkdir()
    for name, each in maps.items():
        save_cams(tmp_path / "cams" / f"{name}.npy", each)
    return tmp_path / "cams"


@pytest.fixture
def masks(tmp_path, maps):
    """Where a class is high, mostly; some pixels are unknown."""
    rng = np.random.default_rng(1)
    (tmp_path / "masks").mkdir()
    for name, each in maps.items():
        ids = pseudo_labels(each, 0.6).astype(int)
        wrong = rng.random(ids.shape)
        save_mask(tmp_path / "masks" / f"{name}.png", np.where(wrong < 0.2, 0, np.where(wrong < 0.3, 255, ids)))
    return tmp_path / "masks"


def write_list(tmp_path, names, file="dev.txt"):
    (tmp_path / file).write_text("\n".join(names) + "\n")
    return tmp_path / file


def photos_of(tmp_path, sizes, suffix=".jpg"):
    (tmp_path / "photos").mkdir(exist_ok=True)
    for name, (height, width) in sizes.items():
        Image.new("RGB", (width, height)).save(tmp_path / "photos" / f"{name}{suffix}")
    return tmp_path / "photos"


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "rule",
    [{"threshold": 0.4}, {"ignore_between": (0.2, 0.6)}, {"alphas": (4, 32)}, {"background": False}],
    ids=str,
)
def test_each_image_becomes_a_palette_png_of_its_labels(tmp_path, cams, maps, rule):
    report = quiet(cams, tmp_path / "labels", **rule)
    assert report.written == NAMES
    assert sorted(os.listdir(tmp_path / "labels")) == [f"{name}.png" for name in NAMES]
    for name in NAMES:
        with Image.open(tmp_path / "labels" / f"{name}.png") as image:
            assert image.mode == "P"
            assert image.getpalette()[3 * 15 : 3 * 16] == [192, 128, 128]  # VOC's person
        np.testing.assert_array_equal(read_mask(tmp_path / "labels" / f"{name}.png"), pseudo_labels(maps[name], **rule))


@pytest.mark.parametrize("format", FORMATS)
def test_labels_are_made_of_every_format(tmp_path, cams, maps, format):
    convert_cams(cams, tmp_path / "other", format, progress=False)
    other = tmp_path / "other_4" if format == "psa_crf" else tmp_path / "other"
    quiet(other, tmp_path / "labels", format, threshold=0.4)
    for name in NAMES:
        (file,) = other.glob(f"{name}.*")
        expected = pseudo_labels(load_cams(file, format), 0.4)
        np.testing.assert_array_equal(read_mask(tmp_path / "labels" / f"{name}.png"), expected)


def test_the_best_threshold_of_a_list_gives_labels_with_that_score(tmp_path, cams, masks):
    dev = write_list(tmp_path, NAMES[:2])
    scores = score_dev_list(cams, dev, masks, 21, progress=False)
    quiet(cams, tmp_path / "labels", threshold=scores.best_threshold)
    samples = find_samples(read_list(dev), tmp_path / "labels", masks, "labels")
    found = score_labels(samples, LabelMeanIoU(21), progress=False).compute()
    assert 0 < scores.best_threshold < 0.99
    assert found.miou == scores.best_miou
    np.testing.assert_array_equal(found.per_class_iou, scores.per_class_iou)


def test_so_do_small_maps_that_are_resized(tmp_path, cams, masks, maps):
    """Resized by the evaluation's own function: another rounding would move pixels over the threshold."""
    for name, each in maps.items():
        save_cams(cams / f"{name}.npy", {number: values[::2, ::3] for number, values in each.items()})
    photos = photos_of(tmp_path, dict(zip(NAMES, SIZES, strict=True)))
    dev = write_list(tmp_path, NAMES)
    scores = score_dev_list(cams, dev, masks, 21, images=photos, progress=False)
    quiet(cams, tmp_path / "labels", threshold=scores.best_threshold, images=photos)
    samples = find_samples(read_list(dev), tmp_path / "labels", masks, "labels")
    assert score_labels(samples, LabelMeanIoU(21), progress=False).compute().miou == scores.best_miou


def test_an_image_without_a_class_is_background_of_its_photos_size(tmp_path, cams):
    save_cams(cams / f"{NAMES[1]}.npy", {})
    report = quiet(cams, tmp_path / "labels", threshold=0.4)
    assert list(report.failed) == [NAMES[1]]
    assert "--images" in report.failed[NAMES[1]]
    photos = photos_of(tmp_path, dict(zip(NAMES, SIZES, strict=True)))
    assert quiet(cams, tmp_path / "labels", threshold=0.4, images=photos).written == [NAMES[1]]
    ids = read_mask(tmp_path / "labels" / f"{NAMES[1]}.png")
    assert (ids.shape, ids.any()) == (SIZES[1], False)


def test_a_class_that_no_label_image_can_hold_fails_by_name(tmp_path, cams):
    save_cams(cams / f"{NAMES[1]}.npy", {254: np.ones((3, 4))})
    report = quiet(cams, tmp_path / "labels", threshold=0.4)
    assert report.written == [NAMES[0], NAMES[2]]
    assert re.search(r"class 254\b.*up to 253", report.failed[NAMES[1]])
    assert not (tmp_path / "labels" / f"{NAMES[1]}.png").exists()


# ---------------------------------------------------------------- interrupted runs and two rules


def test_an_interrupted_run_is_taken_up_again(tmp_path, cams):
    quiet(cams, tmp_path / "labels", threshold=0.4)
    (tmp_path / "labels" / f"{NAMES[1]}.png").unlink()
    before = (tmp_path / "labels" / f"{NAMES[0]}.png").stat().st_mtime_ns
    report = quiet(cams, tmp_path / "labels", threshold=0.4)
    assert (report.written, report.existing) == ([NAMES[1]], [NAMES[0], NAMES[2]])
    assert (tmp_path / "labels" / f"{NAMES[0]}.png").stat().st_mtime_ns == before


def test_labels_that_are_not_whole_are_made_anew(tmp_path, cams):
    quiet(cams, tmp_path / "labels", threshold=0.4)
    file = tmp_path / "labels" / f"{NAMES[1]}.png"
    content = file.read_bytes()
    for rest in (b"", content[:5], content[:60], content[:-16], bytes(len(content)), content[:-40] + bytes(40)):
        file.write_bytes(rest)
        assert quiet(cams, tmp_path / "labels", threshold=0.4).written == [NAMES[1]]
        assert file.read_bytes() == content
    (tmp_path / "labels" / "of_another_image.png").write_bytes(b"")
    assert quiet(cams, tmp_path / "labels", threshold=0.4).written == []
    file.write_bytes(b"my notes")
    with pytest.raises(
        ValueError, match=rf"{NAMES[1]}\.png is damaged, or no label map: .* is in no format .*another folder"
    ):
        quiet(cams, tmp_path / "labels", threshold=0.4)
    assert file.read_bytes() == b"my notes"


@pytest.mark.parametrize(
    "second",
    [
        {"threshold": 0.4000001},
        {"ignore_between": (0.4, 0.6)},
        {"alphas": (4, 32)},
        {"background": False},
    ],
    ids=str,
)
def test_labels_of_two_rules_do_not_mix(tmp_path, cams, second):
    quiet(cams, tmp_path / "labels", threshold=0.4)
    (tmp_path / "labels" / f"{NAMES[2]}.png").unlink()
    with pytest.raises(ValueError, match=rf"{NAMES[0]}\.png was made with threshold=0\.4, .*overwrite"):
        quiet(cams, tmp_path / "labels", **second)
    assert len(os.listdir(tmp_path / "labels")) == 2
    assert quiet(cams, tmp_path / "labels", **second, overwrite=True).written == NAMES
    assert quiet(cams, tmp_path / "labels", **second).existing == NAMES


def test_a_run_that_overwrote_some_labels_only_is_not_taken_for_complete(tmp_path, cams):
    quiet(cams, tmp_path / "labels", threshold=0.4)
    quiet(cams, tmp_path / "other", threshold=0.5)
    shutil.copy(tmp_path / "other" / f"{NAMES[0]}.png", tmp_path / "labels")  # the first file of those to come
    with pytest.raises(ValueError, match=rf"{NAMES[1]}\.png was made with threshold=0\.4, .* has threshold=0\.5\."):
        quiet(cams, tmp_path / "labels", threshold=0.5)


def test_equal_rules_are_equal_however_their_numbers_are_given(tmp_path, cams):
    for name, first, second in [
        ("threshold", 0, np.float32(0)),
        ("threshold", 0.3, np.float64(0.3)),
        ("alphas", (4, 32), [4.0, np.float64(32)]),
        ("ignore_between", (0, 1), (np.int64(0), 1.0)),
    ]:
        quiet(cams, tmp_path / f"{name}{first}", **{name: first})
        assert quiet(cams, tmp_path / f"{name}{first}", **{name: second}).existing == NAMES


def test_labels_of_other_images_by_another_rule_are_not_kept(tmp_path, cams):
    quiet(cams, tmp_path / "labels", threshold=0.4)
    (cams / f"{NAMES[2]}.npy").unlink()
    with pytest.raises(ValueError, match=rf"{NAMES[2]}\.png was made with threshold=0\.4"):
        quiet(cams, tmp_path / "labels", threshold=0.5, overwrite=True)


def test_label_images_of_another_program_are_not_passed_over(tmp_path, cams, masks):
    before = (masks / f"{NAMES[0]}.png").read_bytes()
    with pytest.raises(ValueError, match=rf"{NAMES[0]}\.png was not made by this conversion.*another folder"):
        quiet(cams, masks, threshold=0.4)
    (masks / f"{NAMES[0]}.png").write_bytes(before[:20])
    with pytest.raises(ValueError, match=rf"{NAMES[1]}\.png .*another folder"):
        quiet(cams, masks, threshold=0.4)
    assert (masks / f"{NAMES[0]}.png").read_bytes() == before[:20]


# ---------------------------------------------------------------- photos


def test_sizes_are_those_of_upright_photos(tmp_path, cams):
    photos = photos_of(tmp_path, dict(zip(NAMES, SIZES, strict=True)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(photos / f"{NAMES[0]}.jpg", exif=exif)
    convert_cams(cams, tmp_path / "psa", "psa", images=photos, progress=False)
    quiet(cams, tmp_path / "labels", threshold=0.4, images=photos)
    assert load_cams(tmp_path / "psa" / f"{NAMES[0]}.npy")[0].shape == (20, 30)
    assert read_mask(tmp_path / "labels" / f"{NAMES[0]}.png").shape == (20, 30)


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".PNG", ".webp", ".tif", ".TIFF", ".bmp", ".gif"])
def test_photos_are_found_whatever_their_ending(tmp_path, cams, suffix):
    photos = photos_of(tmp_path, dict.fromkeys(NAMES, (20, 30)), suffix)
    assert convert_cams(cams, tmp_path / "psa", "psa", images=photos, progress=False).written == NAMES
    assert load_cams(tmp_path / "psa" / f"{NAMES[0]}.npy")[0].shape == (20, 30)


@pytest.mark.parametrize("format", ["irn", "labels"])
def test_files_at_the_maps_size_are_not_taken_for_those_at_the_photos(tmp_path, cams, format):
    """Of a run without images=, before one with it."""
    photos = photos_of(
        tmp_path, {name: (2 * height, 2 * width) for name, (height, width) in zip(NAMES, SIZES, strict=True)}
    )

    def convert(**options):
        if format == "labels":
            return quiet(cams, tmp_path / "out", threshold=0.5, **options)
        return convert_cams(cams, tmp_path / "out", format, progress=False, **options)

    convert()
    with pytest.raises(ValueError, match=r"9x14 and its photo 18x28 .*overwrite"):
        convert(images=photos)
    assert convert(images=photos, overwrite=True).written == NAMES
    assert convert(images=photos).existing == NAMES
    Image.new("RGB", (5, 4)).save(photos / f"{NAMES[2]}.jpg")
    with pytest.raises(ValueError, match=rf"{NAMES[2]}\.\w+ of an earlier run is .* and its photo 4x5 .*overwrite"):
        convert(images=photos)
    (photos / f"{NAMES[2]}.jpg").write_bytes(b"no photo")  # not needed for a file that exists
    assert convert(images=photos).existing == NAMES


def test_two_photos_of_one_image_are_told_by_name(tmp_path, cams):
    photos = photos_of(tmp_path, dict.fromkeys(NAMES, (20, 30)))
    photos_of(tmp_path, {NAMES[0]: (30, 20)}, ".PNG")
    for report in (
        convert_cams(cams, tmp_path / "psa", "psa", images=photos, progress=False),
        quiet(cams, tmp_path / "labels", threshold=0.4, images=photos),
    ):
        assert list(report.failed) == [NAMES[0]]
        assert f"{NAMES[0]}.PNG, {NAMES[0]}.jpg" in report.failed[NAMES[0]]


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_told_before_any_work(tmp_path, cams, masks):
    photos = photos_of(tmp_path, dict.fromkeys(NAMES, (20, 30)))
    target = tmp_path / "labels"
    for fact, source, to, options in [
        (r"exactly one of threshold", cams, target, {}),
        (r"000032\.npy is a file\. Name a folder", cams, cams / f"{NAMES[0]}.npy", {"threshold": 0.4}),
        (r"cams is both source and target", cams, cams, {"threshold": 0.4}),
        (r"photos is both folder of the photos and target", cams, photos, {"threshold": 0.4, "images": photos}),
        (r"absent is not a folder.*photos", cams, target, {"threshold": 0.4, "images": tmp_path / "absent"}),
        (r"no \.npy or \.npz files in .*masks", masks, target, {"threshold": 0.4}),
        (r"There is no format 'voc'", cams, target, {"source_format": "voc", "threshold": 0.4}),
    ]:
        with pytest.raises(ValueError, match=fact):
            quiet(source, to, **options)
    save_cams(cams / f"{NAMES[0]}.npz", {0: np.ones((2, 2))})
    with pytest.raises(ValueError, match=rf"{NAMES[0]}\.npy, {NAMES[0]}\.npz.*one image twice"):
        quiet(cams, target, threshold=0.4)
    assert not target.exists()


def test_a_list_that_cannot_choose_a_threshold_is_refused(tmp_path, cams, masks):
    dev = write_list(tmp_path, [*NAMES, "2009_000001", "2009_000002"])
    with pytest.raises(ValueError, match=r"dev\.txt names 2009_000001, 2009_000002, .*cams has no maps"):
        score_dev_list(cams, dev, masks, 21)
    dev = write_list(tmp_path, NAMES)
    with pytest.raises(ValueError, match=r"masks .*absent is not a folder"):
        score_dev_list(cams, dev, tmp_path / "absent", 21)
    with pytest.raises(ValueError, match=r"cannot be read"):
        score_dev_list(cams, tmp_path / "absent.txt", masks, 21)
    with pytest.raises(ValueError, match=r"2007_000032.*\b14\b.* 5 ids"):
        score_dev_list(cams, dev, masks, 5, progress=False)
    for name, (height, width) in zip(NAMES, SIZES, strict=True):
        save_mask(masks / f"{name}.png", np.full((height, width), 20))
    with pytest.raises(ValueError, match=r"No class has a correct pixel on .*dev\.txt"):
        score_dev_list(cams, dev, masks, 21, progress=False)
