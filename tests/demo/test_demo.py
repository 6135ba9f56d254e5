"""The command ``python -m acr_reg demo`` from end to end, on scenes and on photos."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from acr_reg.__main__ import main
from acr_reg.demo.comparison import CONTROL, WITH, WITHOUT
from acr_reg.demo.scene_task import QUICK


def test_quick_demo_ends_well_and_says_that_its_figures_mean_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--quick", "--controls", "--threads", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mean nothing" in printed
    assert "synthetic" in printed
    assert CONTROL in printed
    assert all(len(line) <= 100 for line in printed.splitlines() if not line.startswith("Written:"))
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size[0] > 600
    run = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert set(run) >= {"command", "versions", "machine", "settings", "split", "seeds", "summary", "paired_differences"}
    rows = {row["name"]: row for row in run["seeds"][0]["rows"]}
    assert set(rows) == {"all background", "best centred ellipse", WITHOUT, WITH, "ACR, flip not undone"}
    for name in (WITHOUT, WITH):
        assert list(rows[name]["maps"]) == ["fused map", "patch map", "class attention"]
        assert all(0 <= score["miou"] <= 1 for score in rows[name]["maps"].values())
        fused = rows[name]["maps"]["fused map"]
        assert len(fused["curve"]) == len(fused["thresholds"]) == 100
        assert 0 < rows[name]["terms"]["entropy"] <= 1
        assert rows[name]["training"]["seconds"] > 0
        assert len(rows[name]["training"]["history"]) == QUICK.continue_steps
    assert set(rows[WITH]["training"]["history"][0]) == {"classification", "activation", "affinity", "cam", "entropy"}
    assert set(rows[WITHOUT]["training"]["history"][0]) == {"classification"}
    assert rows[WITH]["training"]["history"][0] != rows["ACR, flip not undone"]["training"]["history"][0]


@pytest.mark.parametrize("background", [True, False])
def test_the_command_runs_on_a_folder(
    tmp_path: Path,
    make_photos: Callable[..., Path],
    weights: Path,
    background: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = make_photos(["background"] * background + ["cat", "bird", "dog"])
    output = tmp_path / "out"
    options = ["--weights", str(weights), "--size", "28", "--epochs", "1", "--split", "test", "--output", str(output)]
    assert main(["demo", "--voc", str(root), *options]) == 0
    printed = capsys.readouterr().out
    assert "3 classes" in printed
    assert "weights of weights.npz, which may have seen masks" in printed
    run = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in run["seeds"][0]["rows"]]
    with_background = ["all background", "best centred ellipse"]
    baselines = with_background if background else ["largest present class", "location prior"]
    assert names == [*baselines, "without ACR", "with ACR"]
    assert run["settings"]["size"] == 28
    assert run["seeds"][0]["rows"][-1]["maps"]["raw CAM"]["threshold"] is None or background
    assert (output / "demo.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--size", "28"], ("--size", "photos", "--voc DIR")),
        (["--seeds", "0"], ("--seeds is 0", "1")),
        (["--affinity-weight", "-1"], ("--affinity-weight is -1.0", "0 or more")),
        (["--quick", "--voc", "photos"], ("--quick", "synthetic scenes")),
        (["--cam-weight", "1", "--voc", "photos"], ("--cam-weight", "synthetic scenes")),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    options: list[str], facts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *options, "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert not [fact for fact in facts if fact not in printed]
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(
    tmp_path: Path, make_photos: Callable[..., Path], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    options = ["--weights", str(weights), "--size", "100", "--output", output]
    assert main(["demo", "--voc", str(make_photos()), *options]) == 2
    printed = capsys.readouterr().err
    assert not [fact for fact in ("--size is 100", "multiple of 14", "try 98") if fact not in printed]
