"""Both attention terms of one layer, dense or in blocks of query rows that never hold an N x N map of all heads.

The dense evaluation leaves the maps of a layer to autograd. The blockwise one runs autograd inside each block of query
rows and adds up the gradients to query and key in the forward pass, in float32 at least: memory grows with N, and the
upstream gradient, loss scale included, is applied before anything is cast to half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from acr_reg._block_sides import Side
from acr_reg.alignment import AlignedPair, AlignedRows, mean_entropy
from acr_reg.attention import rows_of_block
from acr_reg.functional import Distance, Normalize, RowSum, sum_rows

Term = Literal["activation", "affinity"]


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """What is compared in one layer, and how: see :class:`~acr_reg.losses.AllPairsConsistencyLoss` for the options.

    ``weights`` names the terms wanted; ``tokens`` (R,) are the patch rows compared; ``present`` (B, C) the class rows.
    """

    pair: AlignedPair
    weights: Mapping[Term, float]
    tokens: Tensor
    present: Tensor | None
    distance: Distance
    normalize: Normalize
    heads: Literal["mean", "each"]

    def compared(self, rows: AlignedRows, term: Term) -> RowSum:
        a, b, overlap = rows.comparable(self.heads)
        counted = self.present if term == "activation" else rows.counted if rows.is_partial else None
        keys_valid = rows.keys_valid if rows.is_partial else None
        return sum_rows(a, b, self.distance, self.normalize, keys_valid, counted, overlap)


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The weighted sum of a layer's terms, on the graph, and each term and the entropy, detached."""

    weighted: Tensor
    terms: dict[str, Tensor]


def evaluate_dense(layer: LayerTerms) -> Evaluated:
    """Everything at once: the maps of the layer are kept for the backward pass."""
    sums, entropies = {}, []
    for term in layer.weights:
        rows = _rows(layer.pair, term, layer.tokens)
        sums[term] = layer.compared(rows, term).mean()
        entropies.append(rows.entropy)
    weighted = sum(weight * sums[term] for term, weight in layer.weights.items())
    assert isinstance(weighted, Tensor)
    terms: dict[str, Tensor] = {term: value.detach() for term, value in sums.items()}
    return Evaluated(weighted, terms | {"entropy": mean_entropy(entropies, weighted)})


def _rows(pair: AlignedPair, term: Term, tokens: Tensor) -> AlignedRows:
    return pair.activation() if term == "activation" else pair.affinity(tokens)


def can_be_blockwise(pair: AlignedPair) -> bool:
    """Whether what carries gradient is there as factors. The gradient to an explicit map is as large as the map."""
    return all(layer.is_factored or not layer.requires_grad for layer in pair.layers)


def evaluate_blockwise(layer: LayerTerms, block_rows: int | None = None) -> Evaluated:
    """The same in blocks of ``block_rows`` query rows, by default as many as keep a block's maps near 4 MB, at
    least 64.

    The first derivative is exact; a second one is refused.
    """
    sides = Side(layer.pair.layers[0]), Side(layer.pair.layers[1])
    if block_rows is None:
        block_rows = rows_of_block(layer.pair.layers)
    learns = any(side.learns for side in sides)
    report: dict[str, Tensor] = {}

    def run() -> Tensor:
        return _in_blocks(layer, sides, block_rows, report)

    inputs = [tensor for side in sides for tensor in side.inputs]
    return Evaluated(_Blockwise.apply(run, sides, *inputs) if learns else run(), report)


def _in_blocks(layer: LayerTerms, sides: tuple[Side, Side], block_rows: int, report: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the terms; their gradients are added up in the sides."""
    pair = layer.pair.of(*sides)
    entropies: list[Tensor | None] = []
    weighted: list[Tensor] = []
    for term, weight in layer.weights.items():
        whole: RowSum | None = None
        learns = weight != 0 and any(side.learns for side in sides)
        for tokens in layer.tokens.split(block_rows) if term == "affinity" else [layer.tokens]:
            with torch.set_grad_enabled(learns):
                rows = _rows(pair, term, tokens)
                block = layer.compared(rows, term)
            if learns:
                leaves = [leaf for side in sides for leaf in side.leaves]
                found = iter(torch.autograd.grad(block.total, leaves, allow_unused=True))
                for side in sides:
                    side.add(found)
            entropies.append(rows.entropy)
            block = RowSum(block.total.detach(), block.weight, block.count)
            whole = block if whole is None else whole + block
        assert whole is not None
        for side in sides:
            side.scale(weight / whole.norm())
        report[term] = whole.mean()
        weighted.append(weight * report[term])
    value = torch.stack(weighted).sum()
    report["entropy"] = mean_entropy(entropies, value)
    return value


class _Blockwise(torch.autograd.Function):
    """Hands the gradients that the forward pass found to autograd, times the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Tensor], sides: tuple[Side, Side], *inputs: Tensor) -> Tensor:
        value = run()
        gradients = [gradient for side in sides for gradient in side.gradients()]
        ctx.present = [gradient is not None for gradient in gradients]
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "found a second derivative of the blockwise loss (create_graph=True), which has none; expected a first "
                "one; build the loss with blockwise=False to differentiate it twice"
            )
        saved = iter(ctx.saved_tensors)
        gradients = [
            (next(saved) * upstream).to(dtype) if present else None
            for present, dtype in zip(ctx.present, ctx.dtypes, strict=True)
        ]
        return None, None, *gradients
