"""Models of timm, torchvision and transformers, built from config with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


def timm_model(name: str, **kwargs: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, **kwargs)

    return build


def mvitv2(size: int) -> Callable[[], nn.Module]:
    """A third of the width of timm's smallest, and three blocks fewer."""

    def build() -> nn.Module:
        from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

        return MultiScaleVit(MultiScaleVitCfg((1, 2, 2, 2), (32, 64, 128, 256)), img_size=(size, size), num_classes=5)

    return build


def transformers_model(name: str, attn: str = "eager", **config: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        return model_class._from_config(
            model_class.config_class(**{"num_labels": 5, **config}), attn_implementation=attn
        )

    return build


def transformers_swin(attn: str) -> Callable[[], nn.Module]:
    sizes = {"embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4]}
    return transformers_model("SwinForImageClassification", attn, image_size=64, patch_size=4, window_size=4, **sizes)


def segformer(widths: Sequence[int] = (16, 32, 32, 32), heads: Sequence[int] = (1, 2, 2, 2)) -> Callable[[], nn.Module]:
    sizes = {"depths": [1] * 4, "hidden_sizes": list(widths), "num_attention_heads": list(heads)}
    return transformers_model("SegformerForImageClassification", decoder_hidden_size=16, **sizes)
