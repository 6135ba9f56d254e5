"""What carries tokens and attention back onto the image: properties over views, grids and prefixes; and refusals."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    VerticalFlip,
    align_attention,
    align_tokens,
    token_validity,
)
from tests.support.attention import explicit, generator, layout_of, random_attention, random_maps, says
from tests.support.pairs import aligned_rows

# Properties

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


both_kinds = pytest.mark.parametrize("exact", [True, False], ids=["whole tokens", "resampled"])


def on_each_kind(examples):
    """A property over exact and over resampled views."""

    def decorate(check):
        @both_kinds
        @given(data=st.data())
        @settings(max_examples=examples, deadline=None)
        def test(exact, data):
            check(*data.draw(cases(exact)), exact)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


@on_each_kind(80)
def test_alignment_commutes_with_row_sums(view, source, target, maps, exact):
    """The mass of each row on the keys that the image shows, carried as any value of its query is."""
    aligned = align_attention(maps, view, source, target)
    prefix = source.num_prefix_tokens
    seen = token_validity(view.inverse, target.key, source.key)[:, None, None]
    valid = token_validity(view, source.key, target.key)
    mass = torch.cat([maps[..., :prefix].sum(-1, True), (maps[..., prefix:] * seen).sum(-1, True)], -1)
    mass[..., 1] *= valid.any(1)[:, None, None]  # of a part too small to hold a token's centre nothing is left
    wanted = align_tokens(mass, view, source.query, target.query, prefix)
    found = torch.stack([aligned[..., :prefix].sum(-1), aligned[..., prefix:].sum(-1)], -1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)


@on_each_kind(40)
def test_alignment_commutes_with_concatenation(view, source, target, maps, exact):
    heads = [align_attention(maps[:, h : h + 1], view, source, target) for h in range(2)]
    found = align_attention(maps, view, source, target)
    near = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-9, "atol": 1e-15}
    torch.testing.assert_close(found, torch.cat(heads, 1), **near)
    tokens = maps[:, 0, :, : 3 + source.num_prefix_tokens % 3]
    apart = [align_tokens(c, view, source.query, target.query, source.num_prefix_tokens) for c in tokens.split(1, -1)]
    found = align_tokens(tokens, view, source.query, target.query, source.num_prefix_tokens)
    torch.testing.assert_close(found, torch.cat(apart, -1), **near)


@on_each_kind(40)
def test_aligned_rows_stay_non_negative_and_within_their_mass(view, source, target, maps, exact):
    aligned = align_attention(maps, view, source, target)
    prefix = source.num_prefix_tokens
    assert aligned.isfinite().all()
    assert aligned.min() >= 0
    assert aligned.sum(-1).max() <= 1 + 1e-6
    hidden = ~token_validity(view, source.key, target.key)[:, None, None, :].expand(BATCH, 2, len(aligned[0, 0]), -1)
    assert (aligned[..., prefix:][hidden] == 0).all()
    hidden = ~token_validity(view, source.query, target.query)[:, None, :, None].expand(BATCH, 2, -1, aligned.shape[-1])
    assert (aligned[:, :, prefix:][hidden] == 0).all()


@on_each_kind(30)
def test_each_image_is_aligned_by_its_own_view(view, source, target, maps, exact):
    whole = align_attention(maps, view, source, target)
    for image in range(BATCH):
        own = align_attention(maps[image : image + 1], view.of_image(image), source, target)
        # An image whose own view falls on whole tokens is indexed, beside others it is resampled by weights of 0 and 1.
        torch.testing.assert_close(own, whole[image : image + 1], rtol=1e-6, atol=1e-12)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_aligned_rows_are_align_attention_of_the_heads(data):
    view, source, target, maps = data.draw(cases(True).filter(lambda case: case[1].query == case[1].key))
    prefix = source.num_prefix_tokens
    one = torch.randn(BATCH, 2, target.num_queries, target.num_keys, generator=generator(1)).double().softmax(-1)
    _, patches = aligned_rows(explicit(one, target), explicit(maps, source), view)
    aligned = align_attention(maps, view, source, target)
    shown = patches.shown[:, None, :, None]
    expected = aligned[:, :, prefix:, prefix:]
    assert torch.equal(patches.b.where(shown, 0), expected)
    keys = patches.keys_valid[:, None, None, :]
    assert torch.equal(patches.a, one[:, :, prefix:, prefix:].where(keys, 0))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_composition_is_the_sequence(data):
    grid = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    first, between = data.draw(views_of(grid, True))
    second, grid_b = data.draw(views_of(between, True))
    prefix = data.draw(st.integers(0, 24))
    layouts = [TokenLayout(Lattice(*size), Lattice(*size), prefix) for size in (grid_b, between, grid)]
    maps = torch.rand(BATCH, 2, layouts[0].num_queries, layouts[0].num_keys, generator=generator(1))
    steps = align_attention(align_attention(maps, second, *layouts[:2]), first, *layouts[1:])
    at_once = align_attention(maps, Compose([first, second]), layouts[0], layouts[2])
    assert torch.equal(steps, at_once)
    tokens = maps[:, 0]
    steps = align_tokens(
        align_tokens(tokens, second, layouts[0].query, layouts[1].query, prefix),
        first,
        layouts[1].query,
        layouts[2].query,
        prefix,
    )
    assert torch.equal(
        steps, align_tokens(tokens, Compose([first, second]), layouts[0].query, layouts[2].query, prefix)
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_alignment_commutes_with_transposition_where_queries_and_keys_lie_alike(data):
    grid = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    view, grid_b = data.draw(views_of(grid, True))
    prefix = data.draw(st.integers(0, 24))
    source, target = (TokenLayout(Lattice(*size), Lattice(*size), prefix) for size in (grid_b, grid))
    maps = torch.rand(BATCH, 2, source.num_queries, source.num_keys, generator=generator(1))
    assert torch.equal(align_attention(maps, view, source, target).mT, align_attention(maps.mT, view, source, target))


@pytest.mark.parametrize("prefix", [0, 1, 5, 24])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (5, 3)], ids=str)
def test_the_identity_changes_no_bit(grid, prefix):
    layout = layout_of(grid, prefix, ())
    maps = torch.rand(2, 3, layout.num_queries, layout.num_keys, generator=generator(1))
    assert torch.equal(align_attention(maps, Identity(), layout, layout), maps)
    assert torch.equal(align_tokens(maps[:, 0], Identity(), layout.query, layout.query, prefix), maps[:, 0])


# Refusals


def pixels(grid, patch=16.0, prefix=1):
    """Attention that knows of its images' pixels."""
    layout = layout_of(grid, prefix, stride=(patch, patch))
    return AttentionMaps([explicit(random_maps(grid, prefix, layers=1)[0], layout)])


def refused(view, a, b, match, *fragments, **call):
    with pytest.raises(ValueError, match=match) as error:
        AllPairsConsistencyLoss(view, 0.0, 1.0)(a, b, **call)
    assert says(error, *fragments)
    return error


def numbers_in(error):
    return set(re.findall(r"\d+", str(error.value)))


@pytest.mark.parametrize(
    ("view", "facts"),
    [
        (Crop(0, 0, 64, 64, image_size=(96, 160)), ["128 x 128 px", "96 x 160 px", "first view"]),
        (Crop(0, 0, 64, 64, size=96, image_size=(128, 128)), ["64 x 64 px", "96 x 96 px", "second view"]),
    ],
    ids=["of images of another size", "resized to another size than the second view had"],
)
def test_a_crop_that_does_not_fit_the_images(view, facts):
    refused(view, pixels((8, 8)), pixels((4, 4)), "images of", "layer 0", *facts)


@pytest.mark.parametrize("view", [Rotate90(1), Compose([Rotate90(3), HorizontalFlip()])], ids=repr)
def test_a_quarter_turn_of_queries_whose_keys_were_not_turned(view):
    layouts = [
        TokenLayout(Lattice(*query, (8.0, 8.0)), Lattice(2, 3, (16.0, 16.0)), 0, ()) for query in ((4, 6), (6, 4))
    ]
    rows = [torch.rand(2, 2, 24, 6, generator=generator(k)).softmax(-1).requires_grad_() for k in (1, 2)]
    a, b = (AttentionMaps([explicit(r, layout)]) for r, layout in zip(rows, layouts, strict=True))
    refused(view, a, b, "key grids of 2 x 3 and 2 x 3", "second 3 x 2", "layer 0", repr(view))


@pytest.mark.parametrize("where", ["view", "view_a"])
def test_views_of_as_many_images_as_another_batch_has(where):
    view = PerImage([HorizontalFlip(), Identity(), VerticalFlip()])
    a, b = (random_attention((4, 4), seed=seed) for seed in (1, 2))
    call = {} if where == "view" else {"view_a": view}
    error = refused(view if where == "view" else Identity(), a, b, "batch", **call)
    assert numbers_in(error) == {"2", "3"}


def test_views_of_two_batches():
    two, three = PerImage([Identity()] * 2), PerImage([HorizontalFlip()] * 3)
    a, b = (random_attention((4, 4), seed=seed) for seed in (1, 2))
    assert numbers_in(refused(two, a, b, "batch", view_a=three)) == {"2", "3"}


def test_two_crops_of_images_of_two_sizes():
    a, b = (random_attention((4, 4), seed=seed) for seed in (1, 2))
    view_a, view = Crop(0, 0, 4, 4, image_size=(8, 8)), Crop(0, 0, 4, 4, image_size=(6, 6))
    refused(view, a, b, "8 x 8", "takes 6 x 6", view_a=view_a)


@pytest.mark.parametrize("factor", [0.1, (1.0, 0.05)], ids=str)
def test_a_scale_that_leaves_no_token(factor):
    a, b = random_attention((4, 6)), random_attention((1, 1))
    refused(Scale(factor), a, b, "4 x 6", "at least 1 x 1", "x 0" if isinstance(factor, tuple) else "0 x 1")


@pytest.mark.parametrize("grid_b", [(2, 4), (6, 4), (8, 8)], ids=str)
def test_a_crop_of_which_the_second_view_has_other_tokens(grid_b):
    view = Crop(0, 2, 4, 4, image_size=(8, 8))
    a, b = random_attention((8, 8)), random_attention(grid_b)
    refused(view, a, b, f"8 x 8 and {grid_b[0]} x {grid_b[1]}", "second 4 x 4", repr(view))


def test_valid_of_another_batch_beside_a_view_of_the_first_maps():
    a, b = (random_attention((4, 4), seed=seed) for seed in (1, 2))
    valid = torch.ones(3, 4, 4)
    refused(Identity(), a, b, "valid", "shape (3, 4, 4)", "not (2, H, W)", view_a=HorizontalFlip(), valid=valid)


def test_what_is_no_map_and_no_token_of_a_layout():
    layout = layout_of((2, 3))
    for maps, fragments in [
        (torch.rand(2, 7, 7), ("shape (2, 7, 7)", "not (B, H, N, M)")),
        (torch.rand(2, 1, 8, 7), ("Dimension -2", "8 tokens", "not 7", "1 prefix + 2 x 3")),
        (torch.rand(2, 1, 7, 6), ("Dimension -1", "6 tokens", "not 7")),
    ]:
        with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
            align_attention(maps, Identity(), layout, layout)
        assert says(error, *fragments)
    with pytest.raises(ValueError, match="5 tokens") as error:
        align_tokens(torch.rand(2, 5, 3), Identity(), layout.query, layout.query, 1)
    assert says(error, "not 7", "num_prefix_tokens")
    with pytest.raises(ValueError, match="batch") as error:
        align_tokens(torch.rand(2, 7, 3), PerImage([Identity()] * 3), layout.query, layout.query, 1)
    assert numbers_in(error) == {"2", "3"}
