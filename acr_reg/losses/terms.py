"""Both attention terms of one layer, with its maps formed at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from acr_reg.alignment.pairs import AlignedPair, AlignedRows, mean_entropy
from acr_reg.losses.functional import Distance, Normalize, RowSum, sum_rows

Term = Literal["activation", "affinity"]


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """What is compared in one layer, and how: see :class:`~acr_reg.AllPairsConsistencyLoss` for the options.

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
