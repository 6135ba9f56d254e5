"""Keys or queries on a grid coarser or finer than the tokens, and tokens in no order of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models.tokens import GRID, Attention


class ReducedKeys(Attention):
    """Keys and values of a grid ``by`` times coarser, as in PVT and SegFormer; queries from all tokens."""

    def __init__(self, grid: tuple[int, int] = GRID, by: int = 2, **kwargs: int) -> None:
        super().__init__(**kwargs)
        self.grid = grid
        self.reduce = nn.Conv2d(self.proj.in_features, self.proj.in_features, by, by)

    def others(self, x: Tensor) -> Tensor:
        return self.reduce(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.join(self.attend(self.split(x)[0], *self.split(self.others(x))[1:]))


class Pyramid(nn.Module):
    """PVT-like: stages on ever coarser grids, the keys of the early ones reduced, of the last one not."""

    def __init__(self, reductions: Sequence[int] = (4, 2, 1), patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.ModuleList([nn.Conv2d(3, 32, patch, patch)])
        self.patches += [nn.Conv2d(32, 32, 2, 2) for _ in reductions[1:]]
        self.attention = nn.ModuleList(ReducedKeys(by=by) if by > 1 else Attention() for by in reductions)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for patches, attention in zip(self.patches, self.attention, strict=True):
            x = patches(x)
            attention.grid = x.shape[2:]
            x = attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.head(x.mean((2, 3)))


class FewerQueries(Attention):
    """LeViT's step between stages: every other row and column asks, all answer, and these are the tokens left."""

    def forward(self, x: Tensor) -> Tensor:
        asking = x.unflatten(1, GRID)[:, ::2, ::2].flatten(1, 2)
        return asking + self.join(self.attend(self.split(asking)[0], *self.split(x)[1:]))


class PoolingOfFour(Attention):
    """Four queries of its own look at all tokens; what they find goes to every token alike."""

    def __init__(self, queries: int = 4) -> None:
        super().__init__()
        self.asking = nn.Parameter(torch.randn(1, queries, 32))

    def forward(self, x: Tensor) -> Tensor:
        asking = self.split(self.asking.expand(len(x), -1, -1))[0]
        return x + self.join(self.attend(asking, *self.split(x)[1:])).mean(1, keepdim=True)


class MoreKeys(ReducedKeys):
    """Keys pooled to a grid of a size of its own, which may be finer than that of the queries (PVTv2 linear)."""

    def others(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, GRID), (8, 12)).flatten(2).transpose(1, 2)


class PooledAlongTheSequence(ReducedKeys):
    """NextViT's keys: means of runs of tokens in row-major order, which wrap around the ends of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(4, 4)

    def others(self, x: Tensor) -> Tensor:
        return self.pool(x.transpose(1, 2)).transpose(1, 2)


class Unroll(nn.Module):
    """Hiera's order of tokens: those of one mask unit follow each other."""

    def forward(self, x: Tensor) -> Tensor:
        units = x.unflatten(1, GRID).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return units.transpose(2, 3).flatten(1, 4)
