"""Models on several devices: split, offloaded, with a teacher on another one; and what the caller leaves on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    GradientCam,
    capture_attention,
    check,
    class_token_gradient_cam,
    propagate_cam,
)
from tests.devices.inputs import LABELS, SIZE, VIEWS, model_and_images
from tests.support.devices import CPU

SECOND = torch.device("cuda", 1)


def split(model: Any, first: torch.device, second: torch.device) -> Any:
    """The model with its second block and its head on a second device, as ``device_map="auto"`` puts them."""
    model = copy.deepcopy(model).to(first)
    block, head = model.encoder[1].to(second), model.head.to(second)
    block.register_forward_pre_hook(lambda _, args: (args[0].to(second),))
    head.register_forward_pre_hook(lambda _, args: (args[0].to(second),))
    return model


def trained(model: Any, images: Tensor, view: Any, valid: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss, terms, class maps and gradients of a step, on the CPU."""
    acr = AllPairsConsistencyLoss(view)
    with capture_attention(model) as attention:
        logits, first = model(images), attention.take()
        maps = class_token_gradient_cam(logits, first, labels, start_layer=0)
        refined = propagate_cam(maps, first)
        model(view(images))
        loss, terms = acr(first, attention.take(), valid=valid, return_terms=True)
        loss.backward()
    with GradientCam(model, start_layer=0, method="cam_grad") as cam:
        found = [loss, *terms.values(), maps, refined, cam(images, labels)]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    return [each.detach().cpu() for each in found]


@pytest.mark.parametrize(("kind", "of"), [("fused", "crops"), ("explicit", "flip")])
def test_model_on_two_devices_gives_what_it_gives_on_one(gpu: torch.device, kind: str, of: str) -> None:
    model, images = model_and_images(kind)
    valid = (torch.arange(48) < 40).expand(2, *SIZE)
    expected = trained(copy.deepcopy(model), images, VIEWS[of], valid, LABELS)
    found = trained(split(model, gpu, SECOND), images.to(gpu), VIEWS[of], valid, LABELS)
    assert len(found) == len(expected)
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours)


def test_check_of_a_model_on_two_devices_reports_what_it_reports_on_one(gpu: torch.device) -> None:
    model, images = model_and_images("fused")
    here, there = check(model, images), check(split(model, gpu, SECOND), images.to(gpu))
    assert (there.ok, there.problems, there.warnings) == (here.ok, here.problems, here.warnings)
    assert there.terms == pytest.approx(here.terms, rel=1e-4)


@pytest.mark.parametrize(("kind", "of"), [("fused", "crops"), ("explicit", "flip")])
def test_student_and_teacher_on_two_devices_are_compared_where_the_first_maps_lie(
    gpu: torch.device, kind: str, of: str
) -> None:
    (student, images), view = model_and_images(kind), VIEWS[of]
    teacher = copy.deepcopy(student)
    acr = AllPairsConsistencyLoss(view)
    losses, gradients = [], []
    for here, there in ((CPU, CPU), (gpu, SECOND)):
        student, teacher = student.to(here), teacher.to(there)
        student.zero_grad()
        with capture_attention(student) as of_student, capture_attention(teacher, no_grad=True) as of_teacher:
            student(view(images.to(here)))
            with torch.no_grad():
                teacher(images.to(there))
            own, others = of_student.take(), of_teacher.take().detach()
            losses += [acr(own, others, view=view.inverse) if of == "flip" else acr(others, own)]
            losses[-1].backward()
        gradients.append([p.grad.cpu() for p in student.parameters() if p.grad is not None])
        assert losses[-1].device == (here if of == "flip" else there)
    torch.testing.assert_close(losses[1].detach().cpu(), losses[0].detach())
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours)


def test_labels_valid_and_class_maps_may_lie_elsewhere_for_every_term(gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, cams = torch.randn(2, 2, 2, 27, 27, generator=generator), torch.randn(2, 2, 3, 4, 6, generator=generator)
    labels, valid = torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.rand(2, *SIZE, generator=generator) > 0.3
    both = []
    for devices in ([CPU] * 6, [gpu, SECOND, gpu, SECOND, CPU, CPU]):
        a, b, cam_a, cam_b, known, inside = (
            each.clone().to(device) for each, device in zip((*rows, *cams, labels, valid), devices, strict=True)
        )
        leaves = [each.requires_grad_() for each in (a, b, cam_a, cam_b)]
        last = SECOND if devices[0] == gpu else CPU  # where the second layer lies
        first, second = (
            AttentionMaps.from_tensors([each.softmax(-1), each.to(last).softmax(-1)], 3, (4, 6), class_tokens=3)
            for each in (a, b)
        )
        for view in VIEWS.values():
            loss, terms = AllPairsConsistencyLoss(view)(
                first, second, cam_a, cam_b, labels=known, valid=inside, return_terms=True
            )
            loss.backward(retain_graph=True)
            assert loss.device == devices[0]
            both.append([loss, *terms.values()])
        both.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(both[:3], both[3:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(other.detach().cpu(), one.detach())


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
def test_model_offloaded_by_accelerate_gives_the_maps_of_the_model(how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, images = model_and_images("explicit")
    expected = GradientCam(model)(images, LABELS)
    if how == "cpu_offload":  # its weights come while it runs, and lie on "meta" before and after
        accelerate.cpu_offload(model, execution_device=CPU)
        assert {p.device.type for p in model.parameters()} == {"meta"}
    else:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with GradientCam(model) as cam:
        torch.testing.assert_close(cam(images, LABELS), expected)
    assert check(model, images).ok


class _Comes(nn.Module):
    """Holds an empty class token until it runs, as weights that are loaded for a forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.kept = model, model.cls_token.detach()
        model.cls_token = nn.Parameter(torch.empty_like(self.kept, device="meta"))
        forward = model.forward

        def with_weights(images: Tensor) -> Tensor:
            model.cls_token = nn.Parameter(self.kept.clone())
            return forward(images)  # type: ignore[no-any-return]

        model.forward = with_weights

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[no-any-return]


def test_token_that_comes_while_the_model_runs_is_the_models_own() -> None:
    model, images = model_and_images("explicit")
    wrapped = _Comes(model)
    with capture_attention(wrapped) as attention:
        wrapped(images)
        layout = attention.take()[0].layout
    assert (layout.num_prefix_tokens, layout.class_tokens) == (1, (0,))
