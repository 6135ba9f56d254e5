"""The distance of two views' attention as the loss has it, and the part of it that resampling makes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from acr_reg import AttentionMaps, TokenLayout, View, align_attention
from acr_reg.alignment.pairs import AlignedPair, plan_of
from acr_reg.attention.layer import RecordedTensors
from acr_reg.losses.terms import LayerTerms


@dataclass(frozen=True)
class Distances:
    """L1 per class row and per patch row, means over layers: between 0 and 2."""

    activation: float
    affinity: float


@torch.no_grad()
def distances(
    first: AttentionMaps, second: AttentionMaps, view: View, *, blur_alike: bool = False, tokens: Tensor | None = None
) -> Distances:
    """Of maps of images and of ``view`` of them; ``tokens`` are the patches of the images whose rows count."""
    found = []
    for a, b in zip(first, second, strict=True):
        plan = plan_of(a, b, view, blur_alike=blur_alike)
        (block,), picked, left_out = plan.blocks, None, plan.num_left_out
        if tokens is not None:
            picked = torch.isin(plan.tokens, tokens).nonzero()[:, 0]
            left_out = len(tokens) - len(picked)
        pair, share = AlignedPair(a, b, plan, with_entropy=False), left_out / max(plan.num_left_out, 1)
        terms = LayerTerms(pair, {}, [(block, picked)], None, "l1", "row", "mean", share)
        compared, _ = terms.compare(("activation", "affinity"), terms.blocks[0])
        found.append([terms.closed(term, rows).mean() for term, rows in compared.items()])
    activation, affinity = torch.tensor(found).mean(0).tolist()
    return Distances(activation, affinity)


@torch.no_grad()
def as_equivariant(maps: AttentionMaps, view: View, grid: TokenLayout) -> AttentionMaps:
    """What a network that commutes with the view would show on the view's ``grid``, up to resampling: rows over fewer
    keys where the view is a crop, as a softmax gives them."""
    kept = []
    for layer in maps:
        carried = align_attention(layer.weights(), view.inverse, layer.layout, grid)
        rows = carried / carried.sum(-1, keepdim=True)
        kept.append(replace(layer, recorded=RecordedTensors(map=rows), placed=grid))
    return AttentionMaps(kept)
