"""One layer's attention terms: which rows are compared (LayerTerms, sampling), and their value from whole maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from acr_reg.alignment.pairs import AlignedPair, Heads, RowSource
from acr_reg.alignment.plan import Block, Plan
from acr_reg.attention.layer import LayerAttention
from acr_reg.losses.functional import Distance, Normalize, RowSum, sum_rows

Term = Literal["activation", "affinity"]

Rows = tuple[Block, Tensor | None]  # a block of the plan's tokens, and those picked (R,) among them, None for all


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """The rows to compare in one layer, and how; :class:`~acr_reg.AllPairsConsistencyLoss` describes the options.

    ``weights`` names the terms to compute. ``blocks`` are the patch rows to compare, the ``share`` of all that counts.
    ``labels`` (B, C) are > 0 for the classes whose class-token rows are compared.
    """

    pair: AlignedPair
    weights: Mapping[Term, float]
    blocks: Sequence[Rows]
    labels: Tensor | None
    distance: Distance
    normalize: Normalize
    heads: Heads
    share: float = 1.0

    def of_images(self, images: slice, a: RowSource, b: RowSource) -> LayerTerms:
        """The terms of a part of the batch, of rows that come from other sources."""
        labels = None if self.labels is None else self.labels[images]
        blocks = self.pair.plan.blocks
        pair = self.pair.of(a, b, images)
        of_part = dict(zip(blocks, pair.plan.blocks, strict=True))
        rows = [(of_part[block], picked) for block, picked in self.blocks]
        return replace(self, pair=pair, blocks=rows, labels=labels)

    def compare(self, term: Term, rows: Rows) -> tuple[RowSum, Tensor | None]:
        """The sums over a term's rows, and their entropy. ``rows`` are those of the affinity term."""
        aligned = self.pair.activation() if term == "activation" else self.pair.affinity(*rows)
        a, b, overlap = aligned.comparable(self.heads)
        keys_valid, counted = (aligned.keys_valid, aligned.counted) if aligned.is_partial else (None, None)
        if term == "activation":  # one class token serves whatever classes are present
            counted = self.labels.to(a.device) > 0 if self.labels is not None and a.shape[2] > 1 else None
        return sum_rows(a, b, self.distance, self.normalize, keys_valid, counted, overlap), aligned.entropy

    def closed(self, term: Term, found: RowSum) -> RowSum:
        """The sum of a term's blocks, with the rows that were left out because one view does not show them."""
        if term == "activation" or not self.pair.plan.is_partial:
            return found
        batch, heads = self.pair.layers[0].shape[:2]
        groups = 1 if self.heads == "mean" else heads
        return RowSum(found.total, found.weight, found.count + groups * self.share * self.pair.plan.left_out(batch))


class OrderedLayer:
    """A layer that puts its keys in order once for all terms, as :class:`~acr_reg.LayerAttention` does for each."""

    def __init__(self, layer: LayerAttention, order: Tensor | None) -> None:
        self._layer, self._ordered = layer, layer.is_factored
        if self._ordered:
            self._layer = layer.with_keys(order)

    @property
    def stochastic(self) -> bool:
        return self._layer.stochastic

    def weights(self, queries: Tensor, keys: Tensor | None = None) -> Tensor:
        return self._layer.weights(queries, None if self._ordered else keys)


def evaluate_dense(layer: LayerTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the layer's terms, on the graph; each term, and the entropy if it has one, detached.

    All maps of the layer are formed at once, and autograd keeps them for the backward pass.
    """
    plan, (a, b), (rows,) = layer.pair.plan, layer.pair.layers, layer.blocks
    sides = OrderedLayer(a, plan.of_image.order), OrderedLayer(b, plan.of_view.order)
    layer = replace(layer, pair=layer.pair.of(*sides))
    compared = {term: layer.compare(term, rows) for term in layer.weights}
    values = {term: layer.closed(term, found).mean() for term, (found, _) in compared.items()}
    weighted = torch.stack([layer.weights[term] * value for term, value in values.items()]).sum()
    terms: dict[str, Tensor] = {term: value.detach() for term, value in values.items()}
    return weighted, terms | mean_entropy([entropy for _, entropy in compared.values()])


def sample_rows(plan: Plan, share: float) -> tuple[list[Rows], float]:
    """Draws a ``share`` of the plan's tokens to compare, anew in each call, and returns the share that it is in whole
    tokens. Each row of the grid has its part of them, rounded at random, and picks them at random, so that it is known
    without a look at the device how many tokens a block has."""
    if share == 1:
        return [(block, None) for block in plan.blocks], 1.0
    count, width = len(plan.tokens), plan.width
    wanted, height = max(1, round(share * count)), count // width
    start = torch.rand((), dtype=torch.float64, device="cpu").item()
    bounds = [math.floor(start + wanted * y / height) for y in range(height + 1)]
    order = _scattered(count, plan.tokens.device).view(height, width).argsort(1)
    rows: list[Rows] = []
    for block in plan.blocks:
        top, bottom = (token // width for token in block.tokens)
        picked = [order[y, : bounds[y + 1] - bounds[y]] + (y - top) * width for y in range(top, bottom)]
        if bounds[bottom] > bounds[top]:
            rows.append((block, torch.cat(picked)))
    return rows, wanted / count


def _scattered(count: int, device: torch.device) -> Tensor:
    """``count`` numbers, all different, by Wellons' 32-bit hash of consecutive ones. They depend on the CPU's generator
    only, so that every device samples the same rows, and none are sent there."""
    numbers = torch.arange(count, device=device) + int(torch.randint(2**31, (), device="cpu"))
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        numbers = ((numbers ^ (numbers >> shift)) * factor) & 0xFFFFFFFF
    return numbers ^ (numbers >> 15)


def mean_entropy(entropies: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The mean over all rows of several blocks as the term "entropy"; no term if no block has one."""
    found = [entropy.flatten() for entropy in entropies if entropy is not None]
    return {"entropy": torch.cat(found).mean()} if found else {}
