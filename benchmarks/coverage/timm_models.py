"""The timm rows of the coverage table: one or two models of every family with attention of any kind.

Families without any (ConvNeXt, MLP-Mixer, RDNet, RepVGG, StarNet and others) are left out, except two that are often
taken for transformers. models.py explains the columns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.coverage.candidate import CLASSES, Candidate, images_of, named, tensor_of


def _timm(
    name: str,
    expected: int,
    kind: str,
    grids: bool,
    note: str = "",
    size: int = 64,
    fused: bool = True,
    **kwargs: Any,
) -> Candidate:
    def build() -> nn.Module:
        import timm

        model = timm.create_model(name, num_classes=CLASSES, **kwargs)
        for module in model.modules():
            if not fused and hasattr(module, "fused_attn"):
                module.fused_attn = False
        return model

    shown, images = named(name, "" if fused else "unfused"), images_of(kwargs.get("img_size", size))
    return Candidate("timm", shown, build, images, tensor_of, expected, kind, grids, note)


def _mobilenetv5() -> Candidate:
    def build() -> nn.Module:
        import timm
        from timm.models._efficientnet_builder import decode_arch_def

        stages = [["er_r1_k3_s2_e4_c32"], ["uir_r1_a3_k5_s2_e4_c48"]]
        stages += [["uir_r1_a5_k5_s2_e4_c64", "mqa_r1_k3_h2_v2_s1_d32_c64", "uir_r1_a0_k0_s1_e2_c64"]]
        stages += [["uir_r1_a5_k5_s2_e4_c96", "mqa_r1_k3_h2_s1_d48_c96", "uir_r1_a0_k0_s1_e2_c96"]]
        return timm.create_model("mobilenetv5_300m", num_classes=CLASSES, block_args=decode_arch_def(stages))

    name, note = "mobilenetv5_300m", "one key head for all"
    return Candidate("timm", name, build, images_of(128), tensor_of, 2, "global + reduced keys", True, note)


_vit = partial(_timm, img_size=64, embed_dim=48, depth=3, num_heads=3)
_vit14 = partial(_timm, img_size=56, embed_dim=48, depth=3, num_heads=3)
_swin = partial(_timm, img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
_max = partial(_timm, img_size=64, embed_dim=(32, 32, 64, 64), depths=(1, 1, 2, 2), stem_width=(16, 32))

TIMM = [
    _vit("vit_tiny_patch16_224", 3, "global", True),
    _vit("vit_tiny_patch16_224", 3, "global", True, fused=False),
    _vit("vit_medium_patch16_reg4_gap_256", 3, "global", True, "4 register tokens, no class token"),
    _vit("vit_base_patch16_siglip_224", 3, "global + pooling", True, "pooling: one latent query"),
    _vit("vit_small_patch16_18x2_224", 6, "global", True, "two attention layers in parallel a block"),
    _vit(
        "vit_dlittle_patch16_reg1_gap_256",
        6,
        "global + mixed heads",
        True,
        "differential: two kernels a layer, their outputs subtracted",
    ),
    _vit(
        "vit_dlittle_patch16_reg1_gap_256",
        3,
        "global + mixed heads",
        True,
        "differential: one map subtracted from another after one softmax",
        fused=False,
    ),
    _vit("vit_relpos_small_patch16_224", 3, "global", True),
    _timm("vit_tiny_r_s16_p8_224", 3, "global", True, "convolutional stem", img_size=128, depth=3),
    _vit("deit_tiny_patch16_224", 3, "global", True),
    _vit("deit_tiny_distilled_patch16_224", 3, "global", True, "class and distillation tokens"),
    _vit("deit3_small_patch16_224", 3, "global", True),
    _vit("deit3_small_patch16_224", 3, "global", True, fused=False),
    _vit("beit_base_patch16_224", 3, "global", True),
    _vit("beitv2_base_patch16_224", 3, "global", True, fused=False),
    _vit14("eva02_tiny_patch14_224", 3, "global", True),
    _vit14("eva02_tiny_patch14_224", 3, "global", True, fused=False),
    _vit("vit_small_patch16_dinov3", 3, "global", True, "class and 4 register tokens"),
    _vit("vit_small_patch16_rope_224", 3, "global", True),
    _vit("vit_pe_core_tiny_patch16_384", 3, "global + pooling", True, "pooling: one latent query"),
    _timm("naflexvit_base_patch16_gap", 3, "global", True, embed_dim=48, depth=3, num_heads=3),
    _vit("qwen3_vit_88m", 3, "global", True),
    _vit14("deepseek_vit_412m", 3, "global", True),
    _timm(
        "gemma4_vit_167m",
        3,
        "global",
        True,
        img_size=64,
        embed_dim=48,
        depth=3,
        num_heads=3,
        head_dim=16,
        intermediate_size=96,
        position_embedding_size=64,
    ),
    _vit("samvit_base_patch16_224", 3, "global + window", False, window_size=2, global_attn_indexes=(2,)),
    _vit("cait_xxs24_224", 3, "global + mixed heads + pooling", True, "talking heads; 2 class attention layers"),
    _timm(
        "convit_tiny",
        3,
        "global + mixed heads",
        True,
        "2 gated layers mix the softmax of content and of position: 5 softmaxes",
        img_size=64,
        depth=3,
        local_up_to_layer=2,
    ),
    _vit("xcit_nano_12_p16_224", 0, "channel + pooling", False, "3 channel layers, 2 class attention layers"),
    _timm(
        "volo_d1_224",
        14,
        "other + global + pooling",
        True,
        "4 outlook layers (softmax, no keys) on another grid; 2 class attention layers",
        img_size=64,
    ),
    _timm(
        "tnt_s_patch16_224",
        4,
        "global + window",
        False,
        "half the layers within one patch",
        img_size=64,
        depth=2,
        embed_dim=48,
        inner_dim=12,
        num_heads_outer=3,
    ),
    _timm(
        "crossvit_tiny_240",
        9,
        "global + cross",
        False,
        "images of two sizes, one placed; 6 cross layers, one query",
        img_size=240,
        depth=[[1, 2, 0]] * 3,
    ),
    _timm("pit_ti_224", 4, "global", True, img_size=64, depth=[1, 2, 1]),
    _timm("pit_ti_distilled_224", 4, "global", True, img_size=64, depth=[1, 2, 1]),
    _timm("visformer_tiny", 8, "global", True, img_size=64),
    _timm("vitamin_small_224", 3, "global", True, img_size=64, depth=3),
    _timm("caformer_s18", 12, "global", True, size=64),
    _max("coatnet_nano_rw_224", 4, "global", True),
    _max("coatnext_nano_rw_224", 4, "global", True),
    _timm("botnet26t_256", 3, "global", True, "maps (B H, N, N)", img_size=128),
    _timm("eca_botnext26ts_256", 3, "global", True, "maps (B H, N, N); channel gates without a softmax", img_size=128),
    _timm("resnet50_clip", 1, "global", False, "attention pool, all queries; its mean token needs num_prefix_tokens=1"),
    _timm(
        "levit_128s", 11, "global + reduced keys", True, "2 downsampling layers: fewer queries than keys", img_size=224
    ),
    _timm(
        "levit_conv_128s",
        11,
        "global + reduced keys",
        True,
        "2 downsampling layers; computed as v @ map^T",
        img_size=224,
    ),
    _timm("efficientformer_l1", 1, "global", True, size=224),
    _timm(
        "efficientformerv2_s0",
        5,
        "global + reduced keys + mixed heads",
        True,
        "talking heads; 1 downsampling layer: fewer queries than keys",
        img_size=224,
    ),
    _timm("fastvit_sa12", 2, "global", True, size=128),
    _timm("shvit_s1", 9, "global", True, "one head on part of the channels, maps (B, N, N), v @ map^T", size=128),
    _timm("iformer_t", 5, "global", True, "one head, output gated", size=128),
    _timm("iformer_t", 5, "global", True, "one head, maps (B, N, N), v @ map^T", size=128, fused=False),
    _timm("lowformer_b0", 7, "global", True, "on a strided grid", size=128),
    _timm("cpubone_b0_bfrobust", 7, "global", True, "on a strided grid", size=128),
    _timm(
        "csatv2", 4, "global + other", False, "14 more softmaxes of (B, B), between the images of the batch", size=128
    ),
    _timm("mobilenetv4_hybrid_medium_075", 8, "global + reduced keys", True, "one key head for all", size=128),
    _timm(
        "mobilenetv4_hybrid_medium_075", 8, "global + reduced keys", True, "one key head for all", size=128, fused=False
    ),
    _mobilenetv5(),
    _timm("pvt_v2_b0", 8, "global + reduced keys", True, size=64),
    _timm("pvt_v2_b0", 8, "global + reduced keys", True, size=64, fused=False),
    _timm("pvt_v2_b2_li", 4, "reduced keys", True, "keys pooled to 7 x 7, more than queries late", depths=(1, 1, 1, 1)),
    _timm("twins_pcpvt_small", 4, "global + reduced keys", True, img_size=64, depths=(1, 1, 1, 1)),
    _timm(
        "twins_svt_small",
        8,
        "global + window + reduced keys",
        False,
        "windows as 5-D maps",
        img_size=64,
        depths=(2, 2, 2, 2),
    ),
    _timm("mvitv2_tiny", 10, "global + reduced keys", True, "queries pooled at stage changes", img_size=64),
    _timm("mvitv2_small_cls", 16, "global + reduced keys", True, "queries pooled at stage changes", img_size=64),
    _timm(
        "nextvit_small",
        3,
        "global + reduced keys",
        False,
        "keys are runs of row-major tokens, not a grid",
        depths=(1, 1, 5, 1),
    ),
    _timm(
        "hiera_tiny_224",
        4,
        "global + window",
        False,
        "tokens unrolled by unit; windows as 5-D maps",
        img_size=64,
        stages=(1, 1, 1, 1),
    ),
    _timm("sam2_hiera_tiny", 12, "global + window", False, "queries pooled at stage changes", size=128),
    _swin("swin_tiny_patch4_window7_224", 4, "window", False),
    _swin("swin_tiny_patch4_window7_224", 4, "window", False, fused=False),
    _swin("swinv2_tiny_window8_256", 4, "window", False, "cosine attention"),
    _timm(
        "swinv2_cr_tiny_224",
        4,
        "window",
        False,
        "cosine attention",
        img_size=64,
        window_size=2,
        embed_dim=24,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 4, 4),
    ),
    _timm("davit_tiny", 4, "window + channel", False, "4 channel layers", depths=(1, 1, 1, 1)),
    _timm(
        "gcvit_xxtiny", 12, "window", False, "6 of them with queries from the whole image, keys from a window", size=224
    ),
    _timm("nest_tiny", 12, "window", False, "5-D maps", img_size=64),
    _timm("tiny_vit_5m_224", 10, "window", False),
    _timm(
        "efficientvit_m0",
        24,
        "global + window",
        False,
        "6 layers of 4 heads in cascade, each head its own softmax; maps (B, N, N), v @ map^T",
        img_size=224,
    ),
    _max("maxvit_pico_rw_256", 12, "window", False, "block and dilated grid"),
    _max("maxvit_tiny_pm_256", 12, "window", False, "block and dilated grid, in parallel"),
    _max("maxxvit_rmlp_nano_rw_256", 12, "window", False, "block and dilated grid"),
    _max("maxxvitv2_nano_rw_256", 6, "window", False, "dilated grid only"),
    _timm(
        "mobilevit_xxs",
        9,
        "window",
        False,
        "dilated, as (4 B, H, N, N): a pixel attends to the same place of every 2 x 2 patch",
        size=128,
    ),
    _timm("halonet26t", 3, "window", False, "more keys than queries: halo", size=256),
    _timm("mobilevitv2_050", 0, "linear", False, "softmax over tokens of one score each"),
    _timm("coat_lite_tiny", 0, "linear", False, "softmax of keys over the tokens (dim 2), factorised", img_size=64),
    _timm("coat_tiny", 0, "linear", False, "softmax of keys over the tokens (dim 2), factorised", img_size=64),
    _timm("lambda_resnet26t", 0, "linear", False, "softmax of keys over the tokens (last)", size=128),
    _timm("efficientvim_m1", 0, "linear", False, "softmax over tokens into hidden states", size=224),
    _timm("efficientvit_b0", 0, "linear", False, "no softmax"),
    _timm("swiftformer_xs", 0, "linear", False, "additive, no softmax", size=224),
    _timm("edgenext_xx_small", 0, "channel", False, "3 channel layers"),
    _timm("gcresnet33ts", 0, "pooling", False, "global context: 10 softmaxes over positions"),
    _timm("poolformer_s12", 0, "other", False, "pooling instead of attention"),
    _timm("focalnet_tiny_srf", 0, "other", False, "modulation, no softmax"),
]
