"""Where tokens sit: layouts inferred from input size and model fields, or given with tensors; and what they say."""

import itertools

import pytest
import torch
from helpers import random_maps, says, wrap
from torch import nn

from acr_reg import AttentionMaps, Lattice, LayoutError, TokenLayout
from acr_reg._inference import ModelFields, Stem, infer_layout, read_fields
from acr_reg.tokens import Window, class_token_positions

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


class Convolutions(nn.Module):
    """Nothing but convolutions (channels, kernel, stride, padding), in this order."""

    def __init__(self, *convolutions, **fields):
        super().__init__()
        self.stem = nn.ModuleList(nn.Conv2d(c, 8, k, s, p) for c, k, s, p in convolutions)
        for name, value in fields.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("host", "stem"),
    [
        (Convolutions(), None),
        (Convolutions((3, 16, 8, 0)), Stem((16, 16), (8, 8), (0, 0))),  # PiT
        (Convolutions((3, 7, 4, 3)), Stem((7, 7), (4, 4), (3, 3))),  # SegFormer, PVTv2
        (Convolutions((1, (8, 6), (4, 3), (2, 1))), Stem((8, 6), (4, 3), (2, 1))),
        (Convolutions((4, 7, 4, 3)), Stem((7, 7), (4, 4), (3, 3))),
        (Convolutions((3, 16, 16, 0)), None),  # whole patches, no overlap
        (Convolutions((3, 3, 1, 1)), None),  # of every pixel one
        (Convolutions((64, 7, 4, 3)), None),  # does not read images
        (Convolutions((3, 7, 4, 3), (8, 3, 2, 1)), Stem((7, 7), (4, 4), (3, 3))),
        (Convolutions((3, 7, 4, 3), (3, 16, 16, 0)), None),  # two that do
        (Convolutions((3, 7, 4, "valid")), None),
    ],
)
def test_the_stem_is_the_one_convolution_of_the_images_with_overlapping_windows(host, stem):
    assert read_fields(host).stem == stem


def test_the_grid_of_a_stem():
    assert Stem((16, 16), (8, 8), (0, 0)).grid((224, 224)) == (27, 27)
    assert Stem((7, 7), (4, 4), (3, 3)).grid((64, 96)) == (16, 24)
    assert Stem((7, 7), (4, 4), (3, 3)).grid((65, 98)) == (17, 25)
    assert Stem((8, 6), (4, 3), (2, 1)).grid((16, 12)) == (4, 3)
    for kernel, stride, padding in ((16, 8, 0), (7, 4, 3), (3, 2, 1), (8, 3, 2)):
        convolution = nn.Conv2d(3, 1, kernel, stride, padding)
        for size in ((64, 96), (65, 97), (50, 31)):
            stem = Stem((kernel,) * 2, (stride,) * 2, (padding,) * 2)
            assert stem.grid(size) == tuple(convolution(torch.zeros(1, 3, *size)).shape[2:])


@pytest.mark.parametrize(
    ("host", "reads"),
    [
        (Host(16), True),
        (Host((16, 8)), True),
        (Host(16, channels=1), True),
        (Host(patch_size=16), False),  # says so, and may do otherwise
        (Host(4, kernel=7, patch_size=4), False),
        (Host(16, channels=64), False),
        (Host(), False),
    ],
)
def test_whether_a_convolution_cuts_the_images_into_patches(host, reads):
    fields = read_fields(host)
    assert fields.reads_patches == reads
    assert not fields.is_pyramid  # which only a run shows


@pytest.mark.parametrize(
    ("host", "prefix"),
    [
        (Host(16), 0),  # a model of images without a parameter that might be a token
        (Host(16, pos_embed=tokens(24)), 0),
        (Host(16, mask_token=tokens(1)), 0),  # of masked images, never a prefix
        (Host(16, num_prefix_tokens=2), 2),
        (Host(16, prompt_tokens=tokens(5)), None),  # it may hold some, and how many are in use is not said
        (Host(16, query_embed=tokens(5)), None),
        (Host(16, latents=tokens(5)), None),
        (Host(16, num_prefix_tokens="two"), 0),
        (Host(16, channels=64), None),  # nothing here reads images
        (Host(), None),
    ],
)
def test_a_model_of_images_without_any_token_of_its_own_has_no_prefix(host, prefix):
    assert read_fields(host).num_prefix_tokens == prefix
    assert read_fields(host).num_class_tokens == (0 if prefix == 0 else None)


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
    assert infer_layout(6, (30, 45), UNKNOWN, num_prefix_tokens=0).query.stride == (
        15.0,
        15.0,
    )  # not 14, whose grid is 2 x 3 too
    assert infer_layout(6, (29, 43), UNKNOWN, num_prefix_tokens=0).query.stride == (14.0, 14.0)


def test_what_is_given_goes_before_the_fields():
    fields = ModelFields((16, 16), 1, 1)
    assert infer_layout(26, (64, 96), fields, num_prefix_tokens=2).num_prefix_tokens == 2
    assert infer_layout(97, (64, 96), fields, patch_size=8).query == Lattice(8, 12, (8.0, 8.0))
    assert infer_layout(25, (64, 48), fields, patch_size=(16, 8)).query.stride == (16.0, 8.0)
    assert infer_layout(26, (64, 96), fields, num_prefix_tokens=2, class_tokens=2).class_tokens == (0, 1)
    assert infer_layout(26, (64, 96), fields, num_prefix_tokens=2, class_tokens=[1]).class_tokens == (1,)
    assert infer_layout(26, (64, 96), fields, num_prefix_tokens=2, class_tokens=0).class_tokens == ()
    assert infer_layout(84, (128, 128), UNKNOWN, patch_size=16).num_prefix_tokens == 20
    assert infer_layout(84, (128, 128), UNKNOWN, patch_size=14).num_prefix_tokens == 3
    assert infer_layout(84, (128, 128), UNKNOWN, num_prefix_tokens=3).query.height == 9


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
    layout = infer_layout(prefix + 24, (64, 96), fields, 16, prefix, given)
    assert layout.class_tokens == expected


def test_class_tokens_that_nobody_knows_raise_when_they_are_needed():
    layout = infer_layout(28, (64, 96), UNKNOWN, patch_size=16)
    assert layout.num_prefix_tokens == 4
    with pytest.raises(LayoutError, match="4 prefix tokens") as error:
        layout.known_class_tokens()
    assert says(error, "class_tokens=")
    assert infer_layout(25, (64, 96), UNKNOWN, patch_size=16).known_class_tokens() == (0,)


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
        (1000, (64, 96), UNKNOWN, {}, ["1000 tokens", "nothing is known"]),
        (3, (8, 12), ModelFields((16, 16)), {}, ["3 tokens", "8 x 12 px", "0 x 0"]),
    ],
)
def test_a_misfit_says_what_was_counted(num_tokens, image, fields, given, fragments):
    with pytest.raises(LayoutError, match="tokens") as error:
        infer_layout(num_tokens, image, fields, **given)
    assert says(error, *fragments, "patch_size=", "num_prefix_tokens=")


def test_no_image():
    with pytest.raises(LayoutError, match="25 tokens") as error:
        infer_layout(25, None, ModelFields((16, 16), 1))
    assert says(error, "no image", "with_layout(grid=(h, w), num_prefix_tokens=)")


def test_too_long_a_prefix_is_given_and_not_guessed():
    with pytest.raises(LayoutError):
        infer_layout(24 + 25, (64, 96), ModelFields((16, 16)))
    assert infer_layout(24 + 25, (64, 96), ModelFields((16, 16)), num_prefix_tokens=25).num_prefix_tokens == 25
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


# infer_layout: stages, stems, and keys that are not as many as the queries


def pyramid_of(patch, prefix=0, classes=0, **fields):
    return ModelFields((patch, patch), prefix, classes, **{"reads_patches": True, "is_pyramid": True, **fields})


def grids_of(layout):
    return (layout.query.height, layout.query.width), (layout.key.height, layout.key.width)


@pytest.mark.parametrize(
    ("num_tokens", "image", "grid", "stride"),
    [
        (16 * 24, (64, 96), (16, 24), 4),
        (8 * 12, (64, 96), (8, 12), 8),
        (4 * 6, (64, 96), (4, 6), 16),
        (2 * 3, (64, 96), (2, 3), 32),
        (7 * 7, (224, 224), (7, 7), 32),
        (4 * 4, (224, 224), (4, 4), 64),  # 7 rows halved and rounded up
        (3 * 3, (224, 224), (3, 3), 64),  # or down
        (15 * 10, (120, 80), (15, 10), 8),
        (8 * 5, (120, 80), (8, 5), 16),
        (7 * 5, (120, 80), (7, 5), 16),
    ],
)
def test_later_stages_of_a_pyramid(num_tokens, image, grid, stride):
    layout = infer_layout(num_tokens, image, pyramid_of(4))
    assert grids_of(layout) == (grid, grid)
    assert layout.query.stride == layout.key.stride == (float(stride),) * 2
    assert layout.query.extent == image
    assert layout.num_prefix_tokens == 0


def test_fewer_tokens_are_a_later_stage_only_of_a_pyramid():
    """A quarter of the tokens may be a stage, or what masking and patch dropout left: these lie on no grid."""
    plain = pyramid_of(16, is_pyramid=False)
    assert grids_of(infer_layout(16, (64, 64), plain)) == ((4, 4), (4, 4))
    with pytest.raises(LayoutError, match="4 tokens") as error:
        infer_layout(4, (64, 64), plain)
    assert says(error, "64 x 64 px", "patch size 16 x 16", "0 prefix tokens", "with_layout(")
    assert grids_of(infer_layout(4, (64, 64), pyramid_of(16))) == ((2, 2), (2, 2))
    with pytest.raises(LayoutError, match="5 tokens"):
        infer_layout(5, (64, 64), ModelFields((16, 16), 1, 1, reads_patches=True))
    with pytest.raises(LayoutError, match="3 tokens"):  # nor does a pyramid take any number
        infer_layout(3, (64, 64), pyramid_of(16))


def test_where_no_convolution_cuts_patches_stages_need_no_run_that_shows_them():
    said = ModelFields((4, 4), 0, 0)
    assert grids_of(infer_layout(16, (64, 64), said)) == ((4, 4), (4, 4))
    with pytest.raises(LayoutError):
        infer_layout(16, (64, 64), ModelFields((4, 4), 0, 0, reads_patches=True))


@pytest.mark.parametrize(
    ("count", "grid", "prefix", "classes"),
    [(64, (8, 8), 0, ()), (16, (4, 4), 0, ()), (17, (4, 4), 1, (0,)), (5, (2, 2), 1, (0,)), (4, (2, 2), 0, ())],
)
def test_a_class_token_may_join_in_the_last_stage_only(count, grid, prefix, classes):
    """The model has one; early stages run without, and then none of their tokens is a class token."""
    layout = infer_layout(count, (64, 64), pyramid_of(8, 1, 1))
    assert grids_of(layout) == (grid, grid)
    assert layout.num_prefix_tokens == prefix
    assert layout.class_tokens == classes
    assert layout.known_class_tokens() == classes


def test_a_class_token_that_is_given_is_there():
    assert infer_layout(65, (64, 64), pyramid_of(8, 1, 1), num_prefix_tokens=1).num_prefix_tokens == 1
    with pytest.raises(LayoutError, match="64 tokens") as error:
        infer_layout(64, (64, 64), pyramid_of(8, 1, 1), num_prefix_tokens=1)
    assert says(error, "1 prefix tokens")
    assert infer_layout(64, (64, 64), pyramid_of(8, 1, 1), num_prefix_tokens=0).num_prefix_tokens == 0


PIT = ModelFields(None, 1, 1, Stem((16, 16), (8, 8), (0, 0)))


def test_a_stem_of_overlapping_windows_without_padding_leaves_a_margin():
    """PiT at 224 px: 27 x 27 windows of 16 px, the first centred at 8 px and not at 4."""
    layout = infer_layout(1 + 27 * 27, (224, 224), PIT)
    assert layout.query == Lattice(27, 27, (8.0, 8.0), (4.0, 4.0), (224.0, 224.0))
    assert layout.key == layout.query
    assert layout.num_prefix_tokens == 1
    assert layout.query.offset[0] + 0.5 * layout.query.stride[0] == 8.0


@pytest.mark.parametrize(
    ("count", "grid", "stride", "offset"), [(14 * 14, 14, 16.0, 0.0), (13 * 13, 13, 16.0, 8.0), (7 * 7, 7, 32.0, 0.0)]
)
def test_later_stages_behind_such_a_stem_are_centred_too(count, grid, stride, offset):
    lattice = infer_layout(1 + count, (224, 224), PIT).query
    assert lattice == Lattice(grid, grid, (stride, stride), (offset, offset), (224.0, 224.0))


def test_a_stem_with_padding_begins_at_the_edge():
    fields = ModelFields(None, 0, 0, Stem((7, 7), (4, 4), (3, 3)))
    assert infer_layout(16 * 24, (64, 96), fields).query == Lattice(16, 24, (4.0, 4.0), (0.0, 0.0), (64.0, 96.0))
    assert infer_layout(4 * 6, (64, 96), fields).query == Lattice(4, 6, (16.0, 16.0), (0.0, 0.0), (64.0, 96.0))
    lattice = infer_layout(17 * 25, (66, 98), fields).query  # a row of its own for the rest
    assert (lattice.height, lattice.width, lattice.offset) == (17, 25, (0.0, 0.0))


def test_a_patch_size_that_is_given_goes_before_the_stem():
    layout = infer_layout(1 + 28 * 28, (224, 224), PIT, patch_size=8)
    assert layout.query == Lattice(28, 28, (8.0, 8.0))
    with pytest.raises(LayoutError, match="730 tokens"):
        infer_layout(1 + 27 * 27, (224, 224), PIT, patch_size=8)


@pytest.mark.parametrize(
    ("stride", "grid", "image"),
    [
        (4, (16, 24), (64, 96)),
        (8, (8, 12), (64, 96)),
        (16, (4, 6), (64, 96)),
        (32, (2, 3), (64, 96)),
        (4, (17, 25), (66, 98)),  # with a row and a column for the rest
        (8, (9, 13), (66, 98)),
        (16, (5, 7), (66, 98)),
    ],
)
def test_several_convolutions_before_the_first_attention(stride, grid, image):
    """No stem and no patch is known: strides of 4, 8 or 16 and their stages, for a prefix that is known."""
    lattice = infer_layout(grid[0] * grid[1], image, ModelFields(num_prefix_tokens=0)).query
    assert (lattice.height, lattice.width) == grid
    assert lattice.stride == (float(stride),) * 2
    assert lattice.extent == image


@pytest.mark.parametrize(
    ("queries", "keys", "query_grid", "key_grid", "step"),
    [
        (16 * 24, 2 * 3, (16, 24), (2, 3), 8),  # SegFormer's stages
        (8 * 12, 2 * 3, (8, 12), (2, 3), 4),
        (4 * 6, 2 * 3, (4, 6), (2, 3), 2),
        (16 * 24, 16 * 24, (16, 24), (16, 24), 1),
        (16 * 24, 8 * 12, (16, 24), (8, 12), 2),
        (16 * 24, 5 * 8, (16, 24), (5, 8), 3),  # a row is left over
        (2 * 3, 4 * 6, (2, 3), (4, 6), 0.5),  # fewer queries than keys
        (4 * 6, 8 * 12, (4, 6), (8, 12), 0.5),
        (8 * 12, 16 * 24, (8, 12), (16, 24), 0.5),
    ],
)
def test_keys_that_are_not_as_many_lie_on_a_grid_of_their_own(queries, keys, query_grid, key_grid, step):
    layout = infer_layout(queries, (64, 96), pyramid_of(4), num_keys=keys)
    assert grids_of(layout) == (query_grid, key_grid)
    assert (layout.num_queries, layout.num_keys) == (queries, keys)
    assert layout.query.extent == layout.key.extent == (64.0, 96.0)
    assert [layout.key.stride[i] / layout.query.stride[i] for i in (0, 1)] == [step, step]
    assert layout.query.stride[0] == {16: 4, 8: 8, 4: 16, 2: 32}[query_grid[0]]


@pytest.mark.parametrize("rows", [16, 8, 4, 2])
def test_keys_pooled_to_a_grid_of_their_own_size_divide_the_image(rows):
    """PVTv2's linear attention pools to 7 x 7, which is more than a late stage has."""
    layout = infer_layout(rows * rows, (64, 64), pyramid_of(4), num_keys=49)
    assert grids_of(layout) == ((rows, rows), (7, 7))
    assert layout.query.stride == (64 / rows,) * 2
    assert layout.key.stride == pytest.approx((64 / 7,) * 2)
    assert layout.key.extent == (64.0, 64.0)
    with pytest.raises(LayoutError, match="49 patches beside a grid"):  # what is square over a wide image is not told
        infer_layout(16 * 24, (64, 96), pyramid_of(4), num_keys=49)


def test_queries_of_no_stage_are_placed_by_their_keys():
    """LeViT from 14 x 14 to 7 x 7 and on to 4 x 4; or a step of 4 that no stage has on the way."""
    plain = pyramid_of(16, is_pyramid=False)
    layout = infer_layout(49, (224, 224), plain, num_keys=196)
    assert grids_of(layout) == ((7, 7), (14, 14))
    assert layout.query.stride == (32.0, 32.0)
    layout = infer_layout(9, (224, 224), plain, num_keys=196)
    assert grids_of(layout) == ((3, 3), (14, 14))
    assert layout.query.stride == (64.0, 64.0)


def test_the_prefix_counts_on_both_sides():
    fields = ModelFields((16, 16), 1, 1, reads_patches=True)
    for queries, keys, grids in ((24, 6, ((4, 6), (2, 3))), (6, 24, ((2, 3), (4, 6)))):
        layout = infer_layout(1 + queries, (64, 96), fields, num_keys=1 + keys)
        assert grids_of(layout) == grids
        assert layout.num_prefix_tokens == 1
        assert layout.class_tokens == (0,)


@pytest.mark.parametrize(
    ("keys", "fragments"), [(7, ["7 patches", "4 x 6", "fit no grid like it"]), (5, ["5 patches"])]
)
def test_keys_that_fit_no_grid_like_that_of_the_queries(keys, fragments):
    with pytest.raises(LayoutError, match="patches beside a grid") as error:
        infer_layout(24, (64, 96), ModelFields((16, 16), 0, 0), num_keys=keys)
    assert says(error, *fragments, "with_layout(grid=, key_grid=, num_prefix_tokens=)")


def test_keys_that_fit_two_grids_like_that_of_the_queries_are_an_error_that_lists_them():
    with pytest.raises(LayoutError, match="12 patches beside a grid") as error:
        infer_layout(4, (64, 64), ModelFields((32, 32), 0, 0, reads_patches=True), num_keys=12)
    assert says(error, "3 x 4 or 4 x 3", "expected one grid of the same proportions", "key_grid=")


def test_queries_and_keys_that_both_fit_nothing():
    with pytest.raises(LayoutError, match="23 tokens") as error:
        infer_layout(23, (64, 96), ModelFields((16, 16), 0, 0, reads_patches=True), num_keys=11)
    assert says(error, "64 x 96 px", "4 x 6")


def test_no_image_for_keys_that_are_not_as_many():
    with pytest.raises(LayoutError, match="25 tokens and no image"):
        infer_layout(25, None, ModelFields((16, 16), 1), num_keys=7)


# Lattice, TokenLayout


def test_lattice():
    lattice = Lattice(4, 6, (16.0, 8.0))
    assert len(lattice) == 24
    assert str(lattice) == "4 x 6"
    assert lattice.extent == (64.0, 48.0)
    assert Lattice(4, 6).extent == (4.0, 6.0)
    assert Lattice(4, 6, extent=(70.0, 101.0)).extent == (70.0, 101.0)
    assert lattice == Lattice(4, 6, (16.0, 8.0))
    assert hash(lattice) == hash(Lattice(4, 6, (16.0, 8.0)))
    assert lattice != Lattice(4, 6)
    with pytest.raises(AttributeError):
        lattice.height = 5


@pytest.mark.parametrize("grid", [(0, 6), (4, 0), (-1, 6)])
def test_a_grid_without_tokens(grid):
    with pytest.raises(LayoutError, match="token grid") as error:
        Lattice(*grid)
    assert says(error, f"{grid[0]} x {grid[1]}", "1 x 1", "(height, width)")


@pytest.mark.parametrize(
    ("prefix", "class_tokens", "found"), [(1, (1,), "[1]"), (2, (0, 2, 5), "[2, 5]"), (1, (-1,), "[-1]")]
)
def test_class_tokens_outside_the_prefix(prefix, class_tokens, found):
    with pytest.raises(LayoutError, match="class tokens") as error:
        TokenLayout(Lattice(4, 6), Lattice(4, 6), prefix, class_tokens)
    assert says(error, found, f"{prefix} prefix tokens", "class_tokens=")


def test_negative_prefix():
    with pytest.raises(LayoutError, match="-1 prefix") as error:
        TokenLayout(Lattice(4, 6), Lattice(4, 6), -1)
    assert says(error, "num_prefix_tokens=")


def test_queries_and_keys_may_lie_on_lattices_of_their_own():
    layout = TokenLayout(Lattice(4, 6), Lattice(2, 3), 1, (0,))
    assert layout.num_queries == 25
    assert layout.num_keys == 7


@pytest.mark.parametrize(
    ("window", "shown"),
    [
        (Window((7, 7), (0, 0), 64), "64 windows of 7 x 7"),
        (Window((7, 7), (3, 3), 64), "64 windows of 7 x 7, shifted by 3 x 3"),
        (Window((4, 8), (0, 4), 2), "2 windows of 4 x 8, shifted by 0 x 4"),
        (Window((4, 8), (2, 0), 2), "2 windows of 4 x 8, shifted by 2 x 0"),
        (Window(None, (0, 0), 16), "16 windows"),
        (Window(None, (2, 2), 16), "16 windows, shifted by 2 x 2"),
        (Window((7, 7), (0, 0), 1), "1 windows of 7 x 7"),
    ],
)
def test_a_window_says_its_size_and_shift(window, shown):
    assert str(window) == shown
    assert window == Window(window.size, window.shift, window.per_image)


def test_class_token_positions():
    assert class_token_positions(None, 0) == ()
    assert class_token_positions(None, 1) == (0,)
    assert class_token_positions(None, 2) is None
    assert class_token_positions(3, 5) == (0, 1, 2)
    assert class_token_positions([4, 0], 5) == (4, 0)
    assert class_token_positions((), 5) == ()


# from_tensors, with_layout and the parts of AttentionMaps


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
    assert says(error, "layer 1", "within 0.0001", "softmax(-1)", "dropout")


@pytest.mark.parametrize(
    ("dtype", "off", "allowed"),
    [
        (torch.float32, 0.9e-4, True),
        (torch.float32, 1.2e-4, False),
        (torch.float64, 1.2e-4, False),
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
        assert says(error, f"within {5e-3 if dtype == torch.float16 else 1e-4:g}")


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
    assert says(error, "expected 16")


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
    for attempt in (lambda: wrap(maps, (3, 5), 2, 3), lambda: wrap(maps, (3, 5), 2, 1).with_layout((3, 5), 2, [2])):
        with pytest.raises(LayoutError, match=r"\[2\]") as error:
            attempt()
        assert says(error, "2 prefix tokens")


def test_with_layout_renames_the_tokens_of_the_same_maps():
    attention = wrap(random_maps((3, 5), prefix=1), (3, 5))
    other = attention.with_layout((2, 6), 4, class_tokens=2)
    assert other[0].layout.query == Lattice(2, 6)
    assert other[1].layout.class_tokens == (0, 1)
    assert other[0].explicit.data_ptr() == attention[0].explicit.data_ptr()
    assert attention[0].layout.query == Lattice(3, 5)


def reduced_maps(queries, keys, layers=2):
    logits = torch.randn(layers, 2, 3, queries, keys, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return list(logits.softmax(-1).unbind())


def test_keys_on_a_grid_of_their_own_are_named():
    maps = reduced_maps(1 + 24, 1 + 6)
    attention = AttentionMaps.from_tensors(maps, 1, (4, 6), key_grid=(2, 3))
    layout = attention[1].layout
    assert layout.query == Lattice(4, 6)
    assert layout.key == Lattice(2, 3, (2.0, 2.0))
    assert layout.key.extent == layout.query.extent
    assert layout.class_tokens == (0,)
    assert attention[0].kind == "reduced keys"
    assert torch.equal(attention[0].weights(), maps[0])
    assert "25 queries, 7 keys: 1 prefix + 4 x 6" in repr(attention)
    again = attention.with_layout((6, 4), 1, key_grid=(3, 2))
    assert again[0].layout.key == Lattice(3, 2, (2.0, 2.0))
    assert AttentionMaps.from_tensors(reduced_maps(4, 6), 0, (2, 2), key_grid=(2, 3))[0].kind == "reduced queries"
    uneven = AttentionMaps.from_tensors(reduced_maps(24, 49), 0, (4, 6), key_grid=(7, 7))[0].layout.key
    assert uneven.stride == pytest.approx((4 / 7, 6 / 7))
    assert uneven.extent == (4.0, 6.0)


@pytest.mark.parametrize(
    ("key_grid", "prefix"), [((2, 2), 1), ((3, 3), 1), ((2, 3), 0), ((2, 3), 2), ((4, 6), 1), (None, 1)]
)
def test_a_key_grid_that_does_not_fit_the_keys(key_grid, prefix):
    maps = reduced_maps(1 + 24, 1 + 6)
    attention = AttentionMaps.from_tensors(maps, 1, (4, 6), key_grid=(2, 3))
    for attempt in (
        lambda: AttentionMaps.from_tensors(maps, prefix, (4, 6), key_grid=key_grid),
        lambda: attention.with_layout((4, 6), prefix, key_grid=key_grid),
    ):
        with pytest.raises(LayoutError, match="25 queries and 7 keys") as error:
            attempt()
        assert says(error, "layer 0")


def test_a_key_grid_that_does_not_fit_is_named_in_the_message():
    """The queries fit: the message must say how many keys were expected."""
    maps = reduced_maps(1 + 24, 1 + 6)
    with pytest.raises(LayoutError, match="25 queries and 7 keys") as error:
        AttentionMaps.from_tensors(maps, 1, (4, 6), key_grid=(2, 2))
    assert says(error, "5 keys", "2 x 2", "key_grid=")


@pytest.mark.parametrize("key_grid", [6, (6,), (1, 2, 3), "23"], ids=str)
def test_a_key_grid_is_two_numbers(key_grid):
    maps = reduced_maps(25, 7)
    with pytest.raises(LayoutError, match="grid=") as error:
        AttentionMaps.from_tensors(maps, 1, (4, 6), key_grid=key_grid)
    assert says(error, repr(key_grid), "(height, width)")


@pytest.mark.parametrize("key_grid", [(0, 3), (2, 0), (-2, -3)], ids=str)
def test_a_key_grid_without_tokens(key_grid):
    with pytest.raises(LayoutError, match="token grid") as error:
        AttentionMaps.from_tensors(reduced_maps(25, 7), 1, (4, 6), key_grid=key_grid)
    assert says(error, f"{key_grid[0]} x {key_grid[1]}")


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
