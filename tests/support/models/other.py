"""What mixes tokens and is no self-attention between them: channels, few queries, other tokens, no map at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models.tokens import GRID, Attention


class ChannelAttention(Attention):
    """XCiT: channels look at channels over all tokens; by hand, or a kernel given transposed operands."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(*(t.transpose(-2, -1) for t in (F.normalize(q, dim=-2), F.normalize(k, dim=-2), v))).mT


class GroupedChannels(Attention):
    """DaViT: the map of channels (q^T k) meets the transposed values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.transpose(-1, -2) @ k * q.shape[-2] ** -0.5).softmax(dim=-1)
        return (weights @ v.transpose(-1, -2)).transpose(-1, -2)


class ClassAttention(Attention):
    """One query, of the mean token here, looks at all."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(x.mean(1, keepdim=True))[0]
        return x + self.join(self.attend(q, *self.split(x)[1:]))


class SomeKeys(Attention):
    """The first tokens alone are keys."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.join(self.attend(self.split(x)[0], *self.split(x[:, :7])[1:]))


class MeanImage(Attention):
    """Attention of one image, the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x.mean(0, keepdim=True))


class Looking(Attention):
    """Attention to tokens that the caller gives, under any name, or to its own."""

    def forward(self, x: Tensor, second: Tensor | None = None, **named: Tensor | None) -> Tensor:
        other = next((t for t in (*named.values(), second) if t is not None and t.is_floating_point()), x)
        if other.ndim == 2:  # positions (N, C), or a condition (B, C)
            x = other = x + (other if len(other) == x.shape[1] else other[:, None])
        return x + self.join(self.attend(self.split(x)[0], *self.split(other)[1:]))


class Decoder(nn.Module):
    """Attention of its own, then a second one that ``call`` makes with its tokens and others (B, M, C)."""

    def __init__(self, call: Callable[[nn.Module, Tensor, Tensor], Tensor], count: int = 24) -> None:
        super().__init__()
        self.own, self.second = Attention(), Looking()
        self.others = nn.Parameter(torch.randn(1, count, 32))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.second, self.own(x), self.others.expand(len(x), -1, -1))


class Pooling(nn.Module):
    """PoolFormer's token mixer: a mean over neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.transpose(1, 2).unflatten(2, GRID), 3, 1, 1).flatten(2).transpose(1, 2) - x


class Mixing(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.token_mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.token_mixer(x)


class LinearAttention(Attention):
    """Efficient attention: keys are softmaxed over the tokens and meet the values first. No map is ever there."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


class LinearOverTheLastAxis(Attention):
    """The same with keys (..., d, N), softmaxed over their last axis."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-2, -1).softmax(-1) @ v)


class Gate(Attention):
    """A softmax over what a linear map scores, which weighs tokens of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([x, x.flip(1)], -2)
        return (self.score(x).softmax(-1).unsqueeze(-2) @ both).squeeze(-2)


class OverTheQueries(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(dim=-2) @ v


class OverTheHeads(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q @ k.transpose(-2, -1), 1) @ v


class WithoutValues(Attention):
    """Its map serves as a score and meets no values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v * torch.softmax(q @ k.transpose(-2, -1), -1).amax(-1, keepdim=True)


class SumsTheQueries(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ v


class BetweenImages(Attention):
    """Scores between the images of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1)
        return x + ((mean @ mean.T).softmax(-1) @ mean)[:, None]
