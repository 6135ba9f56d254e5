"""What alignment refuses: layers of other images, grids of another view, masks of another batch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from acr_reg.attention import LayerAttention
from acr_reg.tokens import Lattice
from acr_reg.views import View


def check_pair(a: LayerAttention, b: LayerAttention, view: View) -> None:
    """Raises ValueError where the two layers cannot be of images and of this view of them."""
    name = f"layer {a.index} ({a.name})"
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"{name}: found {a.shape[0]} images with {a.shape[1]} heads in one view and {b.shape[0]} with {b.shape[1]} "
            "in the other; expected the same; take both views' maps from the same model and images"
        )
    view.check_batch(a.shape[0])
    sides: tuple[Literal["query", "key"], ...] = ("query", "key")
    for side in sides:
        grid_a, grid_b = a.layout.lattice(side), b.layout.lattice(side)
        check_lattices(name, view, grid_b, grid_a)
        if _are_of_view(grid_a, grid_b, view):
            continue
        expected = view.output_size((grid_a.height, grid_a.width))
        rounding = 1 if view.scales else 0  # a scaled image need not hold a whole number of patches
        if abs(grid_b.height - expected[0]) > rounding or abs(grid_b.width - expected[1]) > rounding:
            raise ValueError(
                f"{name}: found {side} grids of {grid_a} and {grid_b}; expected {expected[0]} x {expected[1]} for the "
                f"second under {view.brief}; pass the view that was applied to the second view's images"
            )
    if len(a.layout.class_tokens or ()) != len(b.layout.class_tokens or ()):
        raise ValueError(
            f"{name}: found class tokens {a.layout.class_tokens} and {b.layout.class_tokens}; expected as many in both "
            "views; capture both with the same class_tokens="
        )


def _are_of_view(grid_a: Lattice, grid_b: Lattice, view: View) -> bool:
    """Whether the images that two grids lie on are of the sizes the view says. The grids need not be in proportion:
    patches may leave a margin."""
    if grid_a.is_unit or grid_b.is_unit:
        return False
    size_a, size_b = ((round(grid.extent[0]), round(grid.extent[1])) for grid in (grid_a, grid_b))
    return view.output_size(size_a) == size_b


def check_lattices(name: str, view: View, source: Lattice, target: Lattice) -> None:
    """A view bound to one size of image needs tokens of such images. A grid in units of tokens says no pixels."""
    for which, grid, size in (("first", target, view.input_size), ("second", source, view.fixed_size)):
        if size is not None and not grid.is_unit and grid.extent != (float(size[0]), float(size[1])):
            raise ValueError(
                f"{name}: found tokens of images of {grid.extent[0]:g} x {grid.extent[1]:g} px in the {which} view and "
                f"{view.brief}, which is of {size[0]} x {size[1]} px there; expected the same; pass the view that was "
                "drawn for these images"
            )


def check_valid(valid: Tensor, batch: int) -> None:
    if not isinstance(valid, Tensor):
        raise TypeError(
            f"found valid of type {type(valid).__name__}; expected a tensor (B, H, W); pass one mask per image"
        )
    if valid.ndim != 3 or valid.shape[0] != batch:
        raise ValueError(
            f"found valid of shape {tuple(valid.shape)}; expected ({batch}, H, W); pass one mask per image"
        )
