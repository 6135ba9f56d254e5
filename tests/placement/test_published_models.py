"""What is told of models as they are out there."""

from __future__ import annotations

import pytest

from acr_reg import HorizontalFlip, LayoutError, capture_attention, class_token_gradient_cam, propagate_cam
from tests.support.attention import says
from tests.support.capturing import affinity_loss, captured, grids, images, nothing_captured, refusal_of_the_loss
from tests.support.models import CASES
from tests.support.models.published import segformer, timm_model, transformers_swin

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2, 2), "num_heads": (2, 4, 8)}
TINY = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
DAVIT = {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)}
MODELS = {
    "timm swin": (
        timm_model("swin_tiny_patch4_window7_224", **SWIN),
        (64, 64),
        ["16 windows of 4 x 4", "4 windows of 4 x 4", "4 windows of 4 x 4, shifted by 2 x 2", "4 x 4", "4 x 4"],
        {},
    ),
    "timm twins": (
        timm_model("twins_svt_small", img_size=64, depths=(2, 2, 1, 1)),
        (64, 64),
        [
            "9 windows of 7 x 7",
            "16 x 16, keys 2 x 2",
            "4 windows of 7 x 7",
            "8 x 8, keys 2 x 2",
            "1 windows of 7 x 7",
            "1 windows of 7 x 7",
        ],
        {},
    ),
    "timm davit": (
        timm_model("davit_tiny", **DAVIT),
        (64, 64),
        ["9 windows of 7 x 7", "4 windows of 7 x 7", "1 windows of 7 x 7", "1 windows of 7 x 7"],
        {f"stages.{i}.blocks.0.1.attn": "32 channels attend to 32 channels" for i in range(4)},
    ),
    "timm cait": (
        timm_model("cait_xxs24_224", **TINY),
        (64, 64),
        ["4 x 4, mixed", "4 x 4, mixed"],
        {f"blocks_token_only.{i}.attn": "pooling or class attention: 1 query attends to 17 keys" for i in range(2)},
    ),
    "timm convit": (
        timm_model("convit_tiny", img_size=64, depth=3, local_up_to_layer=2),
        (64, 64),
        ["4 x 4, mixed", "4 x 4, mixed", "1 prefix + 4 x 4"],
        {},
    ),
    "timm differential": (
        timm_model("vit_dlittle_patch16_reg1_gap_256", **TINY),
        (64, 64),
        ["1 prefix + 4 x 4"] * 4,
        {},
    ),
    "timm levit": (
        timm_model("levit_128s"),
        (224, 224),
        ["14 x 14"] * 2 + ["7 x 7, keys 14 x 14"] + ["7 x 7"] * 3 + ["4 x 4, keys 7 x 7"] + ["4 x 4"] * 4,
        {},
    ),
    "timm pvt, linear": (
        timm_model("pvt_v2_b2_li", depths=(1, 1, 1, 1)),
        (64, 64),
        ["16 x 16, keys 7 x 7", "8 x 8, keys 7 x 7", "4 x 4, keys 7 x 7", "2 x 2, keys 7 x 7"],
        {},
    ),
    "timm nextvit": (
        timm_model("nextvit_small", depths=(1, 1, 5, 1)),
        (64, 64),
        ["keys pooled along the sequence", "keys pooled along the sequence", "2 x 2"],
        {},
    ),
    "timm hiera": (
        timm_model("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1)),
        (64, 64),
        ["4 windows", "4 windows", "4 windows", "order of mask units (Unroll)"],
        {},
    ),
    "transformers swin, eager": (
        transformers_swin("eager"),
        (64, 64),
        ["16 windows of 4 x 4", "16 windows of 4 x 4, shifted by 2 x 2", "4 windows of 4 x 4"],
        {},
    ),
    "transformers swin, sdpa": (
        transformers_swin("sdpa"),
        (64, 64),
        ["16 windows of 4 x 4", "16 windows of 4 x 4, shifted by 2 x 2", "4 windows of 4 x 4"],
        {},
    ),
    "transformers segformer": (
        segformer(),
        (64, 96),
        ["16 x 24, keys 2 x 3", "8 x 12, keys 2 x 3", "4 x 6, keys 2 x 3", "2 x 3"],
        {},
    ),
}


def summary(layer) -> str:
    """What was told of a layer's tokens, in words."""
    if layer.window is not None:
        return str(layer.window)
    if layer.placed is None:
        return layer.why_unplaced
    query, key = grids(layer)
    prefix = f"{layer.layout.num_prefix_tokens} prefix + " * (layer.layout.num_prefix_tokens > 0)
    keys = f", keys {layer.layout.key}" * (key != query)
    return f"{prefix}{layer.layout.query}{keys}{'' if layer.stochastic else ', mixed'}"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_told_of_models_out_there(name: str) -> None:
    build, size, told, reasons = MODELS[name]
    maps, skipped = captured(build().eval(), images(size=size))
    assert len(maps) == len(told)
    for layer, expected in zip(maps, told, strict=True):
        found = summary(layer)
        assert found.startswith(expected) if layer.window or layer.placed is not None else expected in found
    assert skipped.keys() == reasons.keys()
    for module, reason in reasons.items():
        assert reason in skipped[module]


def test_a_model_of_channel_attention_alone_is_refused_by_name() -> None:
    build = timm_model("xcit_nano_12_p16_224", img_size=64, depth=2)
    for size in ((64, 64), (64, 128)):  # 16 tokens, and 32, as many as a head has channels
        message = str(nothing_captured(build(), images(size=size)).value)
        assert "blocks.1.attn: channel attention: 32 channels attend to 32 channels over all tokens" in message
        assert "cls_attn_blocks.0.attn: pooling or class attention: 1 query" in message


def test_the_last_stage_of_swin_is_regularised_and_gives_class_maps() -> None:
    model, view, x = timm_model("swin_tiny_patch4_window7_224", **SWIN)().eval(), HorizontalFlip(), images(2, (64, 64))
    with capture_attention(model) as attention:
        logits = model(x)
        a = attention.take()
        model(view(x))
        b = attention.take()
    with pytest.raises(LayoutError) as error:
        affinity_loss(view)(a, b)
    assert says(error, "layer 0 (layers.0.blocks.0.attn)", "Use only layers [3, 4]")
    assert affinity_loss(view, layers=[3, 4])(a, b) > 0
    last = a.select([3, 4])
    cam = class_token_gradient_cam(logits, last, query="all")
    assert cam.shape == (2, 5, 4, 4)
    assert propagate_cam(cam, last).shape == (2, 5, 4, 4)
    affinity_loss(view, layers=[3, 4])(a, b).backward()
    assert model.layers[0].blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_segformer_is_regularised_on_both_of_its_grids() -> None:
    model, view, x = segformer()().eval(), HorizontalFlip(), images(size=(64, 96))
    with capture_attention(model) as attention:
        model(x)
        a = attention.take()
        model(view(x))
        b = attention.take()
    assert [layer.layout.query.stride[0] for layer in a] == [4, 8, 16, 32]
    assert [layer.layout.key.stride[0] for layer in a] == [32, 32, 32, 32]
    affinity_loss(view)(a, b).backward()
    for stage in model.segformer.stages:
        gradients = [p.grad for name, p in stage.named_parameters() if name.endswith(("q_proj.weight", "query.weight"))]
        assert gradients
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_patches_dropped_in_training_leave_no_grid() -> None:
    """4 of 16 tokens would make a 2 x 2 grid of a later stage, in a model that has none."""
    model = timm_model("vit_tiny_patch16_224", **TINY, patch_drop_rate=0.75)()
    with capture_attention(model) as attention:
        model.train()(images(size=(64, 64)))
        (first, _) = maps = attention.take()
        assert first.shape[2:] == (5, 5)
        assert says(refusal_of_the_loss(maps), "5 tokens lie on no grid of the image", "dropping")
        model.eval()(images(size=(64, 64)))
        maps = attention.take()
        assert grids(maps[0]) == ((4, 4), (4, 4))
        assert affinity_loss()(maps, maps) > 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_image_of_another_size_gives_another_grid(implementation: str) -> None:
    case = next(c for c in CASES if c.name == f"transformers-registers-{implementation}")
    with capture_attention(model := case.build()) as attention:
        model(images(size=(48, 80)))
        layout = attention.take()[0].layout
    assert (layout.query.height, layout.query.width, layout.num_prefix_tokens) == (3, 5, 5)


@pytest.mark.parametrize("size", [(48, 48), (48, 80)])
def test_grids_of_models_that_take_any_size(size: tuple[int, int]) -> None:
    import timm
    import transformers as tf

    common = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = tf.ViTForImageClassification(tf.ViTConfig(image_size=32, patch_size=16, **common))
    clip = tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(image_size=32, patch_size=16, **common))
    flexible = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=5, depth=1)
    for model, options in (
        (flexible, {}),
        (vit, {"interpolate_pos_encoding": True}),
        (clip, {"interpolate_pos_encoding": True}),
    ):
        with capture_attention(model) as attention:
            model(images(size=size), **options)
            layout = attention.take()[0].layout
        assert (layout.query.height, layout.query.width) == (size[0] // 16, size[1] // 16)
        assert layout.query.extent == size
        assert layout.num_prefix_tokens == 1
