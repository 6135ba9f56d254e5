"""Makes every kind of :class:`~acr_reg.View` from checked arguments. A new kind is added here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce

from acr_reg.views.affine import Affine, Axis
from acr_reg.views.view import Size, View

_MIRRORED = Axis.reading(-1, 1)


def Identity() -> View:
    """Changes nothing."""
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
        raise TypeError(f"k is {k!r}. Pass a whole number of quarter turns; Rotate90(2) is half a turn.")
    y, x, transposed = {
        0: (Axis(), Axis(), False),
        1: (Axis(), _MIRRORED, True),
        2: (_MIRRORED, _MIRRORED, False),
        3: (_MIRRORED, Axis(), True),
    }[k % 4]
    return View((Affine(y, x, transposed),), label=f"Rotate90({k % 4})")


def Scale(factor: float | tuple[float, float], keep_size: bool = False) -> View:
    """Resizes images by ``factor``, or by one factor for each of height and width.

    The filter is bilinear, antialiased when it shrinks; sizes are rounded.

    With ``keep_size`` the output has the input's size, as with torchvision's affine: the image is scaled about its
    centre, cut if it is larger, and surrounded by 0 (not valid) if it is smaller. Unlike affine it antialiases, and
    does not read the part that is cut.

    >>> import torch
    >>> Scale(0.5)(torch.ones(1, 3, 32, 48)).shape
    torch.Size([1, 3, 16, 24])
    """
    try:
        factors = tuple(map(float, factor)) if isinstance(factor, (tuple, list)) else (float(factor), float(factor))
    except (TypeError, ValueError):
        factors = ()
    if len(factors) != 2 or not all(0 < f < float("inf") for f in factors):
        raise ValueError(f"The scale is {factor}. Pass one or two positive factors: 0.5 halves the size, 2 doubles it.")
    if not isinstance(factor, (int, float, tuple)):  # numpy and torch numbers print differently
        factor = factors[0] if factors[0] == factors[1] else factors
    zoom = (Fraction(factors[0]), Fraction(factors[1]))
    if not keep_size:
        return View((Affine(zoom=zoom),), label=f"Scale({factor})", rounds=True)
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
    """Cuts a box out of an image of ``image_size`` and resizes it to ``size``, as torchvision's ``resized_crop``.

    All are in pixels, and the sizes are (height, width). By default the box keeps its own size.

    The box is in torchvision's order, so ``Crop(*RandomResizedCrop.get_params(images, scale, ratio), size=224,
    image_size=images.shape[-2:])`` repeats that transform. With ``pad`` the box may reach beyond the image: the output
    there is 0 and not valid. Hosts that scale by 0.5 to 2 and pad to one size need it. Raises ValueError for a box
    outside the image.

    >>> import torch
    >>> Crop(0, 16, 32, 32, size=64, image_size=(32, 48))(torch.ones(1, 3, 32, 48)).shape
    torch.Size([1, 3, 64, 64])
    """
    top, left, height, width = (_whole(value, "The box") for value in (top, left, height, width))
    rows, columns = _height_and_width(image_size, "image_size")
    size = (height, width) if size is None else (size, size) if isinstance(size, int) else size
    out_rows, out_columns = _height_and_width(size, "size")
    box = f"The box of {height} x {width} at ({top}, {left})"
    if min(height, width, out_rows, out_columns, rows, columns) < 1:
        raise ValueError(
            f"{box} of an image of {rows} x {columns} is resized to {out_rows} x {out_columns}. Each of these sizes "
            "must be at least 1."
        )
    inside = top >= 0 and left >= 0 and top + height <= rows and left + width <= columns
    touching = top < rows and left < columns and top + height > 0 and left + width > 0
    if not (touching if pad else inside):
        raise ValueError(
            f"{box} covers rows {top} to {top + height} and columns {left} to {left + width} of an image of {rows} x "
            f"{columns}. {'Move it.' if pad else 'Shrink or move it, or pass pad=True for zeros beyond the image.'}"
        )
    y = Axis.reading(Fraction(height, rows), Fraction(top, rows))
    x = Axis.reading(Fraction(width, columns), Fraction(left, columns))
    padded = ", pad=True" if pad else ""
    resized = "" if (out_rows, out_columns) == (height, width) else f", size=({out_rows}, {out_columns})"
    label = f"Crop({top}, {left}, {height}, {width}{resized}, image_size=({rows}, {columns}){padded})"
    zoom = (Fraction(out_rows, rows), Fraction(out_columns, columns))
    return View((Affine(y, x, zoom=zoom),), (rows, columns), (out_rows, out_columns), label)


def _height_and_width(size: object, what: str) -> tuple[int, int]:
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise TypeError(f"{what} is {size!r}. Pass (height, width), for instance images.shape[-2:].")
    return _whole(size[0], what), _whole(size[1], what)


def _whole(value: object, what: str) -> int:
    try:
        whole = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != value or isinstance(value, bool):
        raise TypeError(f"{what} contains {value!r}. Pass whole pixels.")
    return whole


def Compose(views: Sequence[View]) -> View:
    """Applies the views one after another, in order, as one view that resamples once. Views for one image and views for
    a batch can be combined.

    Raises ValueError if a view is bound to a size that the view before it does not give.
    """
    views = _views(views, "Compose([first, second])")
    composed = reduce(_then, views, View(label="nothing"))
    return replace(composed, label=f"Compose({list(views)})")


def _then(first: View, second: View) -> View:
    if 1 not in (first.num_images, second.num_images):
        second.check_batch(first.num_images)
    given, wanted = first.fixed_size, second.input_size
    if given is not None and wanted is not None and given != wanted:
        raise ValueError(
            f"{first.brief} gives {given[0]} x {given[1]}, and {second.brief} after it takes {wanted[0]} x "
            f"{wanted[1]}. Make each view for the output of the one before."
        )
    input_size, fixed_size = first.input_size, second.fixed_size
    if input_size is None and wanted is not None and not first.rounds:
        input_size = first.inverse.output_size(wanted)
    if fixed_size is None and given is not None:
        fixed_size = second.output_size(given)
    count = max(first.num_images, second.num_images)
    later = _for_all(second, count)
    if given is not None and fixed_size is not None:
        later = (_between_sizes(affine, given, fixed_size) for affine in later)
    affines = tuple(one.then(other) for one, other in zip(_for_all(first, count), later, strict=True))
    return View(affines, input_size, fixed_size, second.label, first.rounds or (second.rounds and given is None))


def _between_sizes(affine: Affine, given: Size, size: Size) -> Affine:
    """The affine with the zoom between two known sizes, for a scale's factor before rounding would not undo it."""
    height, width = (given[1], given[0]) if affine.transposed else (given[0], given[1])
    return replace(affine, zoom=(Fraction(size[0], height), Fraction(size[1], width)))


def _for_all(view: View, count: int) -> Iterator[Affine]:
    return iter(view.affines * count if view.num_images == 1 else view.affines)


def PerImage(views: Sequence[View]) -> View:
    """Gives each image of a batch its own view.

    All views have one output size. The images may differ in size if each is cropped before the batch is stacked.

    >>> import torch
    >>> view = PerImage([HorizontalFlip(), Identity()])
    >>> view(torch.tensor([[[[1, 2]]], [[[3, 4]]]])).flatten().tolist()
    [2, 1, 3, 4]
    """
    views = _views(views, "PerImage([of_the_first, of_the_second])")
    if not views or any(view.num_images > 1 for view in views):
        counts = [view.num_images for view in views]
        given = f"The {len(views)} views are for {counts} images" if views else "There are 0 views"
        raise ValueError(f"{given}. Pass one view for each image, as PerImage([HorizontalFlip(), Identity()]).")
    inputs, outputs = (
        {size for view in views if (size := getattr(view, what))} for what in ("input_size", "fixed_size")
    )
    if len(outputs) > 1:
        raise ValueError(
            f"The views give {' and '.join(f'{h} x {w}' for h, w in sorted(outputs))}. All images need one output "
            "size. Crop or pad to it by Crop(..., size=, pad=True)."
        )
    # Crops of images of different sizes form a batch, but the images themselves do not.
    input_size, fixed_size = inputs.pop() if len(inputs) == 1 else None, outputs.pop() if outputs else None
    affines, rounds = tuple(view.affines[0] for view in views), any(view.rounds for view in views)
    made = View(affines, input_size, fixed_size, f"PerImage({list(views)})", rounds)
    zooms = dict.fromkeys(affine.zoom for affine in affines)
    if made.input_size is not None:
        made.output_size(made.input_size)
    elif len(zooms) > 1 and any(view.fixed_size is None for view in views):
        raise ValueError(
            f"The views scale by {' and '.join(f'({float(y):g}, {float(x):g})' for y, x in zooms)}. All images need "
            "one output size; Scale(factor, keep_size=True) keeps it."
        )
    return made


def _views(views: Sequence[View], example: str) -> Sequence[View]:
    if isinstance(views, View):
        raise TypeError(f"The views are one View. Pass a sequence of them, as {example}.")
    for view in views:
        if not isinstance(view, View):
            raise TypeError(f"One of the views is a {type(view).__name__}. Pass Views, for instance HorizontalFlip().")
    return list(views)
