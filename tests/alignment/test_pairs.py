"""The rows of both views are those of the aligned maps, and layers and views that are no pair are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acr_reg import (
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
)
from acr_reg.alignment.pairs import AlignedPair, plan_of
from tests.support.alignment import BATCH, cases
from tests.support.attention import explicit, generator, numbers_in, random_attention
from tests.support.pairs import carried_rows, refused


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_aligned_rows_are_align_attention_of_the_heads(data):
    view, source, target, maps = data.draw(cases(True).filter(lambda case: case[1].query == case[1].key))
    prefix = source.num_prefix_tokens
    one = torch.randn(BATCH, 2, target.num_queries, target.num_keys, generator=generator(1)).double().softmax(-1)
    layers = explicit(one, target), explicit(maps, source)
    plan = plan_of(*layers, view, blur_alike=False)
    patches = AlignedPair(*layers, plan).rows(plan.blocks[0])
    found_a, found_b = carried_rows(patches)
    whole = align_attention(maps, view, source, target)[:, :, prefix:, prefix:]
    shown = patches.shown[:, None, :, None]
    torch.testing.assert_close(found_b.where(shown, 0), whole[:, :, plan.tokens], rtol=1e-12, atol=1e-15)
    keys = patches.keys_valid[:, None, None, :]
    assert torch.equal(found_a, one[:, :, prefix:, prefix:].where(keys, 0)[:, :, plan.tokens])
    left_out = torch.ones(len(target.query), dtype=torch.bool).index_fill(0, plan.tokens, False)
    assert not whole[:, :, left_out].any()


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
