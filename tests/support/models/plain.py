"""Plain vision transformers that need torch alone, explicit or fused, and what tests put into their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Builder = Callable[..., nn.Module]


class PlainEncoder(nn.Module):
    """A patch embedding, one class token and an encoder that is given."""

    def __init__(self, encoder: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 4 * 6, width))
        self.encoder = encoder
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        return self.head(self.encoder(tokens)[:, 0])


class ExplicitBlock(nn.Module):
    """Softmax and matmul by hand, for a copy of which every step is known; ``need_weights`` style models look like
    this."""

    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.drop((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1))
        return x + self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class MultiheadBlock(nn.Module):
    """nn.MultiheadAttention, asked for its weights or not."""

    def __init__(self, need_weights: bool, width: int = 32, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=self.need_weights)[0]


def explicit_vit(depth: int = 2, dropout: float = 0.0) -> nn.Module:
    return PlainEncoder(nn.Sequential(*(ExplicitBlock(dropout=dropout) for _ in range(depth))))


def multihead_vit(depth: int = 2, need_weights: bool = False, dropout: float = 0.0) -> nn.Module:
    return PlainEncoder(nn.Sequential(*(MultiheadBlock(need_weights, dropout=dropout) for _ in range(depth))))


BUILDERS: dict[str, Builder] = {"explicit": explicit_vit, "fused": multihead_vit}
BLOCKS: dict[str, Builder] = {"explicit": ExplicitBlock, "fused": lambda **options: MultiheadBlock(False, **options)}
every_kind = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


class FunctionAttention(nn.Module):
    """Attention by a function that is given."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = 32) -> None:
        super().__init__()
        self.qkv, self.function = nn.Linear(width, 3 * width), function

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + self.function(q, k, v).transpose(1, 2).flatten(2)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Checkpointed(nn.Sequential):
    """Blocks that are recomputed in backward, all by one kind of checkpointing or each by its own; None keeps one."""

    reentrant: bool | tuple[bool | None, ...] = False

    def forward(self, x: Tensor) -> Tensor:
        each = self.reentrant if isinstance(self.reentrant, tuple) else (self.reentrant,) * len(self)
        for block, reentrant in zip(self, each, strict=True):
            x = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        return x


def checkpointed(block: Builder, depth: int = 2) -> Builder:
    return lambda: PlainEncoder(Checkpointed(*(block() for _ in range(depth))))


class Crops(nn.Module):
    """Runs its encoder on the images, then on each of the crops: DINO and MCT-like training."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, *crops: Tensor) -> Tensor:
        return torch.stack([self.encoder(each).sum() for each in (x, *crops)]).sum()


class Calling(nn.Module):
    """Hands its input on, and on the way calls what the test put into ``call``."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Callable[[], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.call is not None:
            self.call()
        return x


def calling_vit() -> tuple[nn.Module, Calling]:
    """A model of an explicit and a fused layer, and the module between them."""
    middle = Calling()
    return PlainEncoder(nn.Sequential(ExplicitBlock(), middle, MultiheadBlock(False))), middle
