"""What is compared: training steps of two views, and class maps of two views, each on a model of its own.

Models of one setting have the same weights, so that losses, gradients and maps can be told apart by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, GradientCam, HorizontalFlip, capture_attention
from benchmarks.cost.models import Setting, build_batch, build_model
from benchmarks.cost.published import ExplicitMaps, published_cam, published_consistency

STEPS = ("plain", "published", "dense", "blockwise", "rows")
ROWS = 0.25
CAMS = ("forward", "published", "library")
UNPROPAGATED = "library, steps=0"  # tells what the gradients cost from what propagation does

Step = Callable[..., Tensor]


def make_step(variant: str, setting: Setting, device: str = "cpu", rows: float | None = None) -> tuple[nn.Module, Step]:
    """A model and its step: forward of the images and of their flip, and backward. No optimizer: it is the same for
    all.

    ``step(classification)`` weights the classification losses; with 0 only the consistency remains. ``rows`` overrides
    the share of rows of a library variant.
    """
    model = build_model(setting, device)
    images, labels = build_batch(setting, device)
    criterion = nn.MultiLabelSoftMarginLoss()
    view = HorizontalFlip()
    if variant == "plain":
        take, consistency = (lambda: None), None
    elif variant == "published":
        take, consistency = ExplicitMaps(model).take, published_consistency
    else:
        take = capture_attention(model).take
        consistency = AllPairsConsistencyLoss.paper(view)
        consistency.blockwise = variant != "dense"
        consistency.rows = rows if rows is not None else ROWS if variant == "rows" else 1.0

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


def difference(variant: str, setting: Setting, device: str = "cpu") -> tuple[float, float]:
    """How far the consistency alone is from the dense evaluation's: of its value, and of its gradient to all
    parameters (norm of the difference over the norm)."""
    values, gradients = [], []
    for each in (variant, "dense"):
        # One after the other, so that only one model's maps are in memory; the same rows are drawn for both.
        model, step = make_step(each, setting, device, ROWS if variant == "rows" else None)
        torch.manual_seed(setting.seed)
        values.append(step(classification=0.0).item())
        found = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
        del model, step, found
    ours, dense = gradients
    return abs(values[0] / values[1] - 1), ((ours - dense).norm() / dense.norm()).item()


def cosine_to_all_rows(setting: Setting, device: str = "cpu") -> float:
    """Of the consistency's gradient to all parameters, on a share of the rows drawn once, to that on all rows."""
    gradients = []
    for rows in (ROWS, 1.0):
        model, step = make_step("rows", setting, device, rows)
        torch.manual_seed(setting.seed)
        step(classification=0.0)
        found = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found).double())
        del model, step, found
    return torch.nn.functional.cosine_similarity(*gradients, dim=0).item()


def make_cam(variant: str, setting: Setting, device: str = "cpu") -> Callable[[], Tensor]:
    """Class maps (B, C, h, w) of the images' classes over both flips; "forward" is the two forward passes alone."""
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
