"""Folders of class maps from one format into another, by function and by `python -m acr_reg convert`."""

import json
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from acr_reg.__main__ import main
from acr_reg.integrations.convert import convert_cams
from acr_reg.integrations.formats import FORMATS, cam_format, load_cams, save_cams
from acr_reg.integrations.formats.labels import pseudo_labels
from acr_reg.integrations.formats.masks import read_mask, save_mask
from tests.support.processes import Program
from tests.support.ranks import needs_gloo

NAMES = ["2007_000032", "2007_000039"]


@pytest.fixture
def maps():
    """By image: class 0 among them, each map with a maximum of 1, so that every format keeps them."""
    rng = np.random.default_rng(0)
    made = {NAMES[0]: {0: rng.random((9, 14)), 14: rng.random((9, 14))}, NAMES[1]: {3: rng.random((12, 8))}}
    return {
        name: {number: (values / values.max()).astype(np.float32) for number, values in cams.items()}
        for name, cams in made.items()
    }


@pytest.fixture
def psa(tmp_path, maps):
    (tmp_path / "psa").mkdir()
    for name, cams in maps.items():
        save_cams(tmp_path / "psa" / f"{name}.npy", cams)
    return tmp_path / "psa"


def folder_of(target, format):
    return target.with_name(f"{target.name}_4") if format == "psa_crf" else target


def assert_holds(folder, format, maps, tolerance=1e-6):
    suffix = ".npz" if format == "npz" else ".npy"
    assert sorted(os.listdir(folder)) == [f"{name}{suffix}" for name in NAMES]
    for name, cams in maps.items():
        found = load_cams(folder / f"{name}{suffix}", format)
        assert found.keys() == cams.keys()
        for number, values in cams.items():
            np.testing.assert_allclose(found[number], values, atol=tolerance)


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_every_format_into_every_other(tmp_path, psa, maps, first, second):
    convert_cams(psa, tmp_path / "first", first)
    source = folder_of(tmp_path / "first", first)
    report = convert_cams(source, tmp_path / "second", second, "psa_crf" if first == "psa_crf" else None)
    assert report.written == NAMES
    assert not report.failed
    tolerance = 2**-11 if "clip_es" in (first, second) else 1e-6
    assert_holds(folder_of(tmp_path / "second", second), second, maps, tolerance)


def test_a_crf_pair_taken_for_psa_dicts_is_refused_file_by_file(tmp_path, psa, capsys):
    convert_cams(psa, tmp_path / "crf", "psa_crf", alphas=(1, 12))
    report = convert_cams(tmp_path / "crf_12", tmp_path / "irn", "irn")
    assert report.written == []
    assert list(report.failed) == NAMES
    assert 'format="psa_crf" or "psa"' in report.failed[NAMES[0]]
    assert "0 written, 0 already there, 2 failed" in capsys.readouterr().err


def test_bad_files_are_told_and_the_rest_is_taken_up_again(tmp_path, psa, maps, capsys):
    good = (psa / f"{NAMES[0]}.npy").read_bytes()
    (psa / f"{NAMES[0]}.npy").write_bytes(good[:300])
    assert list(convert_cams(psa, tmp_path / "irn", "irn").failed) == [NAMES[0]]
    assert f"{NAMES[0]} skipped: {psa / NAMES[0]}.npy" in capsys.readouterr().err
    (psa / f"{NAMES[0]}.npy").write_bytes(good)
    report = convert_cams(psa, tmp_path / "irn", "irn")
    assert (report.written, report.existing) == ([NAMES[0]], [NAMES[1]])
    assert_holds(tmp_path / "irn", "irn", maps)
    assert convert_cams(psa, tmp_path / "irn", "irn", overwrite=True).written == NAMES


def test_the_size_of_the_photos_is_restored(tmp_path, psa):
    save_cams(psa / f"{NAMES[1]}.npy", {})  # no map to tell the size
    report = convert_cams(psa, tmp_path / "irn", "irn")
    assert "images=" in report.failed[NAMES[1]]
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (28, 18)).save(tmp_path / "photos" / f"{NAMES[0]}.jpg")
    report = convert_cams(psa, tmp_path / "large", "irn", images=tmp_path / "photos")
    assert f"{NAMES[1]}.jpg or {NAMES[1]}.png in {tmp_path / 'photos'}" in report.failed[NAMES[1]]
    Image.new("RGB", (6, 5)).save(tmp_path / "photos" / f"{NAMES[1]}.png")
    assert convert_cams(psa, tmp_path / "large", "irn", images=tmp_path / "photos").written == [NAMES[1]]
    shapes = {n: np.load(tmp_path / "large" / f"{n}.npy", allow_pickle=True).item()["high_res"].shape for n in NAMES}
    assert shapes == {NAMES[0]: (2, 18, 28), NAMES[1]: (0, 5, 6)}


def test_mistakes(tmp_path, psa):
    for source, target, fact in [
        (tmp_path / "absent", tmp_path / "to", "absent is not a folder"),
        (psa, psa, r"psa .*another target"),
        (tmp_path, tmp_path / "to", rf"\.npy or \.npz .*{re.escape(str(tmp_path))}\."),
    ]:
        with pytest.raises(ValueError, match=fact):
            convert_cams(source, target, "irn")
    with pytest.raises(ValueError, match=r"'voc'.*psa, psa_crf, irn"):
        convert_cams(psa, tmp_path / "to", "voc")
    with pytest.raises(ValueError, match=r"'voc'.*psa, psa_crf, irn"):
        convert_cams(psa, tmp_path / "to", "irn", "voc")
    with pytest.raises(ValueError, match=r"alphas=\(4, 4\).* 0 < low < high"):
        convert_cams(psa, tmp_path / "to", "psa_crf", alphas=(4, 4))
    convert_cams(psa, tmp_path / "irn", "irn")
    with pytest.raises(ValueError, match=rf"{NAMES[0]}\.npy .*\bclip_es\. .*another folder.*\birn\b"):
        convert_cams(psa, tmp_path / "irn", "clip_es")
    assert not (tmp_path / "to").exists()
    crf = tmp_path / "crf"
    convert_cams(psa, crf, "psa_crf")
    with pytest.raises(ValueError, match=r"crf_4 .*another target"):
        convert_cams(tmp_path / "crf_4", crf, "psa_crf", "psa_crf")


# ---------------------------------------------------------------- the command


def test_command(tmp_path, psa, maps, capsys):
    assert main(["convert", str(psa), str(tmp_path / "irn"), "--to", "irn"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"{tmp_path / 'irn'}: 2 written, 0 already there, 0 failed\n"
    assert_holds(tmp_path / "irn", "irn", maps)
    assert cam_format(tmp_path / "irn" / f"{NAMES[0]}.npy") == "irn"

    crf = ["convert", str(psa), str(tmp_path / "crf"), "--to", "psa_crf", "--alphas", "1", "12"]
    assert main(crf) == 0
    back = ["convert", str(tmp_path / "crf_12"), str(tmp_path / "back"), "--to", "psa"]
    assert main(back) == 1  # some were skipped: it does not say which of two formats it is
    assert 'format="psa_crf" or "psa" (evaluate --format, convert --from)' in capsys.readouterr().err
    assert main([*back, "--from", "psa_crf"]) == 0
    assert_holds(tmp_path / "back", "psa", maps)


def test_command_without_an_extra(tmp_path, psa, monkeypatch):
    for package in ("rich", "PIL", "matplotlib", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "acr_reg.commands.convert", raising=False)
    assert main(["convert", str(psa), str(tmp_path / "irn"), "--to", "irn"]) == 0


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["absent", "to", "--to", "irn"], "absent is not a folder"),
        (["psa", "psa", "--to", "irn"], "psa .*another target"),
        (["psa", "to", "--to", "psa_crf", "--alphas", "4", "1"], r"alphas=\(4.0, 1.0\).* 0 < low < high"),
        (["psa", "to", "--to", "irn", "--alphas", "4", "32"], r"--alphas .*--to irn.* --to labels or psa_crf"),
        (
            ["psa", "to", "--to", "irn", "--threshold", "0", "--alphas", "4", "32"],
            r"--threshold and --alphas .*--to irn",
        ),
        (["psa", "to", "--to", "psa_crf", "--no-background"], r"--no-background .*--to psa_crf.* --to labels"),
        (["psa", "to", "--to", "irn", "--workers", "-1"], r"--workers is -1\b.* 0 "),
        (["psa", "to", "--to", "labels"], r"No rule .*exactly one of --threshold, .*--best-on, --no-background"),
        (
            ["psa", "to", "--to", "labels", "--threshold", "0", "--ignore-between", "0.1", "0.2"],
            r"--threshold and --ignore-between .* exactly one of",
        ),
        (["psa", "to", "--to", "labels", "--best-on", "dev.txt"], r"--best-on .*--masks and --classes too"),
        (
            ["psa", "to", "--to", "labels", "--best-on", "dev.txt", "--masks", "m", "--no-background"],
            r"--best-on and --no-background .* exactly one of",
        ),
        (["psa", "to", "--to", "labels", "--threshold", "0.3", "--masks", "m"], r"--masks is of --best-on alone"),
        (["psa", "to", "--to", "labels", "--threshold", "30"], r"threshold=30\.0 .*\[0, 1\]"),
        (
            ["psa", "to", "--to", "labels", "--ignore-between", "0.7", "0.3"],
            r"ignore_between=\(0\.7, 0\.3\).* low < high",
        ),
        (
            ["psa", "m", "--to", "labels", "--best-on", "dev.txt", "--masks", "m", "--classes", "21"],
            r"m is both --masks and TARGET",
        ),
        (
            ["psa", "to", "--to", "labels", "--best-on", "dev.txt", "--masks", "m", "--classes", "1"],
            r"--classes is 1\b.* at least 2",
        ),
        (
            ["psa", "to", "--to", "labels", "--best-on", "dev.txt", "--masks", "m", "--classes", "21"],
            r"list dev\.txt cannot be read",
        ),
    ],
)
def test_errors_of_the_user(tmp_path, psa, monkeypatch, capsys, arguments, fact):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    assert sorted(os.listdir(tmp_path)) == ["psa"]
    assert re.search(rf"acr_reg convert: error: .*{fact}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--threshold", "0.3"], {"threshold": 0.3}),
        (["--ignore-between", "0.3", "0.6"], {"ignore_between": (0.3, 0.6)}),
        (["--alphas", "4", "32"], {"alphas": (4, 32)}),
        (["--no-background"], {"background": False}),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_labels_by_each_rule(tmp_path, psa, maps, capsys, options, rule):
    command = ["convert", str(psa), str(tmp_path / "labels"), "--to", "labels", *options]
    assert main(command) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'labels'}: 2 written, 0 already there, 0 failed\n"
    for name, cams in maps.items():
        np.testing.assert_array_equal(read_mask(tmp_path / "labels" / f"{name}.png"), pseudo_labels(cams, **rule))
    assert main(command) == 0
    assert "0 written, 2 already there" in capsys.readouterr().err
    save_cams(psa / "2008_000001.npy", {})
    assert main(command) == 1  # one was skipped


def test_labels_of_another_threshold_are_refused_unless_overwritten(tmp_path, psa, capsys):
    command = ["convert", str(psa), str(tmp_path / "labels"), "--to", "labels", "--threshold"]
    assert main([*command, "0.3"]) == 0
    assert main([*command, "0.4"]) == 2
    assert re.search(r"error: .*\.png was made with threshold=0\.3\b.*threshold=0\.4\b", capsys.readouterr().err)
    assert main([*command, "0.4", "--overwrite"]) == 0


@pytest.fixture
def masks(tmp_path, maps):
    """The classes above 0.5, but for some pixels."""
    rng = np.random.default_rng(1)
    (tmp_path / "masks").mkdir()
    for name, cams in maps.items():
        ids = pseudo_labels(cams, 0.5)
        save_mask(tmp_path / "masks" / f"{name}.png", np.where(rng.random(ids.shape) < 0.2, 0, ids))
    (tmp_path / "dev.txt").write_text("\n".join(NAMES))
    return tmp_path / "masks"


def scores_of(tmp_path, masks, *more):
    evaluate = ["evaluate", "--masks", masks, "--list", tmp_path / "dev.txt", "--json", tmp_path / "scores.json"]
    assert main([str(argument) for argument in (*evaluate, *more)]) == 0
    return json.loads((tmp_path / "scores.json").read_text())


def test_labels_at_the_best_threshold_of_a_list_score_as_the_maps(tmp_path, psa, masks, capsys):
    target, listed = tmp_path / "labels", tmp_path / "dev.txt"
    command = ["convert", psa, target, "--to", "labels", "--best-on", listed, "--masks", masks, "--classes", 21]
    assert main([str(argument) for argument in command]) == 0
    output = capsys.readouterr()
    maps = scores_of(tmp_path, masks, "--cams", psa, "--classes", 21)
    best = f"best threshold on {listed}: {maps['best_threshold']} (mIoU {maps['best_miou']:.4f})\n"
    assert output.err == f"{best}{target}: 2 written, 0 already there, 0 failed\n"
    labels = scores_of(tmp_path, masks, "--labels", target, "--classes", 21)
    assert 0.3 < labels["miou"] == maps["best_miou"] < 1
    assert labels["per_class_iou"] == maps["per_class_iou"]
    with Image.open(target / f"{NAMES[0]}.png") as image:
        assert f"threshold={maps['best_threshold']}" in image.info["acr_reg labels"]


@needs_gloo
def test_two_processes_of_torchrun_make_the_labels_of_one(tmp_path, psa, maps, masks):
    """One threshold over the whole list, though each process scores half of it; one summary."""
    for number in range(3):
        save_cams(psa / f"2008_00000{number}.npy", maps[NAMES[0]])
    arguments = ["--to", "labels", "--best-on", tmp_path / "dev.txt", "--masks", masks, "--classes", 21, "--workers", 1]
    (psa / "2008_000001.npy").write_bytes(b"damaged")
    assert main([str(argument) for argument in ("convert", psa, tmp_path / "one", *arguments)]) == 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "acr_reg"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = Program(*torchrun, "convert", psa, tmp_path / "two", *arguments, **environment)
    _, said = process.communicate(timeout=300)
    assert said.count("best threshold on") == 1
    assert said.count(f"{tmp_path / 'two'}: 4 written, 0 already there, 1 failed") == 1
    assert said.count("2008_000001 skipped") == 1
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    for file in os.listdir(tmp_path / "one"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_a_job_of_an_array_finds_the_threshold_of_the_whole_list(tmp_path, psa, masks, monkeypatch, capsys):
    """Its processes never hear of each other, so each scores all; the labels are shared."""
    arguments = ["--to", "labels", "--best-on", tmp_path / "dev.txt", "--masks", masks, "--classes", 21]
    assert main([str(argument) for argument in ("convert", psa, tmp_path / "one", *arguments)]) == 0
    capsys.readouterr()
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert main([str(argument) for argument in ("convert", psa, tmp_path / "two", *arguments)]) == 0
        assert sorted(os.listdir(tmp_path / "two")) == [f"{name}.png" for name in NAMES[: rank + 1]]
        assert f"share {rank + 1} of 2: 1 written" in capsys.readouterr().err
    for name in NAMES:
        assert (tmp_path / "two" / f"{name}.png").read_bytes() == (tmp_path / "one" / f"{name}.png").read_bytes()


def test_labels_without_background_score_as_the_maps(tmp_path, psa, masks):
    assert main(["convert", str(psa), str(tmp_path / "labels"), "--to", "labels", "--no-background"]) == 0
    maps = scores_of(tmp_path, masks, "--cams", psa, "--classes", 20, "--no-background")
    labels = scores_of(tmp_path, masks, "--labels", tmp_path / "labels", "--classes", 20, "--no-background")
    assert 0 < labels["miou"] == maps["best_miou"]


def test_maps_of_another_size_than_the_masks_need_the_photos(tmp_path, psa, masks, capsys):
    save_mask(masks / f"{NAMES[0]}.png", np.zeros((18, 28), int))
    target, listed = tmp_path / "labels", tmp_path / "dev.txt"
    command = ["convert", psa, target, "--to", "labels", "--best-on", listed, "--masks", masks, "--classes", 21]
    assert main([str(argument) for argument in command]) == 2
    assert re.search(rf"{NAMES[0]}\.npy is 9x14 .* 18x28 .*convert --images", capsys.readouterr().err)
    assert not target.exists()


def test_a_crf_pair_is_scored_where_it_is_named(tmp_path, psa, maps, capsys):
    """`evaluate` takes the file's own word, and asks where that is not enough."""
    convert_cams(psa, tmp_path / "crf", "psa_crf", progress=False)
    convert_cams(psa, tmp_path / "clip_es", "clip_es", progress=False)
    (tmp_path / "masks").mkdir()
    for name, cams in maps.items():
        ids = np.select([values > 0.5 for values in cams.values()], [number + 1 for number in cams], 0)
        Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "list.txt").write_text("\n".join(NAMES))
    rest = ["--masks", tmp_path / "masks", "--list", tmp_path / "list.txt", "--classes", 21]

    def score(cams, *more):
        arguments = ["evaluate", "--cams", tmp_path / cams, *rest, "--json", tmp_path / "scores.json", *more]
        code = main([str(argument) for argument in arguments])
        return json.loads((tmp_path / "scores.json").read_text())["best_miou"] if code == 0 else code

    expected = score("psa")
    assert expected > 0.5
    assert score("crf_32") == 2
    assert "evaluate --format" in capsys.readouterr().err
    assert score("crf_32", "--format", "psa_crf") == expected
    assert score("clip_es") == pytest.approx(expected, abs=0.02)
