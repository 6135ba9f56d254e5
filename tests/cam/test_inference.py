"""GradientCam: the maps that the functions give one by one, from a model that is left as it was."""

import inspect
import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from acr_reg import (
    CaptureError,
    GradientCam,
    HorizontalFlip,
    Identity,
    LayoutError,
    capture_attention,
    class_token_gradient_cam,
    multi_view_cam,
    propagate_cam,
)
from tests.support.attention import says
from tests.support.models import explicit_vit, multihead_vit

every_model = pytest.mark.parametrize("build", [multihead_vit, explicit_vit], ids=["fused", "explicit"])
PUBLISHED = (Identity(), HorizontalFlip())
LABELS = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]])


def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def by_hand(model, start_layer=-2, steps=1, views=PUBLISHED):
    with capture_attention(model) as attention:

        def cam(batch):
            logits = model(batch)
            maps = attention.take()
            found = class_token_gradient_cam(logits, maps, LABELS, start_layer)
            return propagate_cam(found, maps, steps=steps) if steps else found

        return multi_view_cam(cam, images(), views).detach()


@every_model
@pytest.mark.parametrize("options", [{}, {"start_layer": 1}, {"steps": 0}, {"steps": 3}, {"views": (Identity(),)}])
def test_it_is_the_functions_one_after_another(build, options):
    model = build(3).eval()
    with GradientCam(model, **options) as cam:
        first, second = cam(images(), LABELS), cam(images(), LABELS)
    expected = by_hand(model, **options)
    assert expected.max() > 0
    for found in (first, second):
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@every_model
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_whatever_the_mode_outside(build, without):
    model = build(2).eval()
    expected = by_hand(model)
    with GradientCam(model) as cam, without():
        torch.testing.assert_close(cam(images(), LABELS), expected, rtol=1e-4, atol=1e-9)


@every_model
def test_the_model_is_left_as_it_was(build):
    model = build(2, dropout=0.2).train()
    frozen, gradient = model.encoder[0], torch.ones_like(model.head.weight)
    frozen.requires_grad_(False)
    frozen.eval()
    model.head.weight.grad = gradient
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = {module: (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()}

    def fails(batch):
        model(batch)
        raise KeyboardInterrupt

    for forward, error in ((None, None), (fails, KeyboardInterrupt), (lambda x: model(x)[:1], ValueError)):
        with GradientCam(model, forward=forward) as cam:
            if error is None:
                cam(images(), LABELS)
            else:
                with pytest.raises(error):
                    cam(images(), LABELS)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        assert {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()} == hooks
        assert torch.is_grad_enabled()
    assert model.head.weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")


def test_layers_below_the_first_used_run_without_a_graph():
    model, seen = multihead_vit(4).eval(), []
    for block in model.encoder:
        block.register_forward_hook(lambda module, args, result: seen.append(result.requires_grad))
    with GradientCam(model, views=[Identity()]) as cam:
        cam(images(), LABELS)
        assert seen == [True] * 4 + [False, False, True, True]  # one image first shows which layers have a graph
        cam(images(), LABELS)
    assert seen[8:] == [False, False, True, True]
    seen.clear()
    with GradientCam(model, start_layer=3, views=[Identity()]) as cam:
        cam(images(), LABELS)
    assert seen == [True] * 4 + [False, False, False, True]


def lower_without_grad(build, lower, depth=4):
    """A model whose lower layers run under no_grad, as frozen backbones are often written."""
    model = build(depth).eval()
    below = nn.Sequential(*model.encoder[:lower])
    below.forward = torch.no_grad()(below.forward)
    model.encoder = nn.Sequential(below, *model.encoder[lower:])
    return model


@every_model
def test_layers_that_the_model_runs_under_no_grad_are_left_out_with_a_warning(build):
    """Were they counted, no layer of the upper half would be on a graph."""
    model = lower_without_grad(build, 2)
    expected = by_hand(model, start_layer=0)
    for start_layer in (-2, 0):
        for no_grad in (None, False):
            with GradientCam(model, start_layer, no_grad=no_grad) as cam:
                with (
                    nullcontext() if no_grad is False else pytest.warns(UserWarning, match="without a graph") as warned
                ):
                    found = cam(images(), LABELS)
                if no_grad is None:
                    (warning,) = warned
                    facts = "encoder.0.0", "encoder.0.1", "no_grad=True", "False"
                    assert all(fact in str(warning.message) for fact in facts)
                    assert warning.filename == __file__
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
                torch.testing.assert_close(cam(images(), LABELS), expected, rtol=1e-4, atol=1e-9)  # warned of once
    with GradientCam(model, steps=0) as cam:  # nothing is propagated, nothing to warn of
        cam(images(), LABELS)


@every_model
@pytest.mark.parametrize("lower", [1, 2, 3])
def test_maps_propagate_over_layers_under_no_grad_if_asked_to(build, lower):
    model = lower_without_grad(build, lower)
    with capture_attention(model, no_grad=True) as attention:

        def by_functions(batch):
            logits = model(batch)
            maps = attention.take()
            return propagate_cam(class_token_gradient_cam(logits, maps, LABELS, start_layer=lower), maps)

        expected = multi_view_cam(by_functions, images(), PUBLISHED).detach()
    for start_layer in (lower, lower - 4):
        with GradientCam(model, start_layer, no_grad=True) as cam:
            torch.testing.assert_close(cam(images(), LABELS), expected, rtol=1e-4, atol=1e-9)
    with GradientCam(model, lower - 1, no_grad=True) as cam, pytest.raises(LayoutError) as error:
        cam(images(), LABELS)
    assert says(
        error, f"layer {lower - 1} (encoder.0.{lower - 1}", "torch.no_grad", f"start_layer={max(lower - 4, -2)}"
    )


@every_model
@pytest.mark.parametrize("no_grad", [None, False, True])
def test_too_few_layers_with_a_graph_are_an_error_that_says_so(build, no_grad):
    model = lower_without_grad(build, 3)
    with GradientCam(model, no_grad=no_grad) as cam, pytest.raises(LayoutError) as error:
        cam(images(), LABELS)
    assert says(error, "start_layer=-1")
    assert says(error, "layer 2 (encoder.0.2" if no_grad else "ran without a graph: 3")
    model = lower_without_grad(build, 4)
    for run in (model, torch.no_grad()(model.forward)):
        with GradientCam(model, forward=run, no_grad=no_grad) as cam, pytest.raises(CaptureError) as error:
            cam(images(), LABELS)
        assert says(error, "All 4 layers", "torch.no_grad", "forward=")


def test_dropout_is_off_meanwhile():
    model = multihead_vit(2, dropout=0.5).train()
    with GradientCam(model) as cam:
        assert torch.equal(cam(images(), LABELS), cam(images(), LABELS))


def test_errors():
    with pytest.raises(ValueError, match="steps=-1 ") as error:
        GradientCam(multihead_vit(), steps=-1)
    assert says(error, "0 leaves propagation out")
    cam = GradientCam(multihead_vit(2))
    cam.remove()
    cam.remove()
    with pytest.raises(CaptureError, match="removed"):
        cam(images())


def detached(model, batch):
    return model(batch).detach()


def twice(model, batch):
    return model(batch.flip(-1)) + model(batch)


def other_run(model, batch):
    with torch.enable_grad():
        return torch.zeros(len(batch), 5, requires_grad=True) + 0 * model(batch).detach()


@pytest.mark.parametrize(
    ("options", "forward", "labels", "facts"),
    [
        ({}, detached, LABELS, ("logits", "detach")),
        ({"start_layer": 0}, twice, LABELS, ("2 times", "forward=", "modules=")),
        ({}, twice, LABELS, ("2 times", "forward=", "modules=")),  # where the first image counts the layers
        ({}, other_run, LABELS, ("logits do not depend on these maps",)),
        ({}, lambda model, batch: model(batch)[:1], LABELS, ("(1, 5)", "2 images", "(B, C)")),
        ({}, None, LABELS[:, :3], ("labels", "(2, 3)", "(2, 5)")),
        ({}, None, LABELS * math.nan, ("labels", "NaN", "0 for the others")),
        ({"class_tokens": 0}, None, LABELS, ("0 class tokens", "class_tokens=", 'query="all"')),
        ({"start_layer": 7}, None, LABELS, ("start_layer=7", "(0, 1)")),
        ({"method": "gradcam"}, None, LABELS, ("method='gradcam'", "cam_grad_s")),
        ({"merge": "median"}, None, LABELS, ("merge='median'", '"mean"')),
        ({"views": ()}, None, LABELS, ("views", "Identity()")),
    ],
)
def test_errors_name_only_arguments_that_it_has(options, forward, labels, facts):
    model = multihead_vit(2)
    run = None if forward is None else lambda batch: forward(model, batch)
    with GradientCam(model, forward=run, **options) as cam, pytest.raises((ValueError, CaptureError)) as error:
        cam(images(), labels)
    assert says(error, *facts)
    arguments = {*inspect.signature(GradientCam).parameters, *inspect.signature(cam.__call__).parameters}
    assert set(re.findall(r"\b([a-z_]+)=", str(error.value))) <= arguments
    for elsewhere in ("capture_attention", "take(", "cam_fn"):
        assert elsewhere not in str(error.value)
