"""Measures where on the image the tokens of a layer lie, by the gradient that reaches the pixels.

The gradient of one token's query (or of one row of an unfused layer's map) surrounds the pixels that the token was made
from. The centroid of its strongest part is the token's position. Tokens that a lattice matches under a view should lie
at the same place on the image; the offset is the distance between them. Where no gradient reaches the pixels, the
places stay unknown, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.tokens import Lattice, TokenLayout, TokenSide, patch_index
from acr_reg.views.resampling import Line
from acr_reg.views.view import View

Observe = Callable[[Tensor], AttentionMaps]

_STRONG = 0.1  # of the largest gradient energy; weaker energy comes through earlier attention and normalisation
# The places of the probed tokens on the grid, (y, x): away from padded borders.
_PLACES = ((0.3, 0.3), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.7, 0.7))


@dataclass(frozen=True)
class Offset:
    """How far apart matched tokens lie under a view, and how far a token lies from its centre on the lattice. Each is
    the largest distance among the probed tokens. ``width`` is the side of the square that a token reads, on average.
    All are pixels of the images as the model reads them."""

    under_view: float
    from_lattice: float
    width: float


@dataclass
class LayerOffsets:
    """The offsets of one layer's tokens by side. A side that could not be measured is missing, and ``why_unmeasured``
    says why."""

    sides: dict[TokenSide, Offset] = field(default_factory=dict)
    why_unmeasured: str | None = None


class _UnmeasuredError(Exception):
    """No place can be told from the gradient."""


def token_offsets(observe: Observe, images: Tensor, view: View) -> dict[int, LayerOffsets]:
    """The offsets of the first layer on each layout that can be measured, and why those before it could not, by the
    layer's position in the maps that ``observe`` returns. Measured at five tokens, on noise of the size of ``images``:
    an image of one colour would show nothing."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, *images.shape[1:]), generator=generator, device="cpu").to(images)
    probe_a, probe_b = _Probe(observe, noise), _Probe(observe, view(noise))
    found: dict[int, LayerOffsets] = {}
    if probe_a.maps.layers != probe_b.maps.layers:  # which the loss refuses by name
        return found
    layouts: set[TokenLayout] = set()
    for position, layer in enumerate(probe_a.maps):
        if layer.placed is None or layer.placed in layouts:
            continue
        offsets = found[position] = LayerOffsets()
        for side in ("query", "key"):
            lattice_a, lattice_b = layer.layout.lattice(side), probe_b.maps[position].layout.lattice(side)
            tokens_b = _inner_tokens(lattice_b)
            centres_b = _carried_back(_centres(lattice_b)[tokens_b], view)
            on_image = ((centres_b > 0) & (centres_b < 1)).all(1)  # and not on padding of the view
            if not on_image.any():
                continue
            tokens_b, centres_b = tokens_b[on_image], centres_b[on_image]
            tokens_a = torch.cdist(centres_b, _centres(lattice_a)).argmin(1)
            nominal_a = _centres(lattice_a)[tokens_a]
            missed = centres_b - nominal_a  # not 0 if the view does not map one lattice onto the other
            try:
                found_a, width = probe_a.positions(position, side, tokens_a)
                found_b = _carried_back(probe_b.positions(position, side, tokens_b)[0], view)
            except _UnmeasuredError as error:
                offsets.why_unmeasured = str(error)
                continue
            pixels = centres_b.new_tensor(lattice_a.extent)  # of the images as the model reads them
            apart = ((found_b - missed - found_a) * pixels).norm(dim=1)
            away = ((found_a - nominal_a) * pixels).norm(dim=1)
            read = (width * pixels).mean()
            offsets.sides[side] = Offset(apart.max().item(), away.max().item(), read.item())
        if offsets.why_unmeasured is None:
            layouts.add(layer.placed)
    return found


class _Probe:
    """Runs one forward on a copy of the image for each token probed, and one backward for each layer and side."""

    def __init__(self, observe: Observe, image: Tensor) -> None:
        self.images = image.detach().expand(len(_PLACES), -1, -1, -1).clone().requires_grad_()
        self.maps = observe(self.images)

    def positions(self, layer: int, side: TokenSide, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Twice (P, 2): y and x of the middle of the pixels that each token was made from, and how far they reach along
        both, from 0 to 1 over the image. Raises _UnmeasuredError if the gradient does not tell."""
        seen = self.maps[layer]
        of_patch = _of_token(seen, side)[:, :, patch_index(seen.layout, side, str(seen.device))]
        of_token = of_patch[torch.arange(len(tokens), device="cpu"), :, tokens]
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(of_token.shape[1:], generator=generator, device="cpu").to(of_token)
        gradient = self._gradient((of_token * weights).sum())
        energy = gradient.cpu().double().square().sum(1)
        if not energy.isfinite().all():
            raise _UnmeasuredError("its gradient to the pixels is NaN or infinite")
        if not energy.amax((1, 2)).all():
            raise _UnmeasuredError("its gradient to the pixels is 0, as below a rounding")
        strong = energy * (energy >= _STRONG * energy.amax((1, 2), keepdim=True))
        strong = strong / strong.sum((1, 2), keepdim=True)
        middles, reaches = [], []
        for axis, along in ((2, strong.sum(2)), (1, strong.sum(1))):
            places = (torch.arange(energy.shape[3 - axis], device="cpu").double() + 0.5) / energy.shape[3 - axis]
            middle = along @ places
            middles.append(middle)
            # An evenly read stretch of length w has a variance of w^2 / 12.
            reaches.append((12 * ((places - middle[:, None]) ** 2 * along).sum(1)).sqrt())
        return torch.stack(middles, 1), torch.stack(reaches, 1)

    def _gradient(self, of_tokens: Tensor) -> Tensor:
        gradient = None
        if of_tokens.requires_grad:
            try:
                (gradient,) = torch.autograd.grad(of_tokens, self.images, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise _UnmeasuredError(f"torch cannot differentiate it: {first_line(error)}") from error
        if gradient is None:
            raise _UnmeasuredError("no gradient reaches the pixels, as below no_grad, detach() or integers")
        return gradient


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _centres(lattice: Lattice) -> Tensor:
    """(tokens, 2): y and x of every centre, from 0 to 1 over the image."""
    grid = torch.meshgrid(*(Line(lattice, axis).places() for axis in (0, 1)), indexing="ij")
    return torch.stack(grid, -1).flatten(0, 1)


def _inner_tokens(lattice: Lattice) -> Tensor:
    numbers = [int(y * lattice.height) * lattice.width + int(x * lattice.width) for y, x in _PLACES]
    return torch.tensor(numbers, device="cpu")


def _carried_back(points: Tensor, view: View) -> Tensor:
    """Carries points (P, 2) of a view's output to its input, from 0 to 1 over each."""
    (affine,) = view.affines
    y, x = points.flip(1).unbind(1) if affine.transposed else points.unbind(1)
    axes = ((affine.y, y), (affine.x, x))
    return torch.stack([float(axis.slope) * along + float(axis.start) for axis, along in axes], 1)


def _of_token(layer: LayerAttention, side: TokenSide) -> Tensor:
    """(B, H, tokens, any): values dominated by one token each."""
    tensor = layer.query if side == "query" else layer.key
    if tensor is None:
        tensor = layer.explicit if side == "query" or layer.explicit is None else layer.explicit.transpose(-2, -1)
    assert tensor is not None
    return tensor
