"""Vision transformers whose projections stand apart, so that parallelize_module can split them over ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models.plain import PlainEncoder


def attend(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    """Attention of as many heads of 8 channels as there are: on a rank, of those of the rank."""
    q, k, v = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in (q, k, v))
    if fused:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


class Kernel(nn.Module):
    """The kernel of attention alone."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.fused)


class SplitAttention(nn.Module):
    """Projections and kernel in one module."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v, self.proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(self.q(x), self.k(x), self.v(x), self.fused))


class SplitBlock(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(32), SplitAttention(fused)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.fc1(self.norm2(x)).relu())


class OutsideBlock(nn.Module):
    """Projections beside the module of the kernel."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(32, 32) for _ in range(4))
        self.attn = Kernel(fused)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.attn(self.q(x), self.k(x), self.v(x)))


class InlineBlock(nn.Module):
    """Attention and MLP written out in the forward of one module."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v, self.proj = (nn.Linear(32, 32) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(attend(self.q(x), self.k(x), self.v(x), self.fused))
        return x + self.fc2(self.fc1(x).relu())


def split_vit(fused: bool, block: type[nn.Module] = SplitBlock) -> nn.Module:
    """A model in float64 with 4 heads in each of two layers."""
    return PlainEncoder(nn.Sequential(block(fused), block(fused))).double()
