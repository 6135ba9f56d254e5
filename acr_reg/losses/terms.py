"""One layer's attention terms: which rows are compared (LayerTerms, sampling), and their value from whole maps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from acr_reg.alignment.pairs import AlignedPair, Heads, RowSource
from acr_reg.alignment.plan import Block, Plan
from acr_reg.losses.functional import Distance, Normalize, RowSum, row_distances, sum_rows

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

    def compare(self, terms: Collection[Term], rows: Rows) -> tuple[dict[Term, RowSum], Tensor | None]:
        """The sums over the rows of each term, and the entropy of all rows. ``rows`` are those of the affinity term."""
        block, picked = rows if "affinity" in terms else (None, None)
        aligned = self.pair.rows(block, picked, "activation" in terms)
        a, b, overlap = aligned.comparable(self.heads)
        plan = self.pair.plan
        keys_valid = plan.keys_valid if plan.hides_keys or (plan.is_partial and self.normalize == "mean") else None
        distances = row_distances(a, b, self.distance, self.normalize, keys_valid)
        sizes = [aligned.num_classes, distances.shape[2] - aligned.num_classes]
        of_classes, of_patches = distances.split(sizes, 2)
        weights = (None, None) if overlap is None else overlap.split(sizes, 2)
        found: dict[Term, RowSum] = {}
        if "activation" in terms:  # one class token serves whatever classes are present
            present = self.labels.to(a.device) > 0 if self.labels is not None and aligned.num_classes > 1 else None
            found["activation"] = sum_rows(of_classes, present, weights[0])
        if "affinity" in terms:
            counted = aligned.counted if plan.is_partial else None
            found["affinity"] = sum_rows(of_patches, counted, weights[1])
        return found, aligned.entropy

    def closed(self, term: Term, found: RowSum) -> RowSum:
        """The sum of a term's blocks, with the rows that were left out because one view does not show them."""
        if term == "activation" or not self.pair.plan.is_partial:
            return found
        batch, heads = self.pair.layers[0].shape[:2]
        groups = 1 if self.heads == "mean" else heads
        return RowSum(found.total, found.weight, found.count + groups * self.share * self.pair.plan.left_out(batch))


def evaluate_dense(layer: LayerTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the layer's terms, on the graph; each term, and the entropy if it has one, detached.

    All maps of the layer are formed at once, and autograd keeps them for the backward pass.
    """
    (rows,) = layer.blocks
    compared: dict[Term, RowSum] = {}
    entropies: list[Tensor | None] = []
    for is_weighed in (True, False):  # apart, so that a term that is only reported changes nothing of the loss
        names = [name for name, weight in layer.weights.items() if bool(weight) is is_weighed]
        if names:
            found, entropy = layer.compare(names, rows)
            compared |= found
            entropies.append(entropy)
    values = {term: layer.closed(term, compared[term]).mean() for term in layer.weights}
    weighted = torch.stack([layer.weights[term] * value for term, value in values.items()]).sum()
    terms: dict[str, Tensor] = {term: value.detach() for term, value in values.items()}
    return weighted, terms | mean_entropy(entropies)


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
    order = torch.rand(height, width, device=plan.tokens.device).argsort(1)  # drawn there: none are sent
    rows: list[Rows] = []
    for block in plan.blocks:
        top, bottom = (token // width for token in block.tokens)
        picked = [order[y, : bounds[y + 1] - bounds[y]] + (y - top) * width for y in range(top, bottom)]
        if bounds[bottom] > bounds[top]:
            rows.append((block, torch.cat(picked)))
    return rows, wanted / count


def mean_entropy(entropies: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The mean over all rows of several blocks as the term "entropy"; no term if no block has one."""
    found = [entropy.flatten() for entropy in entropies if entropy is not None]
    return {"entropy": torch.cat(found).mean()} if found else {}
