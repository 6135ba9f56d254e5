"""The study's floor: what resampling adds to the distance of two views, and the two conditions that change it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch

from acr_reg import Lattice, Scale, TokenLayout
from acr_reg.demo.record import write_json
from benchmarks.study.floor.distances import as_equivariant
from benchmarks.study.floor.measure import WIDTHS, measured, smooth
from benchmarks.study.page.floor import FLOOR, NOT_RUN, SHOWN, SIZES, causes, distances
from benchmarks.study.page.tables import groups
from benchmarks.study.photos import Photos
from benchmarks.study.settings import Cell, Reading, base
from benchmarks.study.training.networks import Run
from benchmarks.study.training.objective import Objective
from tests.benchmarks.test_study import consistent_pair
from tests.support.study import SIZE, made_counts, made_record, make_places, tiny, tiny_vit


def test_a_blurred_map_is_apart_from_the_same_map_and_of_maps_blurred_alike_the_rest_is_left():
    runs, batch = consistent_pair()
    assert Objective(tiny("blurred", 0.5), 1, 0)(runs, batch, 0)[0].item() > 0.05
    assert Objective(tiny("alike", 0.5), 1, 0)(runs, batch, 0)[0].item() == pytest.approx(0, abs=1e-6)
    view, grid = Scale(2), (6, 8)
    seen = Run(runs[1].logits, as_equivariant(runs[0].maps, view, TokenLayout(Lattice(*grid), Lattice(*grid), 1, (0,))))
    batch = replace(batch, view=view, viewed_grid=grid)
    one, both = (Objective(tiny(name, 0.5), 1, 0)([runs[0], seen], batch, 0)[0].item() for name in ("both", "alike"))
    assert 0 < both < 0.7 * one


def test_the_floor_tells_resampling_from_positions_and_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timm, "create_model", tiny_vit)
    voc = Photos("voc", SIZE, 6, make_places(tmp_path))
    rows = {row["view"]: row for row in measured(voc, voc.images("dev", torch.arange(2)))}
    for name in ("flip", "positions resampled through 6 x 6", "crop of whole tokens"):
        assert rows[name]["resampling alone"]["affinity"] == pytest.approx(0, abs=1e-5)
        assert rows[name]["as it was"] == rows[name]["blurred alike"]
        assert rows[name]["as it was"]["affinity"] > 1e-4
    for name in ("scale 0.5", "scale 2", "crop half a token off"):
        assert rows[name]["resampling alone"]["affinity"] > 0.01
        assert rows[name]["blurred alike"]["affinity"] < rows[name]["as it was"]["affinity"]
    late = rows["crop of whole tokens, after the frozen blocks"]["as it was"]["affinity"]
    assert 0 < late < rows["crop of whole tokens"]["as it was"]["affinity"]


def test_a_wider_function_of_places_is_resampled_with_less_loss():
    rows = {(row["view"], row["width"]): row for row in smooth(112)}
    for view in {view for view, _ in rows}:
        for name in ("as it was", "blurred alike"):
            found = [rows[view, width][name] for width in WIDTHS]
            assert found == sorted(found, reverse=True)
        assert rows[view, 1.0]["blurred alike"] < 0.4 * rows[view, 1.0]["as it was"]


def test_the_tables_show_the_cells_and_distances_that_there_are(tmp_path: Path):
    assert distances(tmp_path) == NOT_RUN and causes(tmp_path, []) == NOT_RUN
    leader = base("msrc", "both", 0.17, epochs=16)
    entry = {"plan": "primary", "setting": asdict(leader), "reading": asdict(Reading()), "seeds": [0]}
    write_json(tmp_path / "frozen.json", {"cells": [entry]})
    for name, weight, quality in (("two", 0.0, 0.5), ("both", 0.17, 0.4), ("alike", 0.17, 0.6)):
        cell = Cell(replace(leader, condition=name, weight=weight, view="crop"), 0)
        write_json(tmp_path / cell.file, made_record(cell, quality))
    lines = causes(tmp_path, groups(tmp_path)).splitlines()
    gains = [made_counts(0, quality).miou() - made_counts(0, 0.5).miou() for quality in (0.4, 0.6)]
    assert len(lines) == 4
    for line, gain in zip(lines[2:], gains, strict=True):
        assert line.startswith("| crop: ACR") and line.count(f" | {gain:+.3f} | {gain:+.3f} | +0.000 | 1 |") == 1
    row = {name: {"affinity": value} for name, value in zip(SHOWN, (0.43, 0.34, 0.29), strict=True)}
    rows = [{"size": size, "view": "crop (an image)", **row} for size in SIZES]
    write_json(tmp_path / FLOOR, {"rows": rows})
    assert distances(tmp_path).splitlines()[2:] == ["| crop | 0.43 | 0.34 | 0.29 | 0.43 | 0.34 | 0.29 |"]
