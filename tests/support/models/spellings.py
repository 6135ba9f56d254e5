"""The two products written in every way, maps mixed after the softmax, and other kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models.tokens import Attention


class Transposed(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = (q @ k.transpose(-2, -1)).softmax(-1)
        return (v.transpose(-2, -1) @ self.seen.transpose(-2, -1)).transpose(-2, -1)


class Einsum(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = torch.einsum("b h i d, b h j d -> b h i j", q, k).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", self.seen, v)


class EinsumTokensFirst(Attention):
    """(B, N, H, d) throughout, as in BERT-like code: the values' axes stand in another order than the map's."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        self.seen = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", self.seen, v).transpose(1, 2)


class EinsumValuesFirst(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = torch.einsum("bhid,bhjd->bhij", [q, k]).softmax(-1)
        return torch.einsum("bhjd,bhij->bhid", [v, self.seen])


class EinsumEllipsis(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = torch.einsum("...id,...jd->...ij", q, k).softmax(-1)
        return torch.einsum("...ij,...jd->...id", self.seen, v)


class EinsumLists(Attention):
    """With lists of numbers in place of letters, and tokens first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        self.seen = torch.einsum(q, [0, 2, 1, 3], k, [0, 4, 1, 3], [0, 1, 2, 4]).softmax(-1)
        return torch.einsum(self.seen, [0, 1, 2, 4], v, [0, 4, 1, 3], [0, 2, 1, 3]).transpose(1, 2)


class Baddbmm(Attention):
    """Scores onto a bias, heads flattened into the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.linspace(-1, 1, 24).expand(1, 24, 24)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        self.seen = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.3), dim=-1)
        return torch.bmm(self.seen, v).unflatten(0, (-1, self.num_heads))


class Operators(Attention):
    """With an additive mask, the softmax in double precision and given by function, and casts on the way back."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.mT) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -1e4)
        self.seen = F.softmax(scores, dim=3, dtype=torch.float64)
        return torch.matmul(self.seen.to(v.dtype).contiguous(), v)


class Reshaped(Attention):
    """The map is computed as (B H, N, M) and meets the values as (B, H, N, M), whose shape then is the one told."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1)
        self.seen = flat.view(-1, self.num_heads, *flat.shape[1:])
        return self.seen @ v


class Flattened(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = (q @ k.transpose(-2, -1)).softmax(-1).reshape(-1, 24, 24)
        return torch.bmm(self.seen, v.flatten(0, 1)).unflatten(0, (-1, self.num_heads))


class OneHeadWithoutItsAxis(Attention):
    """(B, N, N) at (B, N, C): no axis of heads, of which there is one."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        self.seen = (q @ k.transpose(-2, -1) * 32**-0.5).softmax(-1)
        return x + self.proj(self.seen @ v)


WRITTEN = [
    Transposed,
    Einsum,
    EinsumTokensFirst,
    EinsumValuesFirst,
    EinsumEllipsis,
    EinsumLists,
    Baddbmm,
    Operators,
    Reshaped,
    Flattened,
    OneHeadWithoutItsAxis,
]


class TalkingHeads(Attention):
    """CaiT: heads are mixed before and after the softmax."""

    def __init__(self, by: str = "linear") -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        self.convolution = nn.Conv2d(4, 4, 1)
        self.by = by

    def mix(self, weights: Tensor) -> Tensor:
        if self.by == "convolution":  # EfficientFormerV2
            return self.convolution(weights)
        if self.by == "einsum":  # DeepViT
            return torch.einsum("b h i j, g h -> b g i j", weights, self.after.weight)
        if self.by == "einsum with a computed matrix":
            return torch.einsum("bhij,gh->bgij", weights, self.after.weight.softmax(0))
        if self.by == "einsum with a computed matrix first":
            return torch.einsum("gh,bhij->bgij", self.after.weight.softmax(0), weights)
        if self.by == "einsum with a matrix for each image":
            return torch.einsum("bhij,bgh->bgij", weights, weights.mean((2, 3))[:, None] * self.after.weight)
        if self.by == "matmul":
            return (weights.permute(0, 2, 3, 1) @ self.after.weight).permute(0, 3, 1, 2)
        return self.after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        self.seen = self.mix(scores.softmax(-1))
        return self.seen @ v


class Gated(Attention):
    """ConViT: a softmax over content and one over positions, mixed by a gate and brought back to a sum of 1."""

    def __init__(self, content_first: bool = True) -> None:
        super().__init__()
        self.positions, self.gate = nn.Linear(3, 4), nn.Parameter(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
        self.content_first = content_first

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.linspace(-1, 1, 24 * 24 * 3).view(1, 24, 24, 3).expand(len(q), -1, -1, -1)
        position = self.positions(places).permute(0, 3, 1, 2)
        content = q @ k.transpose(-2, -1)
        gate = self.gate.view(1, -1, 1, 1).sigmoid()
        if self.content_first:
            self.seen = (1.0 - gate) * content.softmax(-1) + gate * position.softmax(-1)
        else:
            self.seen = gate * position.softmax(-1) + (1.0 - gate) * content.softmax(-1)
        self.seen /= self.seen.sum(-1).unsqueeze(-1)
        return self.seen @ v


class Masked(Attention):
    """Keys are left out after the softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = (q @ k.transpose(-2, -1)).softmax(-1) * torch.arange(24).gt(3)
        return self.seen @ v


class Subtracted(Attention):
    """Differential attention after one softmax: of two maps, one is taken from the other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = (q @ k.transpose(-2, -1)).softmax(-1)
        self.seen = maps[:, :2] - 0.3 * maps[:, 2:]
        return torch.cat([self.seen @ v[:, :2], self.seen @ v[:, 2:]], 1)


class Heads(Attention):
    """Maps that are changed after softmax as ``how`` says. Their rows sum to 1 only if they are renormalised."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        if self.how == "gated":
            maps = maps * 0.5
        elif self.how == "gated by query":
            maps = maps * q.mean(-1, keepdim=True).sigmoid()
        elif self.how == "summed":
            maps = maps.sum(1, keepdim=True)
        elif self.how == "self-self":  # SCLIP, ExCEL
            maps = (q @ q.mT).softmax(-1) + (k @ k.mT).softmax(-1)
        elif self.how == "sparse":
            maps = maps * (maps >= maps.topk(5, dim=-1).values[..., -1:])
        elif self.how == "sparse, renormalised":
            maps = maps * (maps >= maps.topk(5, dim=-1).values[..., -1:])
            maps = maps / maps.sum(-1, keepdim=True)
        elif self.how == "subtracted":
            maps = maps - maps.flip(1)
        else:
            assert self.how == "zero"
            maps = 0 * maps
        self.seen = maps
        return maps @ v


MIXED = {
    "talking heads": TalkingHeads,
    "talking heads by convolution": lambda: TalkingHeads("convolution"),
    "gate": Gated,
    "gate, positions first": lambda: Gated(False),
    "masked": Masked,
    "subtracted": Subtracted,
}


class DroppedInPlace(Attention):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.inplace = inplace

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        self.seen = F.dropout(weights, 0.5, self.training, self.inplace)
        return self.seen @ v


class Differential(Attention):
    """Two kernels in one module, the output of one taken from that of the other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = (
            F.scaled_dot_product_attention(q[..., part], k[..., part], v) for part in (slice(4), slice(4, 8))
        )
        return first - 0.3 * second


class ByKernel(Attention):
    """One class whose instances run another kernel when told so: none that a function mode tells apart."""

    def __init__(self, kernel: str = "by hand") -> None:
        super().__init__()
        self.kernel = kernel

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kernel == "by hand":
            return super().attend(q, k, v)
        if self.kernel == "aten":
            return torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]
        weights = (q @ k.transpose(-2, -1)).exp()  # a softmax written out
        return (weights / weights.sum(-1, keepdim=True)) @ v
