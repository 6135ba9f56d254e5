"""Small vision transformers that learn the synthetic scenes from scratch in a few minutes on one core."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg.demo.class_tokens import ClassTokenOutput, ClassTokens

STRIDE = 8  # pixels per token


class SmallViT(nn.Module):
    """Maps images (B,3,H,W) in [-1, 1] to logits (B, classes). H and W are multiples of 8 and may differ.

    Args:
        num_classes: Number of logits.
        size: Height and width in pixels for which the position table is made. Other sizes resample it.
        width, depth, heads: Sizes of the transformer.
        stem: Module that maps (B,3,H,W) to (B,width,H/8,W/8). None means `mirrored_stem(width)`.
    """

    def __init__(
        self,
        num_classes: int,
        size: tuple[int, int] = (64, 64),
        width: int = 96,
        depth: int = 4,
        heads: int = 3,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = STRIDE
        self.num_prefix_tokens = 1
        self.stem = mirrored_stem(width) if stem is None else stem
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, width, size[0] // STRIDE, size[1] // STRIDE))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        patches = placed(self.stem(images), self.pos_embed).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


class ClassTokenViT(nn.Module):
    """As :class:`SmallViT`, with a token for each class and a convolutional head, in the style of MCTformer+."""

    def __init__(self, num_classes: int, size: int = 64, width: int = 96, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patch_size = STRIDE
        self.num_prefix_tokens = num_classes
        self.stem = mirrored_stem(width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, width, size // STRIDE, size // STRIDE))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.apply(initialise)
        self.class_tokens = ClassTokens(num_classes, width, scale=0.1)

    def forward(self, images: Tensor) -> ClassTokenOutput:
        patches = placed(self.stem(images), self.pos_embed)
        grid, tokens = tuple(patches.shape[2:]), patches.flatten(2).transpose(1, 2)
        return self.class_tokens(tokens.new_zeros(1, 1, 1), tokens, self.blocks, grid)


def placed(patches: Tensor, positions: Tensor) -> Tensor:
    """Adds the position table (1,D,H,W), resampled if the patches (B,D,h,w) are fewer or more."""
    if positions.shape[2:] != patches.shape[2:]:
        positions = F.interpolate(positions, patches.shape[2:], mode="bicubic", align_corners=False)
    return patches + positions


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


def mirrored_stem(width: int) -> nn.Sequential:
    """Three convolutions of stride 2 whose token centres are the patch centres, so that a flip maps token onto token.

    With kernel 4, stride 2 and padding 1, output i reads pixels 2i-1 .. 2i+2. Their middle is the middle of pixels 2i
    and 2i+1, as a flip needs. The usual kernel 3 reads 2i-1 .. 2i+1: half a pixel off the middle at the first layer,
    3.5 px off after three. The tokens that a flip matches are then centred 7 px apart, of 8 px per token.
    """
    return conv_stem(width, kernel=4)


def conv_stem(width: int, kernel: int) -> nn.Sequential:
    widths = [3, width // 4, width // 2, width]
    layers: list[nn.Module] = []
    for incoming, outgoing in pairwise(widths):
        layers += [nn.Conv2d(incoming, outgoing, kernel, stride=2, padding=1), nn.BatchNorm2d(outgoing), nn.GELU()]
    return nn.Sequential(*layers[:-1])  # the last convolution makes the tokens, without activation


def initialise(module: nn.Module) -> None:
    """Larger initial weights. With torch's own, the network learns nothing in its first 200 steps."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
