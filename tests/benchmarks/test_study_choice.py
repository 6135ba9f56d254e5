"""The plans of the study, and how dev cells choose the settings that are frozen."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import timm  # noqa: F401  # this file is left out where the extras are not installed

from acr_reg.demo.record import write_json
from benchmarks.study import __main__ as study
from benchmarks.study.choice import PRIMARY, choose
from benchmarks.study.plans import plan
from benchmarks.study.scoring import RAW
from benchmarks.study.settings import CLASS_TOKENS, SEEDS, SETS, WEIGHTS, Cell, Reading, StudyError, base
from benchmarks.study.store import FROZEN, frozen_entries
from tests.support.study import made_record, made_results


def test_plans_name_each_cell_once_and_dev_plans_never_test():
    for photos in SETS:
        cells = plan("dev", photos, Path("none"))
        assert len({cell.file for cell in cells}) == len(cells)
        assert {cell.split for cell in cells} == {"dev"}
        own = [cell for cell in cells if cell.seed == 0]  # as a process that takes one seed runs them
        weights = {cell.setting.weight for cell in own[:7] if cell.setting.condition == "both"}
        assert weights == set(WEIGHTS) and {cell.setting.condition for cell in own[:7]} == set(PRIMARY)
    with pytest.raises(StudyError, match=r"none/frozen\.json does not exist"):
        plan("primary", "msrc", Path("none"))


def test_the_rest_of_the_grid_is_planned_where_the_primary_contrast_was_frozen(tmp_path: Path):
    frozen = [{"plan": "primary", "setting": asdict(base("voc", "both", 1.5, epochs=7)), "seeds": [0]}]
    tuned = {photos: plan("dev", photos, Path("none")) for photos in SETS}
    write_json(tmp_path / FROZEN, {"commit": "none", "cells": frozen})
    added = plan("dev", "voc", tmp_path)
    assert added[: len(tuned["voc"])] == tuned["voc"]
    rest = {(cell.setting.condition, cell.setting.weight, cell.setting.epochs) for cell in added[len(tuned["voc"]) :]}
    assert {("affinity", 1.5, 7), ("both", 0.17, 7), ("smoothing", 1.5, 7), ("plain", 0.0, 7)} < rest
    assert {epochs for *_, epochs in rest} == {7}
    assert plan("dev", "msrc", tmp_path) == tuned["msrc"]


def test_the_network_with_class_tokens_tunes_both_and_the_reference_at_the_same_epochs():
    for photos in SETS:
        cells = plan("dev", photos, Path("none"), CLASS_TOKENS)
        assert {cell.setting.network for cell in cells} == {CLASS_TOKENS}
        epochs = {name: {c.setting.epochs for c in cells if c.setting.condition == name} for name in ("two", "both")}
        assert epochs["two"] == epochs["both"] and len(epochs["two"]) == 2


@pytest.mark.parametrize(("name", "splits"), [("primary", {"test", "train"}), ("main", {"test"})])
def test_training_photos_are_scored_for_the_primary_contrast_alone(name: str, splits: set[str]):
    assert {cell.split for cell in plan(name, "voc", study.HERE / "results")} == splits


def test_settings_are_chosen_by_one_rule(tmp_path: Path):
    made_results(tmp_path)
    stray = Cell(base("voc", "both", 0.5, view="crop"), 0)  # better, but of another view
    write_json(tmp_path / stray.file, made_record(stray, 0.99))
    chosen = choose(study.all_cells(tmp_path), "voc")
    setting, reading = chosen["both"]
    assert (setting.weight, setting.view, reading) == (0.5, "flip", Reading(-2, "last"))
    assert chosen["misreported"][1] == reading
    assert chosen["two"][1] == Reading(-1, "all")
    with pytest.raises(StudyError, match=r"msrc has no dev cell of two, both\. Run the plan dev"):
        choose(study.all_cells(tmp_path), "msrc")


def test_candidates_are_compared_by_the_seeds_and_epochs_that_all_have(tmp_path: Path):
    made_results(tmp_path)
    lucky = {(-1, RAW): 0.99}
    for condition, weight, epochs, seed in (
        ("both", 1.5, 2, 2),  # a seed that no other weight has
        ("affinity", 0.17, 2, 0),
        ("affinity", 0.5, 4, 0),  # epochs that are not the reference's
    ):
        cell = Cell(base("voc", condition, weight, epochs=epochs), seed)
        write_json(tmp_path / cell.file, made_record(cell, 0.5, readings={} if weight == 0.17 else lucky))
    chosen = choose(study.all_cells(tmp_path), "voc")
    assert chosen["both"][0].weight == 0.5
    assert (chosen["affinity"][0].weight, chosen["affinity"][0].epochs) == (0.17, 2)
    other = Cell(base("voc", "both", 0.06), 3)
    write_json(tmp_path / other.file, made_record(other, 0.5))
    with pytest.raises(StudyError, match=r"seed .*\(.*both-w0\.06.*: \[3\]"):
        choose(study.all_cells(tmp_path), "voc")


def test_the_reference_and_both_are_trained_equally_long(tmp_path: Path):
    made_results(tmp_path)
    lonely = Cell(base("voc", "both", 0.5, epochs=8), 0)  # the best, but the reference has no such epochs
    write_json(tmp_path / lonely.file, made_record(lonely, 0.9))
    for condition, weight, miou in (("two", 0.0, 0.85), ("both", 0.5, 0.1), ("both", 1.5, 0.89)):
        cell = Cell(base("voc", condition, weight, epochs=4), 0)
        write_json(tmp_path / cell.file, made_record(cell, 0.5, readings={(-3, RAW): miou}))
    chosen = choose(study.all_cells(tmp_path), "voc")  # "both" alone would rather have 2 epochs, where it reads 0.9
    assert {name: (s.weight, s.epochs) for name, (s, _) in chosen.items() if name in PRIMARY} == {
        "two": (0.0, 4),
        "both": (1.5, 4),
        "misreported": (1.5, 4),
    }
    fewer = [(cell, record) for cell, record in study.all_cells(tmp_path) if cell.setting != base("voc")]
    kept = [each for each in fewer if each[0].setting.condition != "both" or each[0].setting.epochs == 2]
    with pytest.raises(StudyError, match=r"epochs .*\(two: \[4\]; both: \[2\]\)"):
        choose(kept, "voc")


def test_settings_are_frozen_once_a_plan(tmp_path: Path, capsys):
    made_results(tmp_path)
    command = ["freeze", "--set", "voc", "--results", str(tmp_path), "--plan"]
    assert study.main([*command, "main"]) == 2
    assert "no plan primary of voc" in capsys.readouterr().err
    assert study.main([*command, "primary"]) == 0
    assert study.main([*command, "primary"]) == 2
    assert "the plan primary of voc already" in capsys.readouterr().err
    primary = frozen_entries(tmp_path)
    assert {entry["setting"]["condition"]: entry["seeds"] for entry in primary} == {
        name: list(SEEDS) for name in PRIMARY
    }
    # Cells that come later are chosen from for the other conditions; what is frozen stays, and its controls follow it.
    for condition, weight, miou in (("both", 0.17, 0.99), ("affinity", 0.17, 0.6), ("affinity", 0.5, 0.5)):
        cell = Cell(base("voc", condition, weight), 0)
        write_json(tmp_path / cell.file, made_record(cell, 0.5, readings={(-1, RAW): miou}))
    assert study.main([*command, "main"]) == 0
    found = frozen_entries(tmp_path)
    assert found[: len(primary)] == primary
    weights = {entry["setting"]["condition"]: entry["setting"]["weight"] for entry in found[len(primary) :]}
    assert weights == {"affinity": 0.17, "smoothing": 0.5}
    assert choose(study.all_cells(tmp_path), "voc", found)["both"][0].weight == 0.5
    assert choose(study.all_cells(tmp_path), "voc")["both"][0].weight == 0.17
