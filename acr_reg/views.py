"""Views: augmentations that know how to carry a map, or an affinity between tokens, back to the image they came from.

A :class:`View` is one axis-aligned affine map between a source image and its augmented output, in coordinates that run
from 0 to 1 along each axis, with half-pixel centres (torchvision's convention, ``align_corners=False``). It acts on
anything laid over the image by mapping centres: where the centres of one lattice fall on those of the other, that is an
index, exact to the bit; elsewhere it is a bilinear resampling, antialiased when shrinking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from acr_reg.attention import at_least_float32
from acr_reg.tokens import Lattice

# A centre this close to another (in units of the target's spacing) falls on it: far below any resampling one could see.
_ON_LATTICE = 1e-4


@dataclass(frozen=True)
class Axis:
    """A source coordinate read along one output axis: source = slope * output + start, both in [0, 1]."""

    slope: float = 1.0
    start: float = 0.0

    def inverse(self) -> Axis:
        return Axis(1.0 / self.slope, -self.start / self.slope)

    def after(self, earlier: Axis) -> Axis:
        """This axis read through ``earlier``: earlier(self(output))."""
        return Axis(earlier.slope * self.slope, earlier.slope * self.start + earlier.start)


@dataclass(frozen=True)
class View:
    """An augmentation as one axis-aligned affine map. Made by HorizontalFlip, VerticalFlip, Rotate90, Scale, Compose,
    Identity.

    ``y`` and ``x`` say where the source's rows and columns are read; with ``transposed`` the source's y runs along the
    output's x. ``zoom`` is the output's (height, width) over the source's, in the output's orientation. Immutable,
    comparable, printable, picklable.

    >>> import torch
    >>> image = torch.arange(6.0).reshape(1, 1, 2, 3)
    >>> view = Compose([HorizontalFlip(), Rotate90()])
    >>> view
    Compose([HorizontalFlip(), Rotate90(1)])
    >>> view(image).shape
    torch.Size([1, 1, 3, 2])
    >>> torch.equal(view.inverse(view(image)), image)
    True
    """

    y: Axis = Axis()
    x: Axis = Axis()
    transposed: bool = False
    zoom: tuple[float, float] = (1.0, 1.0)
    label: str = field(default="Identity()", compare=False)

    def __repr__(self) -> str:
        return self.label

    @property
    def inverse(self) -> View:
        """The view that leads back: ``view.inverse(view(images))`` has the images' orientation, and their size too
        unless a scaled size was rounded; :meth:`align` leads back onto a given size.
        """
        (y, x), zoom = (self.y.inverse(), self.x.inverse()), (1.0 / self.zoom[0], 1.0 / self.zoom[1])
        if self.transposed:
            (y, x), zoom = (x, y), (zoom[1], zoom[0])
        label = self.label[: -len(".inverse")] if self.label.endswith(".inverse") else f"{self.label}.inverse"
        return View(y, x, self.transposed, zoom, label)

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """The size (height, width) of this view of a map of ``size``. Raises ValueError where nothing would be left."""
        height, width = (size[1], size[0]) if self.transposed else (size[0], size[1])
        output = round(height * self.zoom[0]), round(width * self.zoom[1])
        if min(output) < 1:
            raise ValueError(
                f"found {self!r} of a map of {size[0]} x {size[1]}, which leaves {output[0]} x {output[1]}; expected "
                "at least 1 x 1; scale less"
            )
        return output

    def __call__(self, maps: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """The view of images or dense maps (..., H, W): (..., H', W'), differentiable. ``size`` overrides (H', W')."""
        if not isinstance(maps, Tensor):
            raise TypeError(
                f"found a {type(maps).__name__}; expected a tensor (..., H, W); convert images to tensors first"
            )
        if maps.ndim < 2 or not (maps.is_floating_point() or self._keeps_pixels(maps.shape[-2:], size)):
            raise TypeError(
                f"found a {maps.dtype} tensor of shape {tuple(maps.shape)}; expected (..., H, W), in floating point "
                f"where {self!r} resamples; convert images with .float()"
            )
        return self._pixel_map(maps.shape[-2:], size, str(maps.device))(maps)

    def align(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Maps made from ``view(images)``, (..., h', w'), carried back onto the images' grid of ``size`` (h, w)."""
        return self.inverse(maps, size)

    def _keeps_pixels(self, source: Sequence[int], size: Sequence[int] | None) -> bool:
        return self._pixel_map(source, size, "cpu").is_exact

    def _pixel_map(self, source: Sequence[int], size: Sequence[int] | None, device: str) -> LatticeMap:
        target = size if size is not None else self.output_size(source)
        return lattice_map(self, Lattice(source[0], source[1]), Lattice(target[0], target[1]), device)


def require_view(view: object) -> None:
    if not isinstance(view, View):
        raise TypeError(
            f"found a view of type {type(view).__name__}; expected an acr_reg View; for instance HorizontalFlip()"
        )


def Identity() -> View:
    """The view that changes nothing."""
    return View()


def HorizontalFlip() -> View:
    """Mirrors left and right."""
    return View(x=Axis(-1.0, 1.0), label="HorizontalFlip()")


def VerticalFlip() -> View:
    """Mirrors top and bottom.

    >>> VerticalFlip()(torch.tensor([[1, 2], [3, 4]])).tolist()
    [[3, 4], [1, 2]]
    """
    return View(y=Axis(-1.0, 1.0), label="VerticalFlip()")


def Rotate90(k: int = 1) -> View:
    """``k`` quarter turns counter-clockwise, as ``torch.rot90`` over (H, W)."""
    if not isinstance(k, int):
        raise TypeError(f"found k={k!r}; expected a whole number of quarter turns; Rotate90(2) is half a turn")
    mirrored = Axis(-1.0, 1.0)
    turned = {
        0: View(),
        1: View(Axis(), mirrored, True),
        2: View(mirrored, mirrored),
        3: View(mirrored, Axis(), True),
    }[k % 4]
    return View(turned.y, turned.x, turned.transposed, label=f"Rotate90({k % 4})")


def Scale(factor: float | tuple[float, float]) -> View:
    """Resizes by ``factor`` (or by (height, width) factors), bilinear, antialiased when shrinking; sizes are rounded.

    >>> Scale(0.5)(torch.ones(1, 3, 32, 48)).shape
    torch.Size([1, 3, 16, 24])
    """
    zoom = (float(factor), float(factor)) if isinstance(factor, (int, float)) else (float(factor[0]), float(factor[1]))
    if not (0 < zoom[0] < float("inf") and 0 < zoom[1] < float("inf")):
        raise ValueError(f"found a scale of {factor}; expected positive factors; 0.5 halves the size, 2 doubles it")
    return View(zoom=zoom, label=f"Scale({factor})")


def Compose(views: Sequence[View]) -> View:
    """The views one after another, the first first, as one view: resampled once."""
    composed = View()
    if isinstance(views, View):
        raise TypeError("found one View; expected a sequence of them; Compose([first, second])")
    for view in views:
        if not isinstance(view, View):
            raise TypeError(
                f"found a {type(view).__name__} among the views; expected Views; for instance HorizontalFlip()"
            )
        composed = _then(composed, view)
    return View(composed.y, composed.x, composed.transposed, composed.zoom, f"Compose({list(views)})")


def _then(first: View, second: View) -> View:
    along_y, along_x = (second.x, second.y) if first.transposed else (second.y, second.x)
    zoom = (first.zoom[1], first.zoom[0]) if second.transposed else first.zoom
    return View(
        along_y.after(first.y),
        along_x.after(first.x),
        first.transposed != second.transposed,
        (zoom[0] * second.zoom[0], zoom[1] * second.zoom[1]),
    )


@dataclass(frozen=True, eq=False)
class AxisMap:
    """Where each target position along one axis reads its source: an ``index`` (exact), or rows of ``weights`` that sum
    to 1.

    ``valid`` is False for target positions whose centre lies outside the source.
    """

    index: Tensor | None
    weights: Tensor | None
    valid: Tensor
    is_permutation: bool = False


@dataclass(frozen=True, eq=False)
class LatticeMap:
    """Carries what lies on a source lattice onto a target lattice, as a view's ``y``, ``x`` and transposition say."""

    y: AxisMap
    x: AxisMap
    transposed: bool
    source: Lattice
    target: Lattice

    @property
    def is_exact(self) -> bool:
        """Whether every target centre falls on a source centre."""
        return self.y.index is not None and self.x.index is not None

    @property
    def is_permutation(self) -> bool:
        """Whether the target's tokens are the source's, each once, in another order."""
        return self.y.is_permutation and self.x.is_permutation

    @property
    def valid(self) -> Tensor:
        """(target tokens,) bool: whether the source covers a target token's centre."""
        valid = self.y.valid[:, None] & self.x.valid[None, :]
        return (valid.mT if self.transposed else valid).flatten()

    def index(self) -> Tensor:
        """(target tokens,) the source token on which each target token falls. Only for exact maps."""
        assert self.y.index is not None and self.x.index is not None
        index = self.y.index[:, None] * self.source.width + self.x.index[None, :]
        return (index.mT if self.transposed else index).flatten()

    def __call__(self, maps: Tensor) -> Tensor:
        """Dense maps (..., source height, source width) -> (..., target height, target width)."""
        # Half precision is resampled in float32 and rounded once.
        precise = maps if self.is_exact else at_least_float32(maps)
        mapped = _read(_read(precise, -2, self.y), -1, self.x).to(maps.dtype)
        return mapped.mT if self.transposed else mapped

    def tokens(self, values: Tensor, dim: int = -1) -> Tensor:
        """Values of tokens along one dimension, ``len(source)`` of them -> ``len(target)``."""
        if self.is_exact:
            return values.index_select(dim, self.index())
        values = values.movedim(dim, -1)
        mapped = self(rearrange(values, "... (h w) -> ... h w", h=self.source.height))
        return rearrange(mapped, "... h w -> ... (h w)").movedim(-1, dim)


def _read(values: Tensor, dim: int, axis: AxisMap) -> Tensor:
    if axis.index is not None:
        return values.index_select(dim, axis.index)
    assert axis.weights is not None
    with torch.autocast(values.device.type, enabled=False):
        return (values.movedim(dim, -1) @ axis.weights.mT.to(values)).movedim(-1, dim)


@lru_cache(maxsize=256)
def lattice_map(view: View, source: Lattice, target: Lattice, device: str) -> LatticeMap:
    """The map from a ``source`` lattice on a view's input to a ``target`` lattice on its output."""
    turned = view.transposed
    # Cached for training too, which tensors made under inference_mode could not serve.
    with torch.inference_mode(False):
        y = _axis_map(view.y, _Line.rows(source), _Line.columns(target) if turned else _Line.rows(target), device)
        x = _axis_map(view.x, _Line.columns(source), _Line.rows(target) if turned else _Line.columns(target), device)
    return LatticeMap(y, x, turned, source, target)


@dataclass(frozen=True)
class _Line:
    """One axis of a lattice: centres at offset + (i + 1/2) * stride on a line of length extent."""

    count: int
    stride: float
    offset: float
    extent: float

    @staticmethod
    def rows(lattice: Lattice) -> _Line:
        return _Line(lattice.height, lattice.stride[0], lattice.offset[0], lattice.extent[0])

    @staticmethod
    def columns(lattice: Lattice) -> _Line:
        return _Line(lattice.width, lattice.stride[1], lattice.offset[1], lattice.extent[1])


def _axis_map(axis: Axis, source: _Line, target: _Line, device: str) -> AxisMap:
    """Places every target centre on the source line, in source tokens: position = first + i * step."""
    step = axis.slope * target.stride / target.extent * source.extent / source.stride
    start = (target.offset + 0.5 * target.stride) / target.extent
    first = ((axis.slope * start + axis.start) * source.extent - source.offset) / source.stride - 0.5
    positions = first + step * torch.arange(target.count, dtype=torch.float64)
    nearest = positions.round()
    valid = (positions > -0.5 - _ON_LATTICE) & (positions < source.count - 0.5 + _ON_LATTICE)
    if bool(((positions - nearest).abs() < _ON_LATTICE).all()) and abs(abs(step) - 1) < _ON_LATTICE:
        index = nearest.long().clamp(0, source.count - 1)
        permutes = len(index) == source.count and bool(valid.all())
        return AxisMap(index.to(device), None, valid.to(device), permutes)
    # The triangle filter of bilinear interpolation, widened by the factor of shrinking.
    reach = max(1.0, abs(step))
    distances = (positions.clamp(0, source.count - 1)[:, None] - torch.arange(source.count)[None, :]).abs()
    weights = (1 - distances / reach).clamp(min=0)
    return AxisMap(None, weights / weights.sum(1, keepdim=True), valid.to(device))  # float64 is not on every device
