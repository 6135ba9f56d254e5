"""align_attention and align_tokens on tokens that do not all stand before the patches."""

import pytest
import torch

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
    align_attention,
    align_tokens,
)
from tests.support.attention import generator, says
from tests.support.orders import FIELDS, layouts, reordered

GRID = (4, 6)  # of the images; with the grid of the view
VIEWS = {
    "flip": (HorizontalFlip(), (4, 6)),
    "turn": (Rotate90(1), (6, 4)),
    "crop": (Crop(1, 2, 3, 4, image_size=GRID), (3, 4)),
    "scale": (Scale(0.5), (2, 3)),
    "flip of one image": (PerImage([HorizontalFlip(), Identity()]), (4, 6)),
    "crops of each image": (
        PerImage([Crop(0, 0, 3, 4, image_size=GRID), Compose([Crop(1, 2, 3, 4, image_size=GRID), HorizontalFlip()])]),
        (3, 4),
    ),
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", VIEWS)
def test_maps_are_aligned_as_with_the_others_in_front(kind, name):
    view, grid_b = VIEWS[name]
    (source, source_moved), (target, target_moved) = layouts(kind, grid_b), layouts(kind, GRID)
    count = source.num_queries
    maps = torch.rand(2, 3, count, count, generator=generator(1), dtype=torch.float64).requires_grad_()
    expected = reordered(align_attention(maps, view, source, target), target_moved, -2, -1)
    found = align_attention(reordered(maps, source_moved, -2, -1), view, source_moved, target_moved)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(found.shape, generator=generator(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((each * weights).sum(), maps)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_maps_of_reduced_keys_are_aligned_with_tokens_behind():
    source, moved = layouts("around", GRID, Lattice(2, 3, (2.0, 2.0)))
    maps = torch.rand(2, 1, source.num_queries, source.num_keys, generator=generator(1))
    expected = reordered(align_attention(maps, HorizontalFlip(), source, source), moved, -2, -1)
    found = align_attention(reordered(maps, moved, -2, -1), HorizontalFlip(), moved, moved)
    torch.testing.assert_close(found, expected)


def test_layouts_with_different_numbers_of_other_tokens():
    grid = Lattice(2, 3)
    with pytest.raises(ValueError, match="1 prefix and 2 suffix tokens") as error:
        align_attention(
            torch.rand(1, 1, 9, 9),
            HorizontalFlip(),
            TokenLayout(grid, grid, 1, (), 2),
            TokenLayout(grid, grid, 2),
        )
    assert says(error, "2 prefix tokens")


def test_tokens_behind_the_patches_stay_behind():
    row = torch.tensor([[9.0, 1.0, 2.0, 3.0, 7.0, 8.0]])
    grid = Lattice(1, 3)
    found = align_tokens(row, HorizontalFlip(), grid, grid, 1, -1, num_suffix_tokens=2)
    assert found.tolist() == [[9.0, 3.0, 2.0, 1.0, 7.0, 8.0]]
    features = align_tokens(row.mT[None], HorizontalFlip(), grid, grid, num_suffix_tokens=3)
    assert features.flatten().tolist() == [2.0, 1.0, 9.0, 3.0, 7.0, 8.0]


def test_tokens_behind_the_patches_that_do_not_add_up():
    grid = Lattice(1, 3)
    with pytest.raises(ValueError, match="6 tokens") as error:
        align_tokens(torch.zeros(1, 6), HorizontalFlip(), grid, grid, 1, -1, num_suffix_tokens=1)
    assert says(error, "not 5", "1 prefix + 1 x 3 + 1 suffix", "num_suffix_tokens")
    with pytest.raises(ValueError, match="num_suffix_tokens=-1") as error:
        align_tokens(torch.zeros(1, 3), HorizontalFlip(), grid, grid, 1, -1, num_suffix_tokens=-1)
