"""Views: augmentations that know how to carry a map, or an affinity between tokens, back to the image they came from.

A :class:`View` is one axis-aligned affine map between a source image and its augmented output, or one for each image of
a batch, in coordinates that run from 0 to 1 along each axis, with half-pixel centres (torchvision's convention,
``align_corners=False``). It acts on anything laid over the image by mapping centres: where the centres of one lattice
fall on those of the other, that is an index, exact to the bit; elsewhere it is a bilinear resampling, antialiased when
shrinking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache, reduce

from einops import rearrange
from torch import Tensor

from acr_reg import _resampling
from acr_reg._affine import Affine, Axis
from acr_reg._resampling import LatticeMap
from acr_reg.tokens import Lattice

Size = Sequence[int]

_BRIEF = 120  # characters


@dataclass(frozen=True)
class View:
    """An augmentation as one axis-aligned affine map, shared by a batch or one for each of its images. Made by
    HorizontalFlip, VerticalFlip, Rotate90, Scale, Crop, Compose, PerImage, Identity, or drawn by a sampler.

    Immutable, comparable, hashable, picklable, and printed as it is written. ``input_size`` and ``fixed_size`` are the
    (height, width) in pixels of its input and output where it is bound to them, as a crop is; other views take any.

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

    affines: tuple[Affine, ...] = (Affine(),)
    input_size: tuple[int, int] | None = None
    fixed_size: tuple[int, int] | None = None
    label: str = field(default="Identity()", compare=False)

    def __repr__(self) -> str:
        return self.label

    @property
    def brief(self) -> str:
        """As printed, cut where the views of a batch would fill a screen."""
        return self.label if len(self.label) <= _BRIEF else f"{self.label[:_BRIEF]} ..."

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # fractions are slow to hash, and maps are looked up by it for every layer
        return hash((self.affines, self.input_size, self.fixed_size))

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def num_images(self) -> int:
        """How many images it is for; 1 serves any batch."""
        return len(self.affines)

    @property
    def scales(self) -> bool:
        """Whether sizes change, and so may have been rounded."""
        return any(zoom != 1 for affine in self.affines for zoom in affine.zoom)

    @property
    def shows_anything(self) -> bool:
        """Whether its output shows any part of its input, of any image: two crops joined may not."""
        return any(axes.y.low < axes.y.high and axes.x.low < axes.x.high for axes in self.affines)

    def of_image(self, image: int) -> View:
        """The view of one image of the batch."""
        affine = self.affines[image if self.num_images > 1 else 0]
        label = f"{self.label}.of_image({image})" if self.num_images > 1 else self.label
        return View((affine,), self.input_size, self.fixed_size, label)

    @cached_property
    def inverse(self) -> View:
        """The view that leads back: ``view.inverse(view(images))`` has the images' orientation, and their size too
        unless a scaled size was rounded; :meth:`align` leads back onto a given size. What the view does not show is 0.
        """
        label = self.label[: -len(".inverse")] if self.label.endswith(".inverse") else f"{self.label}.inverse"
        return View(tuple(affine.inverse() for affine in self.affines), self.fixed_size, self.input_size, label)

    def output_size(self, size: Size) -> tuple[int, int]:
        """The size (height, width) of this view of a map of ``size``. Raises ValueError where nothing would be left,
        and where the views of a batch differ in size or are bound to images of another."""
        sizes = list(dict.fromkeys(affine.output_size(size) for affine in self.affines))
        if len(sizes) > 1:
            raise ValueError(
                f"found {self.brief} of a map of {size[0]} x {size[1]}, which gives "
                f"{' and '.join(f'{h} x {w}' for h, w in sizes)}; expected one output size for all images; turn square "
                "images only, and bring the views to one size by Crop(..., size=)"
            )
        output = sizes[0]
        if min(output) < 1:
            raise ValueError(
                f"found {self.brief} of a map of {size[0]} x {size[1]}, which leaves {output[0]} x {output[1]}; "
                "expected at least 1 x 1; scale less"
            )
        self._check_size("input", self.input_size, size, size)
        self._check_size("output", self.fixed_size, output, size, rounding=1)
        fixed = self.fixed_size
        near = fixed is not None and all(abs(a - b) <= 1 for a, b in zip(fixed, output, strict=True))
        return fixed if fixed is not None and near else output

    def _check_size(self, what: str, bound: Size | None, found: Size, size: Size, rounding: int = 0) -> None:
        """A view bound to images of one size takes those, and maps of them at a lower resolution."""
        if bound is not None and not _is_reduction(bound, found, rounding):
            raise ValueError(
                f"found {self.brief} of a map of {size[0]} x {size[1]}; expected {bound[0]} x {bound[1]} as its "
                f"{what}, or maps of such images at a whole fraction of their resolution; draw the view for the size "
                "of the images it is applied to"
            )

    def __call__(self, maps: Tensor, size: int | Size | None = None) -> Tensor:
        """The view of images or dense maps (..., H, W): (..., H', W'), differentiable. ``size`` overrides (H', W').

        With a view for each image the first axis is the batch. What lies outside the source is 0.
        """
        if not isinstance(maps, Tensor):
            raise TypeError(
                f"found a {type(maps).__name__}; expected a tensor (..., H, W); convert images to tensors first"
            )
        if maps.ndim < 2:
            raise TypeError(f"found a {maps.dtype} tensor of shape {tuple(maps.shape)}; expected (..., H, W); reshape")
        self.check_batch(maps.shape[0] if maps.ndim > 2 else 1)
        pixels = self._pixel_map(maps.shape[-2:], size, str(maps.device))
        if not (maps.is_floating_point() or pixels.is_exact):
            raise TypeError(
                f"found a {maps.dtype} tensor of shape {tuple(maps.shape)}; expected (..., H, W), in floating point "
                f"where {self.brief} resamples; convert images with .float()"
            )
        return pixels(maps)

    def align(self, maps: Tensor, size: int | Size) -> Tensor:
        """Maps made from ``view(images)``, (..., h', w'), carried back onto the images' grid of ``size`` (h, w)."""
        return self.inverse(maps, size)

    def valid(self, size: Size, output_size: Size | None = None) -> Tensor:
        """(1 or B, H', W') bool: which pixels of ``view(images)``, with images of ``size``, show the image."""
        pixels = self._pixel_map(size, output_size, "cpu")
        return rearrange(pixels.valid, "b (h w) -> b h w", h=pixels.target.height)

    def check_batch(self, images: int) -> None:
        """Raises ValueError where the view holds one map for each of a different number of images."""
        if self.num_images not in (1, images):
            raise ValueError(
                f"found {self.brief}, which is for {self.num_images} images, and a batch of {images}; expected as "
                "many; draw it for this batch, images along the first axis"
            )

    def _pixel_map(self, source: Size, size: int | Size | None, device: str) -> LatticeMap:
        if isinstance(size, int):
            size = (size, size)
        if size is None:
            size = self.output_size(source)
        else:
            self._check_size("input", self.input_size, source, source)
        # Not cached: of random views every one is new, and maps of pixels are large.
        return _resampling.lattice_map(self.affines, Lattice(source[0], source[1]), Lattice(size[0], size[1]), device)


def _is_reduction(full: Size, found: Size, rounding: int) -> bool:
    """Whether ``found`` is the size ``full``, or that of a map at a whole fraction of it, give or take one token."""
    return all(
        abs(large - small) <= rounding or any(abs(large / by - small) <= 1 for by in range(2, large + 1))
        for large, small in zip(full, found, strict=True)
    )


@lru_cache(maxsize=32)
def lattice_map(view: View, source: Lattice, target: Lattice, device: str) -> LatticeMap:
    """The map from a ``source`` lattice of tokens on a view's input to a ``target`` lattice on its output."""
    return _resampling.lattice_map(view.affines, source, target, device)


def require_view(view: object) -> None:
    if isinstance(view, View):
        return
    drawn = "; draw one: sampler.sample(images)" if hasattr(view, "sample") else "; for instance HorizontalFlip()"
    raise TypeError(f"found a view of type {type(view).__name__}; expected an acr_reg View{drawn}")


_MIRRORED = Axis.reading(-1, 1)


def Identity() -> View:
    """The view that changes nothing."""
    return View()


def HorizontalFlip() -> View:
    """Mirrors left and right."""
    return View((Affine(x=_MIRRORED),), label="HorizontalFlip()")


def VerticalFlip() -> View:
    """Mirrors top and bottom.

    >>> import torch
    >>> VerticalFlip()(torch.tensor([[1, 2], [3, 4]])).tolist()
    [[3, 4], [1, 2]]
    """
    return View((Affine(y=_MIRRORED),), label="VerticalFlip()")


def Rotate90(k: int = 1) -> View:
    """``k`` quarter turns counter-clockwise, as ``torch.rot90`` over (H, W)."""
    if not isinstance(k, int):
        raise TypeError(f"found k={k!r}; expected a whole number of quarter turns; Rotate90(2) is half a turn")
    y, x, transposed = {
        0: (Axis(), Axis(), False),
        1: (Axis(), _MIRRORED, True),
        2: (_MIRRORED, _MIRRORED, False),
        3: (_MIRRORED, Axis(), True),
    }[k % 4]
    return View((Affine(y, x, transposed),), label=f"Rotate90({k % 4})")


def Scale(factor: float | tuple[float, float], keep_size: bool = False) -> View:
    """Resizes by ``factor`` (or by (height, width) factors), bilinear, antialiased when shrinking; sizes are rounded.

    With ``keep_size`` the output has the input's size, as of torchvision's affine: scaled about the centre, cut where
    it is larger and 0 (and not valid) where it is smaller. Unlike affine it is antialiased, and reads nothing that is
    cut.

    >>> import torch
    >>> Scale(0.5)(torch.ones(1, 3, 32, 48)).shape
    torch.Size([1, 3, 16, 24])
    """
    factors = (float(factor), float(factor)) if isinstance(factor, (int, float)) else tuple(map(float, factor))
    if len(factors) != 2 or not all(0 < f < float("inf") for f in factors):
        raise ValueError(f"found a scale of {factor}; expected positive factors; 0.5 halves the size, 2 doubles it")
    zoom = (Fraction(factors[0]), Fraction(factors[1]))
    if not keep_size:
        return View((Affine(zoom=zoom),), label=f"Scale({factor})")
    y, x = (Axis.reading(1 / z, (1 - 1 / z) / 2) for z in zoom)
    return View((Affine(y, x),), label=f"Scale({factor}, keep_size=True)")


def Crop(
    top: int,
    left: int,
    height: int,
    width: int,
    size: int | Size | None = None,
    *,
    image_size: Size,
    pad: bool = False,
) -> View:
    """The box of an image of ``image_size`` (height, width), in pixels, resized to ``size`` (height, width), by default
    its own: torchvision's ``resized_crop``.

    The box is in torchvision's order, so that ``Crop(*RandomResizedCrop.get_params(images, scale, ratio), size=224,
    image_size=images.shape[-2:])`` is what that transform would have done. With ``pad`` the box may reach beyond the
    image, where the output is 0 and not valid: what hosts do that scale by 0.5 to 2 and pad to one size. Raises
    ValueError for a box outside the image.

    >>> import torch
    >>> Crop(0, 16, 32, 32, size=64, image_size=(32, 48))(torch.ones(1, 3, 32, 48)).shape
    torch.Size([1, 3, 64, 64])
    """
    box = tuple(_whole(value, "a box") for value in (top, left, height, width))
    rows, columns = (_whole(value, "an image size") for value in image_size)
    size = (height, width) if size is None else (size, size) if isinstance(size, int) else size
    out_rows, out_columns = (_whole(value, "a size") for value in size)
    top, left, height, width = box
    inside = top >= 0 and left >= 0 and top + height <= rows and left + width <= columns
    touching = top < rows and left < columns and top + height > 0 and left + width > 0
    if min(height, width, out_rows, out_columns) < 1 or not (touching if pad else inside):
        raise ValueError(
            f"found a box of {height} x {width} at ({top}, {left}), rows {top} to {top + height} and columns {left} to "
            f"{left + width}, of an image of {rows} x {columns}, resized to {out_rows} x {out_columns}; expected a box "
            f"within the image and sizes of at least 1; {'move' if pad else 'shrink or move'} the box"
            f"{'' if pad else ', or pass pad=True for zeros beyond the image'}"
        )
    y = Axis.reading(Fraction(height, rows), Fraction(top, rows))
    x = Axis.reading(Fraction(width, columns), Fraction(left, columns))
    padded = ", pad=True" if pad else ""
    resized = "" if (out_rows, out_columns) == (height, width) else f", size=({out_rows}, {out_columns})"
    label = f"Crop({top}, {left}, {height}, {width}{resized}, image_size=({rows}, {columns}){padded})"
    zoom = (Fraction(out_rows, rows), Fraction(out_columns, columns))
    return View((Affine(y, x, zoom=zoom),), (rows, columns), (out_rows, out_columns), label)


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or int(value) != value:  # type: ignore[call-overload]
        raise TypeError(f"found {value!r} in {what}; expected whole pixels; round the numbers")
    return int(value)  # type: ignore[call-overload]


def Compose(views: Sequence[View]) -> View:
    """The views one after another, the first first, as one view: resampled once. Views of one image each and views for
    a batch go together.

    Raises ValueError where a view is bound to another size than the one before gives.
    """
    views = _views(views, "Compose([first, second])")
    composed = reduce(_then, views, View(label="nothing"))
    return View(composed.affines, composed.input_size, composed.fixed_size, f"Compose({list(views)})")


def _then(first: View, second: View) -> View:
    if 1 not in (first.num_images, second.num_images):
        second.check_batch(first.num_images)
    given, wanted = first.fixed_size, second.input_size
    if given is not None and wanted is not None and given != wanted:
        raise ValueError(
            f"found {second.brief} after {first.brief}, which gives {given[0]} x {given[1]}; expected {wanted[0]} x "
            f"{wanted[1]}; make each view for the output of the one before"
        )
    input_size, fixed_size = first.input_size, second.fixed_size
    if input_size is None and wanted is not None and not first.scales:
        input_size = first.inverse.output_size(wanted)
    if fixed_size is None and given is not None:
        fixed_size = second.output_size(given)
    count = max(first.num_images, second.num_images)
    pairs = zip(_for_all(first, count), _for_all(second, count), strict=True)
    return View(tuple(one.then(other) for one, other in pairs), input_size, fixed_size, second.label)


def _for_all(view: View, count: int) -> Iterator[Affine]:
    return iter(view.affines * count if view.num_images == 1 else view.affines)


def PerImage(views: Sequence[View]) -> View:
    """One view that holds another for each image of a batch, all with one output size. The images they are made
    from may differ in size, where each was cropped before the batch was stacked.

    >>> import torch
    >>> view = PerImage([HorizontalFlip(), Identity()])
    >>> view(torch.tensor([[[[1, 2]]], [[[3, 4]]]])).flatten().tolist()
    [2, 1, 3, 4]
    """
    views = _views(views, "PerImage([of_the_first, of_the_second])")
    if not views or any(view.num_images > 1 for view in views):
        raise ValueError(
            f"found {len(views)} views for {[view.num_images for view in views]} images; expected one view for each "
            "image, of one image each; PerImage([HorizontalFlip(), Identity()])"
        )
    inputs, outputs = (
        {size for view in views if (size := getattr(view, what))} for what in ("input_size", "fixed_size")
    )
    if len(outputs) > 1:
        raise ValueError(
            f"found views that give {' and '.join(f'{h} x {w}' for h, w in sorted(outputs))}; expected one size for "
            "all images of a batch; crop or pad to one size by Crop(..., size=, pad=True)"
        )
    # Crops of images of several sizes make a batch, but there is no batch to make them from.
    input_size, fixed_size = inputs.pop() if len(inputs) == 1 else None, outputs.pop() if outputs else None
    made = View(tuple(view.affines[0] for view in views), input_size, fixed_size, f"PerImage({list(views)})")
    if made.input_size is not None:
        made.output_size(made.input_size)
    elif made.fixed_size is None and len({affine.zoom for affine in made.affines}) > 1:
        zooms = list(dict.fromkeys(affine.zoom for affine in made.affines))
        raise ValueError(
            f"found views that scale by {' and '.join(f'({float(y):g}, {float(x):g})' for y, x in zooms)}; expected "
            "one output size for all images; Scale(factor, keep_size=True) keeps it"
        )
    return made


def _views(views: Sequence[View], example: str) -> Sequence[View]:
    if isinstance(views, View):
        raise TypeError(f"found one View; expected a sequence of them; {example}")
    for view in views:
        if not isinstance(view, View):
            raise TypeError(
                f"found a {type(view).__name__} among the views; expected Views; for instance HorizontalFlip()"
            )
    return list(views)
