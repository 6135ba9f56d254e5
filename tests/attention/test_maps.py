"""Maps that users bring, refused if they are none; and the parts, layouts and copies of AttentionMaps."""

import itertools
from dataclasses import replace

import pytest
import torch

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    HorizontalFlip,
    Lattice,
    LayoutError,
    capture_attention,
    propagate_cam,
)
from acr_reg.attention.layer import RecordedTensors
from acr_reg.tokens import Window
from tests.support.attention import random_maps, says, wrap
from tests.support.models.spellings import MIXED, Heads
from tests.support.models.tokens import GRID, Attention, Tokens


def test_from_tensors_keeps_the_tensors_and_their_graph():
    maps = random_maps((3, 5), prefix=2, layers=3)
    attention = wrap(maps, (3, 5), 2, class_tokens=1)
    assert attention.layers == (0, 1, 2)
    assert attention.batch_size == 2
    for layer, tensor in zip(attention, maps, strict=True):
        assert torch.equal(layer.weights(), tensor)
        assert layer.explicit.data_ptr() == tensor.data_ptr()
        assert layer.requires_grad
        assert not layer.is_factored
        assert layer.shape == (2, 3, 17, 17)
        assert layer.layout.class_tokens == (0,)
    assert "17 tokens: 2 prefix + 3 x 5" in repr(attention)


def test_from_tensors_takes_head_means():
    maps = [m.mean(1) for m in random_maps((3, 5))]
    attention = wrap(maps, (3, 5))
    assert attention.weights()[0].shape == (2, 1, 16, 16)
    assert torch.equal(attention.weights()[0][:, 0], maps[0])


@pytest.mark.parametrize(
    "shift", ["logits", "log-probabilities", "unnormalised", "centred", "renormalised rows of patches"]
)
def test_logits_given_as_attention(shift):
    logits = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {
        "logits": logits,
        "log-probabilities": logits.log_softmax(-1),
        "unnormalised": logits.exp(),
        "centred": logits - logits.mean(-1, keepdim=True) + 1 / 16,  # rows that sum to 1, of either sign
        "renormalised rows of patches": logits.softmax(-2),
    }[shift]
    with pytest.raises(ValueError, match="sum to 1") as error:
        wrap([logits.softmax(-1), given], (3, 5))
    assert says(error, "layer 1", "within 0.005", "softmax(-1)", "dropout", "stochastic=False")


@pytest.mark.parametrize(
    ("dtype", "off", "allowed"),
    [
        (torch.float32, 4e-3, True),
        (torch.float32, 6e-3, False),
        (torch.float64, 6e-3, False),
        (torch.bfloat16, 4e-3, True),
        (torch.float16, 4e-3, True),
        (torch.float16, 8e-3, False),
    ],
)
def test_rows_may_be_off_one_by_rounding(dtype, off, allowed):
    """Two keys, so that half precision can state the row: 0.5 and 0.5 + off."""
    rows = torch.tensor([0.5, 0.5 + off], dtype=torch.float64).to(dtype).expand(1, 1, 2, 2)
    if allowed:
        assert AttentionMaps.from_tensors([rows], 0, (1, 2)).weights()[0].sum() > 1
    else:
        with pytest.raises(ValueError, match="sum to 1") as error:
            AttentionMaps.from_tensors([rows], 0, (1, 2))
        assert says(error, "within 0.005")


def test_maps_behind_dropout_are_no_probabilities():
    maps = random_maps((3, 5))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="sum to 1"):
        wrap([torch.nn.functional.dropout(maps[0], 0.1)], (3, 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_maps(value):
    maps = random_maps((3, 5), layers=3)
    maps[2] = maps[2].detach().clone()
    maps[2][1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite") as error:
        wrap(maps, (3, 5))
    assert says(error, "layer 2")


def test_maps_that_are_no_probabilities_are_taken_if_said_so():
    plain = random_maps((3, 5))
    given = [plain[0], 3 * plain[1], plain[0] - plain[1], 0 * plain[0]]
    attention = AttentionMaps.from_tensors(given, 1, (3, 5), stochastic=[True, False, False, False])
    assert [layer.stochastic for layer in attention] == [True, False, False, False]
    assert all(torch.equal(found, tensor) for found, tensor in zip(attention.weights(), given, strict=True))
    assert not any(layer.stochastic for layer in AttentionMaps.from_tensors(given, 1, (3, 5), stochastic=False))
    with pytest.raises(ValueError, match="layer 1") as error:
        AttentionMaps.from_tensors(given, 1, (3, 5), stochastic=[True, True, False, False])
    assert says(error, "sum to 1", "stochastic=False")
    with pytest.raises(ValueError, match="2 values for 4 layers") as error:
        AttentionMaps.from_tensors(given, 1, (3, 5), stochastic=[True, False])
    assert says(error, "stochastic=")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_maps_that_are_no_probabilities_are_finite_all_the_same(value):
    maps = [3 * m.detach().clone() for m in random_maps((3, 5), layers=3)]
    maps[2][1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite") as error:
        AttentionMaps.from_tensors(maps, 1, (3, 5), stochastic=False)
    assert says(error, "layer 2")


def test_maps_of_no_image_are_no_maps():
    with pytest.raises(ValueError, match=r"\(0, 3, 16, 16\)") as error:
        wrap([torch.zeros(0, 3, 16, 16)], (3, 5))
    assert says(error, "layer 0", "(B, H, N, M)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "fused"])
def test_what_a_capture_returns_can_be_given(dtype, fused):
    """weights() is in float32, whatever the precision that the rows were rounded to."""
    if dtype == torch.float16 and torch.__version__ < (2, 6):
        pytest.skip("older torch has no convolution of half precision on the CPU")
    torch.manual_seed(0)
    others = [build() for build in MIXED.values()] if dtype == torch.float32 else []  # some compute in float32
    model = Tokens(Attention(fused=fused), Heads("summed"), Heads("subtracted"), *others)
    with capture_attention(model.to(dtype)) as attention:
        model(torch.randn(2, 3, 32, 48, dtype=dtype))
        maps = attention.take()
    given = AttentionMaps.from_tensors(maps.weights(), 0, GRID, stochastic=[layer.stochastic for layer in maps])
    assert [layer.stochastic for layer in given] == [True] + [False] * (len(maps) - 1)
    assert len(maps) == 3 + len(others)
    found, expected = (
        AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)(each, each) for each in (given, maps)
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("grid", "prefix", "expected"),
    [((3, 6), 1, "19 (1 prefix + 3 x 6)"), ((3, 5), 2, "17 (2 prefix + 3 x 5)"), ((3, 5), 0, "15 (0 prefix + 3 x 5)")],
)
def test_a_layout_that_does_not_fit_the_tokens(grid, prefix, expected):
    maps = random_maps((3, 5))
    attention = wrap(maps, (3, 5))
    for attempt in (lambda: wrap(maps, grid, prefix), lambda: attention.with_layout(grid, prefix)):
        with pytest.raises(LayoutError, match="16 queries and 16 keys") as error:
            attempt()
        assert says(error, "layer 0", expected, "grid=", "num_prefix_tokens=")


def test_maps_that_are_not_square():
    rows = torch.full((2, 3, 16, 15), 1 / 15)
    with pytest.raises(LayoutError, match="16 queries and 15 keys") as error:
        wrap([rows], (3, 5))
    assert says(error, "16 (1 prefix + 3 x 5)")


def test_shapes_and_types_that_are_no_maps():
    maps = random_maps((3, 5))
    with pytest.raises(ValueError, match=r"\(3, 16, 16, 16, 2\)") as error:
        wrap([torch.zeros(3, 16, 16, 16, 2)], (3, 5))
    assert says(error, "layer 0", "(B, H, N, M)")
    with pytest.raises(ValueError, match="int64") as error:
        wrap([torch.eye(16, dtype=torch.int64).expand(2, 3, 16, 16)], (3, 5))
    assert says(error, "floating point")
    with pytest.raises(TypeError, match="one tensor") as error:
        wrap(maps[0], (3, 5))
    assert says(error, "list")
    with pytest.raises(TypeError, match="ndarray") as error:
        wrap([maps[0], maps[1].detach().numpy()], (3, 5))
    assert says(error, "layer 1", "tensor")
    with pytest.raises(ValueError, match="no attention layer") as error:
        wrap([], (3, 5))
    assert says(error, "at least one")


def test_layers_of_different_batches():
    with pytest.raises(ValueError, match=r"\[2, 1\]") as error:
        wrap([random_maps((3, 5))[0], random_maps((3, 5), batch=1)[0]], (3, 5))
    assert says(error, "one batch size")


@pytest.mark.parametrize("grid", [15, (15,), (1, 3, 5), "35"], ids=str)
def test_a_grid_is_two_numbers(grid):
    maps = random_maps((3, 5))
    for attempt in (lambda: wrap(maps, grid), lambda: wrap(maps, (3, 5)).with_layout(grid, 1)):
        with pytest.raises(LayoutError, match="grid=") as error:
            attempt()
        assert says(error, repr(grid), "(height, width)")


def test_class_tokens_beyond_the_prefix():
    maps = random_maps((3, 5), prefix=2)
    for attempt, said in (
        (lambda: wrap(maps, (3, 5), 2, 3), "class_tokens=3"),
        (lambda: wrap(maps, (3, 5), 2, 1).with_layout((3, 5), 2, [2]), "[2]"),
    ):
        with pytest.raises(LayoutError, match=r"(?i)class.tokens") as error:
            attempt()
        assert says(error, "2 prefix tokens", said)


def test_tokens_behind_the_patches():
    maps = random_maps((3, 5), prefix=3)
    attention = AttentionMaps.from_tensors(maps, 1, (3, 5), [0, -1], num_suffix_tokens=2)
    layout = attention[0].layout
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens, layout.class_tokens) == (1, 2, (0, 17))
    assert repr(attention).endswith("18 tokens: 1 prefix + 3 x 5 + 2 suffix)")
    assert attention.with_layout((3, 5), 3, 1)[0].layout == wrap(maps, (3, 5), 3, 1)[0].layout
    assert wrap(maps, (3, 5), 3, 1).with_layout((3, 5), 1, [0, 17], num_suffix_tokens=2)[0].layout == layout


@pytest.mark.parametrize("suffix", [0, 1, 3])
def test_tokens_behind_the_patches_that_do_not_add_up(suffix):
    maps = random_maps((3, 5), prefix=3)
    attempts = (
        lambda: AttentionMaps.from_tensors(maps, 1, (3, 5), num_suffix_tokens=suffix),
        lambda: wrap(maps, (3, 5), 3).with_layout((3, 5), 1, num_suffix_tokens=suffix),
    )
    for attempt in attempts:
        with pytest.raises(LayoutError, match="layer 0 has 18 queries") as error:
            attempt()
        assert says(error, f"for {16 + suffix}", "1 prefix + 3 x 5", "num_prefix_tokens=", "num_suffix_tokens=")
        assert (f"{suffix} suffix" in str(error.value)) == (suffix > 0)


def test_with_layout_renames_the_tokens_of_the_same_maps():
    attention = wrap(random_maps((3, 5), prefix=1), (3, 5))
    other = attention.with_layout((2, 6), 4, class_tokens=2)
    assert other[0].layout.query == Lattice(2, 6)
    assert other[1].layout.class_tokens == (0, 1)
    assert other[0].explicit.data_ptr() == attention[0].explicit.data_ptr()
    assert attention[0].layout.query == Lattice(3, 5)


def test_chunk_gives_equal_parts_of_the_batch():
    maps = random_maps((3, 5), batch=6)
    attention = wrap(maps, (3, 5))
    thirds = attention.chunk(3)
    assert len(thirds) == 3
    for part, (layer, tensor) in itertools.product(range(3), enumerate(maps)):
        assert torch.equal(thirds[part].weights()[layer], tensor[2 * part : 2 * part + 2])
        assert thirds[part].batch_size == 2
    singles = thirds[1].chunk(2)  # parts of a part
    assert torch.equal(singles[1].weights()[0], maps[0][3:4])
    with pytest.raises(ValueError, match="batch of 6") as error:
        attention.chunk(4)
    assert says(error, "multiple of 4")


def test_select_takes_the_models_indices():
    attention = wrap(random_maps((3, 5), layers=5), (3, 5))
    some = attention.select([3, 1])
    assert some.layers == (3, 1)
    assert attention.select([-1, 0]).layers == (4, 0)
    assert some.select([-1]).layers == (1,)
    for missing in (5, -6):
        with pytest.raises(IndexError, match=rf"\[{missing}\]") as error:
            attention.select([0, missing])
        assert says(error, "[0, 1, 2, 3, 4]")


def test_detach_keeps_values_and_drops_the_graph():
    attention = wrap(random_maps((3, 5)), (3, 5))
    fixed = attention.detach()
    assert not any(layer.requires_grad for layer in fixed)
    assert all(layer.requires_grad for layer in attention)
    assert all(torch.equal(a, b) for a, b in zip(fixed.weights(), attention.weights(), strict=True))


def test_one_layer_in_place_of_a_list_is_refused() -> None:
    maps = AttentionMaps.from_tensors(random_maps((3, 5), layers=2), 1, (3, 5))
    for use in (maps.select, lambda layers: propagate_cam(torch.rand(2, 1, 3, 5), maps, layers)):
        with pytest.raises(TypeError) as error:
            use(1)  # type: ignore[arg-type]
        assert says(error, "layers=", "1", "list")


def test_a_layer_is_printed_on_one_line_with_its_kind_shapes_grid_type_and_device():
    maps = AttentionMaps.from_tensors([torch.ones(2, 3, 16, 16).softmax(-1)] * 2, num_prefix_tokens=1, grid=(3, 5))
    assert repr(maps[1]) == (
        "LayerAttention(1, tensors[1]: global, map of (2, 3, 16, 16); 1 prefix + 3 x 5; torch.float32 on cpu)"
    )
    assert repr(maps[1].recorded) == "RecordedTensors(map=(2, 3, 16, 16))"
    unknown = replace(maps[0], placed=None, recorded=RecordedTensors(*[torch.ones(1, 2, 5, 4).half()] * 3))
    assert repr(unknown) == (
        "LayerAttention(0, tensors[0]: global, query and key of (1, 2, 5, 5); grid unknown; torch.float16 on cpu)"
    )
    window = replace(unknown, window=Window((2, 2), (0, 0), 4))
    assert "window, query and key" in repr(window) and str(window.window) in repr(window)
