"""The pages of the study and its blocks in other pages: each seed, its origin, what is missing."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm  # noqa: F401  # this file is left out where the extras are not installed

from acr_reg.demo.record import write_json
from benchmarks.marked_page import begin, filled
from benchmarks.study import __main__ as study
from benchmarks.study.counts import Difference
from benchmarks.study.page.blocks import GUIDE, NOT_SCORED, PROTOCOL, README, STUDY, blocks
from benchmarks.study.page.primary import HARMS, HELPS, UNCLEAR, judged, rule
from benchmarks.study.page.report import appendix
from benchmarks.study.page.scenes import scenes
from benchmarks.study.page.tables import NOT_RUN, WEIGHTS_NOTE, groups, paired_mean, raw_of, reference_of
from benchmarks.study.plans import FEW
from benchmarks.study.settings import CAM_WEIGHTS, CLASS_TOKENS, CONDITIONS, NETWORKS, SEEDS, SETS, Cell, Reading, base
from benchmarks.study.store import FROZEN
from benchmarks.study.views import VIEWS
from tests.support.study import freeze, made_counts, made_record, made_results


def test_the_report_shows_every_seed_and_its_own_origin(tmp_path: Path):
    made_results(tmp_path)
    made_results(tmp_path, "test")
    other = Cell(base("voc", "affinity", 0.5), 0, "test")
    write_json(tmp_path / other.file, made_record(other, 0.5))
    text = ["Both is to be above two.", "The rule is in benchmarks/study_choice.py."]
    write_json(tmp_path / "primary.json", {"text": text, "contrasts": [["two", "both"], ["misreported", "both"]]})
    baseline = {"rows": [{"name": "best centred ellipse", "miou": 0.359}]}
    write_json(tmp_path / "voc" / "dev" / "baselines.json", baseline)
    assert rule(tmp_path) == "\n".join(text) + "\n\n(Today benchmarks/study_choice.py is benchmarks/study/choice.py.)"
    page = appendix(tmp_path, "voc")
    assert WEIGHTS_NOTE in page
    assert "| best centred ellipse |  |  | 0.359 |" in page
    # Every seed of every contrast of VOC, and MSRC said to be missing.
    reference, better, control = (CONDITIONS[name].title for name in ("two", "both", "misreported"))
    rows = page.partition(f"From {reference} to {better}, weight 0.5:\n")[2].splitlines()[3:5]
    assert len(rows) == 2
    for seed, row in enumerate(rows):
        gain = made_counts(seed, 0.6).miou() - made_counts(seed, 0.5).miou()
        assert row.startswith(f"| {seed} | 0.800 to 0.799 |")
        assert f"| {gain:+.3f} (" in row
    assert page.count(f"From {control}, weight 0.5 to {better}, weight 0.5:") == 1
    assert "Not scored yet." not in page and "Not scored yet." in appendix(tmp_path, "msrc")
    frozen = next(line for line in page.splitlines() if line.startswith("Settings, chosen on dev photos: "))
    alone = CONDITIONS["affinity"].title
    assert better in frozen and alone not in frozen  # another plan's, in the table below
    assert page.count(f"| {alone}, weight 0.5 | 1 |") == 1
    assert page.count(f"From {reference} to {alone}, weight 0.5:\n") == 1
    # The weight that loses mAP is no candidate at matched mAP; the better one is.
    matched = page.partition("At matched mAP")[2].partition("\n\n|")[0].partition("###")[0]
    assert "weight 0.5" in matched
    assert "weight 1.5" not in matched
    assert max(line.count(" | ") for line in page.splitlines()) < 9


def test_details_are_of_the_frozen_size_and_epochs_however_few_were_run_there(tmp_path: Path):
    made_results(tmp_path)
    cell = Cell(base("voc", epochs=4), 0)
    write_json(tmp_path / cell.file, made_record(cell, 0.5))

    def detailed() -> set[str]:
        lines = appendix(tmp_path, "voc").splitlines()
        return {
            line.split("photos, ", 1)[1] for line in lines if line.startswith(("### How", "### Classes", "### Thresh"))
        }

    assert [line.split(", view")[0] for line in detailed()] == [f"{SETS['voc'].size} px, 2 epochs"]
    entry = {"plan": "primary", "setting": asdict(cell.setting), "reading": asdict(Reading()), "seeds": [0]}
    write_json(tmp_path / FROZEN, {"commit": "none", "cells": [entry]})
    assert [line.split(", view")[0] for line in detailed()] == [f"{SETS['voc'].size} px, 4 epochs"]


def test_differences_are_paired_with_the_reference_of_the_same_view(tmp_path: Path):
    made_results(tmp_path)
    stray = Cell(base("voc", "two", view="crop"), 0)
    write_json(tmp_path / stray.file, made_record(stray, 0.9))
    found = groups(tmp_path)
    both = next(g for g in found if g.setting.condition == "both")
    reference = reference_of(both, found)
    assert reference.setting == base("voc", "two")
    expected = [made_counts(seed, 0.6).miou() - made_counts(seed, 0.5).miou() for seed in (0, 1)]
    mean, deviation, seeds = paired_mean(reference, both, raw_of)
    assert (mean, deviation) == pytest.approx((np.mean(expected), np.std(expected, ddof=1)))
    assert seeds == 2


def test_the_primary_contrast_is_judged_by_the_rule_that_was_written_down():
    clear, doubtful = Difference(0.02, 0.01, 0.03), Difference(0.01, -0.01, 0.02)
    assert judged([clear] * 3 + [doubtful] * 2) == HELPS
    assert judged([clear] * 2 + [doubtful] * 3) == UNCLEAR
    assert judged([clear] * 4 + [Difference(-0.001, -0.01, 0.01)]) == UNCLEAR
    assert judged([Difference(-d.value, -d.high, -d.low) for d in [clear] * 3 + [doubtful] * 2]) == HARMS


@pytest.mark.parametrize(
    ("quality", "mean_ap", "said"),
    [
        (0.6, 0.80, "**a gain**"),
        (0.4, 0.90, "**a loss**"),
        (0.5, 0.80, "**no clear difference**"),
        (0.6, 0.78, "**a trade, not a gain: mAP falls by 0.020**"),
    ],
)
def test_the_page_says_what_the_rule_says(tmp_path: Path, quality: float, mean_ap: float, said: str):
    write_json(tmp_path / "primary.json", {"text": [], "contrasts": [["two", "both"]]})
    write_json(tmp_path / "voc" / "test" / "baselines.json", {"rows": [{"name": "ellipse", "miou": 0.3}]})

    def page(seeds: tuple[int, ...]) -> str:
        for seed in seeds:
            for condition, weight, found in (("two", 0.0, (0.5, 0.8)), ("both", 0.5, (quality, mean_ap))):
                cell = Cell(base("voc", condition, weight), seed, "test")
                write_json(tmp_path / cell.file, made_record(cell, *found))
        return appendix(tmp_path, "voc")

    assert "nothing yet: 1 of 5 seeds are missing" in page(SEEDS[:-1])
    whole = page(SEEDS[-1:])
    assert said in whole
    gains = [made_counts(seed, quality).miou() - made_counts(seed, 0.5).miou() for seed in SEEDS]
    interval = np.mean(gains) + np.array((-1, 1)) * 2.776 * np.std(gains, ddof=1) / 5**0.5
    assert "| {:+.3f} to {:+.3f} |".format(*interval) in whole
    above = made_counts(0, quality).miou() > 0.3
    assert ("is above it" if above else "**not yet useful**") in whole


@pytest.fixture(scope="module")
def committed() -> dict[Path, dict[str, str]]:
    return blocks(study.HERE / "results")


@pytest.mark.parametrize("path", [STUDY, PROTOCOL, README, GUIDE], ids=lambda path: path.name)
def test_blocks_in_pages_are_current(committed: dict[Path, dict[str, str]], path: Path):
    text = current = path.read_text(encoding="utf-8")
    for marker, block in committed[path].items():
        current = filled(current, marker, block)
    assert text == current, "run python -m benchmarks.study report"


def test_the_appendices_are_current():
    for name, page in study.appendices(study.HERE / "results", study.PAGE.parent).items():
        assert (study.PAGE.parent / name).read_text(encoding="utf-8") == page, "run python -m benchmarks.study report"


def test_blocks_hold_the_figures_of_the_results(committed: dict[Path, dict[str, str]]):
    results = study.HERE / "results"
    readme, (weights, maps) = (list(committed[page].values()) for page in (README, GUIDE))
    names = ("msrc", "voc", "conditions", "views")
    msrc, voc, conditions, views = (committed[STUDY][begin("study report", name)] for name in names)
    tested = {g.setting.condition: g for g in groups(results) if (g.setting.photos, g.split) == ("msrc", "test")}
    raw = {name: np.array([raw_of(record) for record in group.records.values()]) for name, group in tested.items()}
    mean = f"{raw['both'].mean():.3f} ± {raw['both'].std(ddof=1):.3f} |"
    assert f"| with ACR, weight 0.17, the default | 0.906 | {mean}" in msrc and mean in readme[0]
    assert "last 3 layers | | 0.510 |" in msrc and "ellipse | | 0.359 |" in voc
    gain = raw["affinity"] - raw["two"][:3]
    assert f"| affinity alone | {gain.mean():+.3f} ± {gain.std(ddof=1):.3f} |" in conditions
    assert conditions.count(" (five seeds) |") == 2 and conditions.count(f"| {NOT_RUN} |") == 2
    assert views.count("\n| ") == len(VIEWS)
    assert re.findall(r"^\| ([\d.]+) \|", maps, re.M) == [f"{weight:g}" for weight in CAM_WEIGHTS]
    assert re.findall(r"^\| ([\d.]+) \|", weights, re.M) == ["0.06", "0.17", "0.5"]


def test_blocks_of_an_unfinished_study_say_what_was_not_run(tmp_path: Path):
    empty = blocks(tmp_path)
    assert all(NOT_RUN in block for block in (*empty[README].values(), *empty[GUIDE].values()))
    for name in ("msrc", "voc", "conditions", "views"):
        assert empty[STUDY][begin("study report", name)] == NOT_RUN
    for name in ("msrc", "voc", "terms"):
        assert empty[STUDY][begin("study report", f"class tokens {name}")] == NOT_SCORED
    made_results(tmp_path, "test")
    assert NOT_RUN in blocks(tmp_path)[README].popitem()[1]
    msrc, voc = (blocks(tmp_path)[STUDY][begin("study report", name)] for name in ("msrc", "voc"))
    assert msrc == NOT_RUN and "two seeds" in voc


def test_class_tokens_have_blocks_of_their_own(tmp_path: Path):
    folder = tmp_path / NETWORKS[CLASS_TOKENS].folder
    for seed in FEW:
        for condition, weight, quality in (("two", 0.0, 0.5), ("both", 0.17, 0.6), ("misreported", 0.17, 0.45)):
            for split in ("dev", "test"):
                cell = Cell(base("voc", condition, weight, network=CLASS_TOKENS), seed, split)
                write_json(folder / cell.file, made_record(cell, quality))
    found = blocks(tmp_path)[STUDY]
    block = found[begin("study report", "class tokens voc")]
    assert "with ACR, weight 0.17" in block and found[begin("study report", "voc")] == NOT_RUN
    assert "| mIoU, agreement | fused | fused, spread | patch | attention | gradient |" in block
    assert block.count(", 0.70 |") == 5 * 3
    assert found[begin("study report", "class tokens class maps")] == NOT_RUN
    freeze(folder, [Cell(base("voc", "both", 0.17, network=CLASS_TOKENS), 0)], commit=False)
    for seed in FEW:
        cell = Cell(base("voc", "both_cam", 0.17, 5.0, network=CLASS_TOKENS), seed)
        write_json(folder / cell.file, made_record(cell, 0.4))
    (row,) = blocks(tmp_path)[STUDY][begin("study report", "class tokens class maps")].splitlines()[2:]
    assert re.fullmatch(r"\| VOC animals, ACR \| 5 \| -0\.\d+ ± 0\.\d+ \| 0\.70 to 0\.70 \| 2 \|", row)
    page = appendix(folder, "voc", network=CLASS_TOKENS)
    assert "VOC animals, class tokens and patch head" in page and "the fused map: the root" in page


def test_an_empty_study_says_so(tmp_path: Path):
    assert rule(tmp_path) == "Not written down yet."
    assert "Not scored yet." in appendix(tmp_path, "voc") and "Not run yet." in scenes(tmp_path)


def test_the_demos_scenes_are_taken_over(tmp_path: Path, capsys):
    def row(name: str, raw: float) -> dict[str, object]:
        training = None if "ACR" not in name else {"cpu_seconds": 90.0}
        maps = {"fused map": {"miou": raw}} | ({} if training is None else {"patch map": {"miou": raw / 2}})
        return {"name": name, "maps": maps, "mean_ap": 0.9, "terms": {"entropy": 0.9}, "training": training}

    def run(rows: list[tuple[str, float]], split: str = "test") -> Path:
        seeds = [{"seed": s, "rows": [row(n, value + s / 100) for n, value in rows]} for s in (3, 4)]
        command = ["demo", "--output", str(tmp_path), "--controls"]
        content = {"command": command, "settings": {}, "split": split, "versions": {}, "machine": {}}
        (tmp_path / "demo.json").write_text(json.dumps(content | {"seeds": seeds}))
        return tmp_path / "demo.json"

    rows = [("best centred ellipse", 0.24), ("without ACR", 0.25), ("with ACR", 0.31)]
    results = ["--results", str(tmp_path)]
    for bad, said in (
        (lambda: run(rows), "of test scenes and lacks ACR, flip not undone."),
        (lambda: run([*rows, ("ACR, flip not undone", 0.28)], "dev"), "of dev scenes and lacks no condition."),
        (lambda: tmp_path / "none.json", "none.json"),
    ):
        assert study.main(["scenes", str(bad()), *results]) == 2
        error = capsys.readouterr().err
        assert said in error and "--controls" in error
    assert study.main(["scenes", str(run([*rows, ("ACR, flip not undone", 0.28)])), *results]) == 0
    one = str(tmp_path / "demo.json")
    assert study.main(["scenes", one, one, *results]) == 2 and "same seed" in capsys.readouterr().err
    page = scenes(tmp_path)
    assert "```bash\npython -m acr_reg demo --controls\n```" in page  # not where this machine wrote it
    assert "| mAP | fused map | patch map | entropy |" in page
    assert "| from without ACR to with ACR | +0.060 (+0.060 to +0.060), 2 of 2 | +0.030" in page
    assert "| from ACR, flip not undone to with ACR | +0.030" in page
    assert "| with ACR | 0.900 ± 0.000 | 0.345 ± 0.007 |" in page and "| best centred ellipse |  | 0.275" in page
