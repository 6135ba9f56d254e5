"""Picks and aligns the attention rows to compare, of one layer on images and on a view of them.

With attention maps A1, A2 of an image and of its view, and P the map from the view's tokens back to the image's
(:class:`~acr_reg.alignment.token_maps.AlignmentMaps`), rows of A1 are compared with rows of P^T A2 P. Where P
resamples, A1 is blurred alike. Where one view shows only part of the other, rows are compared on the tokens that both
show.

Rows that are no probabilities (gates, sums over heads, mixed heads) may have any scale. Both maps of such a layer are
divided by one number for each image, a constant to the gradient:

    s = max(1, mean over both views, heads and rows of sum_j |A_ij|)

So a sum of H maps counts like one map, and what a gate in [0, 1] takes away stays away. Rows of either sign have an
absolute sum, and rows near 0 are never divided by less than 1.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from acr_reg._tensors import at_least_float32
from acr_reg.alignment.token_maps import NO_MASS, check_lattices, maps_of_image, maps_of_view, valid_tokens
from acr_reg.attention.layer import LayerAttention
from acr_reg.tokens import Lattice, TokenLayout, token_order
from acr_reg.views.view import View


def check_pair(a: LayerAttention, b: LayerAttention, view: View) -> None:
    """Raises ValueError if the second layer cannot come from this view of the first layer's images."""
    name = f"layer {a.index} ({a.name})"
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"{name}: the views have {a.shape[0]} and {b.shape[0]} images, {a.shape[1]} and {b.shape[1]} "
            "heads. Take both from the same model and images."
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
                f"{name}: the views have {side} grids of {grid_a} and {grid_b}, but {view.brief} makes the second "
                f"{expected[0]} x {expected[1]}. Pass the view that was applied to the second view's images."
            )
    if len(a.layout.class_tokens or ()) != len(b.layout.class_tokens or ()):
        raise ValueError(
            f"{name}: the views have class tokens {a.layout.class_tokens} and {b.layout.class_tokens}. Capture both "
            "with the same class_tokens=."
        )


def _image_sizes_match(grid_a: Lattice, grid_b: Lattice, view: View) -> bool:
    """Whether the view maps the first image size to the second. The grids themselves may be out of proportion, because
    patches may leave a margin."""
    if grid_a.is_unit or grid_b.is_unit:
        return False
    size_a, size_b = ((round(grid.extent[0]), round(grid.extent[1])) for grid in (grid_a, grid_b))
    return view.output_size(size_a) == size_b


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """Rows of both views over the first view's keys: ``full_a`` and ``full_b``, (B, H, R, others + M). The tokens that
    are no patches come first; ``others`` counts those of each view, and both views show them.

    ``keys_valid`` (1 or B, M) is True for keys visible in both views and not padding, ``shown`` (1 or B, R) for rows of
    tokens visible in both views, ``counted`` (1 or B, R) for rows that are not padding. ``is_partial`` is False where
    all of these are known to be True. ``stochastic`` says that rows are probabilities. ``entropy`` (B, H, R), detached,
    is the mean over both views of each row's entropy over its maximum ln M; None if not asked for or not stochastic.
    """

    full_a: Tensor
    full_b: Tensor
    others: tuple[int, int]
    keys_valid: Tensor
    shown: Tensor
    counted: Tensor
    is_partial: bool
    stochastic: bool
    entropy: Tensor | None

    @property
    def a(self) -> Tensor:
        """(B, H, R, M) the first view's rows over patch keys, 0 where a key is not valid."""
        return self._patches(self.full_a, self.others[0])

    @property
    def b(self) -> Tensor:
        """The same for the second view."""
        return self._patches(self.full_b, self.others[1])

    def _patches(self, rows: Tensor, others: int) -> Tensor:
        patches = rows[..., others:]
        return patches.masked_fill(~self.keys_valid[:, None, None], 0) if self.is_partial else patches

    def comparable(self, heads: Literal["mean", "each"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows to compare, (B, H or 1, R, M), averaged over heads or not, and the weight in [0, 1] of each,
        (B, H or 1, R); None if all count alike.

        Full overlap leaves rows as they are, with the mass they give to patches (the paper). Partial overlap makes
        rows conditional: each head's row is divided by its own mass on what both views show, valid keys and the other
        tokens, which equals a softmax over logits with the other keys masked. Only conditional rows are invariant: a
        softmax over a crop does not know the keys beyond it, and the share of attention beyond it differs by head.
        Rows, and heads in their mean, are weighted by the smaller mass of both views: rows that look elsewhere count
        little.
        """
        if not self.is_partial:
            full = self.full_a, self.full_b
            if heads == "mean":  # before the others are cut off: backward then pads one map, not that of every head
                # The gradient of a sum, unlike that of a mean, is no map of its own for each head.
                heads_a, heads_b = full[0].sum(1, keepdim=True), full[1].sum(1, keepdim=True)
                full = heads_a / full[0].shape[1], heads_b / full[1].shape[1]
            return full[0][..., self.others[0] :], full[1][..., self.others[1] :], None
        a, b = self.a, self.b
        weight = self.shown[:, None].to(a.dtype).expand(a.shape[:-1])
        share = torch.full_like(weight, 1 / weight.shape[1])
        if self.stochastic:  # rows of either sign have no mass
            mass_a, mass_b = (
                full[..., :others].sum(-1) + rows.sum(-1)
                for full, rows, others in ((self.full_a, a, self.others[0]), (self.full_b, b, self.others[1]))
            )
            a, b = (rows / mass.clamp_min(NO_MASS)[..., None] for rows, mass in ((a, mass_a), (b, mass_b)))
            weight = torch.minimum(mass_a, mass_b).detach().clamp(max=1) * weight
            share = weight / weight.sum(1, keepdim=True).clamp_min(NO_MASS)
        if heads == "mean":
            a, b = ((rows * share[..., None]).sum(1, keepdim=True) for rows in (a, b))
            weight = weight.mean(1, keepdim=True)
        return a, b, weight


MixedRows = tuple[Tensor, Tensor | None]  # rows to read, (1 or B, R'), and the weights (1 or B, R, R') that mix them


class RowSource(Protocol):
    """A source of attention rows: a :class:`~acr_reg.LayerAttention`, or one evaluated in blocks."""

    @property
    def layout(self) -> TokenLayout: ...

    @property
    def stochastic(self) -> bool: ...

    def weights(self, queries: Tensor, keys: Tensor | None = None) -> Tensor: ...


class AlignedPair:
    """Layer ``a`` on ``images`` and the same layer ``b`` on ``view(images)``. Aligns rows on demand.

    Where the lattices coincide (flips, quarter turns), query and key tokens are permuted before any product.
    Elsewhere both axes of ``b`` are resampled, and each row keeps the mass it gave to patches; with ``blur_alike`` rows
    and keys of ``a`` are blurred as much. ``valid`` (B, H, W) is False where the images are padding. ``with_entropy``
    also computes the entropy of rows.
    """

    def __init__(
        self,
        a: LayerAttention,
        b: LayerAttention,
        view: View,
        valid: Tensor | None = None,
        with_entropy: bool = True,
        blur_alike: bool = True,
    ) -> None:
        check_pair(a, b, view)
        self.layers = a, b
        self.a: RowSource = a
        self.b: RowSource = b
        self.with_entropy = with_entropy
        self.stochastic = a.stochastic and b.stochastic
        self.scale = None if self.stochastic else _row_scale(a, b)
        device = str(a.device)
        self.dtype = at_least_float32(a.recorded.seen[:0]).dtype
        image = None
        if valid is not None:
            image = tuple(valid_tokens(valid, grid).to(device) for grid in (a.layout.query, a.layout.key))
        self.maps = maps_of_view(view, b.layout, a.layout, device, image)
        self.own = maps_of_image(view, b.layout, a.layout, device, image) if blur_alike else None
        self.order_a = [token_order(a.layout, side, device) for side in ("query", "key")]
        self.classes = [
            torch.tensor(layer.layout.class_tokens or (), dtype=torch.long, device=device) for layer in (a, b)
        ]
        self.keys_valid = self.maps.keys.valid
        self.counted = torch.ones_like(self.maps.queries.valid)
        # A view that shows all of the image and padding around it is partial too: its rows look at the padding.
        complete = self.maps.keys.is_complete and self.maps.queries.is_complete
        self.is_partial = not complete or self.maps.keys_shown is not None
        if image is not None:
            self.counted, self.keys_valid = image[0], self.keys_valid & image[1]
            self.is_partial = True

    def of(self, a: RowSource, b: RowSource) -> AlignedPair:
        """This alignment applied to other row sources with the same layout."""
        pair = copy(self)
        pair.a, pair.b = a, b
        return pair

    def activation(self) -> AlignedRows:
        """The aligned rows of the class tokens; none if there is no class token."""
        always = torch.ones(1, len(self.classes[0]), dtype=torch.bool, device=self.keys_valid.device)
        return self._aligned((self.classes[0], None), (self.classes[1], None), always, always)

    def affinity(self, tokens: Tensor) -> AlignedRows:
        """The aligned rows of these patch tokens (R,) of the images."""
        shown = self.maps.queries.valid[:, tokens]
        of_image = self._image_rows(tokens) if self.own is None else self.own.rows(tokens, self.dtype)
        return self._aligned(of_image, self.maps.rows(tokens, self.dtype), shown, self.counted[:, tokens])

    def _image_rows(self, tokens: Tensor) -> MixedRows:
        rows = self.a.layout.num_other_tokens + tokens
        return rows if self.order_a[0] is None else self.order_a[0][rows], None

    def _aligned(self, of_image: MixedRows, of_view: MixedRows, shown: Tensor, counted: Tensor) -> AlignedRows:
        """Aligns rows of both maps."""
        order_a = self.order_a[1] if self.own is None else self.own.key_order
        maps = self.a.weights(of_image[0], order_a), self.b.weights(of_view[0], self.maps.key_order)
        if self.scale is not None:
            maps = maps[0] / self.scale, maps[1] / self.scale
        entropies = [row_entropy(each) for each in maps] if self.with_entropy and self.stochastic else None
        map_a = maps[0] if self.own is None else self.own.carry_keys(maps[0], self.a.stochastic)
        map_b = self.maps.carry_keys(maps[1], self.b.stochastic)
        map_a, map_b = _mix(map_a, of_image[1]), _mix(map_b, of_view[1])
        if entropies is not None:
            weights = of_image[1], of_view[1]
            entropies = [_mix(each[..., None], by)[..., 0] for each, by in zip(entropies, weights, strict=True)]
        return AlignedRows(
            map_a,
            map_b,
            (self.a.layout.num_other_tokens, self.b.layout.num_other_tokens),
            self.keys_valid,
            shown,
            counted,
            self.is_partial,
            self.stochastic,
            None if entropies is None else (entropies[0] + entropies[1]) / 2,
        )


def _mix(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows (B, H, R', ...) mixed by ``weights`` (1 or B, R, R') into (B, H, R, ...); None leaves them as they are."""
    return rows if weights is None else weights[:, None] @ rows


def _row_scale(a: LayerAttention, b: LayerAttention) -> Tensor:
    """(B, 1, 1, 1): by how much to divide the rows of both views; the formula is at the top of this file."""
    with torch.no_grad():
        masses = [torch.linalg.vector_norm(layer.weights(), 1, dim=-1).mean((1, 2)) for layer in (a, b)]
    return ((masses[0] + masses[1]) / 2).clamp_min(1)[:, None, None, None]


def row_entropy(rows: Tensor) -> Tensor:
    """Entropy (...) of probability rows (..., M) over its maximum ln M, detached: 0 means one key, 1 uniform rows."""
    if rows.shape[-1] == 1:
        return rows.new_zeros(rows.shape[:-1])
    rows = rows.detach()
    logs = rows.clamp_min(torch.finfo(rows.dtype).tiny).log_()  # vectorised, which torch's entr is not; 0 ln 0 stays 0
    return logs.mul_(rows).sum(-1).neg_() / math.log(rows.shape[-1])
