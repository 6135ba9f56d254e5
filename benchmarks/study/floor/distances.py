"""The distance of attention rows of which none, one or both maps were resampled, apart from the loss's own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acr_reg import AttentionMaps, TokenLayout, View, align_attention, token_validity

_NO_MASS = 1e-12


@dataclass(frozen=True)
class Distances:
    """L1 of class rows and of patch rows (heads averaged, mean over layers), each between 0 and 2."""

    activation: float
    affinity: float


@torch.no_grad()
def distances(
    first: AttentionMaps, second: AttentionMaps, view: View, *, alike: bool = False, tokens: Tensor | None = None
) -> Distances:
    """Maps of images and of ``view`` of them, compared on the images' grid. ``alike`` resamples the first maps too.
    ``tokens`` are the patches whose rows count."""
    found = []
    for a, b in zip(first, second, strict=True):
        shown = token_validity(view, b.layout.query, a.layout.query)
        here = there_and_back(a.weights(), view, a.layout, b.layout) if alike else a.weights()
        found.append(_rows(here, align_attention(b.weights(), view, b.layout, a.layout), shown, tokens))
    return _mean(found)


@torch.no_grad()
def resampling_alone(maps: AttentionMaps, view: View, grid: TokenLayout, tokens: Tensor | None = None) -> Distances:
    """Maps compared with themselves, carried to the grid of the view and back."""
    found = []
    for layer in maps:
        shown = token_validity(view, grid.query, layer.layout.query)
        back = there_and_back(layer.weights(), view, layer.layout, grid)
        found.append(_rows(layer.weights(), back, shown, tokens))
    return _mean(found)


def there_and_back(maps: Tensor, view: View, own: TokenLayout, grid: TokenLayout) -> Tensor:
    return align_attention(align_attention(maps, view.inverse, own, grid), view, grid, own)


def _rows(a: Tensor, b: Tensor, shown: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of maps (B, H, 1+N, 1+N) with one class token: rows given that they look at what both views show, weighted by the
    smaller mass that they give to it."""
    keys = torch.cat([shown.new_ones(len(shown), 1), shown], 1)
    a, b = (rows * keys[:, None, None] for rows in (a, b))
    masses = a.sum(-1), b.sum(-1)
    weight = torch.minimum(*masses) * keys[:, None]
    share = weight / weight.sum(1, keepdim=True).clamp_min(_NO_MASS)
    a, b = (
        (rows * (share / mass.clamp_min(_NO_MASS))[..., None]).sum(1) for rows, mass in zip((a, b), masses, strict=True)
    )
    distance, weight = (a - b)[..., 1:].abs().sum(-1), weight.mean(1)
    patches = torch.arange(1, a.shape[1]) if tokens is None else 1 + tokens
    of_patches = (distance * weight)[:, patches].sum() / weight[:, patches].sum().clamp_min(_NO_MASS)
    return (distance * weight)[:, 0].sum() / weight[:, 0].sum(), of_patches


def _mean(found: Sequence[tuple[Tensor, Tensor]]) -> Distances:
    activation, affinity = torch.tensor(found).mean(0).tolist()
    return Distances(activation, affinity)
