"""What carries tokens and attention back onto the image: properties over views, grids and prefixes; and refusals."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acr_reg import Compose, Identity, Lattice, PerImage, TokenLayout, align_attention, align_tokens, token_validity
from tests.support.alignment import BATCH, cases, views_of
from tests.support.attention import generator, layout_of, numbers_in, says

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
