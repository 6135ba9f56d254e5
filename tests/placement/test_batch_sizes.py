"""The number of images decides nothing: kinds, layers, grids and maps are those of the images alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acr_reg import CaptureError, capture_attention
from tests.support.models.other import ChannelAttention, GroupedChannels
from tests.support.models.published import segformer, timm_model
from tests.support.models.reduced import ReducedKeys
from tests.support.models.tokens import GRID, Attention, Tokens
from tests.support.models.windows import Windows

BATCHES = (1, 2, 3, 24, 31, 32, 64)  # 24 tokens; heads of 8, channels of 32


class FlatWindows(Attention):
    """Windows of 2 x 3 tokens, with images, windows and heads in one axis (B windows heads, N, N)."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, GRID).unflatten(2, (-1, 3)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4)
        q, k, v = (t.flatten(0, 3) for t in self.split(groups))
        y = self.attend(q, k, v).unflatten(0, (*groups.shape[:3], self.num_heads))
        y = self.join(y).unflatten(3, (2, 3)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x + y.flatten(1, 2) if y.ndim == 4 else x + y


class Chunked(Attention):
    """Every token looks at all, in chunks of 8 queries: the chunks lie in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y = torch.cat([self.attend(part, k, v) for part in q.split(8, -2)], -2)
        return x + self.join(y)


class FlatHeads(Attention):
    """Images and heads in one axis, as nn.MultiheadAttention has them, without a word about their number."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in self.split(x))
        return x + self.join(self.attend(q, k, v).unflatten(0, (len(x), -1)))


class HeadsBeforeImages(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in self.split(x))
        return x + self.join(self.attend(q, k, v).unflatten(0, (-1, len(x))).transpose(0, 1))


class BehindClassToken(Tokens):
    def embed(self, x: Tensor) -> Tensor:
        tokens = super().embed(x)
        return torch.cat([tokens.new_zeros(len(x), 1, tokens.shape[2]), tokens], 1)


def describe(model: nn.Module, batch: Tensor) -> tuple[Any, list[Tensor]]:
    with capture_attention(model, no_grad=True) as attention, torch.no_grad():
        model(batch)
        try:
            maps = attention.take()
        except CaptureError:
            return attention.skipped, []
        kinds = [
            (layer.index, layer.name, layer.kind, layer.window, layer.placed, layer.why_unplaced, layer.shape[1:])
            for layer in maps
        ]
        skipped = [(name, reason) for name, reason in attention.skipped]
        return (kinds, skipped), [layer.weights()[:1] for layer in maps if layer.window is None]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "global": (lambda: Tokens(Attention(), Attention(fused=True)), (32, 48)),
    "channels": (
        lambda: Tokens(Attention(), ChannelAttention(), ChannelAttention(fused=True), GroupedChannels()),
        (32, 48),
    ),
    "channels behind a class token": (
        lambda: BehindClassToken(Attention(), ChannelAttention(), ChannelAttention(fused=True)),
        (32, 48),
    ),
    "windows": (lambda: Tokens(Windows(), Windows(axes="windows"), Windows(fused=True), Attention()), (32, 48)),
    "padded windows": (lambda: Tokens(Windows((3, 5)), Windows((6, 7), fused=True), Attention()), (32, 48)),
    "flat windows": (lambda: Tokens(FlatWindows(), FlatWindows(fused=True), Attention()), (32, 48)),
    "flat heads": (lambda: Tokens(FlatHeads(), FlatHeads(fused=True)), (32, 48)),
    "reduced keys": (lambda: Tokens(ReducedKeys(), Attention()), (32, 48)),
    "timm davit, wide": (
        timm_model("davit_tiny", depths=(1, 1, 1, 1), embed_dims=(32, 32, 64, 64), num_heads=(1, 1, 2, 2)),
        (64, 128),
    ),
    "timm xcit": (timm_model("xcit_nano_12_p16_224", embed_dim=128, depth=2, num_heads=2), (64, 64)),
    "timm twins": (timm_model("twins_svt_small", img_size=64, depths=(1, 1, 1, 1)), (64, 64)),
    "timm swin": (
        timm_model(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=24,
            depths=(1, 1, 1),
            num_heads=(2, 4, 8),
        ),
        (64, 64),
    ),
    "segformer": (segformer(), (64, 64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_every_size_are_those_of_their_images(name: str) -> None:
    build, size = MODELS[name]
    torch.manual_seed(0)
    model, images = build().eval(), torch.randn(2, 3, *size)
    expected, maps = describe(model, images)
    for batch in BATCHES:
        found, others = describe(model, images.repeat(-(-batch // 2), 1, 1, 1)[:batch])
        assert found == expected, f"{batch} images"
        for ours, others_map in zip(maps, others, strict=True):
            torch.testing.assert_close(others_map, ours, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [31, 32])
def test_a_later_batch_is_read_as_the_first(first: int) -> None:
    """From the second run on, only attention modules are watched."""
    model = Tokens(Attention(), ChannelAttention(), FlatWindows(), FlatHeads(), Windows())
    with capture_attention(model, no_grad=True) as attention, torch.no_grad():
        found = []
        for batch in (first, 1, 2, 24, 32, 64):
            model(torch.randn(batch, 3, 32, 48))
            maps = attention.take()
            found.append(([(m.name, m.kind, m.window, m.placed, m.shape[1:]) for m in maps], attention.skipped))
    assert all(each == found[0] for each in found)
    assert [kind for _, kind, *_ in found[0][0]] == ["global", "window", "global", "window"]


def test_heads_that_stand_before_images_are_refused() -> None:
    """One image does not show their order, so all modules stay watched until there are two."""
    model = Tokens(HeadsBeforeImages(), Attention())
    with capture_attention(model) as attention:
        for batch, refused in ((1, False), (1, False), (2, True), (3, True), (1, True)):
            model(torch.randn(batch, 3, 32, 48))
            why = attention.take()[0].why_unplaced
            assert (why is not None and "heads stand before images" in why) is refused
