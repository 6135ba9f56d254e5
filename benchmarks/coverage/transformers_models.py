"""The transformers rows of the coverage table: tiny configurations, never ``from_pretrained``.

models.py explains the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.candidate import Candidate, named, tensor_of


def _transformers(
    name: str,
    expected: int,
    kind: str,
    grids: bool,
    note: str = "",
    attn: str = "",
    inputs: Callable[[], dict[str, Tensor]] | None = None,
    **config: Any,
) -> Candidate:
    side = config.get("image_size")
    size = side if isinstance(side, int) else 64

    def build() -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        implementation = {"attn_implementation": attn} if attn else {}
        return model_class._from_config(model_class.config_class(**config), **implementation)

    def images() -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(2, 3, size, size)}

    return Candidate("transformers", named(name, attn), build, inputs or images, tensor_of, expected, kind, grids, note)


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 90, (2, 9))}


def _packed_patches() -> dict[str, Tensor]:
    mask, shapes = torch.ones(2, 16, dtype=torch.int64), torch.tensor([[4, 4], [4, 4]])
    return {"pixel_values": torch.randn(2, 16, 768), "pixel_attention_mask": mask, "spatial_shapes": shapes}


_small = partial(_transformers, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
_text = partial(_small, inputs=_ids, vocab_size=99)
_vit = partial(_small, image_size=64, patch_size=16)
_packed = partial(_small, inputs=_packed_patches, num_patches=16)
_swin = partial(
    _transformers, image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4
)
_pyramid = partial(
    _transformers, depths=[1] * 4, hidden_sizes=[16, 32, 32, 32], num_attention_heads=[1, 2, 2, 2], num_labels=10
)
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1] * 4,
    "out_features": ["stage4"],
}
_SWIN = {
    "model_type": "swin",
    "embed_dim": 16,
    "depths": [1] * 4,
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}

TRANSFORMERS = [
    _vit("ViTForImageClassification", 3, "global", True, attn="sdpa"),
    _vit("ViTForImageClassification", 3, "global", True, attn="eager"),
    _vit("DeiTForImageClassification", 3, "global", True, "class and distillation tokens"),
    _vit("BeitForImageClassification", 3, "global", True, attn="sdpa"),
    _vit("BeitForImageClassification", 3, "global", True, attn="eager"),
    _vit("Data2VecVisionForImageClassification", 3, "global", True),
    _vit("Dinov2ForImageClassification", 3, "global", True, attn="sdpa"),
    _vit("Dinov2ForImageClassification", 3, "global", True, attn="eager"),
    _vit("Dinov2WithRegistersForImageClassification", 3, "global", True, "class and 4 register tokens"),
    _vit("DINOv3ViTModel", 3, "global", True, "class and 4 register tokens", num_register_tokens=4),
    _vit("IJepaForImageClassification", 3, "global", True, "no class token"),
    _vit("ViTMSNForImageClassification", 3, "global", True),
    _vit("ViTMAEModel", 3, "global", False, "a quarter of the tokens, shuffled"),
    _vit("CLIPVisionModel", 3, "global", True, attn="sdpa"),
    _vit("CLIPVisionModel", 3, "global", True, attn="eager"),
    _vit("SiglipVisionModel", 3, "global + pooling", True, "pooling: one probe, nn.MultiheadAttention"),
    _packed("Siglip2VisionModel", 3, "global + pooling", False, "packed patches with a mask; pooling: one probe"),
    _vit("BlipVisionModel", 3, "global", True),
    _vit("Aimv2VisionModel", 3, "global + pooling", True, "pooling: one query"),
    _vit(
        "DPTForDepthEstimation",
        4,
        "global",
        True,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
    ),
    _vit(
        "YolosForObjectDetection",
        3,
        "global",
        False,
        "5 detection tokens after the grid",
        num_detection_tokens=5,
        image_size=[64, 64],
    ),
    _vit(
        "SamVisionModel",
        3,
        "global + window",
        False,
        output_channels=16,
        mlp_dim=64,
        window_size=2,
        global_attn_indexes=[2],
        num_pos_feats=16,
    ),
    _pyramid("SegformerForImageClassification", 4, "global + reduced keys", True),
    _pyramid("GLPNForDepthEstimation", 4, "global + reduced keys", True, decoder_hidden_size=16),
    _pyramid(
        "PvtForImageClassification", 4, "global + reduced keys", True, "a class token in the last stage", image_size=64
    ),
    _pyramid("PvtV2ForImageClassification", 4, "global + reduced keys", True, image_size=64),
    _transformers(
        "CvtForImageClassification",
        6,
        "reduced keys",
        True,
        "einsum; a class token in the last stage",
        embed_dim=[16, 32, 48],
        num_heads=[1, 2, 3],
        depth=[1, 2, 3],
    ),
    _transformers(
        "LevitForImageClassification",
        5,
        "global + reduced keys",
        True,
        "2 downsampling layers: fewer queries than keys",
        image_size=128,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
    ),
    _swin("SwinForImageClassification", 4, "window", False, attn="sdpa"),
    _swin("SwinForImageClassification", 4, "window", False, attn="eager"),
    _swin("Swinv2ForImageClassification", 4, "window", False, "cosine attention"),
    _transformers(
        "HieraForImageClassification",
        4,
        "global + window",
        False,
        "tokens unrolled by unit; 5-D maps",
        image_size=[64, 64],
        embed_dim=16,
        depths=[1] * 4,
        num_heads=[1, 2, 4, 8],
    ),
    _transformers(
        "MobileViTForImageClassification",
        9,
        "window",
        False,
        "dilated, as (4 B, H, N, N): a pixel attends to the same place of every 2 x 2 patch",
        image_size=128,
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96],
    ),
    _transformers(
        "DetrForObjectDetection",
        4,
        "global + cross",
        False,
        "2 layers over the grid, 2 between queries; 2 cross layers",
        backbone_config=_RESNET,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
    ),
    _transformers(
        "Mask2FormerForUniversalSegmentation",
        6,
        "window + global + cross + other",
        False,
        "4 windows of Swin, 2 between queries; 2 cross, 1 deformable (softmax over points)",
        backbone_config=_SWIN,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=64,
        num_queries=5,
    ),
    _vit(
        "VivitModel",
        3,
        "global",
        False,
        "tokens over 2 frames",
        num_frames=4,
        tubelet_size=[2, 16, 16],
        inputs=lambda: {"pixel_values": torch.randn(2, 4, 3, 64, 64)},
    ),
    _text("CLIPTextModel", 3, "global", False, "text, causal mask", attn="sdpa"),
    _text("CLIPTextModel", 3, "global", False, "text, causal mask", attn="eager"),
    _text("BertModel", 3, "global", False, "text"),
    _transformers(
        "GPT2Model", 3, "global", False, "text, causal mask", inputs=_ids, n_embd=32, n_layer=3, n_head=2, vocab_size=99
    ),
    _transformers(
        "MobileViTV2ForImageClassification",
        0,
        "linear",
        False,
        "softmax over tokens of one score each",
        image_size=64,
        width_multiplier=0.5,
    ),
    _transformers(
        "PoolFormerForImageClassification",
        0,
        "other",
        False,
        "pooling instead of attention",
        depths=[1] * 4,
        hidden_sizes=[16, 32, 32, 32],
    ),
]
