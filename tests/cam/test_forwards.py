"""GradientCam on models as they are: checkpointed, hooking their tensors, of any bands and outputs."""

import gc
import warnings
import weakref
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from acr_reg import (
    AttentionMaps,
    CaptureError,
    GradientCam,
    HorizontalFlip,
    Identity,
    LayoutError,
    Rotate90,
    Scale,
    class_token_gradient_cam,
    normalize_cam,
    propagate_cam,
)
from acr_reg.errors import SizeError
from tests.support.attention import says
from tests.support.models import explicit_vit, multihead_vit
from tests.support.models.plain import BLOCKS, Checkpointed, PlainEncoder

every_model = pytest.mark.parametrize("build", [multihead_vit, explicit_vit], ids=["fused", "explicit"])
LABELS = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]])


def images(bands=3):
    return torch.randn(2, bands, 32, 48, generator=torch.Generator().manual_seed(0))


def cams(model, batch=None, **options):
    with GradientCam(model, **options) as cam:
        return cam(images() if batch is None else batch, LABELS)


# ---- checkpointing


class OneStage(nn.Sequential):
    def each(self, x):
        for block in self:
            x = block(x)
        return x

    def forward(self, x):
        return checkpoint(self.each, x, use_reentrant=False)


@every_model
@pytest.mark.parametrize("how", [Checkpointed, OneStage])
def test_a_checkpointed_model_gives_the_same_maps_call_after_call(build, how):
    model = build(4)
    expected = cams(model)
    assert expected.amax() > 0
    model.encoder = how(*model.encoder)
    with GradientCam(model) as cam:
        for _ in range(3):
            torch.testing.assert_close(cam(images(), LABELS), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of torch: no parameter needs a gradient
@pytest.mark.parametrize("kind", BLOCKS)
def test_reentrant_checkpointing_is_refused_where_a_gradient_is_needed_and_else_works(kind):
    blocks = [BLOCKS[kind]() for _ in range(3)]
    model = PlainEncoder(nn.Sequential(*blocks))
    expected = cams(model, start_layer=-1)
    model.encoder = Checkpointed(*blocks)
    model.encoder.reentrant = (True, None, None)
    found = cams(model, start_layer=-1, no_grad=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(CaptureError) as error:
        cams(model, start_layer=-1, no_grad=False)
    assert says(error, "encoder.0", "use_reentrant=False")
    model.encoder.reentrant = (None, None, True)
    with pytest.raises(LayoutError) as error:
        cams(model, start_layer=-1, no_grad=True)
    assert says(error, "layer 2 (encoder.2", "reentrant checkpointing")


# ---- models that need a graph below start_layer


def hooks(tokens):
    tokens.register_hook(lambda gradient: None)


def retains(tokens):
    tokens.retain_grad()


def differentiates(tokens):
    torch.autograd.grad(tokens.square().sum(), tokens)


def asserts(tokens):
    assert tokens.requires_grad


def names(tokens):
    tokens.grad_fn.name()


class Needing(nn.Module):
    """A block that does something with its result that needs a graph."""

    def __init__(self, block, what):
        super().__init__()
        self.block, self.what = block, what

    def forward(self, x):
        x = self.block(x)
        self.what(x)
        return x


@every_model
@pytest.mark.parametrize("what", [hooks, retains, differentiates, asserts, names])
def test_a_model_that_needs_a_graph_gets_one_from_the_start(build, what):
    model = build(4).train()
    expected = cams(model)
    model.encoder = nn.Sequential(*(Needing(block, what) for block in model.encoder))
    model.encoder[1].requires_grad_(False)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    for outside in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with outside(), GradientCam(model) as cam:
            for _ in range(2):
                torch.testing.assert_close(cam(images(), LABELS), expected, rtol=1e-4, atol=1e-7)
        assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    with torch.inference_mode():
        batch = images()
    torch.testing.assert_close(cams(model, batch), expected, rtol=1e-4, atol=1e-7)


@every_model
def test_an_error_of_the_model_is_its_own(build):
    model, seen = build(2), []

    def fails(batch):
        seen.append(len(batch))
        raise RuntimeError("the model's own")

    with GradientCam(model, forward=fails) as cam, pytest.raises(RuntimeError, match="the model's own") as error:
        cam(images(), LABELS)
    assert error.value.__context__ is None and seen == [1, 1]
    with GradientCam(model) as cam:
        with pytest.raises(RuntimeError):
            cam(torch.randn(1, 4, 32, 48))
        lower = model.encoder[0].register_forward_hook(lambda *call: seen.append(call[-1].requires_grad))
        cam(images(), LABELS)  # as before: without a graph below
    lower.remove()
    del seen[:2]
    with GradientCam(model, start_layer=-1) as cam:
        model.encoder[0].register_forward_hook(lambda *call: seen.append(call[-1].requires_grad))
        cam(images(), LABELS)
    assert seen[-2:] == [False, False]


class Distilled(nn.Module):
    """Runs an encoder under no_grad beside its own pass: a teacher, or itself on a crop."""

    def __init__(self, student, teacher, first):
        super().__init__()
        self.student, self.teacher, self.first = student, teacher, first

    def forward(self, x):
        if self.first:
            with torch.no_grad():
                self.teacher(x)
        logits = self.student(x)
        if not self.first:
            with torch.no_grad():
                self.teacher(x)
        return logits


@every_model
@pytest.mark.parametrize("first", [True, False])
def test_a_pass_under_no_grad_beside_the_own_one_is_no_part_of_it(build, first):
    model = build(2)
    expected = cams(model)
    torch.testing.assert_close(cams(Distilled(model, model, first)), expected)
    torch.testing.assert_close(cams(Distilled(model, build(2), first)), expected)
    with pytest.raises(CaptureError) as error:
        cams(Distilled(model, model, first), no_grad=True)
    assert says(error, "2 times", "forward=")


# ---- what the forward returns


Output = namedtuple("Output", "loss logits")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"logits": logits, "aux": None},
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: Output(None, logits),
    ],
)
def test_the_logits_of_an_output_are_taken(wrap):
    model = multihead_vit(2)
    expected = cams(model)
    torch.testing.assert_close(cams(model, forward=lambda batch: wrap(model(batch))), expected)


def test_a_transformers_model_needs_no_forward():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16
    )
    config.num_labels = 5
    model = ViTForImageClassification(config).eval()
    batch = torch.rand(2, 3, 64, 64)
    expected = cams(model, batch, forward=lambda x: model(x).logits)
    torch.testing.assert_close(cams(model, batch), expected)


@pytest.mark.parametrize(
    ("wrap", "facts"),
    [
        (lambda logits: (logits, None), ("a tuple of Tensor, NoneType",)),
        (lambda logits: [logits, logits], ("a list of Tensor, Tensor",)),
        (lambda logits: {"scores": logits, "aux": logits}, ("a dict of scores, aux",)),
        (lambda logits: {"logits": None}, ("a dict of logits",)),
        (lambda logits: None, ("a NoneType",)),
        (lambda logits: logits.detach().numpy(), ("a ndarray",)),
        (lambda logits: logits[..., None, None], ("(1, 5, 1, 1)",)),
        (lambda logits: logits[0], ("(5,)",)),
    ],
)
def test_other_outputs_are_refused_with_what_they_hold(wrap, facts):
    model = multihead_vit(2)
    with pytest.raises((TypeError, ValueError)) as error:
        cams(model, forward=lambda batch: wrap(model(batch)))
    assert says(error, *facts, "forward=", "C)")


# ---- images and labels


@every_model
@pytest.mark.parametrize("bands", [1, 2, 5, 13, 64])
def test_images_have_any_number_of_bands(build, bands):
    model = build(2)
    model.proj = nn.Conv2d(bands, 32, 8, 8)
    plain = build(2)
    plain.load_state_dict(model.state_dict() | {"proj.weight": plain.proj.weight})
    plain.proj = nn.Sequential(nn.Conv2d(3, 3, 1), plain.proj)  # three bands
    assert cams(model, images(bands)).shape == cams(plain).shape == (2, 5, 4, 6)


@pytest.mark.parametrize("bands", [1, 2, 5, 13])
@pytest.mark.parametrize(
    "hints", [{}, {"patch_size": 16, "num_prefix_tokens": 1}, {"grid": (4, 4), "num_prefix_tokens": 1}]
)
def test_a_model_of_timm_sees_images_of_any_bands(bands, hints):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5, in_chans=bands)
    batch = torch.rand(2, bands, 64, 64)
    torch.testing.assert_close(cams(model, batch, **hints), cams(model, batch))


def test_the_forward_may_choose_or_add_bands():
    model = multihead_vit(2)
    expected = cams(model)
    more = torch.cat([images(), images(7)], 1)
    torch.testing.assert_close(cams(model, more, forward=lambda batch: model(batch[:, :3])), expected)
    fewer = images()[:, :1]
    torch.testing.assert_close(
        cams(model, fewer, forward=lambda batch: model(batch.expand(-1, 3, -1, -1))),
        cams(model, fewer.expand(-1, 3, -1, -1)),
    )


class Spectral(nn.Module):
    """Cuts patches itself, so that its encoder is given no image."""

    def __init__(self):
        super().__init__()
        self.embed, self.encoder, self.head = nn.Linear(12 * 64, 32), multihead_vit(2).encoder, nn.Linear(32, 5)

    def forward(self, x):
        patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return self.head(self.encoder(self.embed(patches).flatten(1, 2)).mean(1))


def test_a_grid_is_given_where_it_cannot_be_inferred():
    model, batch = Spectral(), images(12)
    known = {"query": "all", "patch_size": 8, "num_prefix_tokens": 0}
    part = {"forward": model.forward, "query": "all"}  # the encoder alone is watched
    with pytest.raises(LayoutError) as error:
        cams(model.encoder, batch, forward=model.forward)
    assert says(error, "24 tokens", "grid=(height, width)", 'query="all"')
    torch.testing.assert_close(cams(model.encoder, batch, **part, grid=(4, 6)), cams(model, batch, **known))
    square, views = batch[..., :32], [Identity(), HorizontalFlip(), Rotate90(1), Scale(2)]
    found = cams(model.encoder, square, **part, grid=(4, 4), views=views)
    torch.testing.assert_close(found, cams(model, square, **known, views=views))
    with pytest.raises(LayoutError) as error:
        cams(model.encoder, batch, **part, grid=(4, 5))
    assert says(error, "20", "24 queries", "grid=")
    with pytest.raises(LayoutError) as error:
        cams(model.encoder, batch, **part, grid=(4, 6), views=[Scale(1.1)])
    assert says(error, "(4, 6)", "32 x 48 px", "views=")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"views": HorizontalFlip()}, ["View", "views=[<View>]"]),
        ({"propagation_layers": 3}, ["3", "propagation_layers=[3]"]),
        ({"modules": "encoder"}, ["'encoder'", "modules=['encoder']"]),
    ],
)
def test_one_value_in_place_of_a_list_is_refused(options, facts):
    with pytest.raises(TypeError, match="not a list") as error:
        GradientCam(explicit_vit(), **options)
    assert says(error, *facts)


def test_a_function_in_place_of_the_model_is_refused():
    with pytest.raises(TypeError, match="forward=") as error:
        GradientCam(lambda images: images)
    assert says(error, "function", "torch.nn.Module")


@pytest.mark.parametrize("grid", [14, (14,), (0, 4), (1, 2, 3), "14"])
def test_a_grid_of_another_form_is_refused(grid):
    with pytest.raises(LayoutError) as error:
        GradientCam(multihead_vit(), grid=grid)
    assert says(error, "grid=", "(height, width)")


@pytest.mark.parametrize(
    ("batch", "error_type", "facts"),
    [
        (np.zeros((2, 3, 32, 48), np.float32), TypeError, ("ndarray", "torch.from_numpy")),
        ([torch.zeros(3, 32, 48)], TypeError, ("list", "(B, bands, H, W)")),
        ({"pixel_values": torch.zeros(1, 3, 32, 48)}, TypeError, ("dict",)),
        (torch.zeros(3, 32, 48), ValueError, ("(3, 32, 48)", "(B, bands, H, W)")),
        (torch.zeros(0, 3, 32, 48), ValueError, ("(0, 3, 32, 48)", "at least one image")),
    ],
)
def test_images_of_another_form_are_refused(batch, error_type, facts):
    with GradientCam(multihead_vit(2)) as cam, pytest.raises(error_type) as error:
        cam(batch)
    assert says(error, *facts)


@pytest.mark.parametrize(
    ("labels", "error_type", "facts"),
    [
        (torch.tensor([1, 3]), ValueError, ("(2,)", "class indices", "one_hot(labels, 5)")),
        (torch.tensor([1, 3], dtype=torch.int16), ValueError, ("class indices",)),
        (3, TypeError, ("int", "(2, 5)")),
        ([1, 3], TypeError, ("list", "(2, 5)")),
        (np.eye(5)[:2], TypeError, ("ndarray", "(2, 5)")),
        (torch.ones(5), ValueError, ("(5,)", "(2, 5)")),
    ],
)
def test_labels_of_another_form_are_refused(labels, error_type, facts):
    with GradientCam(multihead_vit(2)) as cam, pytest.raises(error_type) as error:
        cam(images(), labels)
    assert says(error, *facts)


# ---- memory


def test_the_maps_of_a_run_are_released_when_the_next_begins():
    model, maps = explicit_vit(2), []
    model.encoder[1].drop.register_forward_pre_hook(lambda _, args: maps.append(weakref.ref(args[0])))
    alive = []

    def several(batch):
        for _ in range(3 if len(batch) > 1 else 1):  # one image first shows the layers
            logits = model(batch)
        gc.collect()
        alive[:] = [each() is not None for each in maps]
        return logits

    with GradientCam(model, forward=several) as cam, pytest.raises(CaptureError) as error:
        cam(images(), LABELS)
    assert says(error, "3 times", "forward=", "modules=")
    assert alive[-3:] == [False, False, True]


def test_the_first_call_keeps_what_the_next_ones_keep_and_no_graph_of_all_layers():
    model, given, alive = multihead_vit(6), [], []
    for block in model.encoder:  # a square saves what it is given
        block.register_forward_hook(lambda _, __, x: given.append(weakref.ref(x)) or x.square().sqrt())
    model.head.register_forward_pre_hook(lambda *_: alive.append(sum(each() is not None for each in given)))
    with GradientCam(model, views=[Identity()]) as cam:
        for _ in range(2):
            cam(images(), LABELS)
            given.clear()
    most = alive[-1]
    assert len(alive) == 3 and 0 < most < 6
    assert max(alive) == most


# ---- what is no tensor, and a head of zeros


@pytest.mark.parametrize("kind", ["ImageClassifierOutput", "SimpleNamespace", "dict"])
def test_an_output_in_place_of_its_logits_is_told_to_pass_them(kind):
    logits, maps = torch.zeros(2, 3, requires_grad=True), AttentionMaps.from_tensors([torch.ones(2, 1, 1)], 0, (1, 1))
    outputs = {
        "ImageClassifierOutput": ImageClassifierOutput(logits=logits),
        "SimpleNamespace": SimpleNamespace(logits=logits),
        "dict": {"logits": logits},
    }[kind]
    with pytest.raises(TypeError) as error:
        class_token_gradient_cam(outputs, maps)
    assert says(error, kind, "(B, C)" if kind == "dict" else "outputs.logits")
    for given in (lambda: propagate_cam(outputs, maps), lambda: normalize_cam(outputs)):
        with pytest.raises(TypeError, match=rf"cam has type {kind}. Pass a tensor \(B, C, h, w\)"):
            given()  # logits (B, C) are no maps
    with pytest.raises(TypeError, match="take"):
        class_token_gradient_cam(logits, outputs)


def _pooled(model, x):
    tokens = model.proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], 1) + model.pos_embed
    return model.head(model.encoder(tokens)[:, 1:].mean(1))


def _warned(model, **options):
    with warnings.catch_warnings(record=True) as caught, GradientCam(model, views=[Identity()], **options) as cam:
        warnings.simplefilter("always")
        maps = cam(torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)))
    return maps, [str(each.message) for each in caught]


@pytest.mark.parametrize("build", [explicit_vit, multihead_vit])
def test_a_head_of_zeros_is_told_from_logits_that_are_pooled_from_patches(build):
    model = build()
    nn.init.zeros_(model.head.weight)
    maps, [message] = _warned(model)
    assert not maps.any()
    assert "head of zeros" in message and "pool" not in message
    nn.init.normal_(model.head.weight)
    assert _warned(model)[1] == []
    model.forward = lambda x: _pooled(model, x)
    _, [message] = _warned(model, start_layer=-1)
    assert "pool patches" in message and 'query="all"' in message and "zeros" not in message


# ---- scales


def _timm(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), depth=2, num_classes=5, **options)


def _resized(batch, size):
    return nn.functional.interpolate(batch, size=size, mode="bilinear", antialias=True, align_corners=False)


def test_scales_of_a_gradient_cam_are_a_cam_of_each_size_brought_to_one_grid():
    model, batch = _timm(dynamic_img_size=True), torch.rand(2, 3, 64, 96)
    found = cams(model, batch, scales=[0.5, 1.0, 1.5])  # each on the image and on its flip
    by_hand = [cams(model, _resized(batch, (32 * i, 48 * i))) for i in (1, 2, 3)]
    assert [maps.shape[-2:] for maps in by_hand] == [(2, 3), (4, 6), (6, 9)]
    torch.testing.assert_close(found, sum(_resized(maps, (4, 6)) for maps in by_hand), rtol=1e-4, atol=1e-6)
    with GradientCam(model, scales=[0.5, 1.0]) as cam:
        assert cam(batch, LABELS, size=(64, 96)).shape == (2, 5, 64, 96)


@pytest.mark.parametrize(
    "options", [{"scales": [1.0, 0.5]}, {"scales": [0.5]}, {"views": [Scale(0.5)]}, {"views": [Rotate90()]}], ids=str
)
def test_a_model_of_one_size_says_how_it_takes_others(options):
    batch = torch.rand(2, 3, 64, 96)
    with pytest.raises(SizeError) as error:
        cams(_timm(), batch, **options)
    size = "96 x 64 px" if options == {"views": [Rotate90()]} else "32 x 48 px"
    assert says(error, size, "doesn't match model", "dynamic_img_size=True")
    assert cams(_timm(dynamic_img_size=True), batch, **options).amax() > 0


def test_sizes_of_no_whole_patches_need_padding_and_say_so():
    batch = torch.rand(2, 3, 64, 96)
    with pytest.raises(SizeError, match=r"51 x 77 px: .*divisible by patch size.*dynamic_img_pad=True"):
        cams(_timm(dynamic_img_size=True), batch, scales=[1.0, 0.8])
    padding = _timm(dynamic_img_size=True, dynamic_img_pad=True)
    with pytest.warns(UserWarning, match="pads images of 51 x 77 px"):
        assert cams(padding, batch, scales=[1.0, 0.8]).shape == (2, 5, 4, 6)


def test_other_errors_of_a_model_are_not_taken_for_its_size():
    def broken(x):
        raise KeyError("a key")

    with pytest.raises(KeyError, match="a key"):
        cams(_timm(dynamic_img_size=True), torch.rand(2, 3, 64, 96), scales=[0.5, 1.0], forward=broken)
