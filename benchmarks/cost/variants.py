"""The variants that are compared: training steps and class maps of two views, each with a model of its own.

Models of one setting have the same weights, so that their losses, gradients and maps differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, GradientCam, HorizontalFlip, capture_attention
from benchmarks.cost.models import Setting, build_batch, build_model
from benchmarks.cost.published import ExplicitMaps, published_cam, published_consistency

STEPS = ("plain", "published", "dense", "blockwise", "rows")
ROWS = 0.25
CAMS = ("forward", "published", "library")
UNPROPAGATED = "library, steps=0"  # the gradients' cost without that of propagation

Step = Callable[..., Tensor]


def make_step(variant: str, setting: Setting, device: str = "cpu", rows: float | None = None) -> tuple[nn.Module, Step]:
    """A model and its step: forward passes of the images and of their flip, and backward. It has no optimizer, which
    costs the same for all variants.

    ``step(classification)`` weights the classification losses; 0 leaves the consistency alone. ``rows`` overrides the
    share of rows of a library variant.
    """
    model = build_model(setting, device)
    images, labels = build_batch(setting, device)
    criterion = nn.MultiLabelSoftMarginLoss()
    view = HorizontalFlip()
    take: Callable[[], Any] = _nothing
    consistency: Callable[[Any, Any], Tensor] | None = None
    if variant == "published":
        take, consistency = ExplicitMaps(model).take, published_consistency
    elif variant != "plain":
        take = capture_attention(model).take
        consistency = acr = AllPairsConsistencyLoss.paper(view)
        acr.blockwise = variant != "dense"
        acr.rows = rows if rows is not None else ROWS if variant == "rows" else 1.0

    def step(classification: float = 1.0) -> Tensor:
        model.zero_grad(set_to_none=True)
        logits_a = model(images)
        maps_a = take()
        logits_b = model(view(images))
        maps_b = take()
        loss = classification * (criterion(logits_a, labels) + criterion(logits_b, labels))
        if consistency is not None:
            loss = loss + consistency(maps_a, maps_b)
        del maps_a, maps_b
        loss.backward()
        return loss.detach()

    return model, step


def _nothing() -> None:
    """The plain step has no maps to take."""


def difference(variant: str, setting: Setting, device: str = "cpu") -> tuple[float, float]:
    """How far the consistency alone is from its dense evaluation: the relative error of its value, and that of its
    gradient with respect to all parameters (norm of the difference over the norm)."""
    rows = ROWS if variant == "rows" else None  # the same rows are drawn for both
    value, gradient = _consistency(variant, setting, device, rows)
    dense_value, dense_gradient = _consistency("dense", setting, device, rows)
    return abs(value / dense_value - 1), ((gradient - dense_gradient).norm() / dense_gradient.norm()).item()


def cosine_to_all_rows(setting: Setting, device: str = "cpu") -> float:
    """The cosine of the consistency's gradient on a share of the rows, drawn once, to its gradient on all rows."""
    some, every = (_consistency("rows", setting, device, rows)[1].double() for rows in (ROWS, 1.0))
    return torch.nn.functional.cosine_similarity(some, every, dim=0).item()


def _consistency(variant: str, setting: Setting, device: str, rows: float | None) -> tuple[float, Tensor]:
    """The consistency's value and its gradient with respect to all parameters. The model is freed on return."""
    model, step = make_step(variant, setting, device, rows)
    torch.manual_seed(setting.seed)
    value = step(classification=0.0).item()
    return value, torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


def make_cam(variant: str, setting: Setting, device: str = "cpu") -> Callable[[], Tensor]:
    """Class maps (B, C, h, w) of the images' classes, summed over the flip; "forward" runs the forward passes alone."""
    model = build_model(setting, device).eval()
    images, labels = build_batch(setting, device)
    if variant == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return model(images) + model(images.flip(-1))

        return forward
    if variant == "published":
        explicit = ExplicitMaps(model)
        return lambda: published_cam(model, explicit, images, labels)
    cam = GradientCam(model, steps=0) if variant == UNPROPAGATED else GradientCam(model)
    return lambda: cam(images, labels)
