"""The command `python -m acr_reg evaluate` on small files: in a process of its own, as its user runs it, where the
process matters, and by its main function in this process for the rest (importing torch takes seconds)."""

import json
import os
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from acr_reg.__main__ import COMMANDS, main
from acr_reg.integrations.formats import save_cams
from acr_reg.integrations.scoring import resized
from acr_reg.metrics import CamMeanIoU, LabelMeanIoU
from tests.support.paths import ROOT
from tests.support.processes import Program, free_port, programs

COMMAND = ["-W", "error", "-m", "acr_reg"]
NAMES = ["2007_000032", "2007_000039", "2007_000063"]


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_process(*arguments):
    process = Program(*COMMAND, *arguments)
    out, err = process.communicate()
    return Result(process.returncode, out, err)


@pytest.fixture
def run(capsys):
    def run_here(*arguments):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as exit_by_argparse:
            code = exit_by_argparse.code
        return Result(code, *capsys.readouterr())

    return run_here


def write_mask(path, ids, palette):
    image = Image.fromarray(ids.astype(np.uint8))
    if palette:
        image.putpalette([value for i in range(256) for value in (i, 255 - i, (i * 7) % 256)])
    image.save(path)


class Data:
    """Three images of different non-square sizes with maps, masks and a list, and their score by the library."""

    def __init__(self, folder, classes=21, background=True, names=NAMES):
        rng = np.random.default_rng(0)
        self.folder, self.cams, self.masks, self.list = folder, folder / "cams", folder / "masks", folder / "list.txt"
        self.cams.mkdir()
        self.masks.mkdir()
        self.list.write_text("\n".join(names) + "\n")
        metric = CamMeanIoU(classes, background=background)
        first = int(background)
        for index, (name, size) in enumerate(zip(names, [(5, 8), (9, 4), (6, 7)], strict=True)):
            present = [index, classes - 1 - first]  # 0-based, as the PSA dict has them
            mask = rng.choice([*range(first), *(number + first for number in present), 255], size=size)
            maps = {number: np.clip((mask == number + first) + rng.normal(0, 0.4, size), 0, 1) for number in present}
            save_cams(self.cams / f"{name}{'.npz' if index == 1 else '.npy'}", maps)
            write_mask(self.masks / f"{name}.png", mask, palette=index == 0)
            stacked = np.stack([maps[number].astype(np.float32) for number in present])
            metric.update(stacked, mask, [number + first for number in present])
        self.scores = metric.compute()

    def options(self, classes=21, predictions="--cams"):
        folder = self.cams if predictions == "--cams" else self.labels
        return [predictions, folder, "--masks", self.masks, "--list", self.list, "--classes", classes]

    def write_labels(self):
        """Label maps that are wrong, and without a label, here and there. Returns their scores by the library."""
        rng, metric = np.random.default_rng(1), LabelMeanIoU(21)
        self.labels = self.folder / "labels"
        self.labels.mkdir()
        for path in sorted(self.masks.iterdir()):
            with Image.open(path) as image:
                mask = np.array(image)
            labels = np.where(rng.random(mask.shape) < 0.3, rng.choice([0, 1, 20, 255], mask.shape), mask)
            labels[mask == 255] = 5  # where nobody looks
            write_mask(self.labels / path.name, labels, palette=True)
            metric.update(labels, mask)
        return metric


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


def assert_user_error(result, *patterns):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for pattern in patterns:
        assert re.search(pattern, result.stderr), f"no {pattern!r} in {result.stderr!r}"


def test_table_and_json_hold_the_scores_of_the_library(data, tmp_path):
    with Image.open(data.masks / f"{NAMES[0]}.png") as image:
        assert image.mode == "P"
    result = run_process("evaluate", *data.options(), "--json", tmp_path / "scores.json")
    assert (result.returncode, result.stderr) == (0, "")
    content = json.loads((tmp_path / "scores.json").read_text())
    scores = data.scores
    assert 0.2 < scores.best_miou < 0.99
    assert content["best_miou"] == scores.best_miou
    assert content["best_threshold"] == scores.best_threshold
    assert (content["classes"], content["background"], content["images"]) == (21, True, 3)
    for key in ("thresholds", "miou", "per_class_iou", "false_positive_rate", "false_negative_rate"):
        found = np.array([np.nan if value is None else value for value in content[key]])
        np.testing.assert_array_equal(found, getattr(scores, key))
    assert len(content["thresholds"]) == 100
    assert None in content["per_class_iou"]

    assert f"best threshold  {scores.best_threshold:.4g}\n" in result.stdout
    assert f"mIoU            {scores.best_miou:.4f} over 5 of 21 ids\n" in result.stdout
    for label, number in [(" 0 background", 0), (" 1", 1), ("20", 20)]:
        assert re.search(rf"│ {label} +│ {scores.per_class_iou[number]:.4f} ", result.stdout)
    assert re.search(r"│  7 +│ - ", result.stdout)


@pytest.mark.parametrize(
    "line",
    [
        "{0}",
        "{0}.jpg",
        "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png",
        "JPEGImages/{0}.jpg\tSegmentationClassAug/{0}.png",
        "\n{0}  \n",
    ],
)
def test_lists_of_ids_and_of_pairs(data, tmp_path, line, run):
    data.list.write_text("\n".join(line.format(name) for name in NAMES))
    result = run("evaluate", *data.options(), "--json", tmp_path / "scores.json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((tmp_path / "scores.json").read_text())["best_miou"] == data.scores.best_miou


def test_coco_lists_where_mask_and_image_are_named_differently(tmp_path, run):
    names = [f"COCO_train2014_{number:012d}" for number in (9, 25, 30)]
    data = Data(tmp_path, classes=81, names=names)
    for name in names:
        (data.masks / f"{name}.png").rename(data.masks / f"{name[-12:]}.png")
    data.list.write_text("\n".join(f"/train2014/{name}.jpg /masks/{name[-12:]}.png" for name in names))
    result = run("evaluate", *data.options(81))
    assert (result.returncode, result.stderr) == (0, "")
    assert f"mIoU            {data.scores.best_miou:.4f} over 5 of 81 ids" in result.stdout


def test_without_background(tmp_path, run):
    data = Data(tmp_path, classes=23, background=False)
    result = run("evaluate", *data.options(23), "--no-background", "--json", tmp_path / "scores.json")
    assert (result.returncode, result.stderr) == (0, "")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["best_miou"] == data.scores.best_miou
    assert (content["best_threshold"], content["thresholds"], content["background"]) == (None, [], False)
    assert "threshold" not in result.stdout
    assert "background" not in result.stdout


def test_number_of_thresholds(data, tmp_path, run):
    result = run("evaluate", *data.options(), "--thresholds", 4, "--json", tmp_path / "scores.json")
    assert result.returncode == 0
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["thresholds"] == [0, 0.25, 0.5, 0.75]
    assert content["miou"] == list(data.scores.miou[[0, 25, 50, 75]])


def test_an_image_without_classes_is_background(data, run):
    save_cams(data.cams / f"{NAMES[0]}.npy", {})
    result = run("evaluate", *data.options())
    assert (result.returncode, result.stderr) == (0, "")


def test_sizes_that_differ_are_named_and_resize_helps(data, tmp_path, run):
    rows, columns = np.mgrid[:9, :4] / [[[8]], [[3]]]
    mask = np.where(np.kron(rows, np.ones((2, 2))) > 0.5, 3, 0)  # 18x8 against maps of 9x4
    write_mask(data.masks / f"{NAMES[1]}.png", mask, palette=False)
    save_cams(data.cams / f"{NAMES[1]}.npz", {2: rows, 4: columns * 0.1})
    result = run("evaluate", *data.options())
    assert_user_error(result, rf"{NAMES[1]}\.npz .*9x4.*{NAMES[1]}\.png .*18x8", "--resize")

    data.list.write_text(NAMES[1])
    result = run("evaluate", *data.options(), "--resize", "--json", tmp_path / "scores.json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((tmp_path / "scores.json").read_text())["best_miou"] == 1


def test_resizing_is_bilinear_between_pixel_centres():
    ramp = np.array([[0, 1, 0], [0, 1, 0]], dtype=np.float32)
    expected = [[0, 0.25, 0.75, 0.75, 0.25, 0]] * 4
    np.testing.assert_allclose(resized(ramp, (4, 6)), expected, atol=1e-6)


def test_missing_files_are_counted_and_the_first_named(data, run):
    data.list.write_text("\n".join([*NAMES, "a", "b", "c", "d", "e"]))
    result = run("evaluate", *data.options())
    assert_user_error(result, r"--cams .*5 of 8 .*missing: a\.npy, b\.npy, c\.npy and 2 more\..*list")
    data.list.write_text("\n".join(NAMES))
    (data.masks / f"{NAMES[2]}.png").unlink()
    result = run("evaluate", *data.options())
    assert_user_error(result, rf"--masks .*1 of 3 .*missing: {NAMES[2]}\.png\..*list")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "list.txt is empty.*one image a line"),
        ("a\nb 1\n", "list.txt, line 2 .*'b 1'.*an id.*pair of paths.*/ID.jpg"),
        ("a.jpg a.png 3", "list.txt, line 1 .*'a.jpg a.png 3'.*an id.*pair of paths"),
        ("a\nb\na\n", r"list.txt .*\ba more than once"),
        (None, "list.txt cannot be read: .*No such file"),
    ],
)
def test_lists_that_cannot_be_used(data, text, pattern, run):
    data.list.unlink()
    if text is not None:
        data.list.write_text(text)
    assert_user_error(run("evaluate", *data.options()), pattern)


def test_options_that_cannot_be_used(data, tmp_path, run):
    assert_user_error(run("evaluate", *data.options(1)), "--classes is 1.*at least 2.*VOC.*21.*COCO 81")
    assert_user_error(run("evaluate", *data.options(), "--thresholds", 0), "--thresholds is 0.*at least 1")
    missing = tmp_path / "absent" / "scores.json"
    assert_user_error(run("evaluate", *data.options(), "--json", missing), "--json .*folder .*absent does not exist")
    assert_user_error(run("evaluate", *data.options()[2:]), "one of the arguments --cams --labels is required")
    assert_user_error(
        run("evaluate", *data.options()[2:], "--cams", tmp_path / "absent"), "--cams .*absent is not a folder"
    )
    assert_user_error(run(), "required: COMMAND")
    assert_user_error(run("evaluation"), "invalid choice: 'evaluation'")


def test_classes_and_ids_beyond_the_range(data, run):
    result = run("evaluate", *data.options(20))
    assert_user_error(result, r"2007_000032\.npy .*\[19\].*\b20 ids .*\b18\b.*number of classes.*0-based")
    write_mask(data.masks / f"{NAMES[0]}.png", np.full((5, 8), 77), palette=True)
    assert_user_error(run("evaluate", *data.options()), r"2007_000032\.png: mask with ids \[77\].* 0 to 20,.* 255")


def test_files_with_other_contents(data, run):
    Image.new("RGB", (8, 5), (1, 2, 3)).save(data.masks / f"{NAMES[0]}.png")
    assert_user_error(run("evaluate", *data.options()), r"2007_000032\.png .*\(1, 2, 3\).*palette .*grey")
    (data.masks / f"{NAMES[0]}.png").write_text("no image")
    assert_user_error(run("evaluate", *data.options()), r"2007_000032\.png is in no format")
    np.save(data.cams / f"{NAMES[0]}.npy", np.zeros((20, 5, 8)))
    assert_user_error(run("evaluate", *data.options()), r"2007_000032\.npy: .*float64 array of shape \(20, 5, 8\)")
    write_mask(data.masks / f"{NAMES[0]}.png", np.zeros((5, 8)), palette=False)
    np.save(data.cams / f"{NAMES[0]}.npy", {0: np.full((5, 8), 3.5)})
    assert_user_error(run("evaluate", *data.options()), r"2007_000032\.npy with .*from 3\.5 to 3\.5.*\[0, 1\]")


def test_masks_without_a_known_pixel(data, run):
    for name, size in zip(NAMES, [(5, 8), (9, 4), (6, 7)], strict=True):
        write_mask(data.masks / f"{name}.png", np.full(size, 255), palette=False)
    assert_user_error(run("evaluate", *data.options()), "masks hold no class: every pixel is 255 .*--ignore-index")


def test_maps_keyed_otherwise_raise_a_warning(data, run):
    """1-based keys, or maps of other images: no class has a right pixel, and a mere low figure would not say why."""
    for name, size in zip(NAMES, [(5, 8), (9, 4), (6, 7)], strict=True):
        save_cams(data.cams / f"{name}.npy", {9: np.ones(size)})
    (data.cams / f"{NAMES[1]}.npz").unlink()
    result = run("evaluate", *data.options())
    assert result.returncode == 0
    assert re.search(r"warning: .*no class .*pixel", result.stderr, re.IGNORECASE)
    assert "class k (0-based) is mask id k + 1" in result.stderr


def test_a_terminal_shows_progress(data):
    pty = pytest.importorskip("pty", reason="pseudo-terminals are for POSIX")
    ours, theirs = pty.openpty()
    process = Program(*COMMAND, "evaluate", *data.options(), stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # how Linux reports that the other side has closed
        pass
    os.close(ours)
    process.communicate()
    assert process.returncode == 0
    assert b"Scoring" in shown
    assert b"3/3" in shown


@pytest.mark.parametrize("package", ["rich", "PIL"])
def test_a_missing_extra_is_named(data, run, monkeypatch, package):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("commands.evaluate", "integrations.scoring", "integrations.formats.masks"):
        monkeypatch.delitem(sys.modules, f"acr_reg.{module}", raising=False)
    result = run("evaluate", *data.options())
    assert_user_error(result, rf'[Tt]he package {package}\b.*pip install -e "\.\[demo\]"')


def test_help_needs_no_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rich'] = sys.modules['PIL'] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *COMMAND, "--help"]
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in COMMANDS)


def test_as_a_process_an_error_is_one_line(data):
    pairs = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in NAMES]
    data.list.write_text("\n".join(pairs))
    (data.cams / f"{NAMES[2]}.npy").unlink()
    result = run_process("evaluate", *data.options())
    assert_user_error(result, rf"^python -m acr_reg evaluate: error: --cams .*1 of 3 .*missing: {NAMES[2]}\.npy")
    assert result.stderr.count("\n") == 1


def test_help_explains_the_keys(run):
    result = run("evaluate", "--help")
    assert result.returncode == 0
    assert "Class k is mask id k + 1" in " ".join(result.stdout.split())


def test_label_maps_have_one_score_without_a_threshold(data, tmp_path, run):
    metric = data.write_labels()
    scores = metric.compute()
    result = run("evaluate", *data.options(predictions="--labels"), "--json", tmp_path / "scores.json")
    assert (result.returncode, result.stderr) == (0, "")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert 0.2 < scores.miou < 0.9
    for key in ("miou", "pixel_accuracy", "class_accuracy"):
        assert content[key] == getattr(scores, key)
    for key in ("per_class_iou", "per_class_accuracy", "false_positive_rate", "false_negative_rate"):
        found = np.array([np.nan if value is None else value for value in content[key]])
        np.testing.assert_array_equal(found, getattr(scores, key))
    assert content["confusion"] == metric.confusion().tolist()
    assert (content["ignore_index"], content["names"], content["images"]) == (255, None, 3)
    assert not {"thresholds", "best_threshold", "best_miou"} & content.keys()

    assert "threshold" not in result.stdout
    assert re.search(rf"\nmIoU +{scores.miou:.4f} over 5 of 21 ids\n", result.stdout)
    assert re.search(rf"\npixel accuracy +{scores.pixel_accuracy:.4f}\n", result.stdout)
    assert re.search(rf"\nclass accuracy +{scores.class_accuracy:.4f}, mean over 5 ids\n", result.stdout)
    unlabelled = metric.confusion()[:, -1].sum()
    assert unlabelled > 0
    assert re.search(rf"\nunlabelled +{unlabelled} pixels \(.* %\) predicted as 255, missed\n", result.stdout)


def test_perfect_label_maps_score_1(data, run):
    data.write_labels()
    result = run("evaluate", "--labels", data.masks, *data.options()[2:])
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"mIoU +1\.0000 over 5 of 21 ids", result.stdout)
    assert "unlabelled" not in result.stdout


def test_label_maps_of_another_size_are_named_and_resize_helps(data, run):
    data.write_labels()
    for path in data.masks.iterdir():
        with Image.open(path) as image:
            mask = np.array(image)
        write_mask(data.labels / path.name, np.kron(mask, np.ones((2, 3))), palette=False)
    result = run("evaluate", *data.options(predictions="--labels"))
    assert_user_error(result, r"labels/2007_000032\.png is 10x24 .*masks/2007_000032\.png is 5x8", "--resize")
    result = run("evaluate", *data.options(predictions="--labels"), "--resize")
    assert re.search(r"mIoU +1\.0000", result.stdout)


def test_the_kind_of_folder_is_told_where_it_was_taken_for_the_other(data, run):
    data.write_labels()
    as_labels = run("evaluate", *data.options(predictions="--labels"))
    result = run("evaluate", "--cams", data.labels, *data.options()[2:])
    assert (result.returncode, result.stdout) == (0, as_labels.stdout)
    assert re.search(r"--cams .*labels holds label maps \(\.png\).*as by --labels", result.stderr)
    result = run("evaluate", "--cams", data.labels, *data.options()[2:], "--thresholds", 10)
    assert_user_error(result, "--thresholds is for class maps")
    result = run("evaluate", "--labels", data.cams, *data.options()[2:])
    assert_user_error(result, r"--labels .*cams holds class maps.*as --cams")
    result = run("evaluate", *data.options(), "--labels", data.labels)
    assert_user_error(result, "argument --labels: not allowed with argument --cams")
    (data.labels / f"{NAMES[1]}.png").unlink()
    result = run("evaluate", *data.options(predictions="--labels"))
    assert_user_error(result, rf"--labels .*1 of 3 files are missing: {NAMES[1]}\.png")


@pytest.mark.parametrize("option", [("--thresholds", 10), ("--format", "psa")])
def test_options_of_class_maps_are_refused_for_label_maps(data, run, option):
    data.write_labels()
    result = run("evaluate", *data.options(predictions="--labels"), *option)
    assert_user_error(result, f"{option[0]} is for class maps .*--labels")


def test_masks_of_0_and_255_hold_no_class(data, run):
    for name, size in zip(NAMES, [(5, 8), (9, 4), (6, 7)], strict=True):
        write_mask(data.masks / f"{name}.png", np.resize([0, 255], size), palette=True)
    result = run("evaluate", *data.options())
    assert_user_error(
        result, r"masks hold no class: every pixel is 0 \(background\) or 255 \(ignored\).*--ignore-index"
    )
    result = run("evaluate", *data.options(), "--ignore-index", "none")
    assert_user_error(result, r"mask with ids \[255\].*number of classes and the ignored id")
    result = run("evaluate", *data.options(256), "--ignore-index", "none")
    assert result.returncode == 0
    assert re.search(r"│ 255 +│ 0\.0000 ", result.stdout)


def test_another_id_or_none_is_ignored(data, tmp_path, run):
    for name in NAMES:
        with Image.open(data.masks / f"{name}.png") as image:
            mask = np.array(image)
        write_mask(data.masks / f"{name}.png", np.where(mask == 255, 99, mask), palette=False)
    assert_user_error(run("evaluate", *data.options()), r"mask with ids \[99\]")
    result = run("evaluate", *data.options(), "--ignore-index", 99, "--json", tmp_path / "scores.json")
    assert (result.returncode, result.stderr) == (0, "")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert (content["best_miou"], content["ignore_index"]) == (data.scores.best_miou, 99)
    result = run("evaluate", *data.options(100), "--ignore-index", "none", "--json", tmp_path / "scores.json")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert (content["ignore_index"], content["per_class_iou"][99]) == (None, 0)
    result = run("evaluate", *data.options(), "--ignore-index", "all")
    assert_user_error(result, "argument --ignore-index: 'all' is no id.*none")


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_masks_whose_compression_changes_ids_are_refused(data, run, format):
    for name in NAMES:
        with Image.open(data.masks / f"{name}.png") as image:
            image.convert("L").save(data.masks / f"{name}.{format}")
    data.list.write_text("\n".join(f"/a/{name}.jpg /b/{name}.{format}" for name in NAMES))
    result = run("evaluate", *data.options())
    assert_user_error(result, rf"{NAMES[0]}\.{format} is a \w+ file.*change.*PNG")


def test_a_list_of_ids_finds_masks_and_label_maps_of_other_endings(data, run):
    data.write_labels()
    expected = run("evaluate", *data.options(predictions="--labels")).stdout
    for folder, name, ending in [
        (data.masks, NAMES[0], ".PNG"),
        (data.masks, NAMES[1], ".tif"),
        (data.labels, NAMES[1], ".PNG"),
        (data.labels, NAMES[2], ".bmp"),
    ]:
        with Image.open(folder / f"{name}.png") as image:
            image.save(folder / f"other{ending}")
        (folder / f"{name}.png").unlink()
        (folder / f"other{ending}").rename(folder / f"{name}{ending}")
    result = run("evaluate", *data.options(predictions="--labels"))
    assert (result.returncode, result.stdout) == (0, expected)
    for folder in (data.labels, data.masks):
        for path in folder.glob(f"{NAMES[0]}*"):
            with Image.open(path) as image:
                image.convert("L").save(folder / f"{NAMES[0]}.jpg")
            path.unlink()
        result = run("evaluate", *data.options(predictions="--labels"))
        assert_user_error(result, rf"{folder.name}/{NAMES[0]}\.jpg is a JPEG file.*change.*PNG")
        (folder / f"{NAMES[0]}.jpg").unlink()
        write_mask(folder / f"{NAMES[0]}.png", np.zeros((5, 8)), palette=False)


def test_names_stand_in_the_table_and_in_the_json(data, tmp_path, run):
    result = run("evaluate", *data.options(), "--names", "voc", "--json", tmp_path / "scores.json")
    assert (result.returncode, result.stderr) == (0, "")
    for label in (" 0 background ", " 1 aeroplane ", "20 tvmonitor "):
        assert f"│ {label}" in result.stdout
    names = json.loads((tmp_path / "scores.json").read_text())["names"]
    assert (len(names), names[20]) == (21, "tvmonitor")
    assert_user_error(run("evaluate", *data.options(30), "--names", "voc"), "--names voc has 20 names for 30 ids")
    assert_user_error(run("evaluate", *data.options(), "--names", tmp_path / "absent"), "--names .*absent cannot be")


def test_a_pipe_cuts_no_name(data, tmp_path):
    """rich takes a pipe for 80 columns. Names may also look like rich's markup."""
    names = ["[bold]", "a name of many words " * 6, *(f"class {number}" for number in range(169))]
    (tmp_path / "names.txt").write_text("\n".join(names))
    result = run_process("evaluate", *data.options(171), "--names", tmp_path / "names.txt")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"│   0 \[bold\] +│ 0\.\d{4} │", result.stdout)
    assert f"│   1 {names[1].strip()} │" in result.stdout
    assert "│ 170 class 168 " in result.stdout


def by_torchrun(*arguments):
    port = ["--master-port", free_port()]
    process = Program("-m", "torch.distributed.run", "--nproc-per-node", "2", *port, "-m", "acr_reg", *arguments)
    out, err = process.communicate()
    return Result(process.returncode, out, err)


def by_two(*arguments):
    both = programs(2, *COMMAND, *arguments)
    outs, errs = zip(*(process.communicate() for process in both), strict=True)
    return Result(max(process.returncode for process in both), "".join(outs), "".join(errs))


@pytest.mark.parametrize(("run_two", "predictions"), [(by_torchrun, "--cams"), (by_two, "--labels")])
def test_two_processes_print_one_table_with_the_same_scores(data, tmp_path, run, run_two, predictions):
    data.write_labels()
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    expected = run("evaluate", *data.options(predictions=predictions), "--json", alone)
    done = run_two("evaluate", *data.options(predictions=predictions), "--json", shared)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.stdout
    assert shared.read_text() == alone.read_text()


def test_an_error_in_one_of_two_processes_ends_both_with_one_message(data):
    (data.cams / f"{NAMES[1]}.npz").write_bytes(b"damaged")  # in the share of the second process
    done = by_two("evaluate", *data.options())
    assert done.returncode != 0
    assert done.stdout == ""
    assert len(re.findall(rf"acr_reg evaluate: error: .*{NAMES[1]}\.npz", done.stderr)) == 1
    data.list.unlink()
    done = by_two("evaluate", *data.options())
    assert len(re.findall(r"acr_reg evaluate: error: --list .* cannot be read", done.stderr)) == 1


def test_a_job_of_an_array_is_refused_because_nobody_adds_up(data, run, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = run("evaluate", *data.options())
    assert_user_error(result, "RANK=1 without MASTER_ADDR.*nobody.*torchrun")
    monkeypatch.setenv("RANK", "4")
    assert_user_error(run("evaluate", *data.options()), "RANK='4' and WORLD_SIZE='4' name no process")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("evaluate", *data.options()).returncode == 0


def test_workers_give_the_same_table(tmp_path, run):
    names = [f"image_{number}" for number in range(3)]
    data = Data(tmp_path, names=names)
    many = [f"copy_{number}" for number in range(60)]
    for number, name in enumerate(many):
        suffix = ".npz" if number % 3 == 1 else ".npy"
        shutil.copy(data.cams / f"{names[number % 3]}{suffix}", data.cams / f"{name}{suffix}")
        shutil.copy(data.masks / f"{names[number % 3]}.png", data.masks / f"{name}.png")
    data.list.write_text("\n".join(many))
    results = [run("evaluate", *data.options(), "--workers", number) for number in (0, 2)]
    assert results[0].returncode == 0
    assert f"mIoU            {data.scores.best_miou:.4f} over" in results[0].stdout
    assert results[0] == results[1]
    assert_user_error(run("evaluate", *data.options(), "--workers", -1), "--workers is -1")
    (data.masks / "copy_41.png").write_text("no image")
    result = run("evaluate", *data.options(), "--workers", 2)
    assert_user_error(result, r"copy_41\.png")
    assert result.stderr.count("\n") == 1


def test_a_folder_as_json_is_refused_before_any_work(data, tmp_path, run):
    result = run("evaluate", *data.options(), "--json", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"--json {tmp_path} is a folder" in result.stderr


def test_counts_that_do_not_fit_in_memory_are_an_error(data, run):
    options = [option if option != "--cams" else "--labels" for option in data.options(2**24)]
    options[options.index("--labels") + 1] = data.masks
    result = run("evaluate", *options)
    assert result.returncode == 2
    assert "--classes 16777216 needs too much memory" in result.stderr
