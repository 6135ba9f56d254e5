"""The blockwise evaluation against the dense one, which is the oracle: value, gradient, memory, precision."""

import itertools
import math

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
    TokenLayout,
)
from tests.support.attention import explicit, factored, generator, layout_of, random_factors, says
from tests.support.tensor_watch import TensorWatch

GRID = (4, 6)
LEFT, RIGHT = (Crop(0, left, 4, 4, image_size=GRID) for left in (0, 2))
# Each view with the grid of its output; boxes are in tokens, since nothing here tells of pixels.
VIEWS = {
    "flip": HorizontalFlip(),
    "turn": Rotate90(),
    "twice as large": Scale(2),
    "half as large": Scale(0.5),
    "not in whole tokens": Scale((1.5, 0.75)),
    "crop of whole tokens": LEFT,
    "crop, resized": Crop(1, 1, 3, 4, size=(4, 6), image_size=GRID),
    "another flip for each image": PerImage([HorizontalFlip(), Identity()]),
    "another crop for each image": PerImage([Compose([LEFT, Rotate90()]), RIGHT]),
    "another resized crop for each image": PerImage(
        [Crop(0, 1, 3, 4, size=(4, 6), image_size=GRID), Crop(1, 0, 2, 6, size=(4, 6), image_size=GRID)]
    ),
}
any_view = pytest.mark.parametrize("name", VIEWS)
DISTANCES = {
    "l1": "l1",
    "l2": "l2",
    "js": "js",
    "cosine": lambda a, b: 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1),
}


def attention_of(factors, grid, prefix=2, class_tokens=(0,), layers=1, **recorded):
    layout = layout_of(grid, prefix, class_tokens)
    return AttentionMaps([factored(*factors, layout, index, **recorded) for index in range(layers)])


def pair_of_factors(view, prefix=2, class_tokens=(0,), dtype=torch.float64, **recorded):
    grid_b = view.output_size(GRID)
    factors = [random_factors(grid, prefix, seed) for grid, seed in ((GRID, 1), (grid_b, 2))]
    factors = [[tensor.detach().to(dtype).mul(1.5).requires_grad_() for tensor in pair] for pair in factors]
    attention = [
        attention_of(pair, grid, prefix, class_tokens, **recorded)
        for pair, grid in zip(factors, (GRID, grid_b), strict=True)
    ]
    return [tensor for pair in factors for tensor in pair], attention


def value_and_gradient(acr, blockwise, attention, inputs, block_rows=None, **kwargs):
    acr.blockwise, acr.block_rows = blockwise, block_rows
    torch.manual_seed(7)  # the rows that are sampled
    loss, terms = acr(*attention, return_terms=True, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, inputs), terms


def assert_same(acr, attention, inputs, block_rows=5, **kwargs):
    loss, gradients, terms = value_and_gradient(acr, False, attention, inputs, **kwargs)
    found, found_gradients, found_terms = value_and_gradient(acr, True, attention, inputs, block_rows, **kwargs)
    torch.testing.assert_close(found, loss, rtol=1e-10, atol=1e-12)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients)
    for one, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for name, term in terms.items():
        torch.testing.assert_close(found_terms[name], term, rtol=1e-6, atol=1e-7, equal_nan=True)


@any_view
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_blocks_equal_the_dense_evaluation(name, heads, distance):
    for normalize, rows in itertools.product(("row", "mean"), (1.0, 0.4)):
        acr = AllPairsConsistencyLoss(
            VIEWS[name], 0.7, 1.3, distance=DISTANCES[distance], normalize=normalize, heads=heads, rows=rows
        )
        inputs, attention = pair_of_factors(VIEWS[name])
        assert_same(acr, attention, inputs)


@any_view
@pytest.mark.parametrize("block_rows", [1, 7, 24, 1000, None])
def test_any_size_of_block_does(name, block_rows):
    inputs, attention = pair_of_factors(VIEWS[name])
    assert_same(AllPairsConsistencyLoss(VIEWS[name]), attention, inputs, block_rows)


MASKS = {
    "bias of every head": lambda n: {"mask": torch.randn(1, 2, n, n, generator=generator(5), dtype=torch.float64)},
    "bias of every image": lambda n: {"mask": torch.randn(2, 1, n, n, generator=generator(5), dtype=torch.float64)},
    "bias of all": lambda n: {"mask": torch.randn(n, n, generator=generator(5))},
    "boolean": lambda n: {"mask": torch.rand(n, n, generator=generator(5)) > 0.3},
    "key padding": lambda n: {"mask": (torch.arange(n) < n - 3).expand(2, 1, 1, n)},
    "causal": lambda n: {"causal": True},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["flip", "crop of whole tokens", "another flip for each image"])
def test_masks_and_biases(name, mask):
    view = VIEWS[name]
    inputs, attention = pair_of_factors(view)
    attention = [
        AttentionMaps([factored(layer.query, layer.key, layer.layout, **MASKS[mask](layer.shape[2])) for layer in maps])
        for maps in attention
    ]
    assert_same(AllPairsConsistencyLoss(view, 1.0, 1.0), attention, inputs)


def test_a_learned_bias_gets_its_gradient():
    inputs, attention = pair_of_factors(HorizontalFlip())
    bias = torch.randn(1, 2, 26, 26, generator=generator(3), dtype=torch.float64).requires_grad_()
    attention = [AttentionMaps([factored(m[0].query, m[0].key, m[0].layout, mask=bias)]) for m in attention]
    assert_same(AllPairsConsistencyLoss(HorizontalFlip()), attention, [*inputs, bias])


@any_view
def test_padding_labels_and_class_tokens(name):
    view = VIEWS[name]
    inputs, attention = pair_of_factors(view, prefix=4, class_tokens=(0, 2, 3))
    valid = torch.rand(2, 8, 12, generator=generator(1)) > 0.3
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert_same(AllPairsConsistencyLoss(view), attention, inputs, valid=valid, labels=labels)


def test_two_augmented_views():
    view_a, view_b = PerImage([LEFT, RIGHT]), PerImage([Compose([RIGHT, HorizontalFlip()]), LEFT])
    factors = [random_factors((4, 4), 2, seed) for seed in (1, 2)]
    attention = [attention_of(pair, (4, 4)) for pair in factors]
    acr = AllPairsConsistencyLoss()
    assert_same(acr, attention, [tensor for pair in factors for tensor in pair], view=view_b, view_a=view_a)


def test_reduced_keys():
    layout = TokenLayout(Lattice(4, 6, (4.0, 4.0), (-1.5, -1.5)), Lattice(2, 3, (8.0, 8.0), (-1.5, -1.5)), 0, ())
    inputs = [
        torch.randn(2, 2, count, 4, generator=generator(i), dtype=torch.float64).requires_grad_()
        for i, count in enumerate((24, 6, 24, 6))
    ]
    attention = [AttentionMaps([factored(*inputs[i : i + 2], layout)]) for i in (0, 2)]
    assert_same(AllPairsConsistencyLoss(HorizontalFlip(), 0.0, 1.0), attention, inputs)


def test_one_batch_of_both_views():
    both = [random_factors(GRID, 2, seed) for seed in (1, 2)]
    factors = [torch.cat(pair).detach().requires_grad_() for pair in zip(*both, strict=True)]
    attention = attention_of(factors, GRID).chunk(2)
    assert_same(AllPairsConsistencyLoss(HorizontalFlip()), attention, factors)


def test_a_teacher_gets_no_gradient():
    inputs, attention = pair_of_factors(HorizontalFlip())
    assert_same(AllPairsConsistencyLoss(HorizontalFlip()), [attention[0], attention[1].detach()], inputs[:2])
    of_maps = AttentionMaps([explicit(attention[1][0].weights().detach(), attention[1][0].layout)])
    assert_same(AllPairsConsistencyLoss(HorizontalFlip()), [attention[0], of_maps], inputs[:2])


def test_the_upstream_gradient_is_applied():
    inputs, attention = pair_of_factors(HorizontalFlip())
    acr = AllPairsConsistencyLoss(HorizontalFlip(), blockwise=True, block_rows=5)
    once = torch.autograd.grad(acr(*attention), inputs)
    scaled = torch.autograd.grad(-3 * acr(*attention, scale=0.5), inputs)
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, -1.5 * one)


@any_view
def test_float32_is_as_precise_as_the_dense_evaluation(name):
    """By norms over all inputs: l1 has ties, where a single entry may take either side."""
    errors = {}
    for distance in ("l1", "l2", "js"):
        acr = AllPairsConsistencyLoss(VIEWS[name], distance=distance)
        inputs, attention = pair_of_factors(VIEWS[name])
        _, exact, _ = value_and_gradient(acr, False, attention, inputs)
        inputs, attention = pair_of_factors(VIEWS[name], dtype=torch.float32)
        for blockwise in (False, True):
            _, found, _ = value_and_gradient(acr, blockwise, attention, inputs, 5)
            errors[blockwise] = sum((f.double() - e).norm() for f, e in zip(found, exact, strict=True))
        assert errors[True] <= 2 * errors[False] + 1e-9
        assert errors[False] < 1e-3 * sum(e.norm() for e in exact)


SHARP_VIEWS = ["flip", "half as large", "crop of whole tokens", "another resized crop for each image", "little overlap"]


def sharp_factors(name, dtype, logits, seed):
    """Query and key of both views, with logits of about this size, and their grids."""
    grids = GRID, {**VIEWS, **LITTLE_OVERLAP}[name].output_size(GRID)
    factors = [random_factors(grid, 2, 10 * seed + side, width=12) for side, grid in enumerate(grids)]
    return [tensor.detach().mul(logits**0.5).to(dtype) for pair in factors for tensor in pair], grids


LITTLE_OVERLAP = {
    "little overlap": PerImage(
        [Crop(0, 0, 3, 3, size=(4, 6), image_size=GRID), Crop(2, 3, 2, 3, size=(4, 6), image_size=GRID)]
    )
}


def gradient_of(acr, blockwise, tensors, grids, dtype):
    inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    attention = [attention_of(inputs[2 * side : 2 * side + 2], grid) for side, grid in enumerate(grids)]
    return value_and_gradient(acr, blockwise, attention, inputs, 5)[1]


def norm_of(gradient):
    return sum(one.double().square().sum() for one in gradient).sqrt().item()


def error_of(found, exact):
    return norm_of([one.double() - other for one, other in zip(found, exact, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
@pytest.mark.parametrize("logits", [1e2, 1e3, 1e4, 1e6])
def test_extreme_logits_are_as_precise_as_the_dense_evaluation(logits, distance, dtype):
    """Summed over views: which way a logit of 1e4 is rounded, to 1e-3, depends on how many rows a product has, so that
    either may be the better one on a single view. Below 1e-9 are gradients that float16 cannot hold either."""
    errors, norm = {False: 0.0, True: 0.0}, 0.0
    for seed, name in enumerate(SHARP_VIEWS):
        tensors, grids = sharp_factors(name, dtype, logits, seed)
        for heads in ("mean", "each"):
            acr = AllPairsConsistencyLoss({**VIEWS, **LITTLE_OVERLAP}[name], distance=distance, heads=heads)
            exact = gradient_of(acr, False, tensors, grids, torch.float64)
            norm += norm_of(exact)
            for blockwise in errors:
                found = gradient_of(acr, blockwise, tensors, grids, dtype)
                assert all(one.isfinite().all() for one in found)
                errors[blockwise] += error_of(found, exact)
    assert errors[True] <= 2 * errors[False] + 1e-9
    assert norm > 1e-3 or logits > 1e3  # there was something to be wrong about


@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("rest", [1e-6, 1e-8, 1e-12])
def test_a_row_with_one_key_of_almost_all_mass_keeps_its_gradient(rest, heads, distance):
    """Each of the other keys has about ``rest``, and the gradient is as small. The softmax subtracts the row's mean
    gradient, which is almost that of the large key: their rounding exceeded the gradient, and does so in dense."""
    acr = AllPairsConsistencyLoss(HorizontalFlip(), distance=distance, heads=heads)
    tensors = []
    for seed in (1, 2):
        query, key = 0.1 * torch.randn(2, 2, 2, 26, 8, generator=generator(seed))
        query[..., 0] = 1
        key[..., 6 * seed - 3, 0] = -(8**0.5) * math.log(rest)  # one key, another in each view, for every query
        tensors += [query, key]
    exact = gradient_of(acr, False, tensors, (GRID, GRID), torch.float64)
    found = gradient_of(acr, True, tensors, (GRID, GRID), torch.float32)
    assert 10 * rest < norm_of(exact) < 1000 * rest
    assert error_of(found, exact) < 1e-4 * norm_of(exact)


# An image token reads but a few of the view's tokens, and rows may give all of their mass to the others.
SPARSE = {
    "two pixels, resized, then shrunk in place": Compose(
        [Crop(1, 2, 1, 2, size=(7, 1), image_size=GRID), Scale(2), Scale(0.5, keep_size=True)]
    ),
    "one pixel, resized": Crop(1, 2, 1, 1, size=(9, 7), image_size=GRID),
    "shrunk in place": Scale(0.3, keep_size=True),
    "a strip of fractions of a pixel": Compose(
        [Crop(0, 1, 4, 2, size=(6, 5), image_size=GRID), Crop(1, 1, 3, 2, size=(8, 9), image_size=(6, 5))]
    ),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
def test_rows_that_look_elsewhere_have_a_finite_gradient(name, distance):
    """The squared mass on the tokens that are read underflows; the mass itself does not."""
    view = SPARSE[name]
    grids = GRID, view.output_size(GRID)
    for logits, seed in itertools.product((60, 100), range(2)):
        tensors = []
        for side, grid in enumerate(grids):
            tensors += [one.detach().mul(logits**0.5) for one in random_factors(grid, 1, 10 * seed + side)]
        inputs = [tensor.float().requires_grad_() for tensor in tensors]
        attention = [attention_of(inputs[2 * side : 2 * side + 2], grid, 1) for side, grid in enumerate(grids)]
        for blockwise in (False, True):
            acr = AllPairsConsistencyLoss(view, distance=distance, heads="each")
            loss, gradients, _ = value_and_gradient(acr, blockwise, attention, inputs, 5)
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_half_precision_under_a_loss_scale_flushes_nothing_to_zero():
    """784 tokens, 32 images: the unscaled gradient lies far below what float16 can hold."""
    grid, layout = (28, 28), layout_of((28, 28), 1)
    exact, halves = [], []
    for seed in range(4):
        tensor = 0.5 * torch.randn(32, 2, 785, 8, generator=generator(seed))
        halves.append(tensor.half().requires_grad_())
        exact.append(halves[-1].detach().float().requires_grad_())
    assert len(layout.query) == grid[0] * grid[1]
    scale, acr = 65536.0, AllPairsConsistencyLoss(HorizontalFlip())
    found = []
    for inputs in (halves, exact):
        attention = [AttentionMaps([factored(*inputs[i : i + 2], layout)]) for i in (0, 2)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = acr(*attention, scale=1e-3)  # brings the gradient to the size it has in a ViT of 12 layers
        assert loss.dtype == torch.float32
        found.append(torch.autograd.grad(scale * loss, inputs))
    for half, reference in zip(*found, strict=True):
        assert half.dtype == torch.float16
        unscaled = half.float() / scale
        assert torch.isfinite(unscaled).all()
        assert reference.abs().median() / scale < 5e-10  # float16 holds nothing below 6e-8
        assert (half[reference.abs() > 1e-7] != 0).all()
        assert (half == 0).float().mean() < 2e-2
        torch.testing.assert_close(unscaled * scale, reference, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["flip", "resized crop", "another crop for each image"])
def test_no_map_of_all_rows_is_ever_held(name):
    grid = (16, 24)
    boxes = [Crop(0, left, 12, 12, size=(16, 24), image_size=grid) for left in (0, 7)]
    view = {"flip": HorizontalFlip(), "resized crop": boxes[0], "another crop for each image": PerImage(boxes)}[name]
    factors = [random_factors(grid, 1, seed, heads=3) for seed in (1, 2)]
    attention = [attention_of(pair, grid, 1) for pair in factors]
    inputs = [tensor for pair in factors for tensor in pair]
    largest = {}
    for blockwise in (False, True):
        acr = AllPairsConsistencyLoss(view, blockwise=blockwise, block_rows=8)
        with TensorWatch() as watch:
            torch.autograd.grad(acr(*attention), inputs)
        largest[blockwise] = watch.largest
    patches = grid[0] * grid[1]
    assert largest[False] >= 2 * 3 * patches * patches
    # A block is a row of the grid. Where a view resamples, it also reads the rows beside it.
    assert largest[True] < 2 * 3 * patches * patches / (12 if name == "flip" else 3)


def test_an_image_takes_no_more_work_in_a_large_batch():
    """Every block forms the gradient to all keys: in blocks of a few rows that would be most of the work."""
    work = {}
    for images in (1, 48):
        factors = [torch.randn(images, 6, 197, 64, generator=generator(seed)).requires_grad_() for seed in range(4)]
        attention = [AttentionMaps([factored(*factors[i : i + 2], layout_of((14, 14), 1))]) for i in (0, 2)]
        with TensorWatch() as watch:
            torch.autograd.grad(AllPairsConsistencyLoss(HorizontalFlip())(*attention), factors)
        work[images] = watch.written / images
    assert work[48] < 1.5 * work[1]


def graph_of(loss):
    """The names of the functions that a loss was made by."""
    names, nodes = [], [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(type(node).__name__)
        nodes += [earlier for earlier, _ in node.next_functions if earlier is not None]
    return " ".join(names)


@pytest.mark.parametrize("name", ["flip", "half as large", "crop, resized", "another resized crop for each image"])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_blocks_of_a_part_of_the_images_equal_the_dense_evaluation(name, heads, monkeypatch):
    monkeypatch.setattr("acr_reg.losses.blockwise.BLOCK_MEGABYTES", 1e-3)
    monkeypatch.setattr("acr_reg.losses.blockwise.LEAST_ROWS", 5)
    valid = torch.rand(2, *GRID, generator=generator(3)) > 0.3
    labels = torch.tensor([[1, 0], [1, 1]])
    for mask, given in itertools.product((None, "bias of every image"), ({}, {"valid": valid}, {"labels": labels})):
        grids = GRID, VIEWS[name].output_size(GRID)
        recorded = [{} if mask is None else MASKS[mask](2 + h * w) for h, w in grids]
        factors = [random_factors(grid, 2, seed) for seed, grid in enumerate(grids)]
        sides = zip(factors, grids, recorded, strict=True)
        attention = [attention_of(pair, grid, 2, (0, 1), **more) for pair, grid, more in sides]
        acr = AllPairsConsistencyLoss(VIEWS[name], heads=heads, distance="l2", rows=0.6)
        assert_same(acr, attention, [tensor for pair in factors for tensor in pair], None, **given)


def test_the_default_forms_maps_where_they_are_small(monkeypatch):
    _, attention = pair_of_factors(HorizontalFlip())
    assert "Blockwise" not in graph_of(AllPairsConsistencyLoss(HorizontalFlip())(*attention))
    elements = 2 * attention[0][0].weights().numel()  # of one layer in both views
    for room, rows, blockwise in ((elements, 1.0, False), (elements - 1, 1.0, True), (elements / 2, 0.5, False)):
        monkeypatch.setattr("acr_reg.losses.blockwise.SMALL_MEGABYTES", room * 4 / 2**20)
        loss = AllPairsConsistencyLoss(HorizontalFlip(), rows=rows)(*attention)
        assert ("Blockwise" in graph_of(loss)) == blockwise


@pytest.mark.parametrize("blockwise", [False, True])
def test_rows_and_keys_that_one_view_does_not_show_take_little_work(blockwise):
    grid, work = (16, 16), {}
    for apart in (1, 6):
        views = [Crop(at, at, 10, 10, size=grid, image_size=grid) for at in (0, apart)]
        factors = [random_factors(grid, 1, seed, heads=4) for seed in (1, 2)]
        attention = [attention_of(pair, grid, 1) for pair in factors]
        with TensorWatch() as watch:
            acr = AllPairsConsistencyLoss(views[1], blockwise=blockwise)
            torch.autograd.grad(acr(*attention, view_a=views[0]), [tensor for pair in factors for tensor in pair])
        work[apart] = watch.written
    assert work[6] < 0.5 * work[1]


def test_what_needs_maps_is_evaluated_dense():
    weights = [torch.randn(2, 2, 26, 26, generator=generator(s)).softmax(-1).requires_grad_() for s in (1, 2)]
    attention = [AttentionMaps([explicit(w, layout_of(GRID, 2))]) for w in weights]
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    loss = acr(*attention)
    assert "Blockwise" not in graph_of(loss)
    factors = pair_of_factors(HorizontalFlip())[1]
    assert "Blockwise" in graph_of(
        AllPairsConsistencyLoss(HorizontalFlip(), blockwise=True)(*factors)
    )  # what names the function does find it
    (first,) = torch.autograd.grad(loss, weights[0], create_graph=True)
    assert first.isfinite().all()


def test_a_second_derivative_is_refused_by_name():
    inputs, attention = pair_of_factors(HorizontalFlip())
    acr = AllPairsConsistencyLoss(HorizontalFlip(), distance="l2", blockwise=True)
    with pytest.raises(RuntimeError, match="second derivative") as error:
        torch.autograd.grad(acr(*attention), inputs, create_graph=True)
    assert says(error, "create_graph=True", "blockwise=False")
    acr = AllPairsConsistencyLoss(HorizontalFlip(), distance="l2", blockwise=False)
    first = torch.autograd.grad(acr(*attention), inputs, create_graph=True)
    assert torch.autograd.grad(first[0].square().sum(), inputs[0])[0].abs().max() > 0


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradient_only_the_value_is_computed(without, monkeypatch):
    _, attention = pair_of_factors(HorizontalFlip())
    acr = AllPairsConsistencyLoss(HorizontalFlip(), block_rows=5)
    expected = acr(*attention).item()
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("a gradient was computed"))
    with without():
        value = acr(*attention)
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected, rel=1e-12)
