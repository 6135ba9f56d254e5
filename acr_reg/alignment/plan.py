"""What to read of two attention maps to compare them under a view, worked out once for a view and two layouts.

Attention A of a view is carried back onto the image as P^T A P. A flip, a quarter turn or a crop of whole tokens
permutes or picks tokens: P is an index. Any other view resamples rows and keys, each along both axes of the grid, and
the image's own attention is then blurred alike.

A view is known on the host, and so is all that follows from it: no tensor on a device is read here, a new view costs
one copy to the device, and layers with the same layouts share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acr_reg._tensors import select
from acr_reg.alignment.token_maps import valid_tokens
from acr_reg.tokens import TokenLayout, TokenSide
from acr_reg.views.resampling import LatticeMap
from acr_reg.views.view import View, blur_between, map_between

Range = tuple[int, int]
SIDES: tuple[TokenSide, TokenSide] = ("query", "key")


@dataclass(frozen=True, eq=False)
class Resampling:
    """Weights along both axes of a grid: ``first`` (1 or B, n1, m1) and ``second`` (1 or B, n2, m2)."""

    first: Tensor
    second: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """(B, ..., m1 m2) -> (B, ..., n1 n2)."""
        shape = values.shape[:-1]
        along_x = values.reshape(len(self.second), -1, self.second.shape[2]).bmm(self.second.mT)
        each = self.first[:, None].expand(-1, shape.numel() // len(self.first), -1, -1).flatten(0, 1)
        rows, columns = self.first.shape[1], self.second.shape[1]
        return each.bmm(along_x.view(len(each), each.shape[2], columns)).view(*shape, rows * columns)

    def backwards(self, values: Tensor) -> Tensor:
        """The transposed product: (B, ..., n1 n2) -> (B, ..., m1 m2)."""
        return Resampling(self.first.mT, self.second.mT)(values)


@dataclass(frozen=True, eq=False)
class RowReading:
    """The queries ``index`` (1 or B, R') of which a block's rows are ``mixed``; None if they are those rows.
    ``patches`` numbers them among the patches."""

    index: Tensor
    patches: Tensor
    mixed: Resampling | None


@dataclass(frozen=True, eq=False)
class KeyReading:
    """How rows over the source's keys are carried onto the image's keys.

    ``order`` (1 or B, M') puts the ``others``, tokens that are no patches, first, and then the patches, as ``patches``
    numbers them; None is the model's order. Keys in the ``window`` of that order are ``resampled``; None where they
    are the image's keys. The window is an index (B, K) where images are turned differently. ``totals`` (1 or B, M', 4)
    sums up a row's masses: on other tokens; on the patches to be kept; on these after resampling; and on what both
    views show, after it. ``area`` (1 or B,) is the number of source keys that one of the image covers; None if the map
    is exact. ``unpadded`` (B, K) is False for keys that are padding.
    """

    order: Tensor | None
    others: int
    patches: Tensor
    window: slice | Tensor
    resampled: Resampling | None
    totals: Tensor
    area: Tensor | None
    unpadded: Tensor | None = None

    def read(self, rows: Tensor) -> Tensor:
        """The window of rows (B, ..., M') in ``order``."""
        return rows[..., self.window] if isinstance(self.window, slice) else select(rows, -1, self.window)

    def without(self, padding: Tensor, keys_valid: Tensor) -> KeyReading:
        """For source keys that are ``padding`` (B, M') and ``keys_valid`` (B, M) of the image."""
        totals = self.totals.expand(len(padding), -1, -1).clone()
        totals[..., 3] = _spread(self.window, self.resampled, keys_valid.to(totals), totals.shape[1])
        if self.area is None:
            return replace(self, totals=totals)
        others = padding.new_zeros(len(padding), self.others)
        read = ~torch.cat([others, padding.gather(1, self.patches.expand(len(padding), -1))], 1)
        totals[..., 1:] *= read[..., None]
        return replace(self, totals=totals, unpadded=self.read(read))


def _spread(window: slice | Tensor, resampled: Resampling | None, values: Tensor, count: int) -> Tensor:
    """Values (B, M) of the image's keys -> (B, M'): the sums that these are of a row's masses on the source's keys."""
    values = values if resampled is None else resampled.backwards(values[:, None])[:, 0]
    spread = values.new_zeros(len(values), count)
    if isinstance(window, slice):
        spread[:, window] = values
        return spread
    return spread.scatter_add_(1, window, values)


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of the plan's tokens in the range ``tokens``, and what both maps read for them. ``shown`` (1 or B, R) is
    True for tokens visible in both views. For rows that are padding, see :class:`Plan`."""

    tokens: Range
    of_image: RowReading
    of_view: RowReading
    shown: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """How the maps of an image and of a view of it are compared.

    ``tokens`` (R,) are the image's tokens that both views show, of any image of the batch: a rectangle of its grid,
    ``width`` tokens wide and divided into ``blocks``. The ``num_left_out`` others weigh nothing, but count as rows.
    ``keys_valid`` (1 or B, M) is True for keys visible in both views and not padding. ``is_partial`` is False where all
    tokens and keys are known to be so. ``classes`` (1, C) are the class tokens of both. ``unpadded`` (B, N) and (B, N')
    are False for queries of the image and of the view that are padding; None if none is.
    """

    blocks: tuple[Block, ...]
    of_image: KeyReading
    of_view: KeyReading
    tokens: Tensor
    width: int
    num_left_out: int
    keys_valid: Tensor
    is_partial: bool
    classes: tuple[Tensor, Tensor]
    unpadded: tuple[Tensor, Tensor] | None = None

    @property
    def hides_keys(self) -> bool:
        """Whether rows hold values at keys that are not valid; resampled ones are 0 where a view shows nothing."""
        is_resampled = self.of_image.resampled is not None and self.of_view.resampled is not None
        return self.is_partial and (self.unpadded is not None or not is_resampled)

    def counted(self, block: Block) -> Tensor:
        """(1 or B, R): which of a block's tokens are not padding."""
        tokens = self.tokens[slice(*block.tokens)]
        return torch.ones_like(block.shown[:1]) if self.unpadded is None else self.unpadded[0][:, tokens]

    def of_images(self, images: slice) -> Plan:
        """The plan for a part of the batch."""
        part: Plan = _mapped(
            replace(self, tokens=self.tokens[None]), lambda each: each[images] if len(each) > 1 else each
        )
        return replace(part, tokens=self.tokens)

    def left_out(self, batch: int) -> Tensor | int:
        """The number of rows, of all images, that are not padding and not among ``tokens``."""
        if self.unpadded is None:
            return batch * self.num_left_out
        return self.unpadded[0].sum() - self.unpadded[0][:, self.tokens].sum()


@lru_cache(maxsize=32)
def plan_between(
    view: View, image: TokenLayout, viewed: TokenLayout, blur_alike: bool, rows: Range, device: str, dtype: torch.dtype
) -> Plan:
    """The plan for a layout of images and the layout of ``view`` of them, in blocks of about ``rows[0]`` rows, or
    ``rows[1]`` where rows are resampled."""
    queries, keys = (map_between(view.inverse, viewed.lattice(side), image.lattice(side), "cpu") for side in SIDES)
    seen = map_between(view, image.key, viewed.key, "cpu")
    own_queries, own_keys = (
        blur_between(view.inverse, viewed.lattice(side), image.lattice(side), "cpu")
        if blur_alike
        else map_between(View(), image.lattice(side), image.lattice(side), "cpu")
        for side in SIDES
    )
    # Training uses the plan too, and cannot use tensors made in inference_mode.
    with torch.inference_mode(False), torch.no_grad():
        of_image, of_view = _Axes.of(own_queries), _Axes.of(queries)
        (top, bottom), (left, right) = (_hull(valid) for valid in of_view.valid)
        width, grid = right - left, (image.query.height, image.query.width)
        is_exact = queries.is_exact and own_queries.is_exact
        height, shown = max(1, rows[0 if is_exact else 1] // width), queries.valid.unflatten(1, grid)
        blocks = [
            Block(
                ((y - top) * width, (end - top) * width),
                of_image.rows((y, end), (left, right), image, dtype),
                of_view.rows((y, end), (left, right), viewed, dtype),
                shown[:, y:end, left:right].flatten(1),
            )
            for y in range(top, bottom, height)
            for end in [min(y + height, bottom)]
        ]
        tokens = torch.arange(prod(grid), device="cpu").view(grid)[top:bottom, left:right].flatten()
        plan = Plan(
            blocks=tuple(blocks),
            of_image=_Axes.of(own_keys).keys(image, keys.valid, keys.valid, dtype),
            of_view=_Axes.of(keys).keys(viewed, seen.valid, keys.valid, dtype),
            tokens=tokens,
            width=width,
            num_left_out=prod(grid) - len(tokens),
            keys_valid=keys.valid,
            # A view that shows all of the image and padding around it is partial too: its rows look at the padding.
            is_partial=not (queries.is_complete and keys.is_complete and seen.is_complete),
            classes=(_row(image.class_tokens or ()), _row(viewed.class_tokens or ())),
        )
        return plan if device == "cpu" else _in_one_copy(plan, device)


def without_padding(plan: Plan, view: View, image: TokenLayout, viewed: TokenLayout, valid: Tensor) -> Plan:
    """The plan for images that are padding where ``valid`` (B, H, W) is False."""
    device = plan.keys_valid.device
    of_image = [valid_tokens(valid, image.lattice(side)).to(device) for side in SIDES]
    of_view = [
        map_between(view, image.lattice(side), viewed.lattice(side), str(device)).tokens(tokens.float()) >= 0.5
        for side, tokens in zip(SIDES, of_image, strict=True)
    ]
    keys_valid = plan.keys_valid & of_image[1]
    return replace(
        plan,
        of_image=plan.of_image.without(~of_image[1], keys_valid),
        of_view=plan.of_view.without(~of_view[1], keys_valid),
        keys_valid=keys_valid,
        is_partial=True,
        unpadded=(of_image[0], of_view[0]),
    )


@dataclass(frozen=True, eq=False)
class _Axes:
    """A map between lattices as one matrix for each axis of the target, (S, n1, c1) and (S, n2, c2), over the positions
    along the source's axis that it reads. ``steps`` (S, 2) is how far apart these are among the source's tokens.
    ``valid`` (S, n1) and (S, n2) are the targets shown."""

    whole: LatticeMap
    matrices: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    steps: Tensor

    @classmethod
    def of(cls, whole: LatticeMap) -> _Axes:
        images = [image for part in whole.parts for image in part.images or range(len(part.y.index))]
        order = torch.tensor(images, device="cpu").argsort()
        axes = [(part.x, part.y) if part.transposed else (part.y, part.x) for part in whole.parts]
        matrices, valid = [], []
        for along in ([pair[0] for pair in axes], [pair[1] for pair in axes]):
            longest = max(axis.count for axis in along)
            dense = [F.pad(axis.dense(torch.float64, axis.index.device), (0, longest - axis.count)) for axis in along]
            matrices.append(torch.cat(dense)[order])
            valid.append(torch.cat([axis.valid for axis in along])[order])
        steps = torch.tensor([whole.source.width, 1], device="cpu")
        of_images = [(steps.flip(0) if part.transposed else steps).expand(len(part.y.index), 2) for part in whole.parts]
        return cls(whole, (matrices[0], matrices[1]), (valid[0], valid[1]), torch.cat(of_images)[order])

    def rows(self, along_y: Range, along_x: Range, layout: TokenLayout, dtype: torch.dtype) -> RowReading:
        """For the targets in a rectangle of the grid."""
        chosen = [matrix[:, slice(*along)] for matrix, along in zip(self.matrices, (along_y, along_x), strict=True)]
        if self.whole.is_exact:
            mixed, places = None, [matrix.argmax(2) for matrix in chosen]
        else:
            mixed, places = _window(chosen, dtype)
        patches = self._tokens(*places)
        return RowReading(_positions(layout, "query", patches), patches, mixed)

    def keys(self, layout: TokenLayout, kept: Tensor, keys_valid: Tensor, dtype: torch.dtype) -> KeyReading:
        """For all targets. ``kept`` (1 or B, M') are the source's keys whose mass a row keeps."""
        others, count = layout.num_other_tokens, len(layout.key)
        resampled, patches = None, torch.arange(count, device="cpu")[None]
        window: slice | Tensor = slice(others, None)
        if self.whole.is_permutation:
            patches = self._tokens(*(matrix.argmax(2) for matrix in self.matrices))
        else:
            shown = [matrix * valid[..., None] for matrix, valid in zip(self.matrices, self.valid, strict=True)]
            resampled, places = _window(shown, dtype)
            index = self._tokens(*places)
            if len(self.whole.parts) > 1:
                window = others + index
            else:
                window = slice(others, others + index.shape[1])
                is_rest = torch.ones(len(index), count, dtype=torch.int8, device="cpu").scatter_(1, index, 0)
                patches = torch.cat([index, is_rest.argsort(dim=1, stable=True)[:, index.shape[1] :]], 1)
        beside = torch.arange(-others, 0, device="cpu").expand(len(patches), -1)
        order = _positions(layout, "key", torch.cat([beside, patches], 1))
        images = max(len(patches), len(kept), len(keys_valid))
        totals = torch.zeros(images, others + count, 4, dtype=dtype, device="cpu")
        totals[:, :others, 0] = 1
        totals[:, others:, 1] = kept.expand(images, -1).gather(1, patches.expand(images, -1))
        totals[..., 2:] = _spread(window, resampled, keys_valid.to(dtype), others + count)[..., None]
        return KeyReading(
            order=None if torch.equal(order, torch.arange(others + count, device="cpu")[None]) else order,
            others=others,
            patches=patches,
            window=window,
            resampled=resampled,
            totals=totals,
            area=None if self.whole.is_exact else self.whole.area,
        )

    def _tokens(self, first: Tensor, second: Tensor) -> Tensor:
        """The source's tokens at these positions along both axes, in rows."""
        along_first, along_second = first * self.steps[:, :1], second * self.steps[:, 1:]
        tokens = (along_first[:, :, None] + along_second[:, None]).flatten(1)
        return tokens.clamp(max=len(self.whole.source) - 1)  # beyond the shorter axis nothing has a weight


def _hull(valid: Tensor) -> Range:
    """From the first to the last target that any image shows; at least one, so that no tensor is empty."""
    shown = valid.any(0).nonzero().flatten().tolist() or [0]
    return shown[0], shown[-1] + 1


def _window(matrices: Sequence[Tensor], dtype: torch.dtype) -> tuple[Resampling, list[Tensor]]:
    """The matrices without the positions that are not read, and the others, (S, m): equally many for all images."""
    cut, places = [], []
    for matrix in matrices:
        read = (matrix > 0).any(1)
        low, high = read.long().argmax(1), matrix.shape[2] - read.flip(1).long().argmax(1)
        length = int((high - low).where(read.any(1), 1).max())
        place = low.clamp(max=matrix.shape[2] - length)[:, None] + torch.arange(length, device="cpu")
        cut.append(matrix.gather(2, place[:, None].expand(-1, matrix.shape[1], -1)).to(dtype))
        places.append(place)
    return Resampling(*cut), places


def _positions(layout: TokenLayout, side: TokenSide, patches: Tensor) -> Tensor:
    """Where these patches stand among a side's tokens. Negative ones are other tokens, from the last."""
    order, tokens = layout.order(side), layout.num_other_tokens + patches
    return tokens if order is None else torch.tensor(order, device="cpu")[tokens]


def _in_one_copy(plan: Plan, device: str) -> Plan:
    """All tensors of the plan on a device, as parts of one."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor.contiguous())
        return tensor

    _mapped(plan, collect)
    sizes = [tensor.numel() * tensor.element_size() for tensor in found]
    parts = [
        F.pad(tensor.flatten().view(torch.uint8), (0, -size % 8)) for tensor, size in zip(found, sizes, strict=True)
    ]
    sent = torch.cat(parts).to(device).split([len(part) for part in parts])
    moved = (
        part[:size].view(tensor.dtype).view(tensor.shape) for part, size, tensor in zip(sent, sizes, found, strict=True)
    )
    return _mapped(plan, lambda _: next(moved))


def _row(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([tokens], dtype=torch.long, device="cpu")


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(each, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), change) for field in fields(value)})
    return value
