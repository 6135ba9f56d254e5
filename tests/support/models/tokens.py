"""Patches through blocks without a class token, and plain attention for them, fused or by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

GRID = (4, 6)
SIZE = (32, 48)  # px: patches of 8


class Tokens(nn.Module):
    """Patches of an image as tokens (B, N, C), through blocks and on to 5 logits. There is no class token."""

    def __init__(self, *blocks: nn.Module, width: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 5)

    def embed(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Self-attention over (..., N, C), fused or by hand; ``seen`` is the map by hand, as it met the values."""

    def __init__(self, width: int = 32, heads: int = 4, fused: bool = False) -> None:
        super().__init__()
        self.num_heads, self.fused = heads, fused
        self.parts = heads  # the same, under a name that says nothing
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.seen: Tensor | None = None

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (..., H, N, d)."""
        return self.qkv(x).unflatten(-1, (3, self.parts, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        self.seen = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.seen @ v

    def join(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(-3, -2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.join(self.attend(*self.split(x)))


class Maps(Tokens):
    """The same patches, kept as maps (B, C, h, w)."""

    def embed(self, x: Tensor) -> Tensor:
        return self.patches(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class ByConvolution(nn.Module):
    """Attention over maps (B, C, h, w), projected by 1x1 convolutions; ``order`` is that of its last product."""

    def __init__(self, heads: int = 4, order: str = "A V") -> None:
        super().__init__()
        self.num_heads, self.order = heads, order
        self.qkv, self.proj = nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (B, H, d, N)
        if self.order == "fused":
            y = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        else:
            weights = (q.transpose(-2, -1) @ k * q.shape[-2] ** -0.5).softmax(-1)
            y = v @ weights.transpose(-2, -1) if self.order == "V^T A^T" else (weights @ v.mT).mT
        return x + self.proj(y.flatten(1, 2).unflatten(2, size))


class Rows(nn.Module):
    """A stem and blocks over (B, h, w, C), called one by one, also by ``forward_features`` from outside."""

    def __init__(self, stem: Sequence[nn.Module], *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.ModuleList(stem), nn.ModuleList(blocks), nn.Linear(32, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        for convolution in self.stem:
            x = convolution(x)
        x = x.movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((1, 2)))


class OnMaps(Attention):
    """Attention given maps (B, h, w, C), of which a few rows look like an image of as many channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
