"""The plain vision transformers that capture must serve, built from config with random weights, on a grid with h !=
w."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One model: ``build`` makes it, ``logits`` reads (B, C) off what it returns."""

    name: str
    build: Callable[[], nn.Module]
    image: tuple[int, int]
    num_layers: int
    prefix: int
    grid: tuple[int, int]
    factored: bool
    logits: Callable[[object], Tensor] = lambda output: output  # type: ignore[assignment,return-value]


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


def _timm(name: str, fused: bool, patch: int = 16) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model = timm.create_model(name, img_size=(2 * patch, 3 * patch), num_classes=5, depth=3)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return model

    return build


def _torchvision() -> nn.Module:
    import torchvision

    model = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


def _transformers(kind: str, implementation: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers as tf

        common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config, model = {
            "vit": lambda: (tf.ViTConfig(image_size=(32, 48), patch_size=16, **common), tf.ViTForImageClassification),
            "dinov2": lambda: (
                tf.Dinov2Config(image_size=64, patch_size=16, **common),
                tf.Dinov2ForImageClassification,
            ),
            "registers": lambda: (
                tf.Dinov2WithRegistersConfig(image_size=64, patch_size=16, **common),
                tf.Dinov2WithRegistersForImageClassification,
            ),
            "clip": lambda: (
                tf.CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=5, **common),
                tf.CLIPVisionModelWithProjection,
            ),
        }[kind]()
        return model._from_config(config, attn_implementation=implementation)

    return build


def _cases() -> list[Case]:
    cases = []
    for fused in (True, False):
        kind = "fused" if fused else "unfused"
        cases += [
            Case(f"timm-vit-{kind}", _timm("vit_tiny_patch16_224", fused), (32, 48), 3, 1, (2, 3), fused),
            Case(
                f"timm-distilled-{kind}", _timm("deit_tiny_distilled_patch16_224", fused), (32, 48), 3, 2, (2, 3), fused
            ),
            Case(
                f"timm-registers-{kind}",
                _timm("vit_small_patch14_reg4_dinov2", fused, 14),
                (28, 42),
                3,
                5,
                (2, 3),
                fused,
            ),
        ]
    cases.append(Case("torchvision-vit", _torchvision, (64, 64), 2, 1, (4, 4), True))
    for implementation in ("sdpa", "eager"):
        factored = implementation == "sdpa"
        cases += [
            Case(
                f"transformers-{kind}-{implementation}",
                _transformers(kind, implementation),
                image,
                2,
                prefix,
                grid,
                factored,
                (lambda o: o.image_embeds) if kind == "clip" else (lambda o: o.logits),
            )
            for kind, image, prefix, grid in (
                ("vit", (32, 48), 1, (2, 3)),
                ("dinov2", (32, 48), 1, (2, 3)),
                ("registers", (32, 48), 5, (2, 3)),
                ("clip", (32, 32), 1, (4, 4)),
            )
        ]
    return [*cases, *core_cases()]


def core_cases() -> list[Case]:
    """Those that need torch alone."""

    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        return PlainEncoder(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    return [
        Case("torch-encoder", encoder, (32, 48), 2, 1, (4, 6), True),
        Case("torch-multihead", lambda: PlainEncoder(MultiheadBlock(False)), (32, 48), 1, 1, (4, 6), True),
        Case("torch-multihead-weights", lambda: PlainEncoder(MultiheadBlock(True)), (32, 48), 1, 1, (4, 6), False),
        Case("torch-explicit", lambda: explicit_vit(2), (32, 48), 2, 1, (4, 6), False),
    ]


def explicit_vit(depth: int = 2, dropout: float = 0.0) -> nn.Module:
    return PlainEncoder(nn.Sequential(*(ExplicitBlock(dropout=dropout) for _ in range(depth))))


def multihead_vit(depth: int = 2, need_weights: bool = False, dropout: float = 0.0) -> nn.Module:
    return PlainEncoder(nn.Sequential(*(MultiheadBlock(need_weights, dropout=dropout) for _ in range(depth))))


CASES = _cases()
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
