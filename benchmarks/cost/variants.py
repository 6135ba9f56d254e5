"""The variants that are compared: training steps and class maps of two views, each with a model of its own.

Models of one setting have the same weights, so that their losses, gradients and maps differ by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, GradientCam, HorizontalFlip, capture_attention
from benchmarks.cost.models import Setting, build_batch, build_model
from benchmarks.cost.published import ExplicitMaps, hooked_cam, published_cam, published_consistency

STEPS = ("plain", "published", "dense", "blockwise", "rows")
ROWS = 0.25
CAMS = ("forward", "published", "library")
UNPROPAGATED = "library, steps=0"  # the gradients' cost without that of propagation
HOOKS = "hooks, steps=0"  # the same, written by hand
GRAD_CAM = "pytorch-grad-cam"  # Grad-CAM of the last block, another map at a similar purpose

Step = Callable[..., Tensor]


def make_step(
    variant: str,
    setting: Setting,
    device: str = "cpu",
    rows: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Step]:
    """A model and its step: forward passes of the images and of their flip, and backward. It has no optimizer, which
    costs the same for all variants.

    ``step(classification)`` weights the classification losses; 0 leaves the consistency alone. ``rows`` overrides the
    share of rows of a library variant. A half precision ``dtype`` is that of autocast, with the loss scale of float16.
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
        with precision(device, dtype):
            logits_a = model(images)
            maps_a = take()
            logits_b = model(view(images))
            maps_b = take()
            loss = classification * (criterion(logits_a, labels) + criterion(logits_b, labels))
            if consistency is not None:
                loss = loss + consistency(maps_a, maps_b)
        del maps_a, maps_b
        (loss_scale(dtype) * loss).backward()
        return loss.detach()

    return model, step


def _nothing() -> None:
    """The plain step has no maps to take."""


def precision(device: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a half precision."""
    half = dtype != torch.float32
    return torch.autocast(device, dtype=dtype if half else None, enabled=half)


def loss_scale(dtype: torch.dtype) -> float:
    """What keeps the gradients of a loss from vanishing in float16, as GradScaler does."""
    return 1024.0 if dtype == torch.float16 else 1.0


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
    return consistency_of(*make_step(variant, setting, device, rows), setting)


def consistency_of(model: nn.Module, step: Step, setting: Setting, scale: float = 1.0) -> tuple[float, Tensor]:
    """The consistency's value and its gradient, divided by the loss ``scale``, with respect to all parameters. The rows
    that a share picks are the same in each call."""
    torch.manual_seed(setting.seed)
    value = step(classification=0.0).item()
    return value, torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]) / scale


def make_cam(
    variant: str, setting: Setting, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], Tensor]:
    """Class maps (B, C, h, w) of the images' classes, summed over the flip; "forward" runs the forward passes alone."""
    model = build_model(setting, device).eval()
    images, labels = build_batch(setting, device)
    make: Callable[[], Tensor]
    if variant == "forward":
        make = torch.no_grad()(lambda: model(images) + model(images.flip(-1)))
    elif variant in ("published", HOOKS):
        explicit, written = ExplicitMaps(model), published_cam if variant == "published" else hooked_cam
        make = lambda: written(model, explicit, images, labels)  # noqa: E731
    elif variant == GRAD_CAM:
        make = grad_cam(model, images, labels)
    else:
        cam = GradientCam(model, steps=0) if variant == UNPROPAGATED else GradientCam(model)
        make = lambda: cam(images, labels)  # noqa: E731

    def maps() -> Tensor:
        with precision(device, dtype):
            return make()

    return maps


def grad_cam(model: VisionTransformer, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Grad-CAM of the last block's tokens, as pytorch-grad-cam makes it: a forward and a backward pass for each class.
    ImportError where that package is not installed."""
    target = import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    last = model.get_submodule(f"blocks.{len(model.blocks) - 1}.norm1")
    cam = import_module("pytorch_grad_cam").GradCAM(model, [last], _on_grid)

    def run() -> Tensor:
        found = torch.zeros(*labels.shape, *images.shape[-2:])
        for label in labels.any(0).nonzero()[:, 0].tolist():
            targets = [target(label)] * len(images)
            for flipped in (False, True):
                made = torch.from_numpy(cam(images.flip(-1) if flipped else images, targets))
                found[:, label] += made.flip(-1) if flipped else made
        return found

    return run


def _on_grid(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1] - 1)
    return tokens[:, 1:].mT.unflatten(2, (side, side))
