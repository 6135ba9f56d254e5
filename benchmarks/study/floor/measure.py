"""What two views' attention differs by before any training, one factor at a time: the rows of floor.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from acr_reg import (
    AttentionMaps,
    Crop,
    HorizontalFlip,
    Identity,
    Scale,
    View,
    capture_attention,
)
from acr_reg.demo.photos.pretrained import PATCH, UpperHalf, load_weights, resize_positions
from acr_reg.demo.train import with_grid
from benchmarks.study.floor.distances import as_equivariant, distances
from benchmarks.study.photos import Photos
from benchmarks.study.views import VIEWS, draws_views, misreported

SIZES = {112: 24, 168: 8, 224: 4}  # px: photos
WIDTHS = (0.5, 1.0, 2.0, 4.0)  # of the smooth attention, in tokens
CROPPED = 2  # tokens that a crop takes off height and width

Row = dict[str, Any]


class Network:
    """Both halves, untrained, on the images of one size."""

    def __init__(self, photos: Photos) -> None:
        self.photos, self.size, self.side = photos, photos.size, photos.grid[0]
        self.upper: UpperHalf = photos.upper(0).eval()
        self.table = load_weights(photos.places.weights)["pos_embed"]

    def maps(self, images: Tensor, positions: Tensor | None = None) -> AttentionMaps:
        """``positions`` (1, 1+N, D) replace those that the images' size gives."""
        side = images.shape[-1] // PATCH
        return self.of_tokens(self.photos.lower(images.shape[-1])(images, positions), side)

    @torch.no_grad()
    def of_tokens(self, tokens: Tensor, side: int) -> AttentionMaps:
        with capture_attention(self.upper, no_grad=True) as attention:
            self.upper(tokens)
            return with_grid(attention.take(), (side, side))

    def positions(self, through: int | None = None) -> Tensor:
        """Those of the images, or the same resampled ``through`` a table of that many tokens a side."""
        table = self.table if through is None else resize_positions(self.table, through)
        return resize_positions(table, self.side)


def measured(photos: Photos, images: Tensor) -> list[Row]:
    """A row for each factor. Those of views also have the distance of maps that do not belong together: the loss is
    told a flip too many."""
    network = Network(photos)
    own = network.maps(images)
    rows = []
    for name, view in _views(photos.size, images):
        viewed = network.maps(view(images))
        told = {alike: distances(own, viewed, misreported(view), blur_alike=alike) for alike in (False, True)}
        wrong = {"misreported": asdict(told[False]), "misreported, blurred alike": asdict(told[True])}
        rows.append(_row(name, own, viewed, view) | wrong)
    return rows + [_row(*each) for each in _whole_tokens(network, images, own)]


def _views(size: int, images: Tensor) -> Iterator[tuple[str, View]]:
    box, token = size - CROPPED * PATCH, CROPPED // 2 * PATCH
    yield "flip", HorizontalFlip()
    for factor in (0.5, 0.75, 1.25, 2.0):
        if size * factor % PATCH == 0:
            yield f"scale {factor:g}", Scale(factor)
    yield "crop half a token off", Crop(token // 2, token // 2, box, box, image_size=(size, size))
    yield "crop of whole tokens, resized", Crop(token, token, box, box, size=size, image_size=(size, size))
    for name, title in VIEWS.items():
        if (draw := draws_views(name, size)) is not None:
            yield title, draw(images, torch.Generator().manual_seed(0))


def _whole_tokens(
    network: Network, images: Tensor, own: AttentionMaps
) -> Iterator[tuple[str, AttentionMaps, AttentionMaps, View, Tensor | None]]:
    """Changes of positions and of context that resample nothing."""
    for through in (network.side - CROPPED, network.side + CROPPED):
        changed = network.maps(images, network.positions(through))
        yield f"positions resampled through {through} x {through}", own, changed, Identity(), None
    edge = CROPPED // 2
    tokens = torch.arange(network.side**2).unflatten(0, network.photos.grid)
    kept = tokens[edge:-edge, edge:-edge].flatten()
    inside = tokens[edge + 1 : -edge - 1, edge + 1 : -edge - 1].flatten()
    border = kept[~torch.isin(kept, inside)]
    side, rows = network.side - CROPPED, torch.cat([torch.zeros(1, dtype=torch.long), 1 + kept])
    crop = Crop(edge * PATCH, edge * PATCH, side * PATCH, side * PATCH, image_size=(network.size, network.size))
    cropped = network.maps(crop(images))
    yield "crop of whole tokens", own, cropped, crop, None
    yield "crop of whole tokens, rows at its border", own, cropped, crop, border
    yield "crop of whole tokens, rows inside", own, cropped, crop, inside
    placed = network.maps(crop(images), network.positions()[:, rows])
    yield "crop of whole tokens, positions of the image", own, placed, crop, None
    late = network.of_tokens(network.photos.encode(images)[:, rows], side)
    yield "crop of whole tokens, after the frozen blocks", own, late, crop, None


def _row(name: str, own: AttentionMaps, viewed: AttentionMaps, view: View, tokens: Tensor | None = None) -> Row:
    alone = as_equivariant(own, view, viewed[0].layout)
    return {
        "view": name,
        "as it was": asdict(distances(own, viewed, view, tokens=tokens)),
        "resampling alone": asdict(distances(own, alone, view, tokens=tokens)),
        "blurred alike": asdict(distances(own, viewed, view, blur_alike=True, tokens=tokens)),
    }


# ------------------------------------------------------------ attention that is known everywhere


def smooth(size: int) -> list[Row]:
    """The affinity of one continuous function of places, a Gaussian of their distance, sampled by both grids: all of it
    is resampling, whatever the network."""
    side = size // PATCH
    rows = []
    for name, view in (
        ("scale 0.75", Scale(0.75)),
        ("scale 1.25", Scale(1.25)),
        ("scale 2", Scale(2.0)),
        ("crop half a token off", Crop(PATCH // 2, PATCH // 2, size - PATCH, size - PATCH, image_size=(size, size))),
    ):
        for width in WIDTHS:
            own = _gaussian(Identity(), side, side, width)
            viewed = _gaussian(view, view.output_size((size, size))[0] // PATCH, side, width)
            found = [distances(own, viewed, view, blur_alike=alike).affinity for alike in (False, True)]
            rows.append({"view": name, "width": width, "as it was": found[0], "blurred alike": found[1]})
    return rows


def _gaussian(view: View, side: int, tokens: int, width: float) -> AttentionMaps:
    """Maps of ``side`` x ``side`` tokens of the view; ``width`` is in the image's tokens, of which it has ``tokens`` a
    side. The class token attends to all patches alike, and none to it."""
    affine = view.affines[0]
    centres = (torch.arange(side) + 0.5) / side
    along = [tokens * (float(axis.slope) * centres + float(axis.start)) for axis in (affine.y, affine.x)]
    places = torch.cartesian_prod(*along)
    rows = (-(torch.cdist(places, places) / width).square() / 2).softmax(-1)
    whole = torch.cat([torch.full((1, side**2), 1 / side**2), rows])
    maps = torch.cat([torch.zeros(1 + side**2, 1), whole], 1)
    return AttentionMaps.from_tensors([maps[None, None]], 1, (side, side))
