"""The loss of tokens in any order is that of the same tokens with the class tokens and registers in front."""

import itertools

import pytest
import torch

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    Lattice,
    PerImage,
    Rotate90,
    Scale,
)
from tests.support.attention import explicit, factored, generator
from tests.support.orders import FIELDS, layouts, numbers, reordered

GRID = (6, 8)  # tokens, which are the pixels of these images


def box(top, left, height, width, **options):
    return Crop(top, left, height, width, image_size=GRID, **options)


VIEWS = {  # and the grid of the view
    "flip": (HorizontalFlip(), (6, 8)),
    "turn": (Rotate90(1), (8, 6)),
    "crop": (box(1, 2, 4, 5), (4, 5)),
    "scale": (Scale(0.5), (3, 4)),
    "resized crop": (box(0, 1, 4, 5, size=(6, 6)), (6, 6)),
    "flip of one image": (PerImage([HorizontalFlip(), Identity()]), (6, 8)),
    "crops of each image": (PerImage([box(0, 0, 4, 5), Compose([box(2, 3, 4, 5), HorizontalFlip()])]), (4, 5)),
    "resized crops of each image": (PerImage([box(0, 0, 3, 4, size=(5, 5)), box(2, 3, 4, 5, size=(5, 5))]), (5, 5)),
}
KERNELS = {  # the tensors of a layer, and how the loss evaluates them
    "fused, blocks of rows": (True, {"blockwise": True, "block_rows": 5}),
    "fused, whole maps": (True, {"blockwise": False, "heads": "each", "distance": "js"}),
    "explicit": (False, {"distance": "l2", "normalize": "mean"}),
    "explicit, blocks of rows": (False, {"blockwise": True, "block_rows": 7}),
}
any_kind = pytest.mark.parametrize("kind", FIELDS)


def tensors_of(fused, queries, keys, seed):
    """Leaves with the other tokens in front: query and key, or logits."""
    shapes = [(2, 2, queries, 4), (2, 2, keys, 4)] if fused else [(2, 2, queries, keys)]
    return [
        torch.randn(shape, generator=generator(10 * seed + i), dtype=torch.float64).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def layers(tensors, front, moved, **recorded):
    """The layer twice: with the others in front, and with every token at its place in ``moved``."""
    if len(tensors) == 1:
        weights = tensors[0].softmax(-1)
        return explicit(weights, front), explicit(reordered(weights, moved, -2, -1), moved)
    query, key = tensors
    kernel = {name: reordered(value, moved, -2, -1) for name, value in recorded.items()}
    return (
        factored(query, key, front, **recorded),
        factored(reordered(query, moved, -2), reordered(key, moved, -2), moved, **kernel),
    )


def evaluated(acr, pair, leaves, **call):
    loss, terms = acr(*(AttentionMaps([layer]) for layer in pair), return_terms=True, **call)
    return [loss, *terms.values(), *torch.autograd.grad(loss, leaves, retain_graph=True)]


def assert_same(kind, view, grids, fused, options, key_grids=(None, None), masks=None, classes=(1,), **call):
    leaves, front, moved = [], [], []
    for seed, (grid, key_grid) in enumerate(zip(grids, key_grids, strict=True)):
        layout, layout_moved = layouts(kind, grid, key_grid, classes)
        tensors = tensors_of(fused, layout.num_queries, layout.num_keys, seed)
        recorded = {} if masks is None else {"mask": masks[seed]}
        first, second = layers(tensors, layout, layout_moved, **recorded)
        leaves += tensors
        front.append(first)
        moved.append(second)
    acr = AllPairsConsistencyLoss(view, 1.0, 2.0, **options)
    expected, found = evaluated(acr, front, leaves, **call), evaluated(acr, moved, leaves, **call)
    assert expected[0] > 0
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)


@any_kind
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_order_of_tokens_does_not_matter(kind, name, kernel):
    view, grid_b = VIEWS[name]
    fused, options = KERNELS[kernel]
    assert_same(kind, view, (GRID, grid_b), fused, options)


@any_kind
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["flip", "resized crop"])
def test_nor_with_padding_absent_classes_and_a_token_for_each_class(kind, kernel, name):
    view, grid_b = VIEWS[name]
    fused, options = KERNELS[kernel]
    valid = torch.ones(2, *GRID, dtype=torch.bool)
    valid[0, :, 6:] = False
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert_same(kind, view, (GRID, grid_b), fused, options, classes=(2, 0, 1), valid=valid, labels=labels)


@any_kind
@pytest.mark.parametrize("kernel", ["fused, blocks of rows", "fused, whole maps"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("boolean", [True, False])
def test_nor_with_a_mask(kind, kernel, batch, boolean):
    view, grid_b = VIEWS["flip of one image"]
    masks = [torch.randn(batch, 2, 51, 51, generator=generator(seed), dtype=torch.float64) for seed in (7, 8)]
    masks = [mask > -1 if boolean else mask for mask in masks]
    assert_same(kind, view, (GRID, grid_b), *KERNELS[kernel], masks=masks)


@pytest.mark.parametrize("kind", ["behind", "around"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["flip", "turn", "scale", "flip of one image"])
def test_nor_where_a_layer_reduces_its_keys(kind, kernel, name):
    view, grid_b = VIEWS[name]
    grids = [Lattice(*grid, (2.0, 2.0)) for grid in (GRID, grid_b)]
    counts = [(2, 4), (1, 2)] if name == "scale" else [(grid.height // 2, grid.width // 2) for grid in grids]
    keys = [Lattice(*n, (of.extent[0] / n[0], of.extent[1] / n[1])) for n, of in zip(counts, grids, strict=True)]
    assert_same(kind, view, grids, *KERNELS[kernel], key_grids=keys)


@any_kind
def test_nor_where_each_view_has_its_own(kind):
    """As where one view was captured and the other was brought by the user, in another order."""
    leaves, pairs = [], []
    for seed in (0, 1):
        layout, moved = layouts(kind, GRID, classes=(0,))
        tensors = tensors_of(True, 51, 51, seed)
        leaves += tensors
        pairs.append(layers(tensors, layout, moved))
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    values = [evaluated(acr, pair, leaves) for pair in itertools.product(*pairs)]
    for found in values[1:]:
        for value, wanted in zip(found, values[0], strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)


def test_a_causal_kernel_is_causal_in_the_order_of_the_model():
    """The mask of the tokens as they stand, not of those brought to the front."""
    front, moved = layouts("around", GRID, classes=(0,))
    query, key = tensors_of(True, 51, 51, 0)
    causal = factored(reordered(query, moved, -2), reordered(key, moved, -2), moved, causal=True)
    place = torch.tensor([i for _, i in sorted((n, i) for i, n in enumerate(numbers(moved, 51)))])
    seen = place[:, None] >= place[None]  # a token sees those that stand before it
    masked = factored(query, key, front, mask=seen)
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0)
    for blockwise in (True, False):
        acr.blockwise = blockwise
        found, expected = (evaluated(acr, (layer, layer), [query, key]) for layer in (causal, masked))
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)


def test_sampled_rows_are_patches():
    """With a share of the rows compared: the same rows of either order."""
    options = {"rows": 0.3}
    for kernel in (True, False):
        leaves, pairs = [], []
        for seed in (0, 1):
            tensors = tensors_of(kernel, 51, 51, seed)
            leaves += tensors
            pairs.append(layers(tensors, *layouts("everywhere", GRID, classes=(2,))))
        values = []
        for number in (0, 1):
            torch.manual_seed(3)
            acr = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0, **options)
            values.append(evaluated(acr, [pair[number] for pair in pairs], leaves))
        for value, wanted in zip(*values, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)


def test_a_wrong_order_changes_the_loss():
    """So that the tests above can fail: the class token behind the patches, read as if it stood in front."""
    weights = tensors_of(False, 51, 51, 0)[0].softmax(-1).detach()
    front, moved = layouts("behind", GRID, classes=(0,))
    layer = explicit(reordered(weights, moved, -2, -1), moved)
    wrong = explicit(reordered(weights, moved, -2, -1), front)
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    with torch.no_grad():
        right, off = (acr(AttentionMaps([each]), AttentionMaps([each])).item() for each in (layer, wrong))
    assert right != pytest.approx(off, rel=1e-3)
