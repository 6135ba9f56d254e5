"""What the loss says of bad input: what was found, what was expected, what to do next; and nothing is left behind."""

import re

import pytest
import torch

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Compose,
    Crop,
    HorizontalFlip,
    Lattice,
    Rotate90,
    Scale,
    VerticalFlip,
)
from tests.support.attention import (
    explicit,
    factored,
    flipped_pair,
    generator,
    layout_of,
    random_attention,
    random_factors,
    random_maps,
    says,
    wrap,
)

# Bad input: found, expected, next step


def call(*args, view=None, **kwargs):
    return lambda acr: acr(*args, view=view, **kwargs)


def test_maps_that_are_not_attention_maps():
    a, b = flipped_pair()
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    for args, name, kind in [
        ((a.weights(), b), "attn_a", "list"),
        ((a, b.weights()[0]), "attn_b", "Tensor"),
        ((a, None), "attn_b", "NoneType"),
    ]:
        with pytest.raises(TypeError, match=name) as error:
            acr(*args)
        assert says(error, name, kind, "from_tensors")


BAD_OPTIONS = [
    ({"distance": "kl"}, ["distance='kl'", "'l1', 'l2', 'js'"]),
    ({"normalize": "sum"}, ["normalize='sum'", "'row', 'mean'"]),
    ({"heads": "max"}, ["heads='max'", "'mean', 'each'"]),
    ({"cam_normalize": "softmax"}, ["cam_normalize='softmax'", "'max', 'minmax', None"]),
    ({"rows": 0}, ["rows=0", "(0, 1]"]),
    ({"rows": 1.5}, ["rows=1.5", "(0, 1]"]),
    ({"rows": float("nan")}, ["rows=nan", "(0, 1]"]),
    ({"activation_weight": -1}, ["'activation': -1.0", ">= 0"]),
    ({"affinity_weight": float("inf")}, ["'affinity': inf", "finite"]),
    ({"cam_weight": float("nan")}, ["'cam': nan", "finite"]),
    ({"block_rows": 0}, ["block_rows=0", "at least 1", "None"]),
]


@pytest.mark.parametrize(("options", "fragments"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_unknown_options(options, fragments):
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
        AllPairsConsistencyLoss(HorizontalFlip(), **options)
    assert says(error, *fragments)


def test_a_view_of_another_kind():
    a, b = flipped_pair()
    with pytest.raises(TypeError, match="str") as error:
        AllPairsConsistencyLoss("hflip")
    assert says(error, "HorizontalFlip()")
    for kwargs in ({"view": torch.flip}, {"view": HorizontalFlip(), "view_a": torch.flip}):
        with pytest.raises(TypeError, match="builtin_function") as error:
            AllPairsConsistencyLoss()(a, b, **kwargs)
        assert says(error, "View", "HorizontalFlip()")


def test_layers_of_another_kind():
    with pytest.raises(TypeError, match="layers=3") as error:
        AllPairsConsistencyLoss(HorizontalFlip(), layers=3)
    assert says(error, "[3]")


def test_no_view():
    with pytest.raises(ValueError, match="no view") as error:
        AllPairsConsistencyLoss()(*flipped_pair())
    assert says(error, "view=HorizontalFlip()")


def test_layers_that_disagree():
    a, b = flipped_pair(layers=3)
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    with pytest.raises(ValueError, match="layers") as error:
        acr(a, b.select([0, 2]))
    assert says(error, "(0, 1, 2)", "(0, 2)")
    with pytest.raises(IndexError, match="layer") as error:
        AllPairsConsistencyLoss(HorizontalFlip(), layers=[0, 7])(a, b)
    assert says(error, "[7]", "[0, 1, 2]", "Choose layers")


def test_images_and_heads_that_disagree():
    a = random_attention((3, 5), batch=2, heads=3)
    for kwargs, numbers in [
        ({"batch": 4}, ("2 and 4 images", "3 and 3 heads")),
        ({"heads": 6}, ("2 and 2 images", "3 and 6 heads")),
    ]:
        with pytest.raises(ValueError, match="the views have") as error:
            AllPairsConsistencyLoss(HorizontalFlip())(a, random_attention((3, 5), **{"batch": 2, "heads": 3, **kwargs}))
        assert says(error, "layer 0", *numbers)


@pytest.mark.parametrize(
    ("view", "grid_b", "expected"),
    [
        (HorizontalFlip(), (6, 4), "4 x 6"),
        (Rotate90(1), (4, 6), "6 x 4"),
        (Compose([Rotate90(1), VerticalFlip()]), (4, 6), "6 x 4"),
        (HorizontalFlip(), (5, 6), "4 x 6"),
        (Scale(2), (4, 6), "8 x 12"),
        (Scale((1.0, 2.0)), (12, 8), "4 x 12"),
    ],
    ids=str,
)
def test_a_view_that_does_not_fit_the_grid(view, grid_b, expected):
    a, b = random_attention((4, 6)), random_attention(grid_b)
    with pytest.raises(ValueError, match="grids of 4 x 6") as error:
        AllPairsConsistencyLoss(view)(a, b)
    assert says(error, f"and {grid_b[0]} x {grid_b[1]}", f"second {expected}", repr(view))


def test_class_tokens_that_disagree():
    a, b = random_attention((3, 5), 4, class_tokens=2), random_attention((3, 5), 4, class_tokens=1)
    with pytest.raises(ValueError, match="class tokens") as error:
        AllPairsConsistencyLoss(HorizontalFlip())(a, b)
    assert says(error, "(0, 1)", "(0,)", "class_tokens=")


def test_labels_of_the_wrong_width_or_batch():
    attention = flipped_pair(prefix=20, class_tokens=20)
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    cams = [torch.rand(2, 20, 3, 5, generator=generator(seed)).requires_grad_() for seed in (1, 2)]
    for shape in [(2, 21), (3, 20), (20,), (2, 20, 1), ()]:
        for given in ((), cams):
            with pytest.raises(ValueError, match="labels") as error:
                acr(*attention, *given, labels=torch.ones(shape))
            assert says(error, f"shape {shape}", "not (2, 20)", "class token", "without background")
    for shape in [(3, 4), (4,)]:
        with pytest.raises(ValueError, match="labels") as error:
            AllPairsConsistencyLoss(HorizontalFlip())(*flipped_pair(), labels=torch.ones(shape))
        assert says(error, f"shape {shape}", "not (2, C)")
    cams = [torch.rand(2, 5, 3, 5, generator=generator(seed)).requires_grad_() for seed in (1, 2)]
    with pytest.raises(ValueError, match="labels") as error:
        AllPairsConsistencyLoss(HorizontalFlip())(*flipped_pair(), *cams, labels=torch.ones(2, 6))
    assert says(error, "(2, 6)", "not (2, 5)", "class map")


def test_labels_and_valid_of_another_kind():
    attention = flipped_pair()
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    with pytest.raises(TypeError, match="labels") as error:
        acr(*attention, labels=[[1, 0], [0, 1]])
    assert says(error, "list", "(B, C)")
    with pytest.raises(TypeError, match="valid") as error:
        acr(*attention, valid=[[True]])
    assert says(error, "list", "(B, H, W)")


def test_labels_that_are_no_numbers_are_refused_whether_or_not_a_term_reads_them():
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    cams = [torch.rand(2, 20, 3, 5, generator=generator(seed)).requires_grad_() for seed in (1, 2)]
    for attention, given in [
        (flipped_pair(prefix=20, class_tokens=20), ()),
        (flipped_pair(), cams),
        (flipped_pair(), ()),
    ]:
        for value in (float("nan"), float("inf"), -float("inf")):
            for dtype in (torch.float32, torch.float64, torch.float16):
                labels = torch.eye(2, 20, dtype=dtype)
                acr(*attention, *given, labels=labels)
                labels[1, 3] = value
                with pytest.raises(ValueError, match="labels") as error:
                    acr(*attention, *given, labels=labels)
                assert says(error, "NaN", "1 for each class", "0 for the others")


@pytest.mark.parametrize("shape", [(2, 1, 6, 10), (6, 10), (3, 6, 10)], ids=str)
def test_valid_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match="valid") as error:
        AllPairsConsistencyLoss(HorizontalFlip())(*flipped_pair(), valid=torch.ones(shape))
    assert says(error, f"shape {shape}", "not (2, H, W)")


def test_class_maps_of_one_view_only():
    attention = flipped_pair()
    cam = torch.rand(2, 3, 3, 5, generator=generator(1))
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    for cams in [(cam, None), (None, cam)]:
        with pytest.raises(ValueError, match="one view only") as error:
            acr(*attention, *cams)
        assert says(error, "cam_a and cam_b", "neither")


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "fragments"),
    [
        ((2, 3, 4, 6), (2, 4, 4, 6), ["(2, 3, 4, 6)", "(2, 4, 4, 6)", "B images and C classes"]),
        ((2, 3, 4, 6), (3, 3, 4, 6), ["(2, 3, 4, 6)", "(3, 3, 4, 6)"]),
        ((2, 4, 6), (2, 4, 6), ["(2, 4, 6)", "(B, C, h, w)"]),
        ((2, 3, 4, 6), (2, 3, 6, 4), ["(4, 6)", "(6, 4)", "HorizontalFlip()"]),
        ((3, 3, 4, 6), (3, 3, 4, 6), ["(3, 3, 4, 6)", "2 images"]),
    ],
    ids=str,
)
def test_class_maps_whose_shapes_disagree(shape_a, shape_b, fragments):
    cams = [torch.rand(shape, generator=generator(1)).requires_grad_() for shape in (shape_a, shape_b)]
    with pytest.raises(ValueError, match=r"class maps|cam_a") as error:
        AllPairsConsistencyLoss(HorizontalFlip())(*flipped_pair((4, 6)), *cams)
    assert says(error, *fragments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_located(value):
    maps = random_maps((2, 3), layers=3)
    broken = maps[1].detach().clone()
    broken[0, 0, 2, 3] = value
    layers = [explicit(m, layout_of((2, 3)), i) for i, m in enumerate([maps[0], broken, maps[2]])]
    whole = wrap(maps, (2, 3))
    for args, side, other in [((AttentionMaps(layers), whole), "a", "b"), ((whole, AttentionMaps(layers)), "b", "a")]:
        with pytest.raises(ValueError, match="NaN or infinite") as error:
            AllPairsConsistencyLoss(HorizontalFlip())(*args)
        assert says(error, "layer 1 (", f"of attn_{side}", "half-precision")
        assert f"attn_{other}" not in str(error.value)
        assert "layer 0" not in str(error.value)


def test_class_maps_that_are_not_finite_are_located():
    cam_a, cam_b = (torch.rand(2, 3, 3, 5, generator=generator(seed)) for seed in (1, 2))
    cam_b[1, 2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite") as error:
        AllPairsConsistencyLoss(HorizontalFlip())(*flipped_pair(), cam_a.requires_grad_(), cam_b)
    assert says(error, "cam_b")
    assert "cam_a" not in str(error.value)
    assert "layer" not in str(error.value)


def test_rows_whose_keys_are_all_masked_are_located():
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[3] = False
    layers = [factored(*random_factors((2, 3), 1, seed), layout_of((2, 3)), mask=mask) for seed in (1, 2)]
    with pytest.raises(ValueError, match="NaN") as error:
        AllPairsConsistencyLoss(HorizontalFlip())(*(AttentionMaps([layer]) for layer in layers))
    assert says(error, "layer 0 (blocks.0.attn) of attn_a", "masked")


def test_a_failed_call_leaves_nothing_behind():
    """The same module gives the same value afterwards."""
    a, b = flipped_pair()
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    before = acr(a, b).item()
    for bad in (call(a, b, labels=torch.ones(5, 2)), call(a, b, view=Rotate90()), call(a, None)):
        with pytest.raises((TypeError, ValueError)):
            bad(acr)
    assert acr(a, b).item() == before


@pytest.mark.parametrize("key_grid", [(2, 3), (4, 3), (8, 12), (3, 5)])
def test_a_key_grid_in_tokens_is_compared_with_no_image_size(key_grid):
    """Its cells are not of one token, and are of no pixels either."""
    view = Crop(16, 0, 32, 48, (64, 96), image_size=(64, 96))
    in_pixels = Lattice(4, 6, (16.0, 16.0)), Lattice(*key_grid, (64 / key_grid[0], 96 / key_grid[1]))
    maps = [torch.rand(2, 3, 24, key_grid[0] * key_grid[1], generator=generator(seed)).softmax(-1) for seed in (0, 1)]
    acr = AllPairsConsistencyLoss(view, activation_weight=0)
    with torch.no_grad():
        found, expected = (
            acr(*(AttentionMaps.from_tensors([each], 0, grid, key_grid=keys) for each in maps))
            for grid, keys in (((4, 6), key_grid), in_pixels)
        )
        mixed = acr(*(AttentionMaps.from_tensors([each], 0, in_pixels[0], key_grid=key_grid) for each in maps))
    assert found == expected == mixed > 0
    small = AttentionMaps.from_tensors(maps[:1], 0, Lattice(4, 6, (8.0, 8.0)), key_grid=key_grid)
    with torch.no_grad(), pytest.raises(ValueError, match="32 x 48 px, but Crop"):
        acr(small, small)
