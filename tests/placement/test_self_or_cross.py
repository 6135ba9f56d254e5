"""Self-attention or cross-attention: queries and keys are the same tokens, or they are not, however they are passed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import capture_attention
from tests.support.capturing import images
from tests.support.models.tokens import Attention, Tokens


class Multihead(nn.Module):
    """nn.MultiheadAttention whose arguments ``call(block, x)`` makes."""

    def __init__(self, call: Callable[[Multihead, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.attn, self.norm, self.call = nn.MultiheadAttention(32, 4, batch_first=True), nn.LayerNorm(32), call
        self.q, self.k, self.pos = nn.Linear(32, 32), nn.Linear(32, 32), nn.Parameter(torch.randn(24, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.call(self, x)
        return x + self.attn(q, k, v, need_weights=False)[0]


SELF: dict[str, Callable[[Multihead, Tensor], tuple[Tensor, ...]]] = {
    "one tensor": lambda m, x: (x, x, x),
    "norm(x) three times": lambda m, x: (m.norm(x), m.norm(x), m.norm(x)),
    "positions added twice": lambda m, x: (x + m.pos, x + m.pos, x),
    "positions of queries only": lambda m, x: (x + m.pos, x, x),
    "a clone": lambda m, x: (x, x.clone(), x),
    "projections before": lambda m, x: (m.q(x), m.k(x), x),
    "a contiguous copy": lambda m, x: (x.mT.contiguous().mT, x, x),
    "a detached key": lambda m, x: (x, x.detach(), x),
    "a gate": lambda m, x: (x * m.q(x).sigmoid(), m.norm(x), x),
    "half of it and back": lambda m, x: (torch.cat(m.norm(x).chunk(2, -1), -1), m.k(x), x),
}


@pytest.mark.parametrize("spelling", SELF)
def test_self_attention_is_known_by_where_its_tokens_come_from(spelling: str) -> None:
    model = Tokens(Attention(), Multihead(SELF[spelling]))
    with capture_attention(model) as attention, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(images())
            assert [layer.name for layer in attention.take()] == ["blocks.0", "blocks.1.attn"]
            assert attention.skipped == ()


class ByPosition(Attention):
    """Attention to tokens that are given by position, as CroCo's decoder and trackers do."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.join(self.attend(self.split(x)[0], *self.split(other)[1:]))


class TwoImages(Tokens):
    def __init__(self, other: Callable[[Tensor], Tensor], fused: bool) -> None:
        super().__init__()
        self.own, self.cross, self.other = Attention(), ByPosition(fused=fused), other

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.embed(x), self.embed(self.other(x))
        return self.head(self.cross(self.own(a), b).mean(1))


@pytest.mark.parametrize("fused", [False, True], ids=["by hand", "fused"])
@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.roll(1, 0),
        lambda x: x.flip(0),
        lambda x: x.flip(-1),
        lambda x: torch.cat([x[1:], x[:1]]),
        lambda x: F.interpolate(x, scale_factor=2)[..., 16:48, 24:72],
    ],
    ids=["rolled", "other order", "mirrored", "next frame", "a crop"],
)
def test_attention_to_as_many_tokens_of_another_image_is_left_out_with_a_warning(other, fused: bool) -> None:
    model = TwoImages(other, fused)
    with capture_attention(model) as attention:
        for turn in range(2):
            model(images(3))
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                maps = attention.take()
            assert [layer.name for layer in maps] == ["own"]
            assert [name for name, _ in attention.skipped] == ["cross"]
            told = [str(w.message) for w in found if "leave out cross" in str(w.message)]
            assert len(told) == (1 if turn == 0 else 0)


def test_two_inputs_are_two_images() -> None:
    class Pair(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.cross = Attention(), ByPosition()

        def forward(self, x: Tensor, second: Tensor) -> Tensor:
            x, second = self.embed(x), self.embed(second)
            return self.cross(self.own(x), second)

    model = Pair()
    with capture_attention(model) as attention:
        model(images(), images())
        with pytest.warns(UserWarning, match="leave out cross"):
            maps = attention.take()
    assert [layer.name for layer in maps] == ["own"]


class Clip(nn.Module):
    """A text tower of buffers that runs before the image tower, or after it."""

    def __init__(self, prompts: int, text_first: bool, batch_text: bool = False) -> None:
        super().__init__()
        self.text = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        self.visual, self.text_first, self.batch_text = Tokens(Attention(), Attention()), text_first, batch_text
        self.register_buffer("prompts", torch.randn(prompts, 24, 32))

    def forward(self, x: Tensor) -> Tensor:
        if self.text_first:
            text = self.text(self.prompts)
            return self.visual(x) @ text[:, -1, :5].T
        return self.visual(x) @ self.text(self.prompts)[:, -1, :5].T


@pytest.mark.parametrize("keep", ["only", "first", "last", "all"])
@pytest.mark.parametrize("prompts", [1, 2, 10])
def test_a_text_tower_that_runs_first_is_no_run_of_the_images(prompts: int, keep) -> None:
    """Also where there are as many prompts as images, of as many tokens as patches."""
    with capture_attention(model := Clip(prompts, True), keep=keep) as attention:
        for _ in range(3):
            model(images())
            maps = attention.take()
            assert [layer.name for layer in maps] == ["visual.blocks.0", "visual.blocks.1"]
            assert (maps[0].layout.query.height, maps[0].layout.query.width) == (4, 6)


class Twice(Tokens):
    """A shared decoder that runs on two feature maps of the same images (WeCLIP+)."""

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Conv2d(3, 32, 8, 8) for _ in range(times))
        self.decoder = Attention()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.decoder(tokens) for tokens in [e(x).flatten(2).mT for e in self.embeddings]]


@pytest.mark.parametrize("times", [2, 3])
def test_a_part_that_runs_again_in_one_call_reads_the_same_images(times: int) -> None:
    with capture_attention(model := Twice(times), keep="all") as attention:
        for _ in range(3):
            model(images())
            runs = attention.take_all()
            assert len(runs) == times
            for maps in runs:
                assert (maps[0].layout.query.height, maps[0].layout.query.width) == (4, 6)
