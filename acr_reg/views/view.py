"""What a view is: an augmentation that can carry a map back to the image it came from.

A :class:`~acr_reg.View` is one axis-aligned affine map between an image and its augmented output, or one for each image
of a batch, in coordinates from 0 to 1 along each axis, with half-pixel centres (torchvision's ``align_corners=False``).
``resampling`` reads values on a lattice over the image through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from einops import rearrange
from torch import Tensor

from acr_reg.tokens import Lattice
from acr_reg.views.affine import Affine
from acr_reg.views.resampling import LatticeMap

Size = Sequence[int]

_BRIEF = 120  # characters


@dataclass(frozen=True)
class View:
    """An augmentation as one axis-aligned affine map, shared by a batch or one for each of its images. HorizontalFlip,
    VerticalFlip, Rotate90, Scale, Crop, Compose, PerImage and Identity make views, and samplers draw them.

    Immutable, comparable, hashable and picklable; prints as the code that makes it. ``input_size`` and ``fixed_size``
    are the (height, width) in pixels of its input and output if it is bound to them, as a crop is; None takes any.

    >>> import torch
    >>> from acr_reg import Compose, HorizontalFlip, Rotate90
    >>> image = torch.arange(6.0).reshape(1, 1, 2, 3)
    >>> view = Compose([HorizontalFlip(), Rotate90()])
    >>> view
    Compose([HorizontalFlip(), Rotate90(1)])
    >>> view(image).shape
    torch.Size([1, 1, 3, 2])
    >>> torch.equal(view.inverse(view(image)), image)
    True
    """

    affines: tuple[Affine, ...] = (Affine(),)
    input_size: tuple[int, int] | None = None
    fixed_size: tuple[int, int] | None = None
    label: str = field(default="Identity()", compare=False)
    rounds: bool = field(default=False, compare=False)
    """Whether it scales images of any size, before any step that fixes the size, and so rounds it."""

    def __repr__(self) -> str:
        return self.label

    @property
    def brief(self) -> str:
        """The printed form, cut if the views of a batch would fill a screen."""
        return self.label if len(self.label) <= _BRIEF else f"{self.label[:_BRIEF]} ..."

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # fractions are slow to hash, and every layer looks its map up by the view
        return hash((self.affines, self.input_size, self.fixed_size))

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def num_images(self) -> int:
        """The number of images that it is for; 1 fits any batch."""
        return len(self.affines)

    @property
    def scales(self) -> bool:
        """Whether it changes sizes; these may then be rounded."""
        return any(zoom != 1 for affine in self.affines for zoom in affine.zoom)

    @property
    def shows_anything(self) -> bool:
        """Whether its output shows any part of any image; a crop of a crop may show nothing."""
        return any(axes.y.low < axes.y.high and axes.x.low < axes.x.high for axes in self.affines)

    def of_image(self, image: int) -> View:
        """The view of one image of the batch."""
        affine = self.affines[image if self.num_images > 1 else 0]
        label = f"{self.label}.of_image({image})" if self.num_images > 1 else self.label
        return View((affine,), self.input_size, self.fixed_size, label, self.rounds)

    @cached_property
    def inverse(self) -> View:
        """The view back: ``view.inverse(view(images))`` has the images' orientation, and their size unless a scaled
        size was rounded (:meth:`align` takes the size). Pixels that the view does not show are 0."""
        label = self.label[: -len(".inverse")] if self.label.endswith(".inverse") else f"{self.label}.inverse"
        affines = tuple(affine.inverse() for affine in self.affines)
        return View(affines, self.fixed_size, self.input_size, label, self.rounds)

    def output_size(self, size: Size) -> tuple[int, int]:
        """The size (height, width) of the view of a map of ``size``. Raises ValueError if nothing would be left, if the
        views of a batch differ in size, or if the view is bound to images of another size."""
        sizes = list(dict.fromkeys(self._output_size(affine, size) for affine in self.affines))
        if len(sizes) > 1:
            raise ValueError(
                f"{self.brief} of a map of {size[0]} x {size[1]} gives {' and '.join(f'{h} x {w}' for h, w in sizes)}. "
                "All images need one output size. Turn square images only, or add Crop(..., size=) to the views."
            )
        output = sizes[0]
        if min(output) < 1:
            raise ValueError(
                f"{self.brief} of a map of {size[0]} x {size[1]} leaves {output[0]} x {output[1]}. Scale less: "
                "at least 1 x 1 must be left."
            )
        self._check_size("input", self.input_size, size, size)
        self._check_size("output", self.fixed_size, output, size, self._rounding(self.fixed_size))
        return output

    def _output_size(self, affine: Affine, size: Size) -> tuple[int, int]:
        """The output size for one affine: the bound size for images, a computed size for their smaller maps."""
        output, fixed = affine.output_size(size), self.fixed_size
        if fixed is None or self.input_size not in (None, tuple(size)):
            return output
        off = [abs(a - b) for a, b in zip(fixed, output, strict=True)]
        return fixed if all(o <= most for o, most in zip(off, self._rounding(fixed), strict=True)) else output

    def _rounding(self, fixed: Size | None) -> tuple[int, int]:
        """How far a computed size may differ from the bound size, (height, width): a crop may enlarge one pixel of a
        scaled image to several."""
        if fixed is None or not self.rounds:
            return 1, 1
        return 1 + fixed[0] // 5, 1 + fixed[1] // 5

    def _check_size(
        self, what: str, bound: Size | None, found: Size, size: Size, rounding: tuple[int, int] = (0, 0)
    ) -> None:
        """Checks a bound size: the view takes images of this size, and maps of these at a lower resolution."""
        if bound is not None and not _is_reduction(bound, found, rounding):
            raise ValueError(
                f"{self.brief} got a map of {size[0]} x {size[1]}. Its {what} must be {bound[0]} x {bound[1]} or a "
                "whole fraction of that. Draw the view for the images it is applied to."
            )

    def __call__(self, maps: Tensor, size: int | Size | None = None) -> Tensor:
        """The view (..., H', W') of images or dense maps (..., H, W), differentiable. ``size`` overrides (H', W').

        If it holds a view for each image, the first axis is the batch. Pixels outside the source are 0.
        """
        if not isinstance(maps, Tensor):
            raise TypeError(f"The images are a {type(maps).__name__}. Convert them to a tensor (..., H, W).")
        if maps.ndim < 2:
            raise TypeError(f"The images have shape {tuple(maps.shape)}. Reshape them to (..., H, W).")
        self.check_batch(maps.shape[0] if maps.ndim > 2 else 1)
        pixels = self._pixel_map(maps.shape[-2:], size)
        if not (maps.is_floating_point() or pixels.is_exact):
            raise TypeError(
                f"The images are {maps.dtype} of shape {tuple(maps.shape)}, and {self.brief} resamples them. Convert "
                "them to floating point by .float()."
            )
        return pixels(maps)

    def align(self, maps: Tensor, size: int | Size) -> Tensor:
        """Carries maps (..., h', w') made from ``view(images)`` back onto the images' grid of ``size`` (h, w)."""
        return self.inverse(maps, size)

    def valid(self, size: Size, output_size: Size | None = None) -> Tensor:
        """(1 or B, H', W') bool: the pixels of ``view(images)`` that show the image, for images of ``size``."""
        pixels = self._pixel_map(size, output_size)
        return rearrange(pixels.valid, "b (h w) -> b h w", h=pixels.target.height)

    def check_batch(self, images: int) -> None:
        """Raises ValueError if the view is for a different number of images."""
        if self.num_images not in (1, images):
            raise ValueError(
                f"{self.brief} is for {self.num_images} images and got a batch of {images}. Draw the view for this "
                "batch, with images along the first axis."
            )

    def _pixel_map(self, source: Size, size: int | Size | None) -> LatticeMap:
        if isinstance(size, int):
            size = (size, size)
        if size is None:
            size = self.output_size(source)
        else:
            self._check_size("input", self.input_size, source, source)
        # Made on the CPU: a flip needs nothing of it on the device of the images.
        lattices = Lattice(source[0], source[1]), Lattice(size[0], size[1])
        first = self.affines[0]
        if self.num_images == 1 and not self.scales and abs(first.y.slope) == abs(first.x.slope) == 1:
            return map_between(self, *lattices, "cpu")  # a flip or a turn, the same at every step
        # Not kept: random views are new each time, and their maps of pixels are large.
        return LatticeMap.between(self.affines, *lattices, "cpu")


def _is_reduction(full: Size, found: Size, rounding: Size) -> bool:
    """Whether ``found`` is the size ``full`` or a whole fraction of it, give or take one token."""
    return all(
        abs(large - small) <= off or any(abs(large / by - small) <= 1 for by in range(2, large + 1))
        for large, small, off in zip(full, found, rounding, strict=True)
    )


@lru_cache(maxsize=32)
def map_between(view: View, source: Lattice, target: Lattice, device: str) -> LatticeMap:
    """The map from a ``source`` lattice of tokens on a view's input to a ``target`` lattice on its output."""
    return LatticeMap.between(view.affines, source, target, device)


@lru_cache(maxsize=32)
def blur_between(view: View, source: Lattice, target: Lattice, device: str) -> LatticeMap:
    """The map of a ``target`` lattice onto itself that blurs as :func:`map_between` does; the identity if that is
    exact."""
    back, there = map_between(view, source, target, device), map_between(view.inverse, target, source, device)
    if back.is_exact or there.is_exact:
        return map_between(View(), target, target, device)
    return back.blur(there)


def require_view(view: object) -> None:
    if isinstance(view, View):
        return
    advice = "Draw one by sampler.sample(images)" if hasattr(view, "sample") else "Pass one, as HorizontalFlip()"
    raise TypeError(f"The view is a {type(view).__name__}, not an acr_reg View. {advice}.")
