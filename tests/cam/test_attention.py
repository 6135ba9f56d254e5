"""The class token's attention and the rollout, against loops over single tokens."""

import pytest
import torch

import acr_reg
from acr_reg import AttentionMaps, LayoutError, attention_rollout, capture_attention, class_attention
from acr_reg.tokens import Lattice, TokenLayout
from tests.support.attention import (
    MASKS,
    explicit,
    factored,
    generator,
    layout_of,
    random_attention,
    random_factors,
    random_maps,
    says,
    wrap,
)
from tests.support.models import every_model
from tests.support.models.windows import only_windows
from tests.support.orders import FIELDS, layouts, reordered
from tests.support.tensor_watch import TensorWatch

GRID = (4, 5)


def rolled_out(maps, images=2):
    """All rows of A'_L ... A'_1, (B, N, N), one element after the other."""
    tokens = maps[0].shape[-1]
    product = torch.eye(tokens, dtype=torch.float64).repeat(images, 1, 1)
    for tensor in (each.detach() for each in maps):
        step = torch.zeros(images, tokens, tokens, dtype=torch.float64)
        for image in range(images):
            for i in range(tokens):
                row = [float(tensor[image, :, i, j].mean()) * 0.5 + 0.5 * (i == j) for j in range(tokens)]
                step[image, i] = torch.tensor(row, dtype=torch.float64) / sum(row)
        product = torch.stack([later @ sooner for later, sooner in zip(step, product, strict=True)])
    return product


# ---------------------------------------------------------------- the class token of one layer


def test_class_attention_is_the_class_row_at_the_patches_for_each_head():
    tensors = random_maps(GRID)
    found = class_attention(wrap(tensors, GRID), layer=0)
    assert found.shape == (2, 3, *GRID)
    for image in range(2):
        for head in range(3):
            for y in range(4):
                for x in range(5):
                    assert found[image, head, y, x] == tensors[0][image, head, 0, 1 + 5 * y + x]
    assert torch.equal(class_attention(wrap(tensors, GRID)), class_attention(wrap(tensors, GRID), layer=1))


def test_its_values_are_probabilities_that_leave_out_what_the_other_tokens_get():
    tensors = random_maps(GRID, prefix=2)
    attention = wrap(tensors, GRID, prefix=2, class_tokens=1)
    beside = tensors[-1][:, :, 0, :2].sum(-1)
    torch.testing.assert_close(class_attention(attention).sum((-2, -1)), 1 - beside)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
def test_the_class_token_may_stand_anywhere(kind, fused):
    found = []
    front, moved = layouts(kind, GRID, classes=(1,))
    query, key = random_factors(GRID, 3, seed=1)
    for layout in (front, moved):
        q, k = (tensor if layout is front else reordered(tensor, layout, -2) for tensor in (query, key))
        layers = [
            factored(q, k, layout) if fused else explicit((q @ k.mT / 2).softmax(-1), layout, 0),
            explicit((k @ q.mT).softmax(-1), layout, 1),
        ]
        attention = AttentionMaps(layers)
        found.append((class_attention(attention, 0), attention_rollout(attention)))
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other, expected)


@pytest.mark.parametrize("mask", MASKS)
def test_a_fused_layer_gives_the_same_as_its_map(mask):
    query, key = random_factors(GRID, 1, seed=2)
    fused = [factored(query, key, layout_of(GRID), i, **MASKS[mask](21)) for i in range(2)]
    if mask == "key padding":  # of the patches at the end
        assert class_attention(AttentionMaps(fused))[..., -1, -3:].eq(0).all()
    maps = [explicit(layer.weights(), layer.layout, layer.index) for layer in fused]
    for function in (class_attention, attention_rollout):
        torch.testing.assert_close(function(AttentionMaps(fused)), function(AttentionMaps(maps)))


def test_one_class_token_of_several_is_chosen():
    tensors = random_maps(GRID, prefix=3)
    attention = wrap(tensors, GRID, prefix=3, class_tokens=3)
    product = rolled_out(tensors)
    for c in (0, 1, 2, -1):
        assert torch.equal(
            class_attention(attention, class_token=c), tensors[-1][:, :, range(3)[c], 3:].unflatten(-1, GRID)
        )
        expected = product[:, range(3)[c], 3:].unflatten(-1, GRID)
        torch.testing.assert_close(attention_rollout(attention, class_token=c), expected)
    for function in (class_attention, attention_rollout):
        with pytest.raises(ValueError, match="3 class tokens") as error:
            function(attention)
        assert says(error, "layer 1 (tensors[1])", "class_token=0 to 2")
        for wrong in (3, -4):
            with pytest.raises(IndexError, match=f"class_token={wrong} ") as error:
                function(attention, class_token=wrong)
            assert says(error, "0 to 2")


def test_reduced_keys_give_class_attention_on_the_grid_of_the_keys():
    maps = torch.rand(2, 3, 25, 7, generator=generator(0)).softmax(-1)
    attention = AttentionMaps.from_tensors([maps], num_prefix_tokens=1, grid=(4, 6), key_grid=(2, 3))
    assert torch.equal(class_attention(attention), maps[:, :, 0, 1:].unflatten(-1, (2, 3)))


def test_a_layer_without_a_class_token_is_an_error_with_the_way_out():
    attention = random_attention(GRID, prefix=0)
    with pytest.raises(LayoutError, match=r"layer 1 .* no class token") as error:
        class_attention(attention)
    assert says(error, "layer.weights().mean(2)")
    with pytest.raises(LayoutError, match=r"layer 1 .* no class token") as error:
        attention_rollout(attention)
    assert says(error, 'query="all"')
    with pytest.raises(LayoutError, match="class_tokens="):
        class_attention(random_attention(GRID, prefix=5))


def test_a_layer_that_does_not_exist_is_an_error():
    for wrong in (2, -3):
        with pytest.raises(IndexError, match=r"\[0, 1\]"):
            class_attention(random_attention(GRID), layer=wrong)
        with pytest.raises(IndexError, match=r"\[0, 1\]"):
            attention_rollout(random_attention(GRID), layers=[0, wrong])


# ---------------------------------------------------------------- the rollout


def test_the_rollout_is_the_class_row_of_the_product():
    tensors = random_maps(GRID, layers=3)
    found = attention_rollout(wrap(tensors, GRID))
    torch.testing.assert_close(found, rolled_out(tensors)[:, 0, 1:].unflatten(-1, GRID))
    assert found.min() > 0
    assert found.sum((1, 2)).max() < 1


def test_the_rollout_is_what_public_implementations_compute():
    """Rows of A + I over their sum, multiplied as matrices: hila-chefer/Transformer-Explainability, and
    jacobgil/vit-explain with discard_ratio=0."""
    tensors = random_maps(GRID, layers=3)
    steps = [each.mean(1) + torch.eye(21, dtype=torch.float64) for each in tensors]
    product = steps[0] / steps[0].sum(-1, keepdim=True)
    for step in steps[1:]:
        product = (step / step.sum(-1, keepdim=True)).bmm(product)
    torch.testing.assert_close(attention_rollout(wrap(tensors, GRID)), product[:, 0, 1:].unflatten(-1, GRID))


def test_the_layers_are_multiplied_in_the_order_of_the_model_however_they_are_listed():
    tensors = random_maps(GRID, layers=4)
    expected = rolled_out([tensors[1], tensors[2]])[:, 0, 1:].unflatten(-1, GRID)
    for layers in ([1, 2], [2, 1], [-3, 2], [2, 1, -2]):
        torch.testing.assert_close(attention_rollout(wrap(tensors, GRID), layers), expected)
    swapped = rolled_out([tensors[2], tensors[1]])[:, 0, 1:].unflatten(-1, GRID)
    assert not torch.allclose(swapped, expected)


def test_the_rollout_of_all_queries_is_the_mean_of_all_rows():
    tensors = random_maps(GRID, prefix=0)
    found = attention_rollout(wrap(tensors, GRID, prefix=0), query="all")
    torch.testing.assert_close(found, rolled_out(tensors).mean(1).unflatten(-1, GRID))
    with pytest.raises(ValueError, match="query='patches'"):
        attention_rollout(wrap(tensors, GRID, prefix=0), query="patches")


def test_rows_that_do_not_sum_to_1_are_divided_by_their_sum():
    """Of gates and of sums over heads."""
    tensors = [scale * each for scale, each in zip((0.3, 4.0), random_maps(GRID), strict=True)]
    attention = AttentionMaps.from_tensors(tensors, 1, GRID, stochastic=False)
    torch.testing.assert_close(attention_rollout(attention), rolled_out(tensors)[:, 0, 1:].unflatten(-1, GRID))
    signed = AttentionMaps.from_tensors([tensors[0], -tensors[1]], 1, GRID, stochastic=[False, False])
    with pytest.raises(ValueError, match=r"layer 1 .* below 0") as error:
        attention_rollout(signed)
    assert says(error, "layers=")
    assert attention_rollout(signed, layers=[0]).shape == (2, *GRID)


def test_layers_on_other_grids_cannot_be_multiplied():
    maps, grids = torch.rand(2, 3, 20, 20).softmax(-1), [(4, 5), (5, 4), (4, 5)]
    mixed = AttentionMaps([explicit(maps, layout_of(grid, 0, ()), index) for index, grid in enumerate(grids)])
    with pytest.raises(LayoutError, match=r"layers \[1\]") as error:
        attention_rollout(mixed, query="all")
    assert says(error, "4 x 5 grid of layer 2", "layers [0, 2]")
    assert attention_rollout(mixed, [0, 2], query="all").shape == (2, 4, 5)


def test_reduced_keys_cannot_be_multiplied():
    maps = torch.rand(2, 3, 25, 7).softmax(-1)
    attention = AttentionMaps.from_tensors([maps, maps], num_prefix_tokens=1, grid=(4, 6), key_grid=(2, 3))
    with pytest.raises(LayoutError, match=r"layers \[0, 1\]") as error:
        attention_rollout(attention)
    assert says(error, "without reduced keys")


@pytest.mark.parametrize(("prefix", "suffix"), [((1, 3), (0, 0)), ((1, 0), (0, 1)), ((1, 2), (1, 0))])
def test_layers_with_other_tokens_beside_the_patches_cannot_be_multiplied(prefix, suffix):
    """As of prompts that enter at a deeper layer."""
    lattice = Lattice(*GRID)
    layers = []
    for index, (before, behind) in enumerate(zip(prefix, suffix, strict=True)):
        layout = TokenLayout(lattice, lattice, before, (0,) if before else (20,), num_suffix_tokens=behind)
        count = 20 + before + behind
        layers.append(explicit(torch.rand(2, 3, count, count).softmax(-1), layout, index))
    with pytest.raises(LayoutError, match="cannot be multiplied") as error:
        attention_rollout(AttentionMaps(layers))
    assert says(error, "layer 0", "layer 1", f"{prefix[1]} prefix", "layers=")


# ---------------------------------------------------------------- of captured models


@every_model
def test_captured_models_give_what_their_maps_give(case):
    torch.manual_seed(0)
    model = case.build().eval()
    with capture_attention(model, no_grad=True, class_tokens=1 if case.prefix else None) as attention, torch.no_grad():
        model(torch.randn(2, 3, *case.image))
        maps = attention.take()
    tensors = maps.weights()
    row = tensors[-1][:, :, 0, case.prefix :].unflatten(-1, case.grid)
    torch.testing.assert_close(class_attention(maps), row)
    expected = rolled_out(tensors)[:, 0, case.prefix :].unflatten(-1, case.grid).float()
    torch.testing.assert_close(attention_rollout(maps), expected)


def test_windows_are_refused_with_the_reason():
    model = only_windows().eval()
    with capture_attention(model) as attention:
        model(torch.randn(2, 3, 32, 48))
        maps = attention.take()
    for function in (class_attention, attention_rollout):
        with pytest.raises(LayoutError, match=r"layer [01] .*window"):
            function(maps)


# ---------------------------------------------------------------- graphs, precision, memory


@pytest.mark.parametrize("function", [class_attention, attention_rollout], ids=["class attention", "rollout"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
def test_the_graph_is_kept(function, fused):
    leaves = random_factors(GRID, 1, seed=3)

    def result(query, key):
        layout = layout_of(GRID)
        weights = (query @ key.mT / 2).softmax(-1)
        return function(AttentionMaps([factored(query, key, layout) if fused else explicit(weights, layout)]))

    assert torch.autograd.gradcheck(result, leaves)
    assert not function(AttentionMaps([factored(*leaves, layout_of(GRID))]).detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    tensors = [each.detach().to(dtype) for each in random_maps(GRID)]
    attention = wrap(tensors, GRID)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = class_attention(attention), attention_rollout(attention)
    assert all(each.dtype == torch.float32 for each in found)
    assert torch.equal(found[0], tensors[-1][:, :, 0, 1:].float().unflatten(-1, GRID))
    expected = rolled_out([each.double() for each in tensors])[:, 0, 1:].unflatten(-1, GRID).float()
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-7)


def test_no_map_of_a_fused_layer_is_formed():
    grid = (24, 25)
    query, key = (torch.randn(1, 2, 601, 8, generator=generator(seed)) for seed in (0, 1))
    attention = AttentionMaps([factored(query, key, layout_of(grid), i) for i in range(3)])
    with TensorWatch() as rows, torch.no_grad():
        class_attention(attention)
    assert rows.largest <= query.numel()
    # Blocks are small only where maps are large.
    with TensorWatch() as blocks, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("acr_reg.attention.layer._BLOCK_ELEMENTS", 1)
        found = attention_rollout(attention)
    assert blocks.largest < 601 * 601 / 2
    torch.testing.assert_close(found, attention_rollout(attention))


def test_nan_is_an_error_and_not_a_picture():
    maps = random_maps(GRID)
    layers = [explicit(each * torch.nan, layout_of(GRID), i) for i, each in enumerate(maps)]
    for function in (class_attention, attention_rollout):
        with pytest.raises(ValueError, match="NaN or infinite values"):
            function(AttentionMaps(layers))


def test_both_are_public():
    assert {"class_attention", "attention_rollout"} <= set(acr_reg.__all__)
