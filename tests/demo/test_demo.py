"""The demo: its scenes, its baselines, its verdict, and the command from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acr_reg.__main__ import main
from acr_reg.demo import scenes
from acr_reg.demo.baselines import all_background, centred_ellipse, ellipse, largest_class, location_prior
from acr_reg.demo.conditions import CONTROL, WITH, WITHOUT, MapScore, Row, at_development_threshold
from acr_reg.demo.report import alignment, judgement, verdict
from acr_reg.demo.scene_task import QUICK, SceneTask, plan_scenes
from acr_reg.demo.scoring import resized
from acr_reg.metrics import CamMeanIoU


def test_scenes_are_the_same_for_a_seed_and_differ_between_seeds_and_splits() -> None:
    first = scenes.compose(12, seed=3, split="dev")
    again = scenes.compose(12, seed=3, split="dev")
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    for seed, split in ((4, "dev"), (3, "test"), (3, "train")):
        assert not torch.equal(first.images, scenes.compose(12, seed, split).images)


def test_a_mask_is_exactly_what_was_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = [scenes.compose(1, seed, "test") for seed in range(20)]
    monkeypatch.setattr(scenes, "place", lambda *_: None)
    bare = [scenes.compose(1, seed, "test") for seed in range(20)]
    for scene, background in zip(painted, bare, strict=True):
        changed = (scene.images != background.images).any(1)
        inside = scene.masks > 0
        assert not changed[~inside].any()
        assert changed[inside].float().mean() > 0.98  # a colour may happen to be the photograph's
    assert sum(int((scene.masks > 0).sum()) for scene in painted) > 20 * 200


def test_labels_are_the_classes_of_the_mask_and_every_class_occurs() -> None:
    data = scenes.compose(200, seed=0, split="train")
    for mask, labels in zip(data.masks, data.labels, strict=True):
        assert set(mask.unique().tolist()) - {0} == {index + 1 for index in labels.nonzero()[:, 0].tolist()}
    counts = data.labels.sum(1)
    assert counts.min() == 1
    assert counts.max() == 3
    assert data.labels.any(0).all()
    assert data.images.dtype == torch.uint8
    assert scenes.to_input(data.images).abs().max() <= 1


def test_training_scenes_share_no_background_pixel_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.arange(200, dtype=np.uint8)[None, :, None].repeat(90, axis=0).repeat(3, axis=2)
    monkeypatch.setattr(scenes, "photographs", lambda: [columns] * len(scenes.PHOTOGRAPHS))
    rng = np.random.default_rng(0)
    seen = {split: [scenes.crop_photograph(rng, split) for _ in range(300)] for split in scenes.SPLITS}
    assert max(crop.max() for crop in seen["train"]) < min(crop.min() for crop in seen["dev"] + seen["test"])


def test_all_background_scores_the_background_share() -> None:
    mask = np.zeros((4, 6), int)
    mask[:2, :3] = 1
    assert all_background([(mask, [1])], num_classes=2).best_miou == pytest.approx((18 / 24 + 0) / 2)


def test_the_ellipse_finds_an_ellipse_and_takes_the_rarest_label() -> None:
    mask = (ellipse(40, 64) > 0.45).astype(int) * 2
    assert centred_ellipse([(mask, [2])], 3, frequency=[0, 5, 5]).best_miou == 1
    assert centred_ellipse([(mask, [1, 2])], 3, frequency=[0, 5, 4]).best_miou == 1
    assert centred_ellipse([(mask, [1, 2])], 3, frequency=[0, 4, 5]).best_miou < 0.5
    assert centred_ellipse([(np.zeros((4, 6), int), [])], 3, frequency=[0, 1, 1]).best_miou == 1


def test_baselines_without_a_background_class() -> None:
    """Class 0 left and class 1, smaller, right; a photo of class 2 alone."""
    mask = np.zeros((20, 32), int)
    mask[:, 20:] = 1
    samples = [(mask, [0, 1]), (np.full((6, 8), 2), [2])]
    largest = largest_class(samples, 3, samples)
    assert largest.per_class_iou == pytest.approx([20 / 32, 0, 1])
    assert location_prior(samples, 3, samples).best_miou > 0.95
    assert location_prior(samples, 3, [(mask[:, ::-1], [0, 1])]).per_class_iou[0] < 0.5


def test_the_threshold_comes_from_the_development_images() -> None:
    def scores(value: float) -> CamMeanIoU:
        counter = CamMeanIoU(2)
        counter.update(np.array([[[value, 0.3]]]), np.array([[1, 0]]), [1])
        return counter

    development, shown = scores(0.35).compute(), scores(0.3).compute()
    found = at_development_threshold(shown, development)
    assert found.threshold == 0.3
    assert found.miou == pytest.approx(0.25)
    assert max(found.curve) == pytest.approx(0.25)


def test_maps_reach_the_masks_size_in_zero_to_one() -> None:
    maps = resized(torch.rand(3, 4, 6) + 5, (37, 50))
    assert maps.shape == (3, 37, 50)
    assert maps.amin((1, 2)).tolist() == [0, 0, 0]
    assert maps.amax((1, 2)).tolist() == pytest.approx([1, 1, 1])
    assert resized(torch.zeros(0, 4, 6), (5, 7)).shape == (0, 5, 7)


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([0.02], "helps (raw CAM mIoU +0.020, one seed"),
        ([-0.01], "does not help (raw CAM mIoU -0.010, one seed"),
        ([0.02, 0.03, 0.025], "helps (raw CAM mIoU +0.025, standard deviation 0.005 over 3 seeds"),
        ([0.02, -0.03, 0.025], "makes no clear difference"),
        ([-0.02, -0.03, -0.025], "does not help"),
    ],
)
def test_the_verdict_follows_the_paired_gain(gains: list[float], words: str) -> None:
    assert judgement(gains).startswith(words)


def scored(name: str, miou: float) -> Row:
    return Row(name, MapScore(miou, 0.5, [0.5], [miou], [miou]))


@pytest.mark.parametrize(
    ("control", "words"),
    [
        (None, "Smoothing alone may gain too: --controls"),
        (0.31, "With the flip not undone the raw CAM mIoU moves by +0.010: undoing it adds +0.040."),
        (0.36, "With the flip not undone the raw CAM mIoU moves by +0.060, no less than with it undone (+0.050)"),
    ],
)
def test_the_verdict_tells_alignment_from_smoothing(control: float | None, words: str) -> None:
    rows = [scored(WITHOUT, 0.30), scored(WITH, 0.35), *([scored(CONTROL, control)] if control else [])]
    assert alignment([rows], [0.05]).startswith(words)


def test_only_the_two_networks_compared_can_void_the_verdict() -> None:
    plan = plan_scenes(QUICK, controls=True, quick=False)
    score = MapScore(0.3, 0.5, [0.5], [0.3], [0.3])
    terms = {"entropy": 0.5, "activation": 0.1, "affinity": 0.1}

    def said(without: float, with_acr: float, control: float) -> str:
        found = {WITHOUT: without, WITH: with_acr, CONTROL: control}
        networks = [Row(name, score, score, mean_ap, terms) for name, mean_ap in found.items()]
        return " ".join(verdict([[Row("all background", score), *networks]], plan))

    assert "mean nothing" not in said(0.9, 0.9, 0.5)
    assert "mean nothing" in said(0.84, 0.9, 0.9)
    assert "mean nothing" in said(0.9, 0.84, 0.9)


def test_conditions_start_from_one_checkpoint_and_see_the_same_batches() -> None:
    task = SceneTask(0, QUICK)
    first, second = task.fork(), task.fork()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    losses = [task.train(model, None, lambda: None).history[0]["classification"] for model in (first, second)]
    assert losses[0] == losses[1]
    assert not torch.equal(first.head.weight, task.fork().head.weight)


def test_quick_demo_ends_well_and_says_that_its_figures_mean_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "acr_reg", "demo", "--quick", "--controls", "--threads", "1"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "mean nothing" in done.stdout
    assert "Synthetic" in done.stdout
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size[0] > 600
    run = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert set(run) >= {"command", "versions", "machine", "settings", "split", "seeds", "summary", "paired_differences"}
    rows = {row["name"]: row for row in run["seeds"][0]["rows"]}
    assert set(rows) == {"all background", "best centred ellipse", WITHOUT, WITH, "ACR, flip not undone"}
    for name in (WITHOUT, WITH):
        assert 0 <= rows[name]["raw"]["miou"] <= 1
        assert len(rows[name]["raw"]["curve"]) == len(rows[name]["raw"]["thresholds"]) == 100
        assert 0 < rows[name]["terms"]["entropy"] <= 1
        assert rows[name]["training"]["seconds"] > 0
        assert len(rows[name]["training"]["history"]) == QUICK.continue_steps
    assert set(rows[WITH]["training"]["history"][0]) == {"classification", "activation", "affinity", "entropy"}
    assert set(rows[WITHOUT]["training"]["history"][0]) == {"classification"}
    assert rows[WITH]["training"]["history"][0] != rows["ACR, flip not undone"]["training"]["history"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "28"], "--size is for photos. Give their folder by --voc DIR"),
        (["--seeds", "0"], "--seeds is 0. It must be at least 1"),
        (["--affinity-weight", "-1"], "--affinity-weight is -1.0. It must be a number of 0 or more"),
        (["--quick", "--voc", "photos"], "--quick is for the synthetic scenes"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_without_a_network_has_class_maps_only() -> None:
    nothing = all_background([(np.zeros((4, 6), int), [])], 2)
    assert Row("all background", at_development_threshold(nothing, nothing)).training is None
