"""The comparison on photos."""

from collections.abc import Callable
from pathlib import Path

import torch

from acr_reg.demo.photos.folder import open_folder
from acr_reg.demo.photos.task import PhotoSettings, PhotoTask


def test_only_the_upper_half_learns(make_photos: Callable[..., Path], weights: Path) -> None:
    folder = open_folder(make_photos())
    task = PhotoTask(folder, weights, PhotoSettings(size=28, epochs=1), seed=0, report=lambda *_: lambda: None)
    truth = task.truths("dev")[0]
    before = task.lower(truth.images)
    model = task.fork()
    history = task.train(model, None, lambda: None).history
    assert len(history) == task.steps == 1
    assert torch.equal(task.lower(truth.images), before)
    untrained = dict(task.fork().named_parameters())
    assert all(not torch.equal(value, untrained[name]) for name, value in model.named_parameters())
    assert task.pixels(truth.images).shape == (2, 28, 28, 3)
