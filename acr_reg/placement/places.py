"""Numbers for the pixels of images, and what convolutions, padding and sums do with them.

A place is the number of a pixel of an image; 0 is none. Places stand in a tensor of the shape of what they are of.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_IMAGE, _ROW = 2**40, 2**20  # a place is image * _IMAGE + y * _ROW + x
_FRACTION = 2**4  # y and x count sixteenths of a pixel
_ORIGIN = 2**18  # added to y and x, so that padding may lie before the first pixel
_PADDED = 2**60  # added to the place of what pads a map of tokens
SLIDING = re.compile(r"_?(conv_transpose|conv|adaptive_\w+_pool|(?:avg|max|lp)_pool)(\d)d")
_DOTS = "ABCDEFGH"


def places_of(images: Tensor, first: int) -> Tensor:
    """The places of images (B, C, H, W), of which the first has this number, all alike over channels."""
    batch, _, height, width = images.shape
    number, y, x = (torch.arange(size, device=images.device) for size in (batch, height, width))
    rows, columns = (y * _FRACTION + _ORIGIN) * _ROW, x * _FRACTION + _ORIGIN
    places = ((first + number) * _IMAGE)[:, None, None] + rows[:, None] + columns
    return places[:, None].expand(images.shape)


def is_padded(places: Tensor) -> Tensor:
    """Whether these are places of padding around a map of tokens."""
    return places >= _PADDED


def split_places(places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image of positive places, and y and x in pixels."""
    at = [(part - _ORIGIN) / _FRACTION for part in (places % _IMAGE // _ROW, places % _ROW)]
    return places % _PADDED // _IMAGE, at[0], at[1]


def is_moved(images: Tensor) -> bool:
    """Whether pixels (B, C, H, W) with these places lie elsewhere than at first."""
    _, y, x = split_places(images)
    rows, columns = (torch.arange(size, device=y.device) for size in y.shape[2:])
    return not bool(((y == rows[:, None]) & (x == columns)).all())


def compact(places: Tensor) -> Tensor:
    """The same places, held once for all channels of a token: the last axis, or the second of a map (B, C, h, w)."""
    for axis in {places.ndim - 1, 1} if places.ndim == 4 else {places.ndim - 1}:
        one = places.narrow(axis, 0, 1) if places.ndim and places.shape[axis] > 1 and places.stride(axis) else None
        if one is not None and torch.equal(one.expand(places.shape), places):
            return one.clone().expand(places.shape)
    return places


def varies(places: Tensor, axis: int) -> bool:
    return places.shape[axis] > 1 and places.stride(axis) != 0 and bool((places.narrow(axis, 0, 1) != places).any())


def is_spread(places: Tensor) -> bool:
    """Whether these are several places of an image."""
    pixels = places.flatten() % _IMAGE
    return bool((pixels != pixels[:1]).any())


def padded(places: Tensor, pad: Sequence[int], of_tokens: bool) -> Tensor:
    """Padding around places goes on with the steps at their edge; around tokens it is marked."""
    for number in range(len(pad) // 2):
        axis, before, behind = places.ndim - 1 - number, pad[2 * number], pad[2 * number + 1]
        size = places.shape[axis]
        index = torch.arange(-before, size + behind, device=places.device)
        outside = ((index < 0) | (index >= size)).view(-1, *[1] * number)
        places = _at(places, axis, index)
        places = torch.where(outside & (places > 0) & (places < _PADDED), places + _PADDED * of_tokens, places)
    return places


def through_memory(view: Tensor, *written: tuple[Tensor, Tensor]) -> Tensor:
    """The places of a tensor once places were ``written``, in this order, into tensors on its memory."""
    memory = written[0][1].new_zeros(view.untyped_storage().nbytes() // view.element_size())
    for tensor, places in written:
        memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(places)
    return memory.as_strided(view.shape, view.stride(), view.storage_offset()).clone()


def _at(places: Tensor, axis: int, index: Tensor) -> Tensor:
    """Places along an axis at an index, which may be a fraction and may lie outside."""
    size = places.shape[axis]
    below = index.floor().long().clamp(0, max(size - 2, 0))
    found = places.index_select(axis, below)
    if size > 1 and bool((index != below).any()):
        shift = ((index - below) * _FRACTION).round().long().view(-1, *[1] * (places.ndim - axis - 1))
        above = places.index_select(axis, below + 1)
        between = found + (above - found) * shift // _FRACTION
        found = torch.where((found > 0) & (above > 0), between, torch.where(shift < _FRACTION, found, above))
    return found


def _window_settings(kind: str, spatial: int, args: Sequence[Any], kwargs: dict[str, Any]) -> list[list[int]] | None:
    """Kernel, stride, padding and dilation of a convolution or a pooling, as torch's functions take them."""

    def setting(position: int, name: str, default: Any) -> list[int]:
        value = kwargs.get(name, args[position] if len(args) > position else None)
        value = default if value is None or value == [] else value
        return (
            [int(v) for v in value] * (spatial if len(value) == 1 else 1)
            if isinstance(value, (tuple, list))
            else ([int(value)] * spatial)
        )

    if kind.startswith("adaptive") or kind == "conv_transpose":
        return None
    if kind == "conv":
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        kernel, dilation = [int(n) for n in weight.shape[2:]], setting(5, "dilation", 1)
        padding = kwargs.get("padding", args[4] if len(args) > 4 else 0)
        if isinstance(padding, str):
            half = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            return [kernel, setting(3, "stride", 1), half, dilation]
        return [kernel, setting(3, "stride", 1), setting(4, "padding", 0), dilation]
    kernel = setting(1, "kernel_size", 1)
    dilation = setting(4, "dilation", 1) if kind == "max_pool" else [1] * spatial
    return [kernel, setting(2, "stride", kernel), setting(3, "padding", 0), dilation]


def summed(equation: str, operands: Sequence[Tensor]) -> Tensor | None:
    """The places of an einsum of these places: those of the operand that vary along most axes of the result."""
    left, _, made = equation.replace(" ", "").partition("->")
    written = [  # "...hd" with letters in the place of dots
        letters.replace("...", _DOTS[len(letters) - 3 - operand.ndim :])
        for letters, operand in zip(left.split(","), operands, strict=True)
    ]
    made = made.replace("...", "".join(letter for letter in _DOTS if letter in "".join(written)))
    sizes: dict[str, int] = {}
    best, most_axes = None, -1
    for letters, places in zip(written, operands, strict=True):
        sizes.update(zip(letters, places.shape, strict=True))
        for axis in reversed(range(len(letters))):
            if letters[axis] not in made:
                places = places.select(axis, 0)
        kept = [letter for letter in letters if letter in made]
        places = places.permute([kept.index(letter) for letter in made if letter in kept])
        for axis, letter in enumerate(made):
            if letter not in kept:
                places = places.unsqueeze(axis)
        axes = sum(varies(places, axis) for axis in range(places.ndim))
        if axes > most_axes:
            best, most_axes = places, axes
    return None if best is None else best.expand([sizes[letter] for letter in made])


def slid(places: Tensor, name: str, args: Sequence[Any], kwargs: dict[str, Any], shape: Sequence[int]) -> Tensor:
    """The places of windows that slide over a map: the one in the middle of each."""
    sliding = SLIDING.match(name)
    places = torch.where(places >= _PADDED, places - _PADDED, places)  # windows over padding make tokens
    spatial = int(sliding[2]) if sliding is not None else len(shape) - 2
    settings = None if sliding is None else _window_settings(sliding[1], spatial, args, kwargs)
    for number in range(spatial):
        axis = places.ndim - spatial + number
        size, out = places.shape[axis], shape[axis]
        steps = torch.arange(out, device=places.device)
        if settings is None:  # equal shares
            index = (2 * steps + 1) * size / (2 * out) - 0.5
        else:
            kernel, stride, padding, dilation = (setting[number] for setting in settings)
            index = steps * stride - padding + dilation * (kernel - 1) / 2
        places = _at(places, axis, index)
    channel = places.ndim - spatial - 1
    if places.shape[channel] != shape[channel]:
        places = places.narrow(channel, 0, 1)
    return places.expand(shape)


def unfolded(
    shape: Sequence[int], places: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Tensor:
    """The places of windows as columns (B, C k k, N): the one in the middle of each."""
    for axis in (-2, -1):
        kernel, apart, around, step = (
            v if isinstance(v, int) else v[axis] for v in (kernel_size, dilation, padding, stride)
        )
        count = (places.shape[axis] + 2 * around - apart * (kernel - 1) - 1) // step + 1
        index = torch.arange(count, device=places.device) * step - around + apart * (kernel - 1) / 2
        places = _at(places, places.ndim + axis, index)
    return places.flatten(-2)[..., :1, :].expand(shape)
