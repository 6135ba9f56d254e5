"""Class maps on a device: no operation mixes devices, they are those of the CPU, and few values are read."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    GradientCam,
    HorizontalFlip,
    Identity,
    Scale,
    attention_rollout,
    capture_attention,
    class_attention,
    class_token_gradient_cam,
    multi_view_cam,
    normalize_cam,
    propagate_cam,
)
from tests.support.devices import CPU, Traffic, stand_in_devices
from tests.support.models.plain import BUILDERS, FunctionAttention, PlainEncoder

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
LABELS = {
    "one class": torch.tensor([[0, 1.0, 0, 0, 0], [1, 0, 0, 0, 0]]),  # floats, which may be NaN
    "two classes": torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]),
    "all classes": None,
    "no class": torch.zeros(2, 5),
}


class Maps(NamedTuple):
    of_classes: Tensor
    reads: int
    copies: int


def model_on(device: torch.device, kind: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[kind]().eval().to(device)


def by_hand(device: torch.device, kind: str, labels: Tensor | None, steps: int = 1, **options: Any) -> Maps:
    """The maps of a second call of the functions, propagated, and what was moved for them."""
    model = model_on(device, kind)
    labels = None if labels is None else labels.to(device)
    with capture_attention(model) as attention:
        for _ in range(2):
            logits, maps = model(IMAGES.to(device)), attention.take()
            with Traffic() as traffic:
                cam = class_token_gradient_cam(logits, maps, labels, **options)
            propagated = propagate_cam(cam, maps, steps=steps)
    assert cam.device == propagated.device == device
    return Maps(normalize_cam(propagated).cpu(), *traffic.counts)


def by_object(device: torch.device, kind: str, labels: Tensor | None, **options: Any) -> Maps:
    images, labels = IMAGES.to(device), None if labels is None else labels.to(device)
    model, runs = model_on(device, kind), list[Any]()
    model.register_forward_hook(lambda *_: runs.append(None))
    with GradientCam(model, **options) as cam:
        for _ in range(2):
            with Traffic() as traffic:
                maps = cam(images, labels)
    assert maps.device == device
    assert len(runs) == 1 + 2 * 2  # a look at one image, and both views twice: none had to be repeated
    return Maps(maps.cpu(), *traffic.counts)


def both(make: Any, *args: Any, **options: Any) -> Maps:
    """The maps on a device, which equal those on the CPU."""
    here = make(CPU, *args, **options)
    with stand_in_devices() as gpu:
        there = make(gpu, *args, **options)
    torch.testing.assert_close(there.of_classes, here.of_classes)
    return there


@cache
def of_labels(make: Any, kind: str, name: str) -> Maps:
    return both(make, kind, LABELS[name])


@pytest.mark.parametrize(("kind", "name"), [*(("fused", name) for name in LABELS), ("explicit", "one class")])
def test_class_maps_on_a_device_equal_those_on_the_cpu(kind: str, name: str) -> None:
    of_labels(by_hand, kind, name)
    of_labels(by_object, kind, name)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fused", {"start_layer": 0, "method": "grad_s"}),
        ("explicit", {"method": "cam_grad"}),
        ("fused", {"method": "cam_grad_s", "query": "all"}),
    ],
    ids=str,
)
def test_class_maps_of_every_method_on_a_device_equal_those_on_the_cpu(kind: str, options: dict[str, Any]) -> None:
    both(by_hand, kind, LABELS["two classes"], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2, "merge": "mean"},
        {"propagation_layers": [-1], "views": [Identity(), Scale(0.75, keep_size=True)], "merge": "max"},
    ],
    ids=str,
)
def test_class_maps_of_every_merge_on_a_device_equal_those_on_the_cpu(options: dict[str, Any]) -> None:
    both(by_object, "fused", LABELS["two classes"], **options)


@pytest.mark.parametrize("name", ["one class", "two classes", "all classes"])
@pytest.mark.parametrize(("make", "reads"), [(by_hand, 2), (by_object, 4)], ids=["function", "GradientCam"])
def test_reads_for_class_maps_do_not_grow_with_the_classes(make: Any, reads: int, name: str) -> None:
    found = of_labels(make, "fused", name)
    assert found.reads <= reads
    assert found.copies == 0


def below_the_diagonal(queries: Tensor) -> Tensor:
    count = queries.shape[-2]
    return torch.ones(count, count, dtype=torch.bool, device=queries.device).tril(count // 2)


ATTENTION: dict[str, Any] = {
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "boolean mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, below_the_diagonal(q)),
    "additive mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, below_the_diagonal(q).to(q)),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_maps_and_loss_of_masked_attention_on_a_device_equal_those_on_the_cpu(kind: str) -> None:
    labels = LABELS["no class" if kind == "causal" else "two classes"]  # the first token then sees itself alone

    def ran(device: torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        model = PlainEncoder(nn.Sequential(*(FunctionAttention(ATTENTION[kind]) for _ in range(2)))).to(device)
        losses = [AllPairsConsistencyLoss(HorizontalFlip(), blockwise=each) for each in (True, False)]
        with capture_attention(model) as attention:
            for _ in range(2):
                with Traffic() as traffic:
                    logits, maps = model(IMAGES.to(device)), attention.take()
                    found = [class_token_gradient_cam(logits, maps, labels.to(device), 0, "cam_grad", "all")]
                    model(HorizontalFlip()(IMAGES.to(device)))
                    other = attention.take()
                    found += [acr(maps, other) for acr in losses]
        assert len(traffic.reads) <= 2 + 2 and len(traffic.copies) <= 3  # of images and labels
        found += [attention_rollout(maps), class_attention(maps)]
        assert {each.device for each in found} == {device}
        return [each.detach().cpu() for each in found]

    here = ran(CPU)
    with stand_in_devices() as gpu:
        for ours, theirs in zip(here, ran(gpu), strict=True):
            torch.testing.assert_close(theirs, ours)


def test_maps_of_a_hosts_own_function_are_merged_where_they_lie() -> None:
    def maps(images: Tensor) -> Tensor:
        return images[:, :2, 4::8, 4::8].abs()

    views = [Identity(), HorizontalFlip()]
    with stand_in_devices() as gpu:
        merged = multi_view_cam(maps, IMAGES.to(gpu), views, "mean", (32, 48), scales=(1.0, 0.5))
        bounded = normalize_cam(merged, "minmax", valid=torch.ones(2, 32, 48, dtype=torch.bool, device=gpu))
        assert bounded.device == gpu
        torch.testing.assert_close(merged.cpu(), multi_view_cam(maps, IMAGES, views, "mean", (32, 48), scales=(1, 0.5)))
