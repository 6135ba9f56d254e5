"""The tensor operations that every room must do alike: raising half precision, picking tokens by an index, telling
ordinary tensors."""

from __future__ import annotations

from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor


def is_dense(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor with a shape of numbers, strides and an address: not nested, and not sparse."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided


def require_tensor(given: Any, what: str, shape: str) -> None:
    """Raises TypeError for what is no tensor. An output that holds its tensor as ``.logits`` is told to pass that;
    ``shape`` is the wanted one in words, such as (B, C)."""
    if isinstance(given, Tensor):
        return
    logits = getattr(given, "logits", None)
    fits = isinstance(logits, Tensor) and logits.ndim == shape.count(",") + 1
    wanted = "outputs.logits, where outputs is what the model returned" if fits else f"a tensor {shape}"
    raise TypeError(f"{what} has type {type(given).__name__}. Pass {wanted}.")


def refuse_labels() -> NoReturn:
    """Raises for labels with NaN, which would count as absent classes, or infinity."""
    raise ValueError("labels holds NaN or infinite values. Write 1 for each class present and 0 for the others.")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Converts half precisions to float32; leaves float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def select(values: Tensor, dim: int, index: Tensor | None) -> Tensor:
    """Picks entries along one dimension by ``index``: (n,), (1, n), or (B, n) for each image; None means all."""
    if index is None:
        return values
    if index.ndim == 1 or index.shape[0] == 1:
        return values.index_select(dim, index.flatten())
    images = torch.arange(len(index), device=index.device)[:, None]
    # Two small indices: a single one, expanded to the shape of an N x N map, would be as large as the map.
    return values.movedim(dim, 1)[images, index].movedim(1, dim)
