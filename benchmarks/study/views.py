"""The second views of the study, and the view that the misreported control is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
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
    token_validity,
)
from acr_reg.attention.layer import LayerAttention, RecordedTensors
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
BLUR = Scale(1.25), (10, 10)  # what resampling does to maps of 8 x 8 tokens that a flip alone leaves sharp


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


def there_and_back(maps: AttentionMaps, view: View, grid: tuple[int, int]) -> AttentionMaps:
    """The maps carried to the ``view``'s ``grid`` and back: what an equivariant network would show there, resampled
    twice. Rows that the view does not show stay as they are, and each row keeps its mass on keys that are not shown."""
    carried = [RecordedTensors(map=_carried(layer, view, Lattice(*grid))) for layer in maps]
    return AttentionMaps(replace(layer, recorded=found) for layer, found in zip(maps, carried, strict=True))


def _carried(layer: LayerAttention, view: View, grid: Lattice) -> Tensor:
    there, own = replace(layer.layout, query=grid, key=grid), layer.weights()
    back = align_attention(align_attention(own, view.inverse, layer.layout, there), view, there, layer.layout)
    shown = token_validity(view, grid, layer.layout.query)
    always = shown.new_ones(len(shown), layer.layout.num_prefix_tokens)
    shown = torch.cat([always, shown], 1)[:, None]
    hidden = own * ~shown[..., None, :]
    mass = (1 - back.sum(-1, keepdim=True)) / hidden.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.where(shown[..., None], back + hidden * mass, own)
