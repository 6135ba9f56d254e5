"""Views of small grids with their layouts and maps, drawn by hypothesis."""

import torch
from hypothesis import strategies as st

from acr_reg import (
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    Lattice,
    PerImage,
    Rotate90,
    Scale,
    TokenLayout,
    VerticalFlip,
)
from tests.support.attention import generator

BATCH = 2
EXACT = [Identity(), HorizontalFlip(), VerticalFlip(), *(Rotate90(k) for k in (1, 2, 3))]


def box_within(draw, grid, pad):
    reach = 2 if pad else 0
    height, width = (draw(st.integers(1, n + reach)) for n in grid)
    top, left = (
        draw(st.integers(1 - size if pad else 0, n - 1 if pad else n - size))
        for n, size in zip(grid, (height, width), strict=True)
    )
    return top, left, height, width


@st.composite
def views_of(draw, grid, exact):
    """A view of images of one pixel a token, with one output size, and that size."""
    kind = draw(st.sampled_from(["whole", "crop", "padded", "of each image"] + ([] if exact else ["resized", "scale"])))
    if kind == "whole":
        view = draw(st.sampled_from(EXACT))
    elif kind in ("crop", "padded"):
        view = Crop(*box_within(draw, grid, kind == "padded"), image_size=grid, pad=kind == "padded")
    elif kind == "resized":
        size = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
        view = Crop(*box_within(draw, grid, True), size=size, image_size=grid, pad=True)
    elif kind == "scale":
        view = Scale(draw(st.sampled_from([2.0, 1.5, 0.75, 3.0])), keep_size=draw(st.booleans()))
    else:
        top, left, height, width = box_within(draw, grid, True)
        other = Crop(grid[0] - 1, 1 - width, height, width, image_size=grid, pad=True)
        one = Crop(top, left, height, width, image_size=grid, pad=True)
        turned = draw(st.sampled_from([HorizontalFlip(), Rotate90(2)]))
        view = PerImage([one, Compose([other, turned])])
    return view, view.output_size(grid)


@st.composite
def cases(draw, exact):
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    view, grid_b = draw(views_of(grid, exact))
    if draw(st.booleans()):
        second, grid_b = draw(views_of(grid_b, exact))
        view = Compose([view, second])
    prefix, finer, seed = draw(st.integers(0, 24)), draw(st.integers(1, 2)), draw(st.integers(0, 1000))

    def layout(size):  # queries may be finer than keys
        key = Lattice(*size)
        query = Lattice(size[0] * finer, size[1] * finer, (1 / finer, 1 / finer))
        return TokenLayout(query, key, prefix)

    source, target = layout(grid_b), layout(grid)
    shape = (BATCH, 2, source.num_queries, source.num_keys)
    maps = (3 * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).softmax(-1)
    return view, source, target, maps
