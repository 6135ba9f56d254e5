"""The plain vision transformers that capture must serve, on a grid with h != w."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from tests.support.models.plain import MultiheadBlock, PlainEncoder, explicit_vit
from tests.support.models.published import timm_model, transformers_model


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


def _timm(name: str, fused: bool, patch: int = 16) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = timm_model(name, img_size=(2 * patch, 3 * patch), depth=3)()
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return model

    return build


def torchvision_vit(depth: int = 2) -> nn.Module:
    import torchvision

    model = torchvision.models.VisionTransformer(64, 16, depth, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


TIMM = {  # name, patch size, prefix tokens
    "vit": ("vit_tiny_patch16_224", 16, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", 16, 2),
    "registers": ("vit_small_patch14_reg4_dinov2", 14, 5),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TRANSFORMERS: dict[str, tuple[str, dict[str, object], tuple[int, int], int, tuple[int, int]]] = {
    "vit": ("ViTForImageClassification", {"image_size": (32, 48), "patch_size": 16}, (32, 48), 1, (2, 3)),
    "dinov2": ("Dinov2ForImageClassification", {"image_size": 64, "patch_size": 16}, (32, 48), 1, (2, 3)),
    "registers": (
        "Dinov2WithRegistersForImageClassification",
        {"image_size": 64, "patch_size": 16},
        (32, 48),
        5,
        (2, 3),
    ),
    "clip": (
        "CLIPVisionModelWithProjection",
        {"image_size": 32, "patch_size": 8, "projection_dim": 5},
        (32, 32),
        1,
        (4, 4),
    ),
}


def _cases() -> list[Case]:
    cases = [
        Case(f"timm-{kind}-{how}", _timm(name, fused, patch), (2 * patch, 3 * patch), 3, prefix, (2, 3), fused)
        for how, fused in (("fused", True), ("unfused", False))
        for kind, (name, patch, prefix) in TIMM.items()
    ]
    cases.append(Case("torchvision-vit", torchvision_vit, (64, 64), 2, 1, (4, 4), True))
    for how, fused in (("sdpa", True), ("eager", False)):
        for kind, (name, config, image, prefix, grid) in TRANSFORMERS.items():
            build = transformers_model(name, how, **config, **SIZES)
            logits = operator.attrgetter("image_embeds" if kind == "clip" else "logits")
            cases.append(Case(f"transformers-{kind}-{how}", build, image, 2, prefix, grid, fused, logits))
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


CASES = _cases()
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
