"""One layer's attention terms: which rows are compared (LayerTerms, sampling), and their value from whole maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from acr_reg.alignment.pairs import AlignedPair
from acr_reg.losses.functional import Distance, Normalize, row_consistency

Term = Literal["activation", "affinity"]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """The rows to compare in one layer, and how; :class:`~acr_reg.AllPairsConsistencyLoss` describes the options.

    ``weights`` names the terms to compute. ``tokens`` (R,) are the patch rows to compare. ``labels`` (B, C) are > 0 for
    the classes whose class-token rows are compared.
    """

    pair: AlignedPair
    weights: Mapping[Term, float]
    tokens: Tensor
    labels: Tensor | None
    distance: Distance
    normalize: Normalize
    heads: Literal["mean", "each"]

    def compare(self, term: Term, tokens: Tensor, by: Callable[..., Result]) -> tuple[Result, Tensor | None]:
        """Applies ``by`` (row_consistency, or sum_rows for a block) to a term's rows, and returns their entropy too.
        ``tokens`` selects patch rows."""
        rows = self.pair.activation() if term == "activation" else self.pair.affinity(tokens)
        a, b, overlap = rows.comparable(self.heads)
        keys_valid, counted = (rows.keys_valid, rows.counted) if rows.is_partial else (None, None)
        if term == "activation":  # one class token serves whatever classes are present
            counted = self.labels > 0 if self.labels is not None and a.shape[2] > 1 else None
        return by(a, b, self.distance, self.normalize, keys_valid, counted, overlap), rows.entropy


def evaluate_dense(layer: LayerTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the layer's terms, on the graph; each term, and the entropy if it has one, detached.

    All maps of the layer are formed at once, and autograd keeps them for the backward pass.
    """
    compared = {term: layer.compare(term, layer.tokens, row_consistency) for term in layer.weights}
    weighted = torch.stack([layer.weights[term] * value for term, (value, _) in compared.items()]).sum()
    terms: dict[str, Tensor] = {term: value.detach() for term, (value, _) in compared.items()}
    return weighted, terms | mean_entropy([entropy for _, entropy in compared.values()])


def sample_rows(count: int, share: float, device: str) -> Tensor:
    """Draws a ``share`` of ``count`` tokens to compare, anew in each call, in ascending order."""
    if share == 1:
        return torch.arange(count, device=device)
    return torch.randperm(count, device="cpu")[: max(1, round(share * count))].sort().values.to(device)


def mean_entropy(entropies: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The mean over all rows of several blocks as the term "entropy"; no term if no block has one."""
    found = [entropy.flatten() for entropy in entropies if entropy is not None]
    return {"entropy": torch.cat(found).mean()} if found else {}


def can_be_blockwise(pair: AlignedPair) -> bool:
    """Whether every layer with a gradient has query and key. An explicit map's gradient is as large as the map."""
    return all(layer.is_factored or not layer.requires_grad for layer in pair.layers)
