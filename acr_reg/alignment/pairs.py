"""Carries tokens, and attention between tokens, from a view back onto the image's tokens, and says what is valid there.

With attention maps A1, A2 of an image and of its view, and P the view's permutation of patch tokens, the maps to
compare are A1 and P^T A2 P. Where lattices do not fall on each other, P is a resampling of rows and columns by the same
weights. Where one view shows a part of the other only, rows are compared on the tokens that both show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from acr_reg._tensors import at_least_float32
from acr_reg.alignment.resampled import AlignmentMaps, check_lattices, check_valid, valid_tokens
from acr_reg.attention.layer import LayerAttention
from acr_reg.tokens import Lattice, TokenLayout
from acr_reg.views.view import View


def check_pair(a: LayerAttention, b: LayerAttention, view: View) -> None:
    """Raises ValueError where the two layers cannot be of images and of this view of them."""
    name = f"layer {a.index} ({a.name})"
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"{name}: found {a.shape[0]} images with {a.shape[1]} heads in one view and {b.shape[0]} with {b.shape[1]} "
            "in the other; expected the same; take both views' maps from the same model and images"
        )
    view.check_batch(a.shape[0])
    sides: tuple[Literal["query", "key"], ...] = ("query", "key")
    for side in sides:
        grid_a, grid_b = a.layout.lattice(side), b.layout.lattice(side)
        check_lattices(name, view, grid_b, grid_a)
        if _image_sizes_match(grid_a, grid_b, view):
            continue
        expected = view.output_size((grid_a.height, grid_a.width))
        rounding = 1 if view.scales else 0  # a scaled image need not hold a whole number of patches
        if abs(grid_b.height - expected[0]) > rounding or abs(grid_b.width - expected[1]) > rounding:
            raise ValueError(
                f"{name}: found {side} grids of {grid_a} and {grid_b}; expected {expected[0]} x {expected[1]} for the "
                f"second under {view.brief}; pass the view that was applied to the second view's images"
            )
    if len(a.layout.class_tokens or ()) != len(b.layout.class_tokens or ()):
        raise ValueError(
            f"{name}: found class tokens {a.layout.class_tokens} and {b.layout.class_tokens}; expected as many in both "
            "views; capture both with the same class_tokens="
        )


def _image_sizes_match(grid_a: Lattice, grid_b: Lattice, view: View) -> bool:
    """Whether the images that two grids lie on are of the sizes the view says. The grids need not be in proportion:
    patches may leave a margin."""
    if grid_a.is_unit or grid_b.is_unit:
        return False
    size_a, size_b = ((round(grid.extent[0]), round(grid.extent[1])) for grid in (grid_a, grid_b))
    return view.output_size(size_a) == size_b


# Below this share of rows and mass that both views show, a term fades out, in place of growing ever noisier.
OVERLAP_FLOOR = 0.25

_NO_MASS = 1e-30  # on what both views show: the row counts for nothing, and its gradient must stay finite


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """Rows of both views over the first view's keys, ``full_a`` and ``full_b`` (B, H, R, prefix + M); both views show
    the prefix tokens, ``prefix`` of each.

    ``keys_valid`` (1 or B, M) is True for keys that both views show and that are no padding, ``shown`` (1 or B, R) for
    the rows of tokens both views show, ``counted`` (1 or B, R) for rows that are no padding. ``is_partial`` is False
    where all of both is known to be True. ``entropy`` (B, H, R) is that of both rows, on average, over its maximum
    ln M, detached; None where it was not asked for. ``stochastic`` says that rows are probabilities.
    """

    full_a: Tensor
    full_b: Tensor
    prefix: tuple[int, int]
    keys_valid: Tensor
    shown: Tensor
    counted: Tensor
    is_partial: bool
    stochastic: bool
    entropy: Tensor | None

    @property
    def a(self) -> Tensor:
        """(B, H, R, M) the first view's rows over patch keys, 0 where a key is not valid."""
        return self._patches(self.full_a, self.prefix[0])

    @property
    def b(self) -> Tensor:
        """(B, H, R, M) the second view's."""
        return self._patches(self.full_b, self.prefix[1])

    def _patches(self, rows: Tensor, prefix: int) -> Tensor:
        patches = rows[..., prefix:]
        return patches.masked_fill(~self.keys_valid[:, None, None], 0) if self.is_partial else patches

    def comparable(self, heads: Literal["mean", "each"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows to compare, (B, H or 1, R, M), averaged over heads or not, and the weight in [0, 1] of each,
        (B, H or 1, R); None where all count alike.

        Full overlap leaves rows as they are, with the mass they give to patches (the paper). Partial overlap gives
        conditional rows: of each head, its row over its own mass on what both views show, prefix and valid keys; the
        same as a softmax over logits in which the other keys are masked. Only that is invariant: a softmax over a crop
        knows nothing of the keys beyond it, and other heads look beyond it by another share. Rows, and heads in their
        mean, are weighted by the smaller mass of both views, so that those that look elsewhere count little.
        """
        if not self.is_partial:
            full = self.full_a, self.full_b
            if heads == "mean":  # before the prefix is cut off: backward then pads one map, not that of every head
                full = full[0].mean(1, keepdim=True), full[1].mean(1, keepdim=True)
            return full[0][..., self.prefix[0] :], full[1][..., self.prefix[1] :], None
        a, b = self.a, self.b
        weight = self.shown[:, None].to(a.dtype).expand(a.shape[:-1])
        share = torch.full_like(weight, 1 / weight.shape[1])
        if self.stochastic:  # rows of either sign have no mass
            mass_a, mass_b = (
                full[..., :prefix].sum(-1) + rows.sum(-1)
                for full, rows, prefix in ((self.full_a, a, self.prefix[0]), (self.full_b, b, self.prefix[1]))
            )
            a, b = (rows / mass.clamp_min(_NO_MASS)[..., None] for rows, mass in ((a, mass_a), (b, mass_b)))
            weight = torch.minimum(mass_a, mass_b).detach().clamp(max=1) * weight
            share = weight / weight.sum(1, keepdim=True).clamp_min(_NO_MASS)
        if heads == "mean":
            a, b = ((rows * share[..., None]).sum(1, keepdim=True) for rows in (a, b))
            weight = weight.mean(1, keepdim=True)
        return a, b, weight


class RowSource(Protocol):
    """What rows are asked of: a :class:`~acr_reg.LayerAttention`, or one that is evaluated in blocks."""

    @property
    def layout(self) -> TokenLayout: ...

    @property
    def stochastic(self) -> bool: ...

    def weights(self, queries: Tensor, keys: Tensor | None = None) -> Tensor: ...


class AlignedPair:
    """A layer of ``images`` and the same layer of ``view(images)``, whose rows are aligned as they are asked for.

    Where the lattices fall on each other (flips, quarter turns), tokens of query and key are permuted before any
    product; elsewhere both axes are resampled by the same weights and each row keeps the mass it gave to patches.
    ``valid`` (B, H, W) is False where the images are padding. ``with_entropy`` also reports the entropy of rows.
    """

    def __init__(
        self,
        a: LayerAttention,
        b: LayerAttention,
        view: View,
        valid: Tensor | None = None,
        with_entropy: bool = True,
    ) -> None:
        check_pair(a, b, view)
        if valid is not None:
            check_valid(valid, a.shape[0])
        self.layers = a, b
        self.a: RowSource = a
        self.b: RowSource = b
        self.with_entropy = with_entropy
        device = str(a.device)
        self.dtype = at_least_float32(a.recorded.seen[:0]).dtype
        image = None
        if valid is not None:
            image = tuple(valid_tokens(valid, grid).to(device) for grid in (a.layout.query, a.layout.key))
        self.carriers = AlignmentMaps(view, b.layout, a.layout, device, image)
        self.classes = [_positions(layer.layout.class_tokens, device) for layer in (a, b)]
        self.keys_valid = self.carriers.keys.valid
        self.counted = torch.ones_like(self.carriers.queries.valid)
        # A view that shows all of the image and padding around it is partial too: its rows look at the padding.
        carriers = (self.carriers.keys, self.carriers.queries, self.carriers.keys_shown)
        self.is_partial = not all(carrier.is_complete for carrier in carriers)
        if image is not None:
            self.counted, self.keys_valid = image[0], self.keys_valid & image[1]
            self.is_partial = True

    def of(self, a: RowSource, b: RowSource) -> AlignedPair:
        """The same alignment of rows that come from elsewhere, with tokens in the same places."""
        pair = copy(self)
        pair.a, pair.b = a, b
        return pair

    def activation(self) -> AlignedRows:
        """The class tokens' rows; there may be none."""
        always = torch.ones(1, len(self.classes[0]), dtype=torch.bool, device=self.keys_valid.device)
        return self._aligned(self.classes[0], self.classes[1], None, always, always)

    def affinity(self, tokens: Tensor) -> AlignedRows:
        """The rows of these patch tokens (R,) of the images."""
        rows_b, mixed = self.carriers.rows(tokens, self.dtype)
        shown = self.carriers.queries.valid[:, tokens]
        rows_a = self.a.layout.num_prefix_tokens + tokens
        return self._aligned(rows_a, rows_b, mixed, shown, self.counted[:, tokens])

    def _aligned(
        self, rows_a: Tensor, rows_b: Tensor, mixed: Tensor | None, shown: Tensor, counted: Tensor
    ) -> AlignedRows:
        """Rows of both maps; those of the view are mixed to the image's rows by weights (S, R, rows of the view)."""
        map_a, map_b = self.a.weights(rows_a), self.b.weights(rows_b, self.carriers.permuted_keys)
        entropies, stochastic = None, self.a.stochastic and self.b.stochastic
        if self.with_entropy and stochastic:
            entropies = [row_entropy(map_a), row_entropy(map_b)]
        map_b = self.carriers.carry_keys(map_b, self.b.stochastic)
        if mixed is not None:
            mixed = mixed[:, None]
            map_b = mixed @ map_b
            if entropies is not None:
                entropies[1] = (mixed @ entropies[1][..., None])[..., 0]
        return AlignedRows(
            map_a,
            map_b,
            (self.a.layout.num_prefix_tokens, self.b.layout.num_prefix_tokens),
            self.keys_valid,
            shown,
            counted,
            self.is_partial,
            stochastic,
            None if entropies is None else (entropies[0] + entropies[1]) / 2,
        )


@dataclass(frozen=True, eq=False)
class AlignedLayer:
    """One layer of both views on the first view's tokens: the class tokens' rows (``activation``; there may be none)
    and the patch rows (``affinity``; all, or those sampled).

    ``entropy`` is the mean entropy of the rows over ln M, in [0, 1], detached; NaN for maps that are no probabilities.
    """

    activation: AlignedRows
    affinity: AlignedRows

    @property
    def entropy(self) -> Tensor:
        return mean_entropy([self.activation.entropy, self.affinity.entropy], self.affinity.full_a)


def align_layer(
    a: LayerAttention,
    b: LayerAttention,
    view: View,
    valid: Tensor | None = None,
    rows: float = 1.0,
) -> AlignedLayer:
    """Carries layer ``b``, computed on ``view(images)``, onto the tokens of layer ``a``, computed on ``images``; see
    :class:`AlignedPair`. ``rows`` in (0, 1] samples that share of the patch rows (torch's global generator)."""
    pair = AlignedPair(a, b, view, valid)
    return AlignedLayer(pair.activation(), pair.affinity(sample_rows(len(a.layout.query), rows, str(a.device))))


def _positions(class_tokens: tuple[int, ...] | None, device: str) -> Tensor:
    return torch.tensor(class_tokens or (), dtype=torch.long, device=device)


def sample_rows(count: int, share: float, device: str) -> Tensor:
    """Which of ``count`` tokens are compared: a ``share`` of them, anew in each call, in their order."""
    if not 0 < share <= 1:
        raise ValueError(f"found rows={share}; expected a share in (0, 1]; 1.0 uses every query row")
    if share == 1:
        return torch.arange(count, device=device)
    return torch.randperm(count)[: max(1, round(share * count))].sort().values.to(device)


def row_entropy(rows: Tensor) -> Tensor:
    """Entropy (...) of probability rows (..., M) over its maximum ln M: 0 is one key only, 1 is collapse to uniform.
    Detached."""
    rows = rows.detach()
    logs = rows.clamp_min(torch.finfo(rows.dtype).tiny).log_()  # vectorised, which torch's entr is not; 0 ln 0 stays 0
    return logs.mul_(rows).sum(-1).neg_() / math.log(rows.shape[-1])


def mean_entropy(entropies: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Over all rows of several blocks; NaN where none has one."""
    found = [entropy.flatten() for entropy in entropies if entropy is not None]
    return torch.cat(found).mean() if found else like.new_full((), math.nan)
