"""Structures met in public codebases that no library ships: written here from scratch, as small as they can be.

Each differs from a plain ViT in one thing: where tokens stand, where the layer is, or what its queries and keys are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.coverage.candidate import CLASSES, Candidate, images_of, tensor_of

Others = tuple[Tensor, Tensor, Tensor]


class _Block(nn.Module):
    """Self-attention by hand, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def heads(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(tokens).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 4).softmax(-1) @ v

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.attend(*self.heads(tokens))
        return tokens + output.transpose(1, 2).flatten(2)


class _Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class _Apart(_Block):
    """Both products and the softmax are modules of their own (ViTs made for explanations)."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.softmax, self.av = _Product(), nn.Softmax(-1), _Product()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = self.av(self.softmax(self.qk(q, k.mT / 4)), v)
        return output


class _PreNorm(nn.Module):
    """nn.MultiheadAttention of norm(x), norm(x), norm(x): the commonest block written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attn(self.norm(x), self.norm(x), self.norm(x))[0]
        return x + output


class _Structure(nn.Module):
    """Patches, a class token, two registers and three prompts; ``tokens`` puts them together, blocks follow."""

    def __init__(self, tokens: Callable[[Tensor, Others], Tensor], block: Callable[[], nn.Module] = _Block) -> None:
        super().__init__()
        self.patch_embed, self.head = nn.Conv2d(3, 32, 16, 16), nn.Linear(32, CLASSES)
        self.cls_token, self.registers = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 2, 32))
        self.prompts = nn.Parameter(torch.randn(1, 3, 32))
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.last = _Block()
        self.tokens = tokens

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).mT
        others = [t.expand(len(images), -1, -1) for t in (self.cls_token, self.registers, self.prompts)]
        x = self.tokens(patches, (others[0], others[1], others[2]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class _OtherImage(_Structure):
    """Tokens of an image attend to as many of another, mirrored here, given by position (CroCo's decoder, trackers)."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        other = self.patch_embed(images.flip(-1)).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        q, (_, k, v) = self.last.heads(x)[0], self.last.heads(other)
        logits: Tensor = self.head((x + self.last.attend(q, k, v).transpose(1, 2).flatten(2)).mean(1))
        return logits


class _Clip(nn.Module):
    """A text tower of learned prompts runs before the image tower."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Sequential(_Block(), _Block())
        self.prompts = nn.Parameter(torch.randn(CLASSES, 16, 32))
        self.visual = _Structure(_front)

    def forward(self, images: Tensor) -> Tensor:
        text = self.text(self.prompts).mean(1)
        logits: Tensor = self.visual(images) + text.mean(1)
        return logits


class _Twice(nn.Module):
    """A shared decoder runs on two feature maps of the same images (WeCLIP+)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.decoder = nn.Conv2d(3, 32, 16, 16), nn.Conv2d(3, 32, 16, 16), _Block()
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        both = [embed(images).flatten(2).mT for embed in (self.first, self.second)]
        logits: Tensor = self.head(sum(self.decoder(tokens).mean(1) for tokens in both))
        return logits


def _front(patches: Tensor, others: Others) -> Tensor:
    return torch.cat([others[0], patches], 1)


def _pruned(patches: Tensor, others: Others) -> Tensor:
    kept = patches.norm(dim=-1).topk(4).indices[..., None].expand(-1, -1, 32)
    return torch.cat([others[0], patches.gather(1, kept)], 1)


def _merged(patches: Tensor, others: Others) -> Tensor:
    source, target = patches[:, ::2], patches[:, 1::2]
    match = (source @ target.mT).argmax(-1)[..., None].expand(-1, -1, 32)
    return target.scatter_reduce(1, match, source, "mean")


def _row(
    name: str,
    build: Callable[[], nn.Module],
    expected: int = 3,
    kind: str = "global",
    grids: bool = True,
    note: str = "",
) -> Candidate:
    return Candidate("structures", name, build, images_of(64), tensor_of, expected, kind, grids, note)


def _tokens(name: str, tokens: Callable[[Tensor, Others], Tensor], grids: bool = True, note: str = "") -> Candidate:
    return _row(name, lambda: _Structure(tokens), grids=grids, note=note)


STRUCTURES = [
    _tokens("class token last", lambda p, o: torch.cat([p, o[0]], 1)),
    _tokens("registers behind", lambda p, o: torch.cat([o[0], p, o[1]], 1)),
    _tokens("prompts behind", lambda p, o: torch.cat([o[0], p, o[2]], 1)),
    _tokens("class token in the middle", lambda p, o: torch.cat([p[:, :8], o[0], p[:, 8:]], 1)),
    _tokens("tokens pruned", _pruned, False, "the tokens lie on no grid"),
    _tokens("tokens merged", _merged, False, "the tokens lie on no grid"),
    _tokens("latents as many as patches", lambda p, o: o[1].repeat(1, 8, 1), False, "the tokens lie on no grid"),
    _row("products in child modules", lambda: _Structure(_front, _Apart)),
    _row("nn.MultiheadAttention of norm(x) twice", lambda: _Structure(_front, _PreNorm)),
    _row("keys of another image", lambda: _OtherImage(_front), 3, "global + cross", True, "1 cross layer"),
    _row("text tower first", _Clip, 3, "global", True, "the 2 layers of the text tower are no layers of the image"),
    _row("shared decoder, twice", _Twice, 2),
]
