"""Which tokens are not padding, and what a view and a mask must fit."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from acr_reg.tokens import Lattice
from acr_reg.views.resampling import Line
from acr_reg.views.view import View

NO_MASS = 1e-30  # a row with less mass on tokens visible in both views counts nothing; its gradient stays finite


def check_lattices(name: str, view: View, source: Lattice, target: Lattice) -> None:
    """A view bound to one image size needs tokens of such images. A grid without a pixel size cannot be checked."""
    for which, grid, size in (("first", target, view.input_size), ("second", source, view.fixed_size)):
        if size is not None and not grid.is_unit and grid.extent != (float(size[0]), float(size[1])):
            raise ValueError(
                f"{name}: the tokens of the {which} view lie on images of {grid.extent[0]:g} x {grid.extent[1]:g} px, "
                f"but {view.brief} is for {size[0]} x {size[1]} px. Pass the view drawn for these images."
            )


def valid_tokens(valid: Tensor, lattice: Lattice) -> Tensor:
    """``valid`` (B, H, W), True on image and False on padding, at any resolution -> (B, tokens), True where at least
    half of a token's cell is image."""
    along_y, along_x = (_cell_shares(lattice, axis, valid.shape[axis + 1], str(valid.device)) for axis in (0, 1))
    return (along_y @ valid.float() @ along_x.mT).flatten(1) >= 0.5 - 1e-6


@lru_cache(maxsize=32)
def _cell_shares(lattice: Lattice, axis: int, pixels: int, device: str) -> Tensor:
    """(tokens, pixels): the share of a token's cell that each pixel covers, of the part that lies on the image."""
    line = Line(lattice, axis)
    with torch.inference_mode(False):  # training uses it too, and cannot use tensors made in inference_mode
        centres, half = line.places()[:, None] * pixels, line.stride / line.extent * pixels / 2
        edges = torch.arange(pixels, dtype=torch.float64, device="cpu")
        covered = (centres + half).minimum(edges + 1) - (centres - half).maximum(edges)
        covered = covered.clamp(min=0)
        return (covered / covered.sum(1, keepdim=True).clamp_min(1e-12)).float().to(device)


def check_valid(valid: Tensor, batch: int) -> None:
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid has type {type(valid).__name__}. Pass a tensor (B, H, W), one mask per image.")
    if valid.ndim != 3 or valid.shape[0] != batch:
        raise ValueError(f"valid has shape {tuple(valid.shape)}, not ({batch}, H, W). Pass one mask per image.")
