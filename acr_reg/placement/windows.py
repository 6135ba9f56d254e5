"""Finds where convolutions and pooling put tokens: the exact centres of their windows, in pixels.

:class:`WindowsSeen` notes what each module with windows does in a model's first run. A :class:`WindowTrace` finds
the chain of windows that leads from the images to a layer's grid, for images of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from acr_reg._tensors import is_dense

Grid = tuple[int, int]
Pixels = tuple[float, float]  # along y and x
Shape = tuple[int, int, int]  # channels, height, width

_ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PADS = (nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)
WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Unfold, *_ADAPTIVE, *_PADS)
_IMAGE_CHANNELS = (1, 2, 3, 4)
_DYNAMIC = None  # padding as TensorFlow's "same", which depends on the size


@dataclass(frozen=True)
class WindowedOp:
    """A module that makes each output from a window of its input: its attributes as (y, x), and its first shapes.

    ``padding`` is (before, after) along y and x, or None if it depends on the size (timm's ``Conv2dSame``). ``fixed``
    is the output size of adaptive pooling, 0 along an axis that it keeps. An op is not ``explained`` if its output size
    differs from what its attributes say. ``batch`` is its input's batch size, which may count patches or heads.
    """

    name: str
    source: Shape
    target: Shape
    batch: int = 0
    kernel: Grid = (1, 1)
    stride: Grid = (1, 1)
    dilation: Grid = (1, 1)
    padding: tuple[Grid, Grid] | None = ((0, 0), (0, 0))
    ceil_mode: bool = False
    fixed: Grid | None = None
    explained: bool = True

    def along(self, axis: int, size: int) -> tuple[int, float, float]:
        """For ``size`` inputs along an axis: the number of outputs, the step between their centres, and the distance
        from the first input's centre to the first output's; both distances count inputs."""
        if self.fixed is not None:
            count = self.fixed[axis] or size
            return count, size / count, (size / count - 1) / 2
        stride, reach = self.stride[axis], self.dilation[axis] * (self.kernel[axis] - 1)
        if self.padding is _DYNAMIC:
            total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
            before, after = total // 2, total - total // 2
        else:
            before, after = self.padding[axis]
        room = size + before + after - reach - 1
        count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
        if self.ceil_mode and (count - 1) * stride >= size + before:  # no window begins in the padding behind
            count -= 1
        return count, stride, reach / 2 - before

    def explains(self) -> bool:
        """Whether the attributes explain the shapes."""
        return all(self.along(axis, self.source[1 + axis])[0] == self.target[1 + axis] for axis in (0, 1))

    def displaces(self) -> bool:
        """Whether the windows' centres differ from the centres of equal pieces of the input."""
        along = [self.along(axis, self.source[1 + axis]) for axis in (0, 1)]
        return not self.explained or any(first != (step - 1) / 2 for _, step, first in along)

    def matters(self) -> bool:
        """Whether it changes shape or position, so that it belongs in a chain."""
        return self.source != self.target or self.displaces()


def windowed_op(name: str, module: nn.Module, source: Sequence[int], target: Sequence[int]) -> WindowedOp | None:
    """What a ``WINDOWED`` module did to turn a tensor of shape ``source``, (B, C, H, W) or (C, H, W), into one of shape
    ``target``; None if tokens stay where they are."""
    if len(source) not in (3, 4) or not isinstance(module, WINDOWED):
        return None
    given = (int(source[-3]), int(source[-2]), int(source[-1]))
    batch = int(source[0]) if len(source) == 4 else 1
    if isinstance(module, _ADAPTIVE):
        size = module.output_size
        fixed = tuple(n or 0 for n in (size if isinstance(size, (tuple, list)) else (size, size)))
        op = WindowedOp(name, given, given, batch, fixed=(fixed[0], fixed[1]))
    elif isinstance(module, _PADS):
        left, right, top, bottom = module.padding
        op = WindowedOp(name, given, given, batch, padding=((top, bottom), (left, right)))
    else:
        kernel, stride = pair(module.kernel_size), pair(module.stride)
        dilation = pair(getattr(module, "dilation", 1))
        padding = _padding(module.padding, kernel, dilation)
        ceil_mode = bool(getattr(module, "ceil_mode", False))
        op = WindowedOp(name, given, given, batch, kernel, stride, dilation, padding, ceil_mode)
    if isinstance(module, nn.Unfold):  # (B, C k k, N)
        grid = tuple(op.along(axis, given[1 + axis])[0] for axis in (0, 1))
        made = (int(target[-2]), *grid) if grid[0] * grid[1] == target[-1] else (int(target[-2]), 0, 0)
    else:
        made = (int(target[-3]), int(target[-2]), int(target[-1]))
    op = replace(op, target=(made[0], made[1], made[2]))
    if not op.explains():
        dynamic = replace(op, padding=_DYNAMIC)
        op = dynamic if dynamic.explains() else replace(op, explained=False)
    return op if op.matters() and made[1:] != (1, 1) else None


class WindowsSeen:
    """The modules with windows that a first run passed, and how many it had passed at each module that attends."""

    def __init__(self) -> None:
        self.ops: dict[str, WindowedOp] = {}  # by name, in order
        self.preceded: dict[nn.Module, tuple[int, int]] = {}  # ops before the first and the last call

    def note(self, name: str, module: nn.Module, given: Tensor | None, result: Any) -> None:
        """Notes a ``WINDOWED`` module that made ``result`` of the tensor it was given."""
        if name not in self.ops and given is not None and is_dense(result):
            op = windowed_op(name, module, given.shape, result.shape)
            if op is not None:
                self.ops[name] = op

    def note_attention(self, module: nn.Module) -> None:
        before = len(self.ops)
        self.preceded[module] = self.preceded.get(module, (before, 0))[0], before


def pair(value: int | Sequence[int]) -> Grid:
    values = list(value) if isinstance(value, Iterable) else [value]
    return int(values[0]), int(values[-1])


def _padding(value: str | int | Sequence[int], kernel: Grid, dilation: Grid) -> tuple[Grid, Grid]:
    if isinstance(value, str):  # with a stride of 1; an odd pixel goes behind
        total = [dilation[i] * (kernel[i] - 1) if value == "same" else 0 for i in (0, 1)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    y, x = pair(value)
    return (y, y), (x, x)


@dataclass(frozen=True)
class Spot:
    """Where a grid of ``size`` lies: the pixels between its centres, and from the image's edge to the first centre.
    ``inside``: whether the last window belonged to the attention in question."""

    stride: Pixels
    centre: Pixels
    size: Grid
    inside: bool = False

    def through(self, op: WindowedOp, inside: bool) -> Spot | None:
        """Where the outputs of an op on this grid lie, or None if unknown."""
        (rows, step_y, first_y), (columns, step_x, first_x) = (op.along(i, self.size[i]) for i in (0, 1))
        if not op.explained or min(rows, columns) < 1:
            return None
        stride = self.stride[0] * step_y, self.stride[1] * step_x
        centre = self.centre[0] + self.stride[0] * first_y, self.centre[1] + self.stride[1] * first_x
        return Spot(stride, centre, (rows, columns), inside)

    @property
    def offset(self) -> Pixels:
        """The offset of a :class:`~acr_reg.Lattice`: the first centre minus half a stride."""
        return self.centre[0] - self.stride[0] / 2, self.centre[1] - self.stride[1] / 2


def spots(
    ops: Iterable[tuple[WindowedOp, bool, bool]], seen: Shape, size: Grid, channels_told: int | None = None
) -> dict[Shape, set[Spot | None]]:
    """Where each grid lies on images of ``size``, for the chains of ops that start at images ``seen``, (batch, height,
    width). Several entries if chains disagree; None is among them if one is unknown.

    An op (op, inside, loose) follows the ops that made its input or, if ``loose``, a grid of its input's size. A grid
    that no op made comes from an unseen operation, or belongs to part of an image."""
    start = Spot((1.0, 1.0), (0.5, 0.5), size)
    of_images = _IMAGE_CHANNELS if channels_told is None else (*_IMAGE_CHANNELS, channels_told)
    reached: dict[Grid, dict[int, set[Spot | None]]] = {seen[1:]: {c: {start} for c in of_images}}
    for op, inside, loose in ops:
        channels = reached.get(op.source[1:], {op.source[0]: {None}} if op.batch == seen[0] else {})
        sources = channels.values() if loose else [channels.get(op.source[0], set())]
        made = {spot and spot.through(op, inside) for source in sources for spot in source}
        if made and not (op.target[1:] == seen[1:] and op.target[0] in of_images):  # what counts as the images
            reached.setdefault(op.target[1:], {}).setdefault(op.target[0], set()).update(made)
    return {(c, *grid): found for grid, channels in reached.items() for c, found in channels.items()}


@dataclass(frozen=True)
class WindowTrace:
    """The windowed ops of a model's first run, in order, on images ``seen``, (batch, height, width). ``calls`` counts
    the ops before the first and the last call of each part that attends ("" is the model)."""

    ops: tuple[WindowedOp, ...] = ()
    seen: Shape = (0, 0, 0)
    calls: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    channels: int | None = None  # of the images, if more than four

    def find(self, part: str, size: Grid, grid: Grid, widths: Iterable[int], inside: bool = False) -> Spot | None:
        """Where a ``grid`` of tokens that attend in ``part`` lies on images of ``size``; None if no chain leads to it
        or chains disagree. ``inside``: windows within the part made it.

        The strongest kind of link decides: equal channels up to one of the tokens' ``widths``, then channels that
        linear maps or heads may have changed. Windows within other attention make that attention's own keys or
        queries, and count only if nothing else leads to the grid.
        """
        widths = frozenset(widths)
        for only_trunk in (True, False):
            ops = list(self._before(part, only_trunk))
            for widths_known, loose_inside, loose in _LINKS:
                links = [(op, within, loose or (loose_inside and within)) for op, within in ops]
                reached = spots(links, self.seen, size, self.channels)
                grids = {shape[1:] for shape, at in reached.items() if any(s and s.size == grid for s in at)}
                wanted = [
                    at for shape, at in reached.items() if not widths_known or shape[0] in widths if shape[1:] in grids
                ]
                found = {spot for at in wanted for spot in at if not (spot and inside) or spot.inside}
                if any(found):
                    return _the_one(found)
        return None

    def displaces(self, part: str) -> bool:
        """Whether windows before this attention move tokens away from the centres of equal pieces of the image."""
        return any(op.displaces() for op, _ in self._before(part, True) if op.batch == self.seen[0])

    def _before(self, part: str, only_trunk: bool) -> Iterator[tuple[WindowedOp, bool]]:
        """The ops before the last call in this part, and whether they lie within it."""
        last = self.calls.get(part, (0, len(self.ops)))[1]
        for number, op in enumerate(self.ops[:last]):
            inside = _lies_in(op, part)
            elsewhere = any(other and number < self.calls[other][0] and _lies_in(op, other) for other in self.calls)
            if inside or not (elsewhere and only_trunk):
                yield op, inside


# Whether the tokens' width counts, and which links may join any channels: links within the attention, or all.
_LINKS = ((True, False, False), (False, False, False), (False, True, False), (False, True, True))


def _the_one(found: set[Spot | None]) -> Spot | None:
    """The spot that all agree on, preferably outside the attention."""
    places = {spot and (spot.stride, spot.centre) for spot in found}
    return min((spot for spot in found if spot), key=lambda spot: spot.inside) if len(places) == 1 else None


def _lies_in(op: WindowedOp, part: str) -> bool:
    return not part or op.name == part or op.name.startswith(f"{part}.")
