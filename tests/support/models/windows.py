"""Attention within windows of the grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models.tokens import GRID, Attention, Tokens


class Windows(nn.Module):
    """Attention within windows of the grid of (B, N, C), padded to whole windows; ``axes`` says where they lie."""

    def __init__(
        self,
        window: tuple[int, int] = (2, 3),
        shift: tuple[int, int] = (0, 0),
        axes: str = "batch",
        fused: bool = False,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.axes = window, shift, axes
        self.attn = (HeadsFirst if axes == "heads, windows" else Attention)(heads=heads, fused=fused)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (wh, ww) = GRID, self.window_size
        grid = F.pad(x.unflatten(1, GRID), (0, 0, 0, -width % ww, 0, -height % wh))
        grid = grid.roll((-self.shift_size[0], -self.shift_size[1]), (1, 2))
        split = grid.unflatten(2, (-1, ww)).unflatten(1, (-1, wh)).transpose(2, 3)  # (B, nh, nw, wh, ww, C)
        groups = split.flatten(3, 4)
        y = self.attn(groups.flatten(0, 2) if self.axes == "batch" else groups.flatten(1, 2))
        grid = y.reshape(split.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(self.shift_size, (1, 2))
        return grid[:, :height, :width].flatten(1, 2)


class HeadsFirst(Attention):
    """Maps (B, H, windows, N, N) of (B, windows, N, C), where the order of ``Attention`` is (B, windows, H, N, N)."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.transpose(1, 2) for t in super().split(x))

    def join(self, x: Tensor) -> Tensor:
        return super().join(x.transpose(1, 2))


def only_windows() -> nn.Module:
    return Tokens(Windows(), Windows((2, 3), (1, 1)))


def windows_and_global() -> nn.Module:
    return Tokens(Windows(), Attention(), Windows((2, 3), (1, 1)), Attention(fused=True))
