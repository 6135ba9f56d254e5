"""Where tokens sit: layouts inferred from input size and model fields."""

import itertools

import pytest
import torch
from torch import nn

from acr_reg import Lattice, LayoutError
from acr_reg.placement.grids import LayoutHints, ModelFields, infer_layout, read_fields
from tests.support.attention import says

UNKNOWN = ModelFields()


class Host(nn.Module):
    """A model of which only what it says about its tokens matters."""

    def __init__(self, patch=None, kernel=None, channels=3, **fields):
        super().__init__()
        if patch is not None:
            self.patch_embed = nn.Conv2d(channels, 8, kernel or patch, patch)
        self.inner = nn.Module()  # fields may lie at any depth
        for name, value in fields.items():
            setattr(self.inner, name, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)


def tokens(count):
    return torch.zeros(1, count, 8)


# read_fields


@pytest.mark.parametrize(
    ("fields", "prefix", "classes"),
    [
        ({}, None, None),  # nn.TransformerEncoder says nothing
        ({"cls_token": tokens(1)}, 1, 1),  # timm, transformers ViT
        ({"class_token": tokens(1)}, 1, 1),  # torchvision
        ({"class_embedding": torch.zeros(8)}, 1, 1),  # transformers CLIP: one axis
        ({"cls_token": tokens(1), "dist_token": tokens(1), "num_prefix_tokens": 2}, 2, 1),  # timm, distilled DeiT
        ({"cls_token": tokens(1), "distillation_token": tokens(1)}, 2, 1),  # transformers, distilled DeiT
        ({"cls_token": tokens(1), "reg_token": tokens(4), "num_prefix_tokens": 5}, 5, 1),  # timm, registers
        ({"cls_token": tokens(1), "register_tokens": tokens(4)}, 5, 1),  # transformers, DINOv2 with registers
        ({"reg_token": tokens(4), "num_prefix_tokens": 4}, 4, 0),  # registers, no class token
        ({"cls_token": tokens(20)}, 20, 20),  # MCTformer: one token for each class
        ({"cls_token": torch.zeros(20, 8)}, 20, 20),
        ({"num_prefix_tokens": 0}, 0, 0),
        ({"num_prefix_tokens": 3}, 3, None),  # three of what?
        ({"cls_token": tokens(1), "num_prefix_tokens": 11}, 11, 1),  # prompts behind the class token
        ({"cls_token": tokens(2), "num_prefix_tokens": 1}, 1, None),  # the two disagree
        ({"cls_token": None, "num_prefix_tokens": 0}, 0, 0),  # timm without a class token
        ({"mask_token": tokens(1), "pos_embed": tokens(25)}, None, None),  # other parameters do not count
    ],
)
def test_prefix_and_class_tokens_are_read_off_names_and_shapes(fields, prefix, classes):
    found = read_fields(Host(**fields))
    assert found.num_prefix_tokens == prefix
    assert found.num_class_tokens == classes


def test_prefix_that_two_modules_state_differently_is_counted():
    host = nn.ModuleList(
        [Host(num_prefix_tokens=1, cls_token=tokens(1)), Host(num_prefix_tokens=5, register_tokens=tokens(4))]
    )
    assert read_fields(host).num_prefix_tokens == 5
    same = nn.ModuleList([Host(num_prefix_tokens=1), Host(num_prefix_tokens=1)])
    assert read_fields(same).num_prefix_tokens == 1


def test_a_name_counts_once_by_its_largest():
    """A host that keeps the single class token of the model it extends beside twenty of its own."""
    hosts = [Host(cls_token=tokens(1)), Host(cls_token=tokens(20))]
    for order in (hosts, hosts[::-1]):
        assert read_fields(nn.ModuleList(order)).num_prefix_tokens == 20


@pytest.mark.parametrize(
    ("host", "patch"),
    [
        (Host(), None),
        (Host(16), (16, 16)),
        (Host((16, 8)), (16, 8)),
        (Host(14, channels=1), (14, 14)),
        (Host(16, channels=64), None),  # not on the image
        (Host(4, kernel=7), None),  # an overlapping stem is no patch size
        (Host(4, kernel=7, patch_size=4), (4, 4)),  # unless it says so
        (Host(patch_size=(16, 8)), (16, 8)),
        (Host(16, patch_size=7), (16, 16)),  # what it does goes before what it says
        (Host(1), None),
        (nn.ModuleList([Host(16), Host(8)]), None),  # two encoders
        (nn.ModuleList([Host(patch_size=16), Host(patch_size=8)]), None),
        (Host(config=type("Config", (), {"patch_size": 14})()), (14, 14)),
        (Host(patch_size="16"), None),
    ],
)
def test_patch_size_is_read_off_the_patch_embedding_or_its_fields(host, patch):
    assert read_fields(host).patch_size == patch


# infer_layout


@pytest.mark.parametrize(
    ("num_tokens", "image", "fields", "prefix", "grid"),
    [
        (25, (64, 96), ModelFields((16, 16), 1, 1), 1, (4, 6)),
        (25, (96, 64), ModelFields((16, 16), 1, 1), 1, (6, 4)),
        (26, (64, 96), ModelFields((16, 16), 2, 1), 2, (4, 6)),
        (44, (64, 96), ModelFields((16, 16), 20, 20), 20, (4, 6)),
        (24, (64, 96), ModelFields((16, 16), 0, 0), 0, (4, 6)),
        (25, (64, 96), ModelFields((16, 16)), 1, (4, 6)),  # the patch alone tells the prefix
        (25, (64, 48), ModelFields((16, 8), 1, 1), 1, (4, 6)),  # patches that are not square
        (25, (70, 101), ModelFields((16, 16), 1, 1), 1, (4, 6)),  # a margin that no patch covers
        (197, (224, 224), UNKNOWN, 1, (14, 14)),  # and without any field, where one layout fits
        (97, (128, 192), UNKNOWN, 1, (8, 12)),
        (105, (112, 184), UNKNOWN, 1, (8, 13)),  # patches of 14 leave a margin at the right
        (257, (224, 224), UNKNOWN, 1, (16, 16)),
        (50, (224, 224), UNKNOWN, 1, (7, 7)),
        (1, (16, 16), ModelFields((16, 16), 0), 0, (1, 1)),
    ],
)
def test_the_one_layout_that_fits(num_tokens, image, fields, prefix, grid):
    layout = infer_layout(num_tokens, image, fields)
    assert layout.num_prefix_tokens == prefix
    for lattice in (layout.query, layout.key):
        assert (lattice.height, lattice.width) == grid
        assert lattice.extent == image
    assert layout.num_queries == layout.num_keys == num_tokens


def test_stride_and_extent_are_in_pixels():
    lattice = infer_layout(25, (70, 101), ModelFields((16, 16))).query
    assert lattice.stride == (16.0, 16.0)
    assert lattice.offset == (0.0, 0.0)
    assert lattice.extent == (70.0, 101.0)
    assert infer_layout(25, (64, 48), ModelFields((16, 8))).query.stride == (16.0, 8.0)
    assert infer_layout(97, (128, 192), UNKNOWN).query.stride == (16.0, 16.0)


def test_a_patch_that_divides_the_image_goes_before_one_that_leaves_a_margin():
    assert infer_layout(6, (30, 45), UNKNOWN, LayoutHints(num_prefix_tokens=0)).query.stride == (
        15.0,
        15.0,
    )  # not 14, whose grid is 2 x 3 too
    assert infer_layout(6, (29, 43), UNKNOWN, LayoutHints(num_prefix_tokens=0)).query.stride == (14.0, 14.0)


def test_what_is_given_goes_before_the_fields():
    fields = ModelFields((16, 16), 1, 1)
    assert infer_layout(26, (64, 96), fields, LayoutHints(num_prefix_tokens=2)).num_prefix_tokens == 2
    assert infer_layout(97, (64, 96), fields, LayoutHints(patch_size=8)).query == Lattice(8, 12, (8.0, 8.0))
    assert infer_layout(25, (64, 48), fields, LayoutHints(patch_size=(16, 8))).query.stride == (16.0, 8.0)
    assert infer_layout(26, (64, 96), fields, LayoutHints(num_prefix_tokens=2, class_tokens=2)).class_tokens == (0, 1)
    assert infer_layout(26, (64, 96), fields, LayoutHints(num_prefix_tokens=2, class_tokens=[1])).class_tokens == (1,)
    assert infer_layout(26, (64, 96), fields, LayoutHints(num_prefix_tokens=2, class_tokens=0)).class_tokens == ()
    assert infer_layout(84, (128, 128), UNKNOWN, LayoutHints(patch_size=16)).num_prefix_tokens == 20
    assert infer_layout(84, (128, 128), UNKNOWN, LayoutHints(patch_size=14)).num_prefix_tokens == 3
    assert infer_layout(84, (128, 128), UNKNOWN, LayoutHints(num_prefix_tokens=3)).query.height == 9


@pytest.mark.parametrize(
    ("fields", "prefix", "given", "expected"),
    [
        (UNKNOWN, 0, None, ()),
        (UNKNOWN, 1, None, (0,)),
        (UNKNOWN, 2, None, None),
        (ModelFields(None, 2, 1), 2, None, (0,)),
        (ModelFields(None, 5, 1), 5, None, (0,)),
        (ModelFields(None, 4, 0), 4, None, ()),
        (ModelFields(None, 1, 0), 1, None, ()),
        (ModelFields(None, 20, 20), 20, None, tuple(range(20))),
        (ModelFields(None, 2, 2), 1, None, (0,)),  # more class tokens than prefix: the fields are about something else
        (ModelFields(None, 5, 1), 5, (3, 1), (3, 1)),
    ],
)
def test_class_tokens(fields, prefix, given, expected):
    layout = infer_layout(prefix + 24, (64, 96), fields, LayoutHints(16, prefix, given))
    assert layout.class_tokens == expected


@pytest.mark.parametrize(
    ("fields", "hints", "expected"),  # prefix, suffix, between, class tokens of 4 x 6 patches
    [
        (UNKNOWN, {"num_prefix_tokens": 0, "num_suffix_tokens": 1}, (0, 1, (), (24,))),
        (UNKNOWN, {"num_prefix_tokens": 1, "num_suffix_tokens": 2}, (1, 2, (), None)),
        (UNKNOWN, {"num_prefix_tokens": 0, "between": [12]}, (0, 0, (12,), (12,))),
        (UNKNOWN, {"patch_size": 16, "num_suffix_tokens": 2}, (3, 2, (), None)),
        # the fields count the tokens behind, too, or those in front alone
        (ModelFields((16, 16), 1, 1), {"num_suffix_tokens": 1}, (0, 1, (), (24,))),
        (ModelFields((16, 16), 1, 1), {"between": (12,)}, (0, 0, (12,), (12,))),
        (ModelFields((16, 16), 1, 1), {"num_suffix_tokens": 4}, (1, 4, (), None)),
        (ModelFields((16, 16), 5, 1), {"num_suffix_tokens": 4}, (1, 4, (), None)),
        (ModelFields((16, 16), 4, 0), {"num_suffix_tokens": 4}, (0, 4, (), ())),
        (ModelFields((16, 16), 20, 20), {"num_suffix_tokens": 20}, (0, 20, (), tuple(range(24, 44)))),
        (ModelFields((16, 16), 0, 0), {"num_suffix_tokens": 3}, (0, 3, (), ())),
        (ModelFields((16, 16), 1, 1), {"num_suffix_tokens": 0}, (1, 0, (), (0,))),
        (UNKNOWN, {"num_prefix_tokens": 1, "num_suffix_tokens": 2, "between": (3, 9)}, (1, 2, (3, 9), None)),
        (UNKNOWN, {"num_prefix_tokens": 0, "num_suffix_tokens": 2, "class_tokens": [-1]}, (0, 2, (), (25,))),
        (UNKNOWN, {"num_prefix_tokens": 1, "num_suffix_tokens": 2, "class_tokens": 2}, (1, 2, (), (0, 25))),
    ],
)
def test_tokens_behind_and_between_the_patches(fields, hints, expected):
    prefix, suffix, between, _ = expected
    layout = infer_layout(prefix + suffix + len(between) + 24, (64, 96), fields, LayoutHints(**hints))
    assert (layout.query.height, layout.query.width) == (4, 6)
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens, layout.between, layout.class_tokens) == expected


def test_tokens_behind_the_patches_of_a_layer_that_reduces_its_keys():
    hints = LayoutHints(num_prefix_tokens=1, num_suffix_tokens=2, class_tokens=1)
    layout = infer_layout(3 + 384, (64, 96), ModelFields((4, 4)), hints, num_keys=3 + 6)
    assert (str(layout), layout.describe("key")) == ("1 prefix + 16 x 24 + 2 suffix", "1 prefix + 2 x 3 + 2 suffix")


@pytest.mark.parametrize(
    ("num_tokens", "fields", "given", "fragments"),
    [
        (
            27,
            ModelFields((16, 16), 1),
            {"num_suffix_tokens": 3},
            ["27 tokens", "1 prefix and 3 suffix tokens", "4 x 6"],
        ),
        (30, ModelFields((16, 16), 5), {"num_suffix_tokens": 3}, ["5 prefix or 2 prefix and 3 suffix tokens"]),
        (23, ModelFields((16, 16)), {"num_suffix_tokens": 1}, ["23 tokens", "1 suffix tokens"]),
        (26, UNKNOWN, {"num_prefix_tokens": 1, "num_suffix_tokens": 2, "patch_size": 16}, ["1 prefix and 2 suffix"]),
        (84, UNKNOWN, {"num_suffix_tokens": 1}, ["2 prefix + 9 x 9 + 1 suffix or 19 prefix + 8 x 8 + 1 suffix"]),
        (25, UNKNOWN, {"patch_size": 16, "num_prefix_tokens": 0, "between": (0,)}, ["(0,)", "token 0", "token 24"]),
    ],
)
def test_counts_behind_the_patches_that_do_not_fit_are_named(num_tokens, fields, given, fragments):
    with pytest.raises(LayoutError) as error:
        infer_layout(num_tokens, (128, 128) if num_tokens == 84 else (64, 96), fields, LayoutHints(**given))
    assert says(error, *fragments)


def test_class_tokens_that_nobody_knows_raise_when_they_are_needed():
    layout = infer_layout(28, (64, 96), UNKNOWN, LayoutHints(patch_size=16))
    assert layout.num_prefix_tokens == 4
    with pytest.raises(LayoutError, match="4 prefix tokens") as error:
        layout.known_class_tokens()
    assert says(error, "class_tokens=")
    assert infer_layout(25, (64, 96), UNKNOWN, LayoutHints(patch_size=16)).known_class_tokens() == (0,)


def test_more_than_one_fit_is_an_error_that_lists_them():
    with pytest.raises(LayoutError, match="84 tokens") as error:
        infer_layout(84, (128, 128), UNKNOWN)
    assert says(error, "128 x 128 px", "3 prefix + 9 x 9 or 20 prefix + 8 x 8", "patch_size=", "num_prefix_tokens=")
    with pytest.raises(LayoutError, match="12 tokens") as error:
        infer_layout(12, (8, 12), UNKNOWN)
    assert says(error, "6 prefix + 2 x 3", "11 prefix + 1 x 1")


@pytest.mark.parametrize(
    ("num_tokens", "image", "fields", "given", "fragments"),
    [
        (26, (64, 96), ModelFields((16, 16), 1), {}, ["26 tokens", "64 x 96 px", "16 x 16", "4 x 6", "1 prefix"]),
        (23, (64, 96), ModelFields((16, 16)), {}, ["23 tokens", "4 x 6"]),
        (500, (64, 96), ModelFields((16, 16)), {"num_prefix_tokens": 3}, ["500 tokens", "3 prefix"]),
        (26, (64, 96), ModelFields((16, 16), 1), {"patch_size": 14}, ["26 tokens", "14 x 14", "4 x 6"]),
        (37, (64, 96), ModelFields(), {"patch_size": (32, 16)}, ["37 tokens", "32 x 16", "2 x 6"]),
        (1000, (64, 96), UNKNOWN, {}, ["1000 tokens", "any common patch size"]),
        (3, (8, 12), ModelFields((16, 16)), {}, ["3 tokens", "8 x 12 px", "0 x 0"]),
    ],
)
def test_a_misfit_says_what_was_counted(num_tokens, image, fields, given, fragments):
    with pytest.raises(LayoutError, match="tokens") as error:
        infer_layout(num_tokens, image, fields, LayoutHints(**given))
    assert says(error, *fragments, "patch_size=", "num_prefix_tokens=")


def test_no_image():
    with pytest.raises(LayoutError, match="25 tokens") as error:
        infer_layout(25, None, ModelFields((16, 16), 1))
    assert says(error, "an image", "with_layout(grid=(h, w), num_prefix_tokens=)")


def test_too_long_a_prefix_is_given_and_not_guessed():
    with pytest.raises(LayoutError):
        infer_layout(24 + 25, (64, 96), ModelFields((16, 16)))
    assert (
        infer_layout(24 + 25, (64, 96), ModelFields((16, 16)), LayoutHints(num_prefix_tokens=25)).num_prefix_tokens
        == 25
    )
    assert infer_layout(24 + 24, (64, 96), ModelFields((16, 16))).num_prefix_tokens == 24


def inferred_or_listed(count, image):
    try:
        return infer_layout(count, image, UNKNOWN), ""
    except LayoutError as error:
        return None, str(error)


def test_every_inferred_layout_adds_up():
    """Over many sizes, patches and prefixes: the layout that made the tokens is found, or among those listed."""
    unique = 0
    for height, width, patch, prefix in itertools.product((32, 64, 112), (48, 96, 128), (8, 14, 16), (0, 1, 2, 20)):
        made = (height // patch, width // patch)
        layout, listed = inferred_or_listed(prefix + made[0] * made[1], (height, width))
        if layout is None:
            assert f"{prefix} prefix + {made[0]} x {made[1]}" in listed
        else:
            unique += 1
            assert (layout.num_prefix_tokens, layout.query.height, layout.query.width) == (prefix, *made)
    assert unique > 20
