"""The second views of the study, and the view that the misreported control is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Generator, Tensor

from acr_reg import (
    AttentionMaps,
    Compose,
    HorizontalFlip,
    Lattice,
    RandomChoice,
    RandomCompose,
    RandomResizedCrop,
    Rotate90,
    Scale,
    View,
    align_attention,
)
from acr_reg.attention.layer import RecordedTensors
from acr_reg.views.samplers import Sampler
from benchmarks.study.settings import StudyError

Draw = Callable[[Tensor, Generator], View]

VIEWS = {
    "flip": "flip",
    "scale": "flip and scale (0.75 or 1.25, a batch)",
    "crop": "flip and random crop (half of the area or more, resized; an image)",
    "turn": "flip, random crop and quarter turns (an image)",
}
_FACTORS = (0.75, 1.25)  # whole tokens at 112 and 168 px
_CROP = (0.5, 1.0)


def draws_views(name: str, size: int) -> Draw | None:
    """A function that draws the view of a batch of square images; None for the flip, which is always the same."""
    if name not in VIEWS:
        raise StudyError(f"There is no view {name!r}. Choose one of {', '.join(VIEWS)}.")
    if name == "flip":
        return None
    if name == "scale":
        scales = RandomCompose([HorizontalFlip(), RandomChoice([Scale(factor) for factor in _FACTORS])])
        return lambda images, generator: scales.sample(images, generator=generator)
    steps: list[View | Sampler] = [HorizontalFlip(), RandomResizedCrop(size, _CROP)]
    if name == "turn":
        steps.append(RandomChoice([Rotate90(k) for k in range(4)]))
    sampler = RandomCompose(steps)
    return lambda images, generator: sampler.sample(images, per_image=True, generator=generator)


def misreported(view: View) -> View:
    """What the loss is told in place of ``view``: one flip too many, so that for the flip it is told nothing was done.
    The images stay the same, but the tokens it compares show different things."""
    return Compose([view, HorizontalFlip()])


def blurred(maps: AttentionMaps) -> AttentionMaps:
    """The maps carried to a grid 1.25 times as fine and back: what resampling does, without another view."""
    kept = []
    for layer in maps:
        grid = layer.layout.query
        fine = Lattice(round(grid.height * 1.25), round(grid.width * 1.25))
        there, finer = replace(layer.layout, query=fine, key=fine), Scale(1.25)
        carried = align_attention(layer.weights(), finer.inverse, layer.layout, there)
        recorded = RecordedTensors(map=align_attention(carried, finer, there, layer.layout))
        kept.append(replace(layer, recorded=recorded))
    return AttentionMaps(kept)
