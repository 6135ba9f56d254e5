"""Lattices, layouts and class tokens: what they count and what they refuse."""

import dataclasses

import pytest
import torch

from acr_reg import Lattice, LayoutError, TokenLayout
from acr_reg.tokens import patch_index, token_order, with_class_tokens
from tests.support.attention import says


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


def test_lattices_are_alike_whether_their_offset_is_known_or_not():
    unknown = dataclasses.replace(Lattice(8, 12), offset_known=False)
    assert unknown == Lattice(8, 12)
    assert hash(unknown) == hash(Lattice(8, 12))
    assert repr(unknown) == repr(Lattice(8, 12))


@pytest.mark.parametrize("grid", [(0, 6), (4, 0), (-1, 6)])
def test_a_grid_without_tokens(grid):
    with pytest.raises(LayoutError, match="token grid") as error:
        Lattice(*grid)
    assert says(error, f"{grid[0]} x {grid[1]}", "1 x 1", "(height, width)")


def layout_of(prefix=0, suffix=0, between=(), class_tokens=(), grid=(2, 3)):
    return TokenLayout(Lattice(*grid), Lattice(*grid), prefix, class_tokens, suffix, between)


@pytest.mark.parametrize(
    ("prefix", "class_tokens", "found"), [(1, (1,), "[1]"), (2, (0, 2, 5), "[2, 5]"), (1, (-1,), "[-1]")]
)
def test_class_tokens_on_a_patch(prefix, class_tokens, found):
    with pytest.raises(LayoutError, match="Class tokens at") as error:
        layout_of(prefix, class_tokens=class_tokens, grid=(4, 6))
    assert says(error, found, f"{prefix} prefix tokens", "4 x 6", "class_tokens=")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"suffix": 2, "class_tokens": (5, 6)}, "[5]"),  # token 5 is the last patch
        ({"suffix": 1, "class_tokens": (7,)}, "[7]"),  # there are 7 tokens
        ({"suffix": 1, "class_tokens": (-2, -1)}, "[-2]"),
        ({"suffix": 1, "class_tokens": (-8,)}, "[-8]"),
        ({"between": (3,), "class_tokens": (2,)}, "[2]"),
    ],
)
def test_class_tokens_on_a_patch_or_beyond_the_tokens(fields, found):
    with pytest.raises(LayoutError, match="Class tokens at") as error:
        layout_of(**fields)
    assert says(error, found, "2 x 3")


def test_class_tokens_may_stand_anywhere_beside_the_patches():
    assert layout_of(1, 2, (4, 5), (0, 4, 5, 9)).class_tokens == (0, 4, 5, 9)
    assert layout_of(suffix=2, class_tokens=(-1, -2)).class_tokens == (7, 6)
    assert layout_of(suffix=2, class_tokens=[-1]) == layout_of(suffix=2, class_tokens=(7,))
    assert hash(layout_of(between=[3])) == hash(layout_of(between=(3,)))


@pytest.mark.parametrize("name", ["num_prefix_tokens", "num_suffix_tokens"])
def test_a_negative_count(name):
    with pytest.raises(LayoutError, match=f"{name}=-1") as error:
        TokenLayout(Lattice(4, 6), Lattice(4, 6), **{name: -1})
    assert says(error, "0 or more")


@pytest.mark.parametrize(
    "between",
    [(0,), (1,), (7,), (8,), (-3,), (3, 3), (4, 3), (3, 7, 9)],
    ids=str,
)
def test_tokens_between_patches_stand_between_the_first_and_the_last_in_order(between):
    """With one token before and one behind; tokens at either end would be prefix or suffix."""
    last = 6 + len(between)
    with pytest.raises(LayoutError, match="between=") as error:
        layout_of(1, 1, between)
    assert says(error, str(between), "token 1", f"token {last}", "prefix or suffix")


def test_tokens_between_patches_need_as_many_keys_as_queries():
    with pytest.raises(LayoutError, match="between=") as error:
        TokenLayout(Lattice(4, 6), Lattice(2, 3), between=(3,))
    assert says(error, "4 x 6", "2 x 3", "(3,)")


def test_queries_and_keys_may_lie_on_lattices_of_their_own():
    layout = TokenLayout(Lattice(4, 6), Lattice(2, 3), 1, (0,))
    assert layout.num_queries == 25
    assert layout.num_keys == 7
    behind = TokenLayout(Lattice(4, 6), Lattice(2, 3), 1, (0,), 2)
    assert (behind.num_other_tokens, behind.num_queries, behind.num_keys) == (3, 27, 9)
    assert behind.order("key") == (0, 7, 8, *range(1, 7))
    assert behind.order("query") == (0, 25, 26, *range(1, 25))


def test_the_order_brings_the_other_tokens_to_the_front():
    assert layout_of(3).order("query") is None
    assert layout_of().order("key") is None
    assert layout_of(suffix=1).order("query") == (6, 0, 1, 2, 3, 4, 5)
    assert layout_of(between=(3,)).order("key") == (3, 0, 1, 2, 4, 5, 6)
    assert layout_of(1, 2, (2, 5)).order("query") == (0, 2, 5, 9, 10, 1, 3, 4, 6, 7, 8)
    assert layout_of(1, 2, (2, 5)).other_tokens == (0, 2, 5, 9, 10)


@pytest.mark.parametrize("fields", [{"prefix": 2}, {"suffix": 2}, {"prefix": 1, "suffix": 2, "between": (3, 4)}])
def test_the_patches_of_a_sequence(fields):
    """Read from a sequence that was built token by token."""
    layout = layout_of(**fields)
    between, patches = set(fields.get("between", ())), iter(range(6))
    names = ["prefix"] * fields.get("prefix", 0)
    while len(names) < layout.num_queries - fields.get("suffix", 0):
        names.append("between" if len(names) in between else next(patches))
    names += ["suffix"] * fields.get("suffix", 0)
    index = patch_index(layout, "query", "cpu")
    assert torch.arange(len(names))[index].tolist() == [i for i, name in enumerate(names) if isinstance(name, int)]
    order = token_order(layout, "query", "cpu")
    order = range(len(names)) if order is None else order.tolist()
    assert [names[i] for i in order][layout.num_other_tokens :] == [0, 1, 2, 3, 4, 5]
    assert [names[i] for i in order[: layout.num_other_tokens]] == [n for n in names if isinstance(n, str)]


def test_an_index_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        index = token_order(layout_of(suffix=5), "query", "cpu")
    values = torch.randn(11, requires_grad=True)
    values.index_select(0, index).square().sum().backward()
    assert torch.allclose(values.grad, 2 * values)


def test_a_layout_in_words():
    assert str(layout_of(1)) == "1 prefix + 2 x 3"
    assert str(layout_of(1, 4)) == "1 prefix + 2 x 3 + 4 suffix"
    assert str(layout_of(0, 1, (2, 5))) == "0 prefix + 2 x 3 with 2 between + 1 suffix"
    assert layout_of(1, 4, (2,)).other_names == "1 prefix and 1 in-between and 4 suffix tokens"
    reduced = TokenLayout(Lattice(4, 6), Lattice(2, 3), 1, (), 1)
    assert (str(reduced), reduced.describe("key")) == ("1 prefix + 4 x 6 + 1 suffix", "1 prefix + 2 x 3 + 1 suffix")


@pytest.mark.parametrize(
    ("fields", "given", "positions"),
    [
        ({}, None, ()),
        ({"prefix": 1}, None, (0,)),
        ({"suffix": 1}, None, (6,)),
        ({"between": (3,)}, None, (3,)),
        ({"prefix": 2}, None, None),
        ({"prefix": 1, "suffix": 1}, None, None),
        ({"prefix": 5}, 3, (0, 1, 2)),
        ({"prefix": 1, "between": (3,), "suffix": 2}, 3, (0, 3, 8)),
        ({"suffix": 3}, 2, (6, 7)),
        ({"prefix": 5}, [4, 0], (4, 0)),
        ({"prefix": 1, "suffix": 2}, [-1, 0], (8, 0)),
        ({"prefix": 5}, (), ()),
        ({"suffix": 5}, 0, ()),
    ],
)
def test_class_tokens_as_users_give_them(fields, given, positions):
    assert with_class_tokens(layout_of(**fields), given).class_tokens == positions


@pytest.mark.parametrize("count", [-1, 4])
def test_a_count_of_class_tokens_that_is_none(count):
    """-1 is no position: it would be the last token only in a list."""
    with pytest.raises(LayoutError, match=f"class_tokens={count}") as error:
        with_class_tokens(layout_of(1, 2), count)
    assert says(error, "1 prefix and 2 suffix tokens", "0 to 3", "[-1]")
