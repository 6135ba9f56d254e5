"""What the loss refuses: maps of other blocks, runs or images, maps without a graph, labels of another width."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from acr_reg._torch_private import is_freed
from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps


def check_same_modules(attn_a: AttentionMaps, attn_b: AttentionMaps) -> None:
    if attn_a.layers != attn_b.layers:
        raise ValueError(
            f"found layers {attn_a.layers} in one view and {attn_b.layers} in the other; expected the same; take "
            "both from the same model, once per forward"
        )
    # Two branches, or a student and a teacher, may name the same block differently: its number must agree.
    other = [(a.name, b.name) for a, b in zip(attn_a, attn_b, strict=True) if _block(a.name) != _block(b.name)]
    if other:
        raise ValueError(
            f"found maps of {other[0][0]} in one view and of {other[0][1]} in the other; expected the same block; "
            "where layers are dropped at random (LayerDrop), switch that off"
        )
    if None not in (attn_a.run, attn_b.run) and attn_a.run != attn_b.run:
        raise ValueError(
            f"found maps of encoder run {attn_a.run} since the last take in one view and of run {attn_b.run} in the "
            'other; expected the same pass of both; capture with keep="first", or with keep="all" and take(i)'
        )


def _block(name: str) -> str:
    numbers = re.findall(r"\d+", name)
    return numbers[-1] if numbers else ""


def check_alive(pairs: list[tuple[LayerAttention, LayerAttention]]) -> None:
    """The first layer tells for all of its forward."""
    for side, layer in zip("ab", pairs[0], strict=True):
        tensor = layer.recorded.output if layer.recorded.output is not None else layer.recorded.seen
        if tensor.grad_fn is not None and is_freed(tensor):
            raise ValueError(
                f"found maps of view {side} whose graph backward() has already freed; expected maps of a forward that "
                "is still to be differentiated; take() them anew in each step, and add the loss before backward()"
            )


def check_placed(pairs: list[tuple[LayerAttention, LayerAttention]]) -> None:
    """Says why a layer is on no grid before anything counts its images: windows hold several maps an image."""
    for pair in pairs:
        for layer in pair:
            _ = layer.layout


def check_cams(cam_a: Tensor | None, cam_b: Tensor | None, batch: int, learns: bool) -> None:
    if (cam_a is None) != (cam_b is None):
        raise ValueError("found class maps of one view only; expected cam_a and cam_b; pass both or neither")
    if cam_a is None or cam_b is None:
        return
    for name, cam in (("cam_a", cam_a), ("cam_b", cam_b)):
        if not isinstance(cam, Tensor):
            raise TypeError(
                f"found {name} of type {type(cam).__name__}; expected a tensor (B, C, h, w); stack one map per class"
            )
    if cam_a.ndim == 4 and cam_a.shape[0] != batch:
        raise ValueError(
            f"found class maps of shape {tuple(cam_a.shape)}; expected those of the {batch} images whose attention was "
            "given; pass maps and attention of the same forward"
        )
    if learns and not (cam_a.requires_grad or cam_b.requires_grad):
        raise ValueError(
            "found no gradient in cam_a or cam_b; expected at least one to carry it; make them with "
            "create_graph=True, or set cam_weight=0 to watch the term alone"
        )


def check_labels(labels: Tensor | None, batch: int, classes: int | None) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"found labels of type {type(labels).__name__}; expected a tensor (B, C); wrap them by torch.tensor"
        )
    if labels.ndim != 2 or labels.shape[0] != batch or (classes is not None and labels.shape[1] != classes):
        raise ValueError(
            f"found labels of shape {tuple(labels.shape)}; expected ({batch}, "
            f"{classes if classes is not None else 'C'}); pass one row of 0 and 1 per image, as wide as the class maps"
        )


def check_choice(name: str, found: object, choices: tuple[object, ...]) -> None:
    if found not in choices:
        raise ValueError(
            f"found {name}={found!r}; expected one of {', '.join(map(repr, choices))}; choose one of these"
        )


def not_finite(pairs: list[tuple[LayerAttention, LayerAttention]], cam_a: Tensor | None, cam_b: Tensor | None) -> str:
    with torch.no_grad():
        layers = [
            f"layer {layer.index} ({layer.name}) of view {side}"
            for pair in pairs
            for side, layer in zip("ab", pair, strict=True)
            if not layer.weights().isfinite().all()
        ]
    layers += [
        name for name, cam in (("cam_a", cam_a), ("cam_b", cam_b)) if cam is not None and not cam.isfinite().all()
    ]
    return (
        f"found NaN or infinite values in {', '.join(layers) or 'the distance'}; expected finite maps; look for an "
        "overflow in half precision, rows whose keys are all masked, or a callable distance that divides by zero"
    )
