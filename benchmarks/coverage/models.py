"""The models of the coverage table: small, built from configuration with random weights; nothing is downloaded.

``expected`` is counted by hand in each model's source, never taken from a capture: the layers of one forward pass with
a softmax over keys between the tokens of one set (global, windows, reduced or downsampled sets alike). Class attention,
pooling with one query, attention over channels, cross-attention and attention without a matrix do not count; ``kind``
names them, and ``note`` says where a count of kernels differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.candidate import CLASSES, Candidate, images_of, named, tensor_of
from benchmarks.coverage.structures import STRUCTURES
from benchmarks.coverage.timm_models import TIMM
from benchmarks.coverage.transformers_models import TRANSFORMERS


def _torchvision(name: str, expected: int, kind: str, grids: bool, note: str = "", **config: Any) -> Candidate:
    def build() -> nn.Module:
        from torchvision.models import maxvit, swin_transformer, vision_transformer

        parts = {key: getattr(swin_transformer, value) for key, value in config.items() if key in _SWIN_V2}
        modules = (maxvit, swin_transformer, vision_transformer)
        model_class = next(getattr(module, name) for module in modules if hasattr(module, name))
        model: nn.Module = model_class(num_classes=CLASSES, **{**config, **parts})
        return model

    name_shown = named(name, "v2" if "block" in config else "")
    return Candidate("torchvision", name_shown, build, images_of(64), tensor_of, expected, kind, grids, note)


_SWIN_V2 = {"block": "SwinTransformerBlockV2", "downsample_layer": "PatchMergingV2"}
_swin = partial(
    _torchvision,
    "SwinTransformer",
    4,
    "window",
    False,
    patch_size=[4, 4],
    embed_dim=24,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=[4, 4],
)

TORCHVISION = [
    _torchvision(
        "VisionTransformer",
        3,
        "global",
        True,
        image_size=64,
        patch_size=16,
        num_layers=3,
        num_heads=3,
        hidden_dim=48,
        mlp_dim=96,
    ),
    _swin("softmax in a function, shifted windows"),
    _swin("softmax in a function, cosine attention", **_SWIN_V2),
    _torchvision(
        "MaxVit",
        4,
        "window",
        False,
        "block and dilated grid, 5-D maps",
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
    ),
]


class _Call(nn.Module):
    """A model whose forward is one method of another, or one function of it."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(self.model, *args)


def _open_clip(
    name: str, expected: int, kind: str, grids: bool, note: str = "", tower: str = "visual", **vision: Any
) -> Candidate:
    text = {"context_length": 9, "vocab_size": 99, "width": 48, "heads": 3, "layers": 3}

    def build() -> nn.Module:
        from open_clip import coca_model, model

        image = {"layers": 3, "width": 48, "head_width": 16, "image_size": 64, "patch_size": 16, **vision}
        if tower == "both":
            words = model.CLIPTextCfg(**text, embed_cls=True, output_tokens=True)
            return coca_model.CoCa(48, coca_model.MultimodalCfg(**text), words, model.CLIPVisionCfg(**image))
        clip = model.CLIP(48, model.CLIPVisionCfg(**image), model.CLIPTextCfg(**text))
        return clip.visual if tower == "visual" else _Call(clip, lambda whole, ids: whole.encode_text(ids))

    def inputs() -> tuple[Tensor, ...]:
        images, ids = torch.randn(2, 3, 64, 64), torch.randint(3, 90, (2, 9))
        return {"visual": (images,), "text": (ids,), "both": (images, ids)}[tower]

    logits = _sum_of_outputs if tower == "both" else tensor_of
    return Candidate("open_clip", name, build, inputs, logits, expected, kind, grids, note)


def _sum_of_outputs(output: dict[str, Tensor]) -> Tensor:
    """Of images, of texts and of the decoder: a score that depends on every layer."""
    weights = torch.linspace(-1, 1, 48)
    parts = [tensor_of(output[name])[:, :48] for name in ("image_features", "text_features", "logits")]
    return torch.stack([part @ weights for part in parts], 1).sum(1, keepdim=True)


_pooled = partial(_open_clip, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=3)

OPEN_CLIP = [
    _open_clip("CLIP.visual", 3, "global", True, "nn.MultiheadAttention without weights"),
    _open_clip("CLIP.visual (qk_norm)", 3, "global", True, "its own attention", qk_norm=True),
    _pooled("CLIP.visual (attentional pool)", 3, "global + cross", True, "1 cross layer: 4 latent queries"),
    _open_clip("CLIP.visual (timm tower)", 8, "global + reduced keys", True, timm_model_name="pvt_v2_b0", timm_pool=""),
    _open_clip(
        "CLIP.visual (ModifiedResNet)",
        1,
        "global",
        False,
        "attention pool, as resnet50_clip in timm",
        layers=(1, 1, 1, 1),
        width=16,
    ),
    _open_clip("CLIP.encode_text", 3, "global", False, "text, causal mask", tower="text"),
    _pooled(
        "CoCa",
        9,
        "global + cross",
        False,
        "3 image, 3 text, 3 decoder layers; 4 cross, 1 of 4 latent queries",
        tower="both",
        output_tokens=True,
    ),
]


def _vit_pytorch(
    name: str, expected: int, kind: str, grids: bool, note: str = "", size: int = 64, **config: Any
) -> Candidate:
    def build() -> nn.Module:
        module, model_class = name.split(".")
        model: nn.Module = getattr(import_module(f"vit_pytorch.{module}"), model_class)(num_classes=CLASSES, **config)
        return model

    return Candidate("vit-pytorch", name, build, images_of(size), tensor_of, expected, kind, grids, note)


_sized = partial(_vit_pytorch, image_size=64, depth=3, dim=48, heads=3, mlp_dim=96, dim_head=16)
_vit = partial(_sized, patch_size=16)
_packed = _vit("na_vit.NaViT", 3, "global + pooling", False, "two images in one masked sequence; 1 query an image")

VIT_PYTORCH = [
    _vit("vit.ViT", 3, "global", True),
    _vit("simple_vit.SimpleViT", 3, "global", True),
    _vit("vit_for_small_dataset.ViT", 3, "global", True, "the diagonal is masked"),
    _vit("parallel_vit.ViT", 6, "global", True, "two attention layers in parallel a block"),
    _vit("deepvit.DeepViT", 3, "global + mixed heads", True, "heads mixed after the softmax; einsum"),
    _vit(
        "cait.CaiT",
        3,
        "global + mixed heads + pooling",
        True,
        "talking heads; einsum; 2 class attention layers",
        cls_depth=2,
    ),
    _vit_pytorch(
        "cct.CCT",
        3,
        "global + pooling",
        True,
        "einsum; sequence pooling: a softmax of (B, N)",
        img_size=64,
        embedding_dim=48,
        num_layers=3,
        num_heads=3,
        mlp_ratio=2.0,
    ),
    _vit_pytorch(
        "cross_vit.CrossViT",
        6,
        "global + cross",
        True,
        "einsum; two grids; 4 cross layers with one query",
        image_size=64,
        sm_dim=32,
        lg_dim=48,
        sm_patch_size=8,
        sm_enc_depth=1,
        sm_enc_mlp_dim=64,
        lg_enc_depth=2,
        lg_enc_mlp_dim=96,
        cross_attn_depth=1,
        depth=2,
    ),
    _sized("t2t.T2TViT", 5, "global", True, "2 layers on finer grids"),
    _vit("pit.PiT", 4, "global", False, "einsum; patches cut by nn.Unfold, overlapping", depth=(1, 2, 1)),
    _vit_pytorch(
        "levit.LeViT",
        5,
        "global + reduced keys",
        True,
        "einsum; 2 downsampling layers",
        size=128,
        image_size=128,
        dim=(32, 48, 64),
        depth=1,
        heads=2,
        mlp_mult=2,
    ),
    _vit_pytorch(
        "cvt.CvT",
        4,
        "reduced keys",
        True,
        "einsum; maps (B H, N, M)",
        s1_emb_dim=16,
        s2_emb_dim=32,
        s3_emb_dim=48,
        s2_depth=1,
        s3_depth=2,
    ),
    _vit_pytorch(
        "mobile_vit.MobileViT",
        3,
        "window",
        False,
        "dilated 2 x 2, 5-D maps",
        size=128,
        image_size=(128, 128),
        dims=[48, 64, 80],
        channels=[16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 160],
        depths=(1, 1, 1),
    ),
    _vit_pytorch(
        "max_vit.MaxViT",
        4,
        "window",
        False,
        "block and dilated grid; einsum",
        dim=32,
        depth=(1, 1),
        dim_head=16,
        window_size=4,
    ),
    _vit_pytorch(
        "nest.NesT",
        4,
        "window",
        False,
        "einsum",
        image_size=64,
        patch_size=4,
        dim=32,
        heads=2,
        num_hierarchies=3,
        block_repeats=(1, 1, 2),
    ),
    _vit_pytorch(
        "regionvit.RegionViT",
        8,
        "global + window",
        False,
        "einsum; one module for regions and windows",
        size=128,
        dim=(32, 32, 32, 32),
        depth=(1, 1, 1, 1),
        window_size=2,
    ),
    replace(_packed, inputs=lambda: ([torch.randn(3, 64, 64), torch.randn(3, 64, 32)],)),
    _vit("xcit.XCiT", 0, "channel + pooling", False, "einsum; 3 channel layers, 2 class attention layers", cls_depth=2),
]


class _Patches(nn.Module):
    """Patch embedding, a body over tokens (B, N, C) and a linear head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 16, stride=16)
        self.body = body
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.body(self.embed(images).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def _torch(
    name: str, body: Callable[[], nn.Module], expected: int, kind: str = "global", grids: bool = True, note: str = ""
) -> Candidate:
    return Candidate("torch", name, lambda: _Patches(body()), images_of(64), tensor_of, expected, kind, grids, note)


def _layer(kind: type[nn.Module], **kwargs: Any) -> Any:
    return kind(32, 4, dim_feedforward=64, **{"batch_first": True, **kwargs})


def _self_attention(batch_first: bool = True, **kwargs: Any) -> nn.Module:
    def call(attention: nn.Module, x: Tensor) -> Tensor:
        tokens = x if batch_first else x.transpose(0, 1)
        output: Tensor = attention(tokens, tokens, tokens, **kwargs)[0]
        return output if batch_first else output.transpose(0, 1)

    return _Call(nn.MultiheadAttention(32, 4, batch_first=batch_first), call)


TORCH = [
    _torch("nn.TransformerEncoderLayer", lambda: _layer(nn.TransformerEncoderLayer), 1),
    _torch(
        "nn.TransformerEncoder",
        lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 3, enable_nested_tensor=False),
        3,
    ),
    _torch(
        "nn.TransformerEncoder (sequence first)",
        lambda: _Call(
            nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer, batch_first=False), 3, enable_nested_tensor=False),
            lambda encoder, x: encoder(x.transpose(0, 1)).transpose(0, 1),
        ),
        3,
    ),
    _torch(
        "nn.TransformerDecoder",
        lambda: _Call(
            nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer), 2), lambda decoder, x: decoder(x[:, :4] * 2, x)
        ),
        2,
        "global + cross",
        False,
        "2 cross layers; the queries are no grid",
    ),
    _torch(
        "nn.Transformer",
        lambda: _Call(
            _layer(nn.Transformer, num_encoder_layers=2, num_decoder_layers=2), lambda whole, x: whole(x, x[:, :4] * 2)
        ),
        4,
        "global + cross",
        False,
        "2 cross layers; the queries are no grid",
    ),
    _torch("nn.MultiheadAttention", _self_attention, 1),
    _torch("nn.MultiheadAttention (need_weights=False)", lambda: _self_attention(need_weights=False), 1),
    _torch("nn.MultiheadAttention (weights per head)", lambda: _self_attention(average_attn_weights=False), 1),
    _torch("nn.MultiheadAttention (sequence first)", lambda: _self_attention(batch_first=False), 1),
]

CANDIDATES = [*TIMM, *TRANSFORMERS, *TORCHVISION, *OPEN_CLIP, *VIT_PYTORCH, *TORCH, *STRUCTURES]
