"""Half precision under autocast and a gradient scaler, channels_last, and inputs with gaps: all equal the plain run."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    GradientCam,
    View,
    align_attention,
    capture_attention,
    class_token_gradient_cam,
    normalize_cam,
    propagate_cam,
)
from tests.devices.inputs import LABELS, SIZE, VIEWS, model_and_images
from tests.support.devices import CPU, stand_in_devices

half_precision = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs torch 2.3 on the CPU")


# ---------------------------------------------------------------- half precision


def trained(kind: str, view: View, device: torch.device, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the gradient of all query and key weights, and the class maps, in float32 on the CPU."""
    model, images = model_and_images(kind, training=True)
    model, images, labels = model.to(device), images.to(device), LABELS.to(device)
    acr = AllPairsConsistencyLoss(view)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    valid = torch.ones(2, *SIZE, dtype=torch.bool, device=device)
    with capture_attention(model) as attention:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            torch.manual_seed(1)
            logits_a, attn_a = model(images), attention.take()
            logits_b, attn_b = model(acr.view(images)), attention.take()
            cams = [
                propagate_cam(class_token_gradient_cam(logits, maps, labels), maps).detach().requires_grad_()
                for logits, maps in ((logits_a, attn_a), (logits_b, attn_b))
            ]
            loss = acr(attn_a, attn_b, *cams, labels=labels, valid=valid)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    gradient = [p.grad.flatten() for name, p in model.named_parameters() if "qkv" in name or "in_proj" in name]
    scaler.step(optimizer)
    scaler.update()
    assert loss.dtype == cams[0].dtype == torch.float32
    assert loss.device == cams[0].device == gradient[0].device == device
    return loss.detach().cpu(), torch.cat(gradient).cpu(), normalize_cam(cams[0].detach()).cpu()


@half_precision
@pytest.mark.parametrize(
    ("kind", "of", "dtype"),
    [
        ("fused", "flip", torch.float16),
        ("fused", "crops", torch.float16),
        ("fused", "crops", torch.bfloat16),
        ("explicit", "flip", torch.bfloat16),
        ("explicit", "crops", torch.float16),
    ],
    ids=str,
)
def test_half_precision_trains_as_float32_does(kind: str, of: str, dtype: torch.dtype) -> None:
    loss, gradient, cams = trained(kind, VIEWS[of], CPU, None)
    with stand_in_devices() as gpu, patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False):
        found = trained(kind, VIEWS[of], gpu, dtype)
    near = 0.02 if dtype is torch.bfloat16 else 0.003
    torch.testing.assert_close(found[0], loss, rtol=near, atol=0)
    assert torch.cosine_similarity(found[1], gradient, 0) > 1 - 4 * near
    torch.testing.assert_close(found[1].norm(), gradient.norm(), rtol=0.05, atol=0)
    torch.testing.assert_close(found[2], cams, rtol=0, atol=5 * near)


@half_precision
@pytest.mark.parametrize("of", VIEWS)
def test_a_step_whose_gradient_overflows_is_skipped_and_the_next_is_as_without_it(of: str) -> None:
    def weights_after(factors: list[float]) -> Tensor:
        model, images = model_and_images("fused", training=True)
        acr = AllPairsConsistencyLoss(VIEWS[of], blockwise=of == "flip")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with capture_attention(model) as attention:
            for factor in factors:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16):
                    model(images)
                    first = attention.take()
                    model(acr.view(images))
                    loss = acr(first, attention.take(), scale=factor)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    once = weights_after([1])
    assert torch.equal(weights_after([1, 1e30]), once)
    twice = weights_after([1, 1])
    assert not torch.equal(twice, once)
    torch.testing.assert_close(weights_after([1, 1e30, 1]) - once, twice - once, rtol=0.01, atol=1e-6)


@half_precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_cam_under_autocast_equals_that_in_float32(dtype: torch.dtype) -> None:
    model, images = model_and_images("fused", training=True)
    with GradientCam(model) as cam:
        expected = normalize_cam(cam(images, LABELS))
        with torch.autocast("cpu", dtype):
            found = normalize_cam(cam(images, LABELS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if dtype is torch.bfloat16 else 0.01)


# ---------------------------------------------------------------- memory layout


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values, with other numbers between them in memory and the axes in another order."""
    room = torch.full([2 * size for size in reversed(tensor.shape)], 7).to(tensor.dtype)
    held = room[tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
    held.copy_(tensor)
    assert not held.is_contiguous()
    return held


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else with_gaps(tensor)


@pytest.mark.parametrize("layout", [with_gaps, channels_last])
@pytest.mark.parametrize("of", VIEWS)
def test_inputs_of_any_memory_layout_give_what_contiguous_ones_give(
    of: str, layout: Callable[[Tensor], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, cams = torch.randn(2, 2, 3, 25, 25, generator=generator), torch.randn(2, 2, 5, 4, 6, generator=generator)
    valid = torch.rand(2, *SIZE, generator=generator) > 0.3
    both = []
    for prepare in (torch.clone, layout):
        leaves = [prepare(each).requires_grad_() for each in (*scores, *cams)]
        maps = [AttentionMaps.from_tensors([prepare(each.softmax(-1))], 1, (4, 6)) for each in leaves[:2]]
        loss = AllPairsConsistencyLoss(VIEWS[of])(*maps, *leaves[2:], labels=prepare(LABELS), valid=prepare(valid))
        loss.backward()
        rows = maps[0][0]
        carried = align_attention(rows.weights(), VIEWS[of], rows.layout, rows.layout)
        refined = propagate_cam(leaves[2], maps[0])
        both.append([loss, *(leaf.grad for leaf in leaves), carried, refined, normalize_cam(leaves[3])])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("kind", ["fused", "explicit"])
def test_model_and_images_in_channels_last_give_what_contiguous_ones_give(kind: str) -> None:
    both = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, images = model_and_images(kind, training=True)
        model, images = model.to(memory_format=memory_format), images.contiguous(memory_format=memory_format)
        with capture_attention(model) as attention:
            model(images)
            first = attention.take()
            model(VIEWS["crops"](images))
            loss = AllPairsConsistencyLoss(VIEWS["crops"])(first, attention.take())
            loss.backward()
        with GradientCam(model) as cam:
            both.append([loss, *(p.grad for p in model.encoder.parameters()), cam(images, LABELS)])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
