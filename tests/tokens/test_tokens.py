"""Lattices, layouts and class tokens: what they count and what they refuse."""

import dataclasses

import pytest

from acr_reg import Lattice, LayoutError, TokenLayout
from acr_reg.tokens import class_token_positions
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


@pytest.mark.parametrize(
    ("prefix", "class_tokens", "found"), [(1, (1,), "[1]"), (2, (0, 2, 5), "[2, 5]"), (1, (-1,), "[-1]")]
)
def test_class_tokens_outside_the_prefix(prefix, class_tokens, found):
    with pytest.raises(LayoutError, match="Class tokens at") as error:
        TokenLayout(Lattice(4, 6), Lattice(4, 6), prefix, class_tokens)
    assert says(error, found, f"{prefix} prefix tokens", "class_tokens=")


def test_negative_prefix():
    with pytest.raises(LayoutError, match="num_prefix_tokens=-1") as error:
        TokenLayout(Lattice(4, 6), Lattice(4, 6), -1)
    assert says(error, "0 or more")


def test_queries_and_keys_may_lie_on_lattices_of_their_own():
    layout = TokenLayout(Lattice(4, 6), Lattice(2, 3), 1, (0,))
    assert layout.num_queries == 25
    assert layout.num_keys == 7


def test_class_token_positions():
    assert class_token_positions(None, 0) == ()
    assert class_token_positions(None, 1) == (0,)
    assert class_token_positions(None, 2) is None
    assert class_token_positions(3, 5) == (0, 1, 2)
    assert class_token_positions([4, 0], 5) == (4, 0)
    assert class_token_positions((), 5) == ()
