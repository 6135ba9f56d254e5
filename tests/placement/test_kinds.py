"""Attention of another kind is skipped by name: between channels, of few queries, to other tokens, or none at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import capture_attention
from tests.support.capturing import affinity_loss, captured, grids, images, kinds, nothing_captured
from tests.support.models import MultiheadBlock, PlainEncoder, other
from tests.support.models.other import ChannelAttention, ClassAttention, Decoder, GroupedChannels, Mixing, Pooling
from tests.support.models.reduced import PoolingOfFour
from tests.support.models.tokens import SIZE, Attention, ByConvolution, Maps, Tokens

# test_self_or_cross.py tests this warning
pytestmark = pytest.mark.filterwarnings("ignore:The maps leave out")

# ---- attention between channels


@pytest.mark.parametrize("build", [ChannelAttention, GroupedChannels, lambda: ChannelAttention(fused=True)])
@pytest.mark.parametrize("square", [False, True], ids=["fewer channels than tokens", "as many"])
def test_channel_attention_is_skipped_by_name(build: Callable[[], nn.Module], square: bool) -> None:
    """Also with 8 channels a head and 4 x 2 tokens, where only the values' order in memory tells."""
    x = images(size=(32, 16) if square else SIZE)
    maps, skipped = captured(Tokens(Attention(), build()), x)
    assert [layer.name for layer in maps] == ["blocks.0"]
    assert skipped["blocks.1"] == "channel attention: 8 channels attend to 8 channels over all tokens"
    error = nothing_captured(Tokens(build()), x)
    assert "blocks.0: channel attention: 8 channels attend to 8 channels over all tokens" in str(error.value)


@pytest.mark.parametrize("size", [(32, 16), (64, 32), SIZE], ids=["N = d", "N = C", "N > d"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Tokens(Attention()),
        lambda: Tokens(Attention(fused=True)),
        lambda: Tokens(Attention(heads=1)),
        lambda: Tokens(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)),
        lambda: Maps(ByConvolution()),
        lambda: Maps(ByConvolution(order="V^T A^T")),
        lambda: Maps(ByConvolution(order="fused")),
        lambda: Maps(ByConvolution(heads=1, order="V^T A^T")),
    ],
    ids=[
        "by hand",
        "fused",
        "one head",
        "nn.MultiheadAttention",
        "maps",
        "maps V^T A^T",
        "maps fused",
        "maps one head",
    ],
)
def test_as_many_tokens_as_a_head_is_wide_are_not_channels(
    build: Callable[[], nn.Module], size: tuple[int, int]
) -> None:
    (layer,) = captured(build(), images(size=size))[0]
    grid = (size[0] // 8, size[1] // 8)
    assert layer.kind == "global"
    assert layer.shape[2:] == (grid[0] * grid[1],) * 2
    assert grids(layer) == (grid, grid)


# ---- attention to other tokens, and to few


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (ClassAttention, "pooling or class attention: 1 query attends to 24 keys"),
        (lambda: ClassAttention(fused=True), "pooling or class attention: 1 query attends to 24 keys"),
        (lambda: PoolingOfFour(6), "cross-attention: 6 queries attend to 24 keys of other tokens"),
        (other.SomeKeys, "24 queries and 7 keys fit no two grids of the image"),
        (other.MeanImage, "not the tokens of the images: a batch of 1 for 2 images"),
    ],
    ids=["one query by hand", "one query fused", "queries of its own", "keys of no grid", "another batch"],
)
def test_attention_that_is_not_between_the_tokens_is_skipped_by_name(
    build: Callable[[], nn.Module], reason: str
) -> None:
    maps, skipped = captured(Tokens(Attention(), build()), images())
    assert [layer.name for layer in maps] == ["blocks.0"]
    assert kinds(maps) == ["global"]
    assert reason in skipped["blocks.1"]


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda m, x, y: m(x, key_value_states=y), 24),
        (lambda m, x, y: m(x, encoder_hidden_states=y), 24),
        (lambda m, x, y: m(x, key=y), 24),
        (lambda m, x, y: m(x, k=y), 24),
        (lambda m, x, y: m(x, kv=y), 24),
        (lambda m, x, y: m(x, memory=y), 24),
        (lambda m, x, y: m(x, context=y), 24),
        (lambda m, x, y: m(x, context=y), 6),  # as many as reduced keys would be
        (lambda m, x, y: m(key=y, x=x), 24),  # in whichever order they are written
        (lambda m, x, y: m(context=y, x=x), 6),
        (lambda m, x, y: m(x, y), 6),  # by their number alone
        (lambda m, x, y: m(x, y), 23),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_cross_attention_is_told_by_names_or_by_two_tensors(call, count: int) -> None:
    maps, skipped = captured(Tokens(Decoder(call, count)), images())
    assert [layer.name for layer in maps] == ["blocks.0.own"]
    assert skipped["blocks.0.second"] == f"cross-attention: 24 queries attend to {count} keys of other tokens"


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y: m(x, key=x),
        lambda m, x, y: m(key=x, x=x),
        lambda m, x, y: m(x, key_value_states=None),
        lambda m, x, y: m(x, x),
        lambda m, x, y: m(x, y[0]),  # positions (N, C)
        lambda m, x, y: m(x, y[:, 0]),  # a condition of each image (B, C)
        lambda m, x, y: m(x, torch.zeros(2, 7, 2, dtype=torch.int64)),  # indices
        lambda m, x, y: m(x, torch.ones(2, 1, 24, dtype=torch.bool)),  # a mask
    ],
    ids=["key=x", "key=x first", "None", "twice", "positions", "condition", "indices", "mask"],
)
def test_self_attention_that_is_given_more_than_its_tokens(call) -> None:
    maps, skipped = captured(Tokens(Decoder(call)), images())
    assert [layer.name for layer in maps] == ["blocks.0.own", "blocks.0.second"]
    assert skipped == {}


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("named", [True, False], ids=["by name", "in order"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_multihead_attention_whose_queries_are_not_its_keys(weights: bool, named: bool, batch_first: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("own", "positions", "cross"):
                setattr(self, name, nn.MultiheadAttention(32, 4, batch_first=batch_first))

        @staticmethod
        def call(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if named:
                return attention(query=q, key=k, value=v, need_weights=weights)[0]
            return attention(q, k, v, need_weights=weights)[0]

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            x = self.call(self.own, x, x, x)
            placed = x + torch.linspace(0, 1, 32)
            x = self.call(self.positions, placed, placed, x)  # DETR: values without positions are the same tokens
            others = x.roll(1, 0 if batch_first else 1)  # of the other image
            x = self.call(self.cross, x, others, others)
            return x if batch_first else x.transpose(0, 1)

    maps, skipped = captured(Tokens(Block()), images())
    assert [layer.name for layer in maps] == ["blocks.0.own", "blocks.0.positions"]
    assert kinds(maps) == ["global", "global"]
    assert "cross-attention" in skipped["blocks.0.cross"]


def test_other_attention_is_skipped_by_name_and_reason() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attention = MultiheadBlock(False)
            self.cross = nn.MultiheadAttention(32, 4, batch_first=True)
            self.pool = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.self_attention(x)
            x = self.cross(x, x.flip(1), x.flip(1), need_weights=False)[0]
            F.softmax(x, dim=1)
            return self.pool(x[:, :1], x, x, need_weights=False)[0].expand(-1, 25, -1)

    model = PlainEncoder(Decoder())
    with capture_attention(model) as attention:
        model(images())
        (layer,) = attention.take()
    assert layer.name == "encoder.self_attention.attention"
    reasons = dict(attention.skipped)
    assert "cross-attention" in reasons["encoder.cross"]
    assert "encoder.pool" in reasons


# ---- softmaxes that make no attention of tokens


NO_MAP = [
    (other.LinearAttention, "linear attention or a gate: a softmax over (2, 4, 24, 8) of no product of queries"),
    (other.LinearOverTheLastAxis, "linear attention or a gate: a softmax over (2, 4, 8, 24) of no product"),
    (other.Gate, "linear attention or a gate: a softmax over (2, 24, 2) of no product of queries and keys"),
    (other.OverTheQueries, "no attention over keys: a softmax over axis -2 of (2, 4, 24, 24), not the last"),
    (other.OverTheHeads, "no attention over keys: a softmax over axis 1 of (2, 4, 24, 24), not the last"),
    (other.WithoutValues, "a softmax over (2, 4, 24, 24) that met no values"),
    (other.SumsTheQueries, "no attention of queries to keys: the product with the values sums over the queries"),
    (other.BetweenImages, "attention between images, not their tokens: a softmax over (2, 2)"),
]


@pytest.mark.parametrize(("build", "reason"), NO_MAP, ids=lambda v: getattr(v, "__name__", ""))
def test_what_is_no_attention_of_tokens_is_told_by_name_and_reason(build: type[nn.Module], reason: str) -> None:
    maps, skipped = captured(Tokens(Attention(), build(), Attention()), images())
    assert [layer.name for layer in maps] == ["blocks.0", "blocks.2"]
    assert any(reason in found for found in skipped.values()), skipped
    assert reason in str(nothing_captured(Tokens(build()), images()).value)


def test_pooling_beside_attention_is_no_missing_attention() -> None:
    maps, skipped = captured(Tokens(Mixing(Pooling()), Mixing(Attention()), Mixing(Pooling())), images())
    assert [layer.name for layer in maps] == ["blocks.1.token_mixer"]
    assert skipped == {}
    assert affinity_loss()(maps, maps) > 0
