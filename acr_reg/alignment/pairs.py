"""Picks and aligns the attention rows to compare, of one layer on images and on a view of them.

With attention maps A1, A2 of an image and of its view, and P the map from the view's tokens back to the image's
(:class:`~acr_reg.alignment.plan.Plan`), rows of A1 are compared with rows of P^T A2 P. Where P
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
from collections.abc import Hashable
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from acr_reg._tensors import at_least_float32, select
from acr_reg.alignment.plan import Block, KeyReading, Plan, Range, Resampling, RowReading, plan_between, without_padding
from acr_reg.alignment.token_maps import NO_MASS, check_lattices
from acr_reg.attention.layer import LayerAttention
from acr_reg.tokens import Lattice
from acr_reg.views.view import View

Heads = Literal["mean", "each"]


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
class ReadRows:
    """Rows of one layer before they are carried onto the image: those of ``classes`` (B, H, C, K), and ``patches``
    (B, H, R', K), over the window of their ``keys``; and the ``sums`` (B, H, C + R', 4) over all keys of both, by
    ``keys.totals``, None where no masses are needed. The patches are ``mixed`` to (B, H, R, ...), unless each is a row
    of the image, and of these rows only those ``picked`` (P,) are wanted, None if all. ``unpadded`` (B, R') is False
    for rows of padding, which are not mixed in. What is not mixed stands in ``patches``, and leaves ``classes`` empty.
    """

    classes: Tensor
    patches: Tensor
    sums: Tensor | None
    keys: KeyReading
    mixed: Resampling | None
    unpadded: Tensor | None
    picked: Tensor | None
    stochastic: bool

    def mix(self, values: Tensor) -> Tensor:
        """(B, H, C + R') -> (B, H, C + R)."""
        if self.mixed is None:
            return values
        of_classes, values = self._parts(values)
        if self.unpadded is None:
            values = self.mixed(values)
        else:
            values = self.mixed(values * self.unpadded[:, None]) / self._share_unpadded(self.mixed)
        return torch.cat([of_classes, select(values, 2, self.picked)], 2)

    def _parts(self, values: Tensor) -> list[Tensor]:
        """Of values (B, H, C + R') or (B, H, C + R), those of class tokens and of patches."""
        count = self.classes.shape[2]
        return list(values.split([count, values.shape[2] - count], 2))

    def _share_unpadded(self, mixed: Resampling) -> Tensor:
        assert self.unpadded is not None
        return mixed(self.unpadded[:, None].to(self.patches)).clamp_min(torch.finfo(self.patches.dtype).tiny)

    def masses(self) -> tuple[Tensor | None, Tensor | None]:
        """(B, H, C + R') what to multiply each row over patches by, to keep the mass that it gave to keys visible in
        both views, None for 1; and (B, H, C + R) the mass on what both show, valid keys and other tokens."""
        area = self.keys.area
        if not self.stochastic:  # rows of either sign have no mass: they keep their mass per area
            count = self.classes.shape[2] + self.patches.shape[2]
            shape = *self.patches.shape[:2], count
            return None if area is None else area.to(self.patches)[:, None, None].expand(shape), None
        if self.sums is None:
            return None, None
        others, kept, moved, valid = self.sums.unbind(-1)
        if area is None:
            return None, self.mix(others + valid)
        factor = kept * _inverse(moved)
        return factor, self.mix(others + factor * valid)

    def onto_image(self, heads: Heads, factor: Tensor | None, weights: Tensor | None = None) -> Tensor:
        """(B, H or 1, C + R, M) rows over the image's patches. ``factor`` (B, H, C + R') multiplies rows before they
        are mixed, ``weights`` (B, H, C + R) after; with heads="mean" these add up over heads, and None is the mean."""
        if self.mixed is None:
            rows = _weighted(self.patches, heads, factor, weights)
        else:
            factors, each = ([None, None] if part is None else self._parts(part) for part in (factor, weights))
            classes = _weighted(self.classes, heads, factors[0], each[0])
            rows = torch.cat([classes, self._mixed_rows(self.mixed, heads, factors[1], each[1])], 2)
        if self.keys.unpadded is not None:
            rows = rows * self.keys.unpadded[:, None, None]
        return rows if self.keys.resampled is None else self.keys.resampled(rows)

    def _mixed_rows(self, mixed: Resampling, heads: Heads, factor: Tensor | None, weights: Tensor | None) -> Tensor:
        """Mixes rows along x, then along y. The factors join the first product and the weights the second, which also
        adds up the heads."""
        batch, count, _, _ = self.patches.shape
        size, groups = (mixed.first.shape[2], mixed.second.shape[2]), 1 if heads == "mean" else count
        if self.unpadded is not None:
            factor = self.unpadded[:, None] if factor is None else factor * self.unpadded[:, None]
        along_x = mixed.second[:, None, None]
        if factor is not None:
            along_x = along_x * factor.unflatten(2, size)[..., None, :]
        rows = along_x @ self.patches.unflatten(2, size)  # (B, H, m1, n2, M')
        if self.picked is not None and weights is not None:
            every = weights.new_zeros(batch, count, mixed.first.shape[1] * mixed.second.shape[1])
            weights = every.index_copy(2, self.picked, weights)
        if weights is None:
            weights = rows.new_full((batch, count, mixed.first.shape[1] * mixed.second.shape[1]), groups / count)
        if self.unpadded is not None:
            weights = weights / self._share_unpadded(mixed)
        grouped = weights.unflatten(2, (-1, mixed.second.shape[1])).unflatten(1, (groups, -1))  # (B, G, H/G, n1, n2)
        along_y = (grouped.permute(0, 1, 4, 3, 2)[..., None] * mixed.first[:, None, None, :, None]).flatten(4)
        rows = along_y @ rows.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
        return select(rows.transpose(2, 3).flatten(2, 3), 2, self.picked)


def _weighted(rows: Tensor, heads: Heads, factor: Tensor | None, weights: Tensor | None) -> Tensor:
    """Rows (B, H, R, K) times both (B, H, R); with heads="mean" these add up over heads, or no weights are the mean."""
    by = factor if weights is None or factor is None else factor * weights
    by = weights if by is None else by
    weighted = rows if by is None else rows * by[..., None]
    if heads == "each":
        return weighted
    # The gradient of a sum, unlike that of a mean, is no map of its own for each head.
    weighted = weighted.sum(1, keepdim=True)
    return weighted / rows.shape[1] if weights is None else weighted


class _Inverse(torch.autograd.Function):
    """1 / mass, and 1 / NO_MASS for less. Torch's gradient of it holds 1 / mass^2, which overflows where a mass is
    1e-20. What it multiplies is as small as the mass, so it is multiplied by 1 / mass twice."""

    @staticmethod
    def forward(ctx: Any, mass: Tensor) -> Tensor:
        inverse = mass.clamp_min(NO_MASS).reciprocal_()
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return ((gradient * inverse) * -inverse).masked_fill(inverse >= 1 / NO_MASS, 0)


def _inverse(mass: Tensor) -> Tensor:
    inverse: Tensor = _Inverse.apply(mass)
    return inverse


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """Rows of both maps that lie on the same tokens of the image: first those of ``num_classes`` class tokens, C, and
    then those of patches.

    ``keys_valid`` (1 or B, M) is True for keys visible in both views and not padding, ``shown`` (1 or B, R) for rows of
    patches visible in both views, ``counted`` (1 or B, R) for rows that are not padding. ``is_partial`` is False where
    all of these are known to be True. ``scale`` (B, 1, 1, 1) divides rows that are no probabilities. ``entropy``
    (B, H, C + R), detached, is the mean over both views of each row's entropy over its maximum ln M; None if not asked
    for or not stochastic.
    """

    of_image: ReadRows
    of_view: ReadRows
    num_classes: int
    keys_valid: Tensor
    shown: Tensor
    counted: Tensor
    is_partial: bool
    scale: Tensor | None
    entropy: Tensor | None

    def comparable(self, heads: Heads) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows to compare, (B, H or 1, C + R, M), averaged over heads or not, and the weight in [0, 1] of each,
        (B, H or 1, C + R); None if all count alike. Only valid keys mean anything.

        Full overlap leaves rows as they are, with the mass they give to patches (the paper). Partial overlap makes
        rows conditional: each head's row is divided by its own mass on what both show, valid keys and the other
        tokens, which equals a softmax over logits with the other keys masked. Only conditional rows are invariant: a
        softmax over a crop does not know the keys beyond it, and the share of attention beyond it differs by head.
        Rows, and heads in their mean, are weighted by the smaller mass of both views: rows that look elsewhere count
        little.
        """
        sides = self.of_image, self.of_view
        (factor_a, mass_a), (factor_b, mass_b) = (side.masses() for side in sides)
        weight = by_a = by_b = None
        if self.is_partial:
            patches = self.of_image.patches
            weight = F.pad(self.shown[:, None].to(patches), (self.num_classes, 0), value=1.0)
            if mass_a is not None and mass_b is not None:
                weight = torch.minimum(mass_a, mass_b).detach().clamp(max=1) * weight
                of_heads = weight.sum(1, keepdim=True).clamp_min(NO_MASS)
                share = weight / of_heads if heads == "mean" else (weight > 0).to(weight)
                by_a, by_b = share * _inverse(mass_a), share * _inverse(mass_b)
            weight = weight.mean(1, keepdim=True) if heads == "mean" else weight
            weight = weight.expand(len(patches), 1 if heads == "mean" else patches.shape[1], -1)
        a, b = self.of_image.onto_image(heads, factor_a, by_a), self.of_view.onto_image(heads, factor_b, by_b)
        return (a, b, weight) if self.scale is None else (a / self.scale, b / self.scale, weight)


class RowSource(Protocol):
    """A source of attention rows: a :class:`~acr_reg.LayerAttention`, or one evaluated in blocks."""

    @property
    def stochastic(self) -> bool: ...

    def weights(self, queries: Tensor, keys: Tensor | None = None) -> Tensor: ...


def plan_of(
    a: LayerAttention,
    b: LayerAttention,
    view: View,
    valid: Tensor | None = None,
    *,
    blur_alike: bool = True,
    rows: Range | None = None,
    known: dict[Hashable, Plan] | None = None,
) -> Plan:
    """The plan to compare layer ``a`` on ``images`` with the same layer ``b`` on ``view(images)``.

    With ``blur_alike`` rows and keys of ``a`` are blurred as resampling blurs those of ``b``. ``valid`` (B, H, W) is
    False where the images are padding. ``rows`` are the sizes of a block where tokens are permuted and where they are
    resampled; None makes one block. Plans for the same view and ``valid`` are looked up in ``known``. Raises ValueError
    if the layers are no such pair.
    """
    check_pair(a, b, view)
    dtype = at_least_float32(a.recorded.seen[:0]).dtype
    rows = rows or (len(a.layout.query), len(a.layout.query))
    key = (a.layout, b.layout, rows, a.device, dtype)
    known = {} if known is None else known
    if key not in known:
        plan = plan_between(view, a.layout, b.layout, blur_alike, rows, str(a.device), dtype)
        known[key] = plan if valid is None else without_padding(plan, view, a.layout, b.layout, valid)
    return known[key]


class AlignedPair:
    """Layer ``a`` on images and the same layer ``b`` on a view of them. Aligns rows on demand, by their plan.

    Where P is an index, query and key tokens are permuted before any product. Elsewhere both axes of ``b`` are
    resampled, and each row keeps the mass it gave to patches. ``with_entropy`` also computes the entropy of rows.
    """

    def __init__(self, a: LayerAttention, b: LayerAttention, plan: Plan, with_entropy: bool = True) -> None:
        self.layers = a, b
        self.a: RowSource = a
        self.b: RowSource = b
        self.plan = plan
        self.stochastic = a.stochastic and b.stochastic
        self.with_entropy = with_entropy and self.stochastic
        self.scale = None if self.stochastic else _row_scale(a, b)

    def of(self, a: RowSource, b: RowSource, images: slice | None = None) -> AlignedPair:
        """This alignment applied to other row sources with the same layout, of all images or a part of them."""
        pair = copy(self)
        pair.a, pair.b = a, b
        if images is not None:
            pair.plan = self.plan.of_images(images)
            pair.scale = None if self.scale is None else self.scale[images]
        return pair

    def rows(self, block: Block | None, picked: Tensor | None = None, with_classes: bool = False) -> AlignedRows:
        """The aligned rows of a block of the plan's tokens, or only those ``picked`` (R,) among them; ``with_classes``
        those of the class tokens before them."""
        plan = self.plan
        shown = counted = plan.keys_valid.new_ones(1, 0)
        of_image = of_view = None
        if block is not None:
            shown, counted = (select(each, 1, picked) for each in (block.shown, plan.counted(block)))
            of_image, of_view = block.of_image, block.of_view
        classes = plan.classes if with_classes else [tokens[:, :0] for tokens in plan.classes]
        unpadded = plan.unpadded or (None, None)
        a, entropy_a = self._read(self.a, classes[0], of_image, plan.of_image, unpadded[0], picked)
        b, entropy_b = self._read(self.b, classes[1], of_view, plan.of_view, unpadded[1], picked)
        entropy = None if entropy_a is None or entropy_b is None else (entropy_a + entropy_b) / 2
        count = classes[0].shape[1]
        return AlignedRows(a, b, count, plan.keys_valid, shown, counted, plan.is_partial, self.scale, entropy)

    def _read(
        self,
        source: RowSource,
        classes: Tensor,
        reading: RowReading | None,
        keys: KeyReading,
        unpadded: Tensor | None,
        picked: Tensor | None,
    ) -> tuple[ReadRows, Tensor | None]:
        """The rows, and the entropy of what they are mixed to."""
        mixed, index, count = None, classes, 0
        if reading is not None:
            mixed, index = reading.mixed, reading.index
            if mixed is None:  # no other rows than those picked are formed
                index = select(index, 1, picked)
            elif unpadded is not None:
                unpadded = unpadded.gather(1, reading.patches.expand(len(unpadded), -1))
            index = torch.cat([classes.expand(len(index), -1), index], 1)
        if mixed is None:
            unpadded = picked = None
        else:
            count = classes.shape[1]
        whole, sums = source.weights(index, keys.order), None
        if source.stochastic and (self.plan.is_partial or keys.area is not None):
            totals = keys.totals[0] if len(keys.totals) == 1 else keys.totals[:, None]
            of_classes, patches, sums = _Split.apply(whole, totals, keys, count)
        else:
            of_classes, patches = (keys.read(part) for part in whole.tensor_split((count,), 2))
        read = ReadRows(of_classes, patches, sums, keys, mixed, unpadded, picked, source.stochastic)
        return read, read.mix(row_entropy(whole)) if self.with_entropy else None


class _Split(torch.autograd.Function):
    """Rows over the window of their keys, the first ``count`` and the others, and the products of all with ``totals``.
    The gradients are added in one tensor; autograd would make one for each, and fill up those of the windows with
    zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, totals: Tensor, keys: KeyReading, count: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(totals)
        ctx.window = keys.window
        return keys.read(rows[:, :, :count]), keys.read(rows[:, :, count:]), rows @ totals

    @staticmethod
    def backward(ctx: Any, of_first: Tensor, of_others: Tensor, of_sums: Tensor) -> tuple[Tensor, None, None, None]:
        (totals,) = ctx.saved_tensors
        whole, count = of_sums @ totals.mT, of_first.shape[2]
        for part, found in ((slice(count), of_first), (slice(count, None), of_others)):
            if isinstance(ctx.window, slice):
                whole[:, :, part, ctx.window].add_(found)
            else:
                whole[:, :, part].scatter_add_(-1, ctx.window[:, None, None].expand_as(found), found)
        return whole, None, None, None


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
