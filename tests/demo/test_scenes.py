"""Synthetic scenes: repeatable, with exact masks, and apart from one split to another."""

import numpy as np
import pytest
import torch

from acr_reg.demo import scenes


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
