"""Class maps of a list of images into a folder: at each image's size, to be taken up again, with no failure hidden."""

import errno
import io
import os
import pickle
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from acr_reg import GradientCam, HorizontalFlip, Identity, Lattice, multi_view_cam, normalize_cam
from acr_reg.integrations.cam_folder import write_cams
from acr_reg.integrations.formats import FORMATS, load_cams, save_cams
from acr_reg.integrations.jobs import progress, saving

SIZES = {"2007_000032": (30, 44), "2007_000039": (51, 33), "2007_000063": (16, 16)}
LABELS = {"2007_000032": [1, 0, 0, 1], "2007_000039": [0, 1, 0, 0], "2007_000063": [0, 0, 1, 0]}


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for name, size in SIZES.items():
        paths.append(tmp_path / f"{name}.png")
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def transform(photo):
    assert photo.mode == "RGB"
    return torch.from_numpy(np.array(photo.resize((32, 32)))).permute(2, 0, 1) / 255


def cam(images, labels):
    """Maps of 4 classes on 4 x 4 tokens, not normalised, larger to the right whatever the image shows there."""
    assert images.shape == (1, 3, 32, 32)
    tokens = functional.avg_pool2d(images, 8) * torch.linspace(0.2, 1, 4)
    return torch.cat([tokens, tokens[:, :1] * torch.arange(4.0)], 1) * 7 * (labels > 0)[:, :, None, None]


def contents(folder, format):
    loaded = {path.name: load_cams(path, format) for path in folder.iterdir()}
    return {name: {number: values.tobytes() for number, values in maps.items()} for name, maps in loaded.items()}


def test_maps_have_the_size_of_each_image_and_its_classes(tmp_path, photos):
    report = write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    assert report.written == list(SIZES)
    assert not report.failed
    for name, size in SIZES.items():
        found = load_cams(tmp_path / "cams" / f"{name}.npy")
        labels = torch.tensor([LABELS[name]])
        image = transform(Image.open(tmp_path / f"{name}.png").convert("RGB"))[None]
        large = functional.interpolate(cam(image, labels), size, mode="bilinear", align_corners=False)
        expected = normalize_cam(large, "minmax")[0]
        assert list(found) == [number for number, label in enumerate(LABELS[name]) if label]
        for number, values in found.items():
            np.testing.assert_allclose(values, expected[number], atol=1e-5)
            assert (values.min(), values.max()) == (0, 1)


def test_labels_may_be_a_file_and_have_the_numbers_of_irn(tmp_path, photos):
    by_number = {int(name.replace("_", "")): np.array(values) for name, values in LABELS.items()}
    np.save(tmp_path / "cls_labels.npy", by_number)
    for folder, labels in (("names", LABELS), ("numbers", by_number), ("file", tmp_path / "cls_labels.npy")):
        write_cams(cam, photos, labels, tmp_path / folder, transform)
    expected = contents(tmp_path / "names", "psa")
    assert contents(tmp_path / "numbers", "psa") == contents(tmp_path / "file", "psa") == expected


def test_photos_are_upright_once(tmp_path):
    upright = np.zeros((60, 40, 3), np.uint8)
    upright[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "photo.png", exif=exif)
    for turn in (lambda photo: photo, ImageOps.exif_transpose):
        write_cams(
            lambda images, labels: images[:, :1],
            [tmp_path / "photo.png"],
            {"photo": [1]},
            tmp_path / "cams",
            lambda photo, turn=turn: torch.from_numpy(np.array(turn(photo))).permute(2, 0, 1) / 255,
            overwrite=True,
        )
        np.testing.assert_array_equal(load_cams(tmp_path / "cams" / "photo.npy")[0], upright[..., 0] / 255)


def test_views_are_merged(tmp_path, photos):
    views = [Identity(), HorizontalFlip()]
    write_cams(cam, photos[:1], LABELS, tmp_path / "cams", transform, views=views, merge="max", normalize="max")
    image, labels = transform(Image.open(photos[0]).convert("RGB"))[None], torch.tensor([LABELS["2007_000032"]])
    merged = multi_view_cam(lambda x: cam(x, labels), image, views, "max", SIZES["2007_000032"])
    expected = normalize_cam(merged, "max")[0]
    alone = normalize_cam(multi_view_cam(lambda x: cam(x, labels), image, views[:1], "max", (30, 44)), "max")[0]
    for number, values in load_cams(tmp_path / "cams" / "2007_000032.npy").items():
        np.testing.assert_allclose(values, expected[number], atol=1e-6)
        assert np.abs(values - alone[number].numpy()).max() > 0.1


def test_the_lattice_of_the_tokens_counts(tmp_path, photos):
    def beside(images, labels):
        return cam(images, labels), Lattice(4, 4, (8.0, 8.0), (4.0, 0.0), (32.0, 32.0))

    for name, function in (("plain", cam), ("moved", beside)):
        write_cams(function, photos[2:], LABELS, tmp_path / name, transform, normalize="max")
    plain, moved = (load_cams(tmp_path / name / "2007_000063.npy")[2] for name in ("plain", "moved"))
    np.testing.assert_allclose(moved[4:14], plain[2:12], atol=1e-5)  # half a token lower: 2 of 16 pixels
    assert np.abs(moved - plain).max() > 0.05


def test_class_maps_of_a_transformer(tmp_path, photos):
    """GradientCam as it is, labels of several types."""
    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    class Vit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed, self.block = torch.nn.Conv2d(3, 16, 8, 8), block

        def forward(self, images):
            return self.block(self.patch_embed(images).flatten(2).transpose(1, 2)).mean(1)[:, :4]

    labels = {name: np.array(values, dtype=np.float32) for name, values in LABELS.items()}
    labels["2007_000039"] = torch.tensor(LABELS["2007_000039"])
    with GradientCam(Vit(), start_layer=0, query="all", steps=0) as gradient_cam:
        report = write_cams(gradient_cam, photos, labels, tmp_path / "cams", transform, "irn")
        image = transform(Image.open(photos[1]).convert("RGB"))[None]
        maps = gradient_cam(image, torch.tensor([LABELS["2007_000039"]]))
    assert report.written == list(SIZES)
    large = functional.interpolate(maps, SIZES["2007_000039"], mode="bilinear", align_corners=False)
    found = load_cams(tmp_path / "cams" / "2007_000039.npy", "irn")
    np.testing.assert_allclose(found[1], normalize_cam(large, "minmax")[0, 1], atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_run_makes_what_is_missing_only(tmp_path, photos, format):
    calls = []

    def counted(images, labels):
        calls.append(labels)
        return cam(images, labels)

    def run(**options):
        calls.clear()
        return write_cams(counted, photos, LABELS, tmp_path / "cams", transform, format, **options)

    assert len(run().written) == len(calls) == 3
    folders = ["cams_4", "cams_32"] if format == "psa_crf" else ["cams"]
    files = {folder: contents(tmp_path / folder, format) for folder in folders}
    assert all(sorted(path.partition(".")[0] for path in found) == list(SIZES) for found in files.values())

    again = run()
    assert (again.written, again.existing, len(calls)) == ([], list(SIZES), 0)

    next((tmp_path / folders[-1]).glob("2007_000039.*")).unlink()
    again = run()
    assert (again.written, again.existing, len(calls)) == (["2007_000039"], ["2007_000032", "2007_000063"], 1)
    assert {folder: contents(tmp_path / folder, format) for folder in folders} == files

    assert run(overwrite=True).written == list(SIZES)
    assert len(calls) == 3


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("format", ["psa", "psa_crf", "irn", "npz"])
def test_files_that_are_not_whole_are_made_anew(tmp_path, photos, format, number, capsys):
    """A disk that lost power keeps the name of a file, or its size too, and a copy may have been broken off."""
    name = list(SIZES)[number]
    write_cams(cam, photos, LABELS, tmp_path / "cams", transform, format)
    (file,) = tmp_path.glob("cams_32/*" + name + "*" if format == "psa_crf" else "cams/*" + name + "*")
    content, before = file.read_bytes(), contents(file.parent, format)
    for rest in (b"", content[:3], content[:100], content[:-1], content[:-300] + bytes(300), bytes(len(content))):
        file.write_bytes(rest)
        capsys.readouterr()
        report = write_cams(cam, photos, LABELS, tmp_path / "cams", transform, format)
        assert (report.written, len(report.existing)) == ([name], 2)
        assert re.search(rf"{name} is made anew: .*{name}\.np[yz]: The file (is|holds)", capsys.readouterr().err)
        assert contents(file.parent, format) == before


@pytest.mark.parametrize("content", [b"my notes", b"PK and my notes", pickle.dumps([1]), b"\x93NUMPY"])
def test_a_file_of_another_kind_is_not_replaced(tmp_path, photos, content):
    write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    file = tmp_path / "cams" / "2007_000063.npy"
    np.save(file, {0: {1, 2}} if content == b"\x93NUMPY" else {})
    file.write_bytes(file.read_bytes() if content == b"\x93NUMPY" else content)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"2007_000063\.npy .* not in the format psa\. Choose another folder"):
        write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    assert file.read_bytes() == before


def test_names_are_any_that_a_file_may_have(tmp_path):
    """Undecodable bytes too, in each way that a name travels: files, failures, other processes' lists."""
    names = ["a b", "x.y.z", "-dash", "[1]*", "new\nline", "\u65e5\u672c", "\U0001f600" * 58, "a" * 240]
    names += [os.fsdecode(b"\xff\xfe")] if sys.platform == "linux" else []
    for name in [*names, "bad\n"]:
        Image.new("RGB", (8, 6)).save(tmp_path / f"{name}.png")
    (tmp_path / "bad\n.png").write_bytes(b"no photo")
    labels = dict.fromkeys([*names, "bad\n"], LABELS["2007_000032"])
    for found in ([], names):
        images = [tmp_path / f"{name}.png" for name in labels]
        report = write_cams(cam, images, labels, tmp_path / "cams", transform)
        assert (report.existing or report.written, list(report.failed)) == (names, ["bad\n"])
        assert report.existing == found
        assert sorted(os.listdir(tmp_path / "cams")) == sorted(f"{name}.npy" for name in names)


def test_a_name_that_no_file_can_have_fails_its_image_alone(tmp_path, photos):
    """Maps of an image without an ending in its name need four bytes more."""
    (tmp_path / "cams" / "2007_000063.npy").mkdir(parents=True)
    for name in ("a" * 251, "a" * 252, "\u00e9" * 127, "a" * 5000):
        labels = {**LABELS, name: [1, 0, 0, 0]}
        report = write_cams(
            lambda images, labels: images[:, :1].expand(-1, 4, -1, -1),
            [*photos, name],
            labels,
            tmp_path / "cams",
            lambda path: torch.eye(4)[None],
            transform_takes="path",
            overwrite=True,
        )
        assert [*report.written, *report.failed] == [*SIZES][:2] + ([name] if len(name) == 251 else []) + [
            "2007_000063"
        ] + ([name] if len(name) != 251 else [])
        assert "disk takes no file of this name" in report.failed["2007_000063"]
        assert len(name) == 251 or "File name too long: the disk takes no file" in report.failed[name]


def test_a_run_that_is_broken_off_leaves_whole_files(tmp_path, photos):
    def interrupted(images, labels):
        if labels[0, 2]:
            raise KeyboardInterrupt
        return cam(images, labels)

    with pytest.raises(KeyboardInterrupt):
        write_cams(interrupted, photos, LABELS, tmp_path / "cams", transform)
    assert sorted(os.listdir(tmp_path / "cams")) == ["2007_000032.npy", "2007_000039.npy"]
    report = write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    assert (report.written, len(report.existing)) == (["2007_000063"], 2)


def test_bad_images_are_told_and_skipped(tmp_path, photos, capsys):
    photos[0].write_bytes(photos[0].read_bytes()[:200])
    photos[2].unlink()
    report = write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    assert report.written == ["2007_000039"]
    assert list(report.failed) == ["2007_000032", "2007_000063"]
    error = capsys.readouterr().err
    assert "2007_000032 skipped: OSError" in error
    assert "2007_000063 skipped: FileNotFoundError" in error
    assert f"{tmp_path / 'cams'}: 1 written, 0 already there, 2 failed\n  2007_000032: OSError" in error
    assert os.listdir(tmp_path / "cams") == ["2007_000039.npy"]
    write_cams(cam, photos, LABELS, tmp_path / "cams", transform, progress=False)
    assert "2007_000032 skipped" in capsys.readouterr().err  # failures are told in any case


def test_without_failuresprogress_false_is_silent(tmp_path, photos, capsys):
    write_cams(cam, photos, LABELS, tmp_path / "cams", transform, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("wrong", "facts"),
    [
        (lambda maps: maps * torch.nan, ["class 1 ", "has NaN"]),
        (lambda maps: maps[:, :2], ["cam ", "(1, 2, ", "4 classes", "(1, 4, h, w)"]),
        (lambda maps: maps[0], ["cam ", "(4, 4, 4)", "(1, 4, h, w)"]),
        (lambda maps: maps.view(5, 5), ["RuntimeError: shape '[5, 5]' is invalid"]),
    ],
)
def test_maps_that_cannot_be_used_fail_their_image_alone(tmp_path, photos, wrong, facts):
    def sometimes(images, labels):
        maps = cam(images, labels)
        return wrong(maps) if labels[0, 1] else maps

    report = write_cams(sometimes, photos, LABELS, tmp_path / "cams", transform)
    assert report.written == ["2007_000032", "2007_000063"]
    assert list(report.failed) == ["2007_000039"]
    for fact in facts:
        assert fact in report.failed["2007_000039"]


def test_a_cam_that_never_works_ends_the_run(tmp_path, photos):
    def broken(images, labels):
        raise IndexError("no such layer")

    with pytest.raises(
        RuntimeError,
        match=r"^cam .*2007_000032, 2007_000039, 2007_000063: IndexError: no such layer\. .*\(B, C, h, w\)",
    ):
        write_cams(broken, photos, LABELS, tmp_path / "cams", transform)
    # Where it has worked before, the images are the odd ones.
    save_cams(tmp_path / "cams" / "another.npy", {0: np.ones((2, 2))})
    assert len(write_cams(broken, photos, LABELS, tmp_path / "cams", transform).failed) == 3


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_full_disk_ends_the_run_and_keeps_the_report(tmp_path, photos, monkeypatch, capsys, step):
    calls = []
    place, attribute = {"write": (Path, "write_bytes"), "fsync": (os, "fsync"), "rename": (os, "replace")}[step]
    real = getattr(place, attribute)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    photos[0].unlink()
    photos.append(photos[1].with_name("more.png"))
    photos[1].rename(photos[3])
    labels = {**LABELS, "more": [1, 0, 0, 0]}
    monkeypatch.setattr(place, attribute, full)
    monkeypatch.setattr(saving, "THREADS", 1)
    with pytest.raises(OSError, match=r"No space left on device: .*more\.npy'") as caught:
        write_cams(cam, photos, labels, tmp_path / "cams", transform, progress=False)
    assert caught.value.report.written == ["2007_000063"]
    assert list(caught.value.report.failed) == ["2007_000032", "2007_000039"]
    assert os.listdir(tmp_path / "cams") == ["2007_000063.npy"]
    assert "cams: ended early. 1 written, 0 already there, 2 failed\n  2007_000032: " in capsys.readouterr().err


def test_a_folder_holds_one_format(tmp_path, photos):
    write_cams(cam, photos[:1], LABELS, tmp_path / "cams", transform, "irn")
    with pytest.raises(ValueError, match=r"2007_000032\.npy .*\bpsa\. .*another folder.*\birn\b"):
        write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    assert os.listdir(tmp_path / "cams") == ["2007_000032.npy"]


def test_the_last_file_may_be_the_one_in_another_format(tmp_path, photos):
    write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    save_cams(tmp_path / "cams" / "2007_000063.npy", {2: np.eye(16)}, "irn")
    with pytest.raises(ValueError, match=r"2007_000063\.npy .*\bpsa\. .*another folder.*\birn\b"):
        write_cams(cam, photos, LABELS, tmp_path / "cams", transform)


def test_mistakes_are_told_before_any_work(tmp_path, photos):
    def run(images=photos, labels=LABELS, **options):
        write_cams(cam, images, labels, tmp_path / "cams", transform, **options)

    with pytest.raises(ValueError, match=r"1 of 3 images .*labels.*\['2007_000063'\]"):
        run(labels={name: LABELS[name] for name in list(LABELS)[:2]})
    with pytest.raises(ValueError, match=r"\['2007_000032'\].*two folders"):
        run(images=[*photos, "elsewhere/2007_000032.jpg"])
    with pytest.raises(ValueError, match=r"normalize='sum'.*\"minmax\" or \"max\""):
        run(normalize="sum")
    with pytest.raises(ValueError, match=r"'voc'.*psa, psa_crf, irn"):
        run(format="voc")
    with pytest.raises(ValueError, match=r"alphas=\(32, 4\).* 0 < low < high"):
        run(format="psa_crf", alphas=(32, 4))
    assert not (tmp_path / "cams").exists()


def test_a_process_takes_its_share_unless_told_otherwise(tmp_path, photos, monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert write_cams(cam, photos, LABELS, tmp_path / "cams", transform).written == ["2007_000039"]
    assert "cams: share 2 of 2: 1 written, 0 already there, 0 failed" in capsys.readouterr().err
    report = write_cams(cam, photos, LABELS, tmp_path / "cams", transform, share=False)
    assert (report.written, report.existing) == (["2007_000032", "2007_000063"], ["2007_000039"])
    assert "cams: 2 written, 1 already there, 0 failed" in capsys.readouterr().err


# ---------------------------------------------------------------- progress


def slow_cam(image, labels):
    time.sleep(0.15)
    return cam(image, labels)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def testprogress_is_a_bar_on_a_terminal(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    photos[0].unlink()
    write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    shown = sys.stderr.getvalue()
    assert "3/3" in shown
    assert "Class maps" in shown
    assert "2007_000032 skipped: FileNotFoundError" in shown
    assert "2 written, 0 already there, 1 failed" in shown


def testprogress_is_a_line_now_and_then_elsewhere(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    write_cams(slow_cam, photos, LABELS, tmp_path / "cams", transform)
    *lines, summary = capsys.readouterr().err.splitlines()
    assert lines and all(re.match(r"Class maps: [0-3] of 3, ", line) for line in lines)
    assert summary.endswith("3 written, 0 already there, 0 failed")


def test_a_short_run_writes_its_summary_alone(tmp_path, photos, capsys):
    write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_rich_a_terminal_shows_lines(tmp_path, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    write_cams(slow_cam, photos, LABELS, tmp_path / "cams", transform)
    assert "Class maps: 1 of 3, about " in sys.stderr.getvalue()


def test_a_long_summary_names_some(tmp_path, photos, capsys):
    labels = {f"{number:03}": [1, 0, 0, 0] for number in range(8)}
    report = write_cams(cam, [f"{name}.jpg" for name in labels], labels, tmp_path / "cams", transform)
    assert len(report.failed) == 8
    assert "and 3 more (`failed` " in str(report).splitlines()[-1]
    assert capsys.readouterr().err.count(" skipped: ") == 8
