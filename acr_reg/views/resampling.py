"""Carries values from one lattice onto another, through an affine map for each image, by the centres of the tokens.

If the centres of both lattices coincide, the map is an index, exact to the bit. Otherwise it resamples each axis
bilinearly, antialiased when shrinking (as torchvision does, ``align_corners=False``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from acr_reg._tensors import at_least_float32, select
from acr_reg.tokens import Lattice
from acr_reg.views.affine import Affine, Axis

_T = TypeVar("_T")
_Band = tuple[slice, Tensor]  # source positions that a block of targets reads, and its weights (block, positions)

# Centres this close, in units of the source's spacing, coincide: far below any visible resampling.
_ON_LATTICE = 1e-4

# An edge includes centres this close to it, in source tokens: the rounding of coordinates, and no more, for a crop of a
# crop of one pixel shows differences as small as 1e-5 pixels.
_ON_EDGE = 1e-9

# On a CPU, this many target positions are computed at once, from only those source positions that they read. Maps with
# fewer positions, and other devices, take one product of matrices, where zeros cost less than more calls.
_BLOCK = 64


@dataclass(frozen=True, eq=False)
class AxisMap:
    """Which of ``count`` source positions each target position reads along one axis, for S images; on the CPU.

    ``index`` (S, target, taps) holds the positions read and ``weights`` their weights, which sum to 1; None if each
    target reads exactly one. ``valid`` (S, target) is False where the centre lies outside the part of the source that
    is shown. ``step`` (S,) is the distance between neighbouring targets, in source tokens. ``runs`` says for exact maps
    what each of the S images reads.
    """

    count: int
    index: Tensor
    weights: Tensor | None
    valid: Tensor
    step: Tensor
    runs: list[_Run] = field(default_factory=list)
    _dense: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @property
    def places(self) -> Tensor:
        """(S, target): the single position read. Only for exact maps."""
        assert self.weights is None
        return self.index[:, :, 0]

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(S, target, source): the weights as a matrix, made once for each precision and device."""
        made = self._dense.get((dtype, device))
        if made is None:
            given = torch.ones_like(self.index) if self.weights is None else self.weights
            images, targets, _ = self.index.shape
            # Training uses them too, and cannot use tensors made in inference_mode.
            with torch.inference_mode(False), torch.no_grad():
                whole = torch.promote_types(dtype, torch.float32)  # holds every index exactly: one copy is enough
                index, weights = torch.stack([self.index.to(whole), given.to(whole)]).to(device)
                empty = torch.zeros(images, targets, self.count, dtype=dtype, device=device)
                made = empty.scatter_add_(2, index.long(), weights.to(dtype))
            self._dense[dtype, device] = made
        return made

    def bands(self, weights: Tensor) -> list[list[_Band]]:
        """The bands of each image, cut out of the dense ``weights``. Only for maps with weights."""
        assert self.weights is not None
        read, bands = self.weights > 0, [list[_Band]() for _ in weights]
        low, high = self.index.where(read, self.count).amin(2), self.index.where(read, -1).amax(2) + 1
        for begins, ends, rows in zip(*(each.split(_BLOCK, 1) for each in (low, high, weights)), strict=True):
            for image, (begin, end) in enumerate(zip(begins.amin(1).tolist(), ends.amax(1).tolist(), strict=True)):
                bands[image].append((slice(begin, end), rows[image, :, begin:end]))
        return bands

    def blur(self, there: AxisMap) -> AxisMap:
        """The mean of staying and of reading what ``there`` gives: the map onto the line that ``there`` reads. Only for
        maps with weights."""
        with torch.inference_mode(False), torch.no_grad():
            back, onto = (axis.dense(torch.float64, self.index.device) for axis in (self, there))
            weights = (back @ onto + torch.eye(there.count, dtype=torch.float64, device="cpu")) / 2
            index = torch.arange(there.count, device="cpu").expand_as(weights)
        return AxisMap(there.count, index, weights, self.valid, torch.ones_like(self.step))


class _Run(NamedTuple):
    """Along one axis an exact map reads ``length`` neighbours from ``start`` on, in order or ``mirrored``. As many
    targets ``before`` and ``after`` them show nothing."""

    before: int
    start: int
    length: int
    mirrored: bool
    after: int


@dataclass(frozen=True, eq=False)
class _Part:
    """The images of a batch (None: all) whose views are all transposed, or all not."""

    images: list[int] | None
    y: AxisMap
    x: AxisMap
    transposed: bool

    def over_tokens(self, pairs: Tensor) -> Tensor:
        """Flattens values for pairs of positions along y and x, (S, y, x), to (S, target tokens)."""
        return (pairs.mT if self.transposed else pairs).flatten(1)

    def __call__(self, maps: Tensor) -> Tensor:
        if self.y.weights is None:
            mapped = _for_each(_moved, maps, self.y.runs, self.x.runs)
        else:
            mapped = self._resampled(maps)
        return mapped.mT if self.transposed else mapped

    def _resampled(self, maps: Tensor) -> Tensor:
        y, x = (axis.dense(maps.dtype, maps.device) for axis in (self.y, self.x))
        if maps.device.type == "cpu" and max(maps.shape[-2:]) > _BLOCK:
            along_y, along_x = self.y.bands(y), self.x.bands(x)
            if len(y) == 1 and maps.ndim > 3:  # each by itself: a block's backward pass writes all that it was cut from
                along_y, along_x = along_y * max(len(maps), 1), along_x * max(len(maps), 1)
            return _for_each(_banded, maps, along_y, along_x)
        return _product(_product(maps.mT, y).mT, x)


@dataclass(frozen=True, eq=False)
class LatticeMap:
    """Carries values from a source lattice onto a target lattice, for one view or one for each image of a batch. Its
    tables are made on the CPU, and what is read of them is copied to its ``device`` once."""

    parts: tuple[_Part, ...]
    source: Lattice
    target: Lattice
    is_exact: bool
    """Whether every target centre falls on a source centre."""
    is_complete: bool
    """Whether the source shows every target centre."""
    device: str

    @classmethod
    def between(cls, affines: Sequence[Affine], source: Lattice, target: Lattice, device: str) -> LatticeMap:
        """The map from a ``source`` lattice on the input of a view, given by its ``affines``, onto a ``target`` lattice
        on its output."""
        turned = [affine.transposed for affine in affines]
        groups = {t: [i for i, other in enumerate(turned) if other == t] for t in dict.fromkeys(turned)}
        made = []
        # Training uses the map too, and cannot use tensors made in inference_mode.
        with torch.inference_mode(False), torch.no_grad():
            for transposed, images in groups.items():
                chosen = [affines[i] for i in images]
                on_y, on_x = (1, 0) if transposed else (0, 1)
                y = _Positions([a.y for a in chosen], Line(source, 0), Line(target, on_y))
                x = _Positions([a.x for a in chosen], Line(source, 1), Line(target, on_x))
                made.append((None if len(groups) == 1 else images, y, x, transposed))
            exact = all(y.fall_on_source and x.fall_on_source for _, y, x, _ in made)
            complete = all(bool(y.valid.all()) and bool(x.valid.all()) for _, y, x, _ in made)
            parts = tuple(_Part(i, y.axis_map(exact), x.axis_map(exact), t) for i, y, x, t in made)
        return cls(parts, source, target, exact, complete, device)

    def blur(self, there: LatticeMap) -> LatticeMap:
        """The map of the target onto itself that blurs as this map does. Only for maps that are not exact.

        ``there`` is the map onto this one's source. Going there and back blurs twice, with twice the variance, so half
        of it, the mean of staying and of going, has the variance of one.
        """
        parts = []
        for onto, back in zip(there.parts, self.parts, strict=True):
            y, x = (back.x, back.y) if onto.transposed else (back.y, back.x)
            parts.append(_Part(onto.images, y.blur(onto.y), x.blur(onto.x), False))
        return LatticeMap(tuple(parts), self.target, self.target, False, self.is_complete, self.device)

    @property
    def is_permutation(self) -> bool:
        """Whether the target has the source's tokens, each once, in another order."""
        return self.is_exact and self.is_complete and len(self.source) == len(self.target)

    @cached_property
    def valid(self) -> Tensor:
        """(1 or B, target tokens) bool: whether the source shows the centre of a target token."""
        return self._over_tokens(lambda part: part.y.valid[:, :, None] & part.x.valid[:, None, :])

    @property
    def area(self) -> Tensor:
        """(1 or B,): the number of source tokens that one target token covers."""
        return self._gathered([(part.y.step * part.x.step).abs() for part in self.parts])

    @cached_property
    def index(self) -> Tensor:
        """(1 or B, target tokens): the source token that each target token coincides with. Only for exact maps."""
        width = self.source.width
        return self._over_tokens(lambda part: part.y.places[:, :, None] * width + part.x.places[:, None, :])

    def _over_tokens(self, pairs: Callable[[_Part], Tensor]) -> Tensor:
        with torch.inference_mode(False):  # as in ``between``
            return self._gathered([part.over_tokens(pairs(part)) for part in self.parts]).to(self.device)

    def __call__(self, maps: Tensor) -> Tensor:
        """Dense maps (..., source height, source width) -> (..., target height, target width), 0 where not shown.

        With a view for each image the first axis is the batch.
        """
        # Half precision is resampled in float32 and rounded once.
        precise = maps if self.is_exact else at_least_float32(maps)
        # Autocast would round products, and refuses to join tensors of float64. The meta device has none.
        with nullcontext() if maps.is_meta else torch.autocast(maps.device.type, enabled=False):
            mapped = self._gathered([part(_of_images(precise, part.images)) for part in self.parts])
        if not (self.is_complete or self.is_exact):
            hidden = rearrange(~self.valid, "b (h w) -> b h w", h=self.target.height)
            mapped = mapped.masked_fill(_beside(hidden.to(mapped.device), mapped), 0)
        return mapped.to(maps.dtype)

    def tokens(self, values: Tensor, dim: int = -1) -> Tensor:
        """Token values along one dimension, ``len(source)`` of them -> ``len(target)``, 0 where not shown."""
        values = values.movedim(dim, -1)
        if self.is_exact:
            mapped = select(values, -1, self.index)
            if not self.is_complete:
                mapped = mapped.masked_fill(_beside(~self.valid, mapped), 0)
        else:
            mapped = self(rearrange(values, "... (h w) -> ... h w", h=self.source.height)).flatten(-2)
        return mapped.movedim(-1, dim)

    def _gathered(self, parts: list[Tensor]) -> Tensor:
        """The results of all parts, in the order of the batch."""
        if len(parts) == 1:
            return parts[0]
        images = [image for part in self.parts for image in part.images or ()]
        found = dict(zip(images, torch.cat(parts), strict=True))
        return torch.stack([found[image] for image in sorted(found)])


def _of_images(maps: Tensor, images: list[int] | None) -> Tensor:
    """The maps of these images, None: of all. A list as index would be copied to the device."""
    return maps if images is None else torch.stack([maps[image] for image in images])


def _beside(mask: Tensor, values: Tensor) -> Tensor:
    """Reshapes a mask (1 or B, ...) to broadcast over the last axes of ``values`` (B, ..., ...)."""
    between = values.ndim - mask.ndim
    return mask[0] if len(mask) == 1 else mask.reshape(len(mask), *[1] * between, *mask.shape[1:])


def _for_each(read: Callable[[Tensor, _T, _T], Tensor], maps: Tensor, along_y: list[_T], along_x: list[_T]) -> Tensor:
    """Reads all images alike, or each in its own way."""
    if len(along_y) == 1:
        return read(maps, along_y[0], along_x[0])
    return torch.stack([read(*each) for each in zip(maps.unbind(), along_y, along_x, strict=True)])


def _moved(maps: Tensor, y: _Run, x: _Run) -> Tensor:
    """Exact maps; 0 where nothing is shown. Always a copy."""
    for dim, run in ((-2, y), (-1, x)):
        if run.length < maps.shape[dim]:  # else its backward pass would copy the whole gradient
            maps = maps.narrow(dim, run.start, run.length)
    moved = maps.flip([dim for dim, run in ((-2, y), (-1, x)) if run.mirrored])
    hidden = (x.before, x.after, y.before, y.after)
    return F.pad(moved, hidden) if any(hidden) else moved


def _banded(maps: Tensor, y: list[_Band], x: list[_Band]) -> Tensor:
    left = min(columns.start for columns, _ in x)
    maps = maps[..., left : max(columns.stop for columns, _ in x)]
    maps = torch.cat([weights @ maps[..., rows, :] for rows, weights in y], -2)
    return torch.cat([maps[..., columns.start - left : columns.stop - left] @ weights.mT for columns, weights in x], -1)


def _product(maps: Tensor, weights: Tensor) -> Tensor:
    """Resamples the last axis of (..., source), or of (S, ..., source), by (S, target, source)."""
    if len(weights) == 1:
        return maps @ weights[0].mT
    return (maps.flatten(1, -2) @ weights.mT).unflatten(1, maps.shape[1:-1])


class Line:
    """One axis of a lattice: centres at offset + (i + 1/2) * stride on a line of length ``extent``."""

    def __init__(self, lattice: Lattice, axis: int) -> None:
        self.count = (lattice.height, lattice.width)[axis]
        self.stride, self.offset, self.extent = lattice.stride[axis], lattice.offset[axis], lattice.extent[axis]

    def places(self) -> Tensor:
        """(count,): the centres, from 0 to 1 over the image."""
        return (
            self.offset + (torch.arange(self.count, dtype=torch.float64, device="cpu") + 0.5) * self.stride
        ) / self.extent

    def tokens(self, places: Tensor) -> Tensor:
        """Converts places from 0 to 1 over the image to tokens: the centre of token i is at i."""
        return (places * self.extent - self.offset) / self.stride - 0.5


class _Positions:
    """Where the centres of the target fall on the source line: ``positions`` (S, target), in source tokens."""

    def __init__(self, axes: Sequence[Axis], source: Line, target: Line) -> None:
        slope, start, low, high = (
            torch.tensor([float(getattr(axis, name)) for axis in axes], dtype=torch.float64, device="cpu")[:, None]
            for name in ("slope", "start", "low", "high")
        )
        self.source = source
        self.step = (slope * target.stride / target.extent * source.extent / source.stride)[:, 0]
        self.positions = source.tokens(slope * target.places() + start)
        nothing = low > high
        within = (self.positions > -0.5 - _ON_EDGE) & (self.positions < source.count - 0.5 + _ON_EDGE)
        # At the image's own edges the lattice decides which tokens are shown: it may reach beyond or leave a margin.
        low = source.tokens(low).where(low > 0, -torch.inf)
        high = source.tokens(high).where(high < 1, torch.inf)
        shown = (self.positions >= low - _ON_EDGE) & (self.positions <= high + _ON_EDGE)
        self.valid = within & shown & ~nothing
        # Only tokens that are at least partly shown are read, up to the tokens whose cells contain the edges.
        self.first = (low + 0.5 + _ON_EDGE).floor().clamp(0, source.count - 1)
        self.last = ((high + 0.5 - _ON_EDGE).ceil() - 1).clamp(0, source.count - 1).maximum(self.first)

    @property
    def fall_on_source(self) -> bool:
        off = (self.positions - self.positions.round()).abs()
        return bool((off < _ON_LATTICE).all()) and bool(((self.step.abs() - 1).abs() < _ON_LATTICE).all())

    def axis_map(self, exact: bool) -> AxisMap:
        count, valid, step = self.source.count, self.valid, self.step.float()
        positions = self.positions.clamp(self.first, self.last)[:, :, None]
        if exact:
            index = positions.round().long()
            return AxisMap(count, index, None, valid, step, self._runs(index[:, :, 0]))
        # The triangle filter of bilinear interpolation, widened by the shrinking factor.
        reach = self.step.abs().clamp_min(1)[:, None, None]
        tokens = (positions - reach).floor() + torch.arange(math.ceil(2 * reach.max().item()) + 2, device="cpu")
        weights = (1 - (positions - tokens).abs() / reach).clamp(min=0)
        weights = weights * ((tokens >= self.first[:, :, None]) & (tokens <= self.last[:, :, None]))
        index = tokens.clamp(0, count - 1).long()
        return AxisMap(count, index, weights / weights.sum(2, keepdim=True), valid, step)

    def _runs(self, places: Tensor) -> list[_Run]:
        before, shown = self.valid.long().argmax(1), self.valid.sum(1)
        last = (before + shown - 1).clamp_min(0)
        ends = torch.stack([places.gather(1, end[:, None])[:, 0] for end in (before, last)]).amin(0)
        numbers = zip(before.tolist(), ends.tolist(), shown.tolist(), (self.step < 0).tolist(), strict=True)
        return [_Run(*each, after=self.valid.shape[1] - each[0] - each[2]) for each in numbers]
