"""The cost benchmarks time what they say: the published procedure as written there is what the library computes."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import timm  # noqa: F401  # this file is left out where the extras are not installed
import torch

from benchmarks.cost import cam, folders, metrics, page, scaling, step, views
from benchmarks.cost.models import Setting, build_model
from benchmarks.cost.process import in_turns, merge, peak_megabytes, quartiles, run_fresh
from benchmarks.cost.variants import STEPS, difference, make_cam, make_step
from benchmarks.marked_page import filled

SMALL = Setting("tiny", size=64, batch=2, depth=3, present=3)


def test_models_of_one_setting_are_equal_and_all_variants_learn_every_parameter():
    one, other = build_model(SMALL).state_dict(), build_model(SMALL).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for variant in STEPS:
        model, run = make_step(variant, SMALL)
        run()
        assert all(p.grad is not None for p in model.parameters()), variant


@pytest.mark.parametrize("variant", ["published", "blockwise", "rows"])
def test_variants_agree_with_the_dense_loss(variant):
    value, gradient = difference(variant, SMALL)
    assert value < 1e-5
    assert gradient < 1e-5


def test_difference_would_tell_a_wrong_flip(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "flip", lambda self, *dims: self.clone())
    value, gradient = difference("published", SMALL)
    assert value > 1e-3
    assert gradient > 1e-2


def test_steps_differ_by_the_consistency_only():
    total, consistency, plain = (
        make_step(variant, SMALL)[1](weight) for variant, weight in (("dense", 1), ("dense", 0), ("plain", 1))
    )
    assert total.item() == pytest.approx(plain.item() + consistency.item(), rel=1e-5)
    assert consistency > 0


def test_published_class_maps_are_those_of_gradient_cam():
    ours, published = make_cam("library", SMALL)(), make_cam("published", SMALL)()
    assert published.shape == (2, 20, 4, 4)
    assert ((published.amax((2, 3)) > 0).sum(1) == 3).all()
    assert cam.map_error(ours, published) < 1e-5


def test_the_sweeps_are_the_single_pass():
    config = metrics.Config(images=3, height=20, width=30, num_classes=6)
    given = metrics.pictures(config)
    assert sorted({len(ids) for ids in given.classes}) != [1]
    miou = [metrics.score(variant, given, 6) for variant in metrics.VARIANTS]
    assert miou[0].shape == (100,)
    for each in miou[1:]:
        np.testing.assert_allclose(each, miou[0], rtol=1e-12)


def test_a_step_is_measured(monkeypatch):
    monkeypatch.setattr(step, "run_fresh", lambda script, payload, give_back=False: step.child(payload))
    setting = Setting("tiny", size=32, depth=1)
    results = step.measure(step.Config(setting, ("plain", "blockwise", "dense"), rounds=2, memory_steps=1))
    assert [r.variant for r in results] == ["plain", "blockwise", "dense"]
    assert all(r.peak_mb > 50 and r.cpu_seconds[1] > 0 and r.skipped is None for r in results)
    assert results[0].extra_mb == 0
    assert results[1].gradient_error < 1e-5
    assert results[1].extra_mb_over_published is None


def test_a_fresh_process_has_a_peak_of_its_own():
    payload = {"config": asdict(metrics.Config(images=1, height=8, width=8)), "variant": "library"}
    ballast = torch.ones(2**28)  # 1 GiB, which the peak of this process keeps
    assert peak_megabytes() > 1024 and ballast.shape
    assert 50 < run_fresh("metrics", payload) < 1000


def test_a_case_that_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(step, "available_megabytes", lambda: 2.0)
    monkeypatch.setattr(step, "run_fresh", fake_run)
    config = step.Config(Setting("tiny", size=384), rounds=2, check=False)
    results = {r.variant: r for r in step.measure(config)}
    assert "GiB" in results["published"].skipped
    assert results["dense"].cpu_seconds is None
    assert results["blockwise"].extra_cpu_seconds == (1.0, 1.0, 1.0)


def fake_run(script, payload, give_back=False):
    seconds = {"plain": 1.0, "blockwise": 2.0, "rows": 1.5, "published": 3.0, "dense": 3.0}
    if payload["do"] == "time":
        return {variant: [seconds[variant]] * payload["rounds"] for variant in payload["variants"]}
    return 100 * seconds[payload["variants"][0]]


def test_ratios_are_over_the_plain_step(monkeypatch, capsys):
    monkeypatch.setattr(step, "run_fresh", fake_run)
    results = {r.variant: r for r in step.measure(step.Config(SMALL, rounds=3, check=False))}
    assert results["blockwise"].extra_cpu_over_published == 0.5
    step.show(list(results.values()))
    assert "0.50" in capsys.readouterr().out
    assert results["rows"].extra_mb_over_published == 0.25


def test_the_table_says_when_a_row_was_measured(monkeypatch):
    monkeypatch.setattr(step, "run_fresh", fake_run)
    rows = [asdict(r) for r in step.measure(step.Config(SMALL, ("plain", "blockwise", "rows"), rounds=3, check=False))]
    assert rows[1].pop("measured") == rows[2]["measured"]  # as rows were before they had a date
    earlier, today = page.step_table(rows).splitlines()[2:]
    assert earlier.endswith("| earlier |")
    assert today.endswith(f"| {rows[2]['measured']} |")


def test_slopes_and_plot(tmp_path):
    rows = [
        {
            "variant": variant,
            "model": "tiny",
            "size": size,
            "tokens": (size // 16) ** 2,
            "extra_mb": (size // 16) ** (2 * power),
            "extra_cpu_seconds": (1.0, float((size // 16) ** 4), 0.0),
            "skipped": None,
        }
        for variant, power in (("published", 2), ("blockwise", 1))
        for size in (224, 448, 896)
    ]
    found = {s.variant: s for s in scaling.slopes(rows)}
    assert found["published"].memory == pytest.approx(2)
    assert found["blockwise"].memory == pytest.approx(1)
    assert found["blockwise"].cpu == pytest.approx(2)
    assert found["rows"].memory is None
    scaling.plot(rows, tmp_path / "docs" / "cost.png")
    assert (tmp_path / "docs" / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_jobs_over_a_folder_are_timed_and_compute_the_same_in_every_variant():
    # 26 files are scored twice, since two workers would not start for fewer than 50.
    config = folders.Config("vit_tiny_patch16_224", 32, 3, 26, 2, 20, 30, batches=(1, 2), rounds=1)
    results = folders.measure(config)
    assert [(r.job, r.variant) for r in results] == [
        ("write_cams", "batches of 1, no worker"),
        ("write_cams", "batches of 2, no worker"),
        ("write_cams", "batches of 1, a worker reads"),
        ("write_cams", "batches of 2, a worker reads"),
        ("evaluate", "no worker"),
        ("evaluate", "two workers"),
        ("evaluate", "counting alone, no files"),
    ]
    assert all(r.wall_seconds[0] > 0 and r.cpu_seconds[0] > 0 for r in results)
    assert all(r.difference < 1e-3 for r in results[:4]) and all(r.difference == 0 for r in results[4:])
    assert results[0].wall_ratio == results[4].cpu_ratio == (1, 1, 1)


def test_views_are_timed_beside_what_gives_the_same_images():
    results = views.measure(views.Config(images=3, size=72, crop=40, rounds=1))
    assert len(results) == 12
    assert all(r.difference < 1e-4 and r.cpu_seconds[0] > 0 and r.over_torchvision[0] > 0 for r in results)


def test_turns_begin_with_another_each_round():
    order = []
    spent = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2, warm=False)
    assert order == ["a", "b", "b", "a"]
    assert {name: len(times) for name, times in spent.items()} == {"a": 2, "b": 2}
    assert quartiles([3.0, 1.0, 2.0]) == (1.5, 2.0, 2.5)


def test_merge_replaces_rows_of_the_same_case(tmp_path):
    path = tmp_path / "results.json"
    merge(path, [{"size": 1, "cost": 2}, {"size": 3, "cost": 4}], ("size",))
    merge(path, [{"size": 1, "cost": 5}], ("size",), config={"rounds": 1})
    record = json.loads(path.read_text())
    assert record["results"] == [{"size": 1, "cost": 5}, {"size": 3, "cost": 4}]
    assert record["threads"] >= 1


@pytest.mark.parametrize("path", [page.README, page.PAGE, page.GPU_PAGE], ids=lambda path: path.name)
def test_pages_show_what_was_measured(path):
    text = path.read_text(encoding="utf-8")
    assert filled(text, page.BEGIN, page.sections()[path]) == text, "run benchmarks.cost page --write"
