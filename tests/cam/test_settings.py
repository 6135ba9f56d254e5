"""What GradientCam says of a model that its settings do not suit: everything that must be set, at once."""

import inspect
import re

import pytest
import timm
import torch
import transformers
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from torch import nn

from acr_reg import GradientCam, LayoutError
from tests.support.attention import says
from tests.support.models import ExplicitBlock, explicit_vit

SMALL = {"num_classes": 3, "embed_dim": 24}


def hugging_face_swin():
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=4, num_labels=3
    )
    return transformers.SwinForImageClassification(config)


def timm_swin(size=64):
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, window_size=4, depths=(1, 1, 2), num_heads=(1, 2, 4), **SMALL
    )


def pvt():
    return timm.create_model("pvt_v2_b0", num_classes=3, depths=(1, 1, 1, 2))


def mvit():
    config = MultiScaleVitCfg(depths=(1, 1, 1, 2), embed_dim=(8, 16, 32, 64), num_heads=(1, 2, 4, 8))
    return MultiScaleVit(config, img_size=(64, 64), num_classes=3)


def without_class_token():
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=64, depth=3, global_pool="avg", class_token=False
    )


def told(error):
    """The settings that a message says to pass."""
    return eval(f"dict({str(error.value).rpartition('Pass ')[2].rstrip('.')})")


@pytest.mark.parametrize(
    ("build", "size", "settings"),
    [
        (hugging_face_swin, 64, {"query", "propagation_layers"}),
        (timm_swin, 64, {"query", "propagation_layers"}),
        (pvt, 64, {"query", "propagation_layers"}),
        (mvit, 64, {"start_layer", "query", "propagation_layers"}),
        (without_class_token, 64, {"query"}),
    ],
)
def test_what_the_first_error_says_is_enough(build, size, settings):
    model, images = build(), torch.rand(2, 3, size, size)
    with pytest.raises(LayoutError) as error:
        GradientCam(model)(images)
    assert told(error).keys() == settings
    with GradientCam(model, **told(error)) as cam:
        maps = cam(images)
    assert maps.shape[:2] == (2, 3) and maps.amax() > 0


def test_each_setting_that_is_given_wrong_is_named():
    model, images = timm_swin(), torch.rand(1, 3, 64, 64)  # layers 2 and 3 see all of it
    wrong = {"start_layer": 0, "query": "class", "propagation_layers": [0, 3]}
    right = {"start_layer": -2, "query": "all", "propagation_layers": [2, 3]}
    for setting, value in wrong.items():
        with pytest.raises(LayoutError) as error:
            GradientCam(model, **{**right, setting: value})(images)
        assert told(error) == {setting: right[setting]}
    for layers in ([], [4], [-5]):
        with pytest.raises(LayoutError) as error:
            GradientCam(model, **{**right, "propagation_layers": layers})(images)
        assert says(error, f"layers {layers}")
        assert told(error) == {"propagation_layers": [2, 3]}
    expected = GradientCam(model, **right)(images)
    torch.testing.assert_close(GradientCam(model, **{**right, "propagation_layers": [-2, -1]})(images), expected)
    GradientCam(model, query="all", steps=0)(images)  # needs no layers to propagate over


def test_windows_in_every_layer_are_refused():
    with pytest.raises(LayoutError) as error:
        GradientCam(timm_swin(128), query="all")(torch.rand(1, 3, 128, 128))
    assert says(error, "windows of 4 x 4", "No layer", "another model")


class WindowLast(nn.Module):
    """A global layer, and above it one in windows of 2 x 2 tokens."""

    def __init__(self):
        super().__init__()
        self.proj, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 3)
        self.wide, self.near = ExplicitBlock(), ExplicitBlock()

    def forward(self, images):
        x = self.wide(self.proj(images).flatten(2).transpose(1, 2))
        x = x.unflatten(1, (2, 2, 2, 2)).transpose(2, 3).reshape(-1, 4, 32)
        return self.head(self.near(x).reshape(len(images), 16, 32).mean(1))


def test_a_window_above_the_layers_that_see_the_whole_image_is_left_out_by_modules():
    model, images = WindowLast(), torch.rand(2, 3, 32, 32)
    with pytest.raises(LayoutError) as error:
        GradientCam(model, query="all")(images)
    assert told(error) == {"modules": ["wide"], "start_layer": -1}
    assert GradientCam(model, query="all", **told(error))(images).shape == (2, 3, 4, 4)


def test_nest_needs_no_grid():
    """Its stages divide the grid in a way that no rule knows; the last is one block, row by row, as the run shows."""
    model = Nest(img_size=64, num_classes=3, embed_dims=(8, 16, 32), num_heads=(1, 2, 4), depths=(1, 1, 2))
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(LayoutError) as error:
        GradientCam(model)(images)
    assert says(error, 'query="all"', "propagation_layers=[2, 3]")
    with GradientCam(model, query="all", propagation_layers=[2, 3]) as cam:
        seen = cam(images)
    with GradientCam(model, grid=(4, 4), query="all", propagation_layers=[2, 3]) as cam:
        torch.testing.assert_close(cam(images), seen)
    with (
        GradientCam(model, grid=(4, 5), query="all", propagation_layers=[2, 3]) as cam,
        pytest.raises(LayoutError) as error,
    ):
        cam(images)
    assert says(error, "16 queries", "20", "grid=")


def test_tokens_in_another_order_are_refused_whatever_grid_is_given():
    model = timm.create_model("hiera_tiny_224", num_classes=3, stages=(1, 1, 1, 1))
    for grid in (None, (7, 7)):
        with pytest.raises(LayoutError, match="mask units"):
            GradientCam(model, grid=grid, query="all")(torch.rand(1, 3, 224, 224))


def test_class_tokens_of_unknown_place_are_asked_for():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2, reg_tokens=4)
    model.num_prefix_tokens = 5
    images = torch.rand(1, 3, 64, 64)
    known = GradientCam(model)(images)
    with pytest.raises(LayoutError) as error:
        GradientCam(model, class_tokens=2)(images)
    assert says(error, "2 class tokens for 3 classes", "class_tokens=", 'query="all"')
    torch.testing.assert_close(GradientCam(model, class_tokens=1)(images), known)
    with pytest.raises(LayoutError) as error:
        GradientCam(prefix_of_six(), num_prefix_tokens=2, patch_size=8)(torch.rand(1, 3, 32, 48))
    assert says(error, "unknown which", "class_tokens=")


def prefix_of_six():
    """A plain model with a second token before the patches, whose fields name neither."""
    model = explicit_vit(2)
    model.prompt_tokens = nn.Parameter(model.cls_token.detach().repeat(1, 2, 1))
    del model.cls_token
    model.pos_embed = nn.Parameter(torch.randn(1, 2 + 24, 32))

    def forward(images):
        patches = model.proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([model.prompt_tokens.expand(len(patches), -1, -1), patches], 1) + model.pos_embed
        return model.head(model.encoder(tokens)[:, 0])

    model.forward = forward
    return model


def test_names_in_messages_are_arguments_of_gradient_cam():
    arguments = {*inspect.signature(GradientCam).parameters}
    for build in (timm_swin, pvt, mvit):
        with pytest.raises(LayoutError) as error:
            GradientCam(build())(torch.rand(1, 3, 64, 64))
        assert set(re.findall(r"\b([a-z_]+)=", str(error.value))) <= arguments
