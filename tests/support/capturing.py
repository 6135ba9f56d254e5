"""What tests of capture do with a model: run it, take the maps, and look at what stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack  # the only way to see a mode left behind

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionCapture,
    AttentionMaps,
    CaptureError,
    HorizontalFlip,
    LayerAttention,
    LayoutError,
    View,
    capture_attention,
)
from tests.support.attention import says

cold_and_warm = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])


def images(batch: int = 2, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randn(batch, 3, *size)


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )


def modes() -> int:
    """How many are entered on this thread."""
    return _len_torch_function_stack()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def query_and_key(gradient: dict[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """The gradients of the query and the key weights of every layer."""
    for name, tensor in gradient.items():
        if name.endswith(("qkv.weight", "in_proj_weight")):
            assert tensor is not None, name
            for part, rows in zip(("query", "key"), tensor.chunk(3)[:2], strict=True):
                yield f"{name}, {part}", rows


def plain_pass(model: nn.Module, x: Tensor) -> tuple[Tensor, AttentionMaps]:
    """What the model returns, and the maps of a capture of nothing but that."""
    with capture_attention(model) as attention:
        return model(x), attention.take()


def is_captured_right(model: nn.Module, attention: AttentionCapture, x: Tensor, output: Tensor, maps: Any) -> None:
    """Whether a forward gives this output and these maps, twice: the second run watches attention modules alone."""
    for _ in range(2):
        assert torch.equal(model(x), output)
        found = attention.take()
        assert [layer.name for layer in found] == [layer.name for layer in maps]
        assert all(torch.equal(a, b) for a, b in zip(found.weights(), maps.weights(), strict=True))
        assert modes() == 0


def recorded(maps: AttentionMaps, layer: int = 0) -> Tensor:
    """The very tensor that the model made: its map, or its query where a fused kernel left no map."""
    tensors = maps[layer].recorded
    tensor = tensors.map if tensors.map is not None else tensors.query
    assert tensor is not None
    return tensor


def captured(model: nn.Module, x: Tensor, checks: bool = True) -> tuple[AttentionMaps, dict[str, str]]:
    """The maps of a second forward, which only attention modules are watched in, and what was skipped by name.

    The first forward, in which every module is watched, must say the same, but for softmaxes that never met values:
    nothing watches their modules afterwards. With ``checks``, weights @ V is held against the model's own product.
    """
    with capture_attention(model, record_products=checks) as attention:
        model(x)
        first, reasons = attention.take(), dict(attention.skipped)
        model(x)
        maps, skipped = attention.take(), dict(attention.skipped)
    seen_again = {name: reason for name, reason in reasons.items() if "met no values" not in reason}
    assert seen_again.items() <= skipped.items() <= reasons.items()
    assert [describe(layer) for layer in maps] == [describe(layer) for layer in first]
    for layer in maps:
        weights = layer.weights()
        if layer.stochastic:
            assert (weights.sum(-1) - 1).abs().max() < 1e-5
            assert weights.min() >= 0
        value = layer.value
        if checks and value is not None and layer.dropout == 0:
            output = layer.output
            assert output is not None
            assert (weights.to(value) @ value - output).norm() < 1e-5 * output.norm()
    return maps, reasons


def describe(layer: LayerAttention) -> tuple[object, ...]:
    return (
        layer.index,
        layer.name,
        layer.kind,
        layer.shape,
        str(layer.window),
        layer.placed or layer.why_unplaced,
        layer.stochastic,
    )


def kinds(maps: AttentionMaps) -> list[str]:
    return [layer.kind for layer in maps]


def grids(layer: LayerAttention) -> tuple[tuple[int, int], tuple[int, int]]:
    query, key = layer.layout.query, layer.layout.key
    return (query.height, query.width), (key.height, key.width)


def nothing_captured(model: nn.Module, x: Tensor) -> pytest.ExceptionInfo[CaptureError]:
    with capture_attention(model) as attention:
        model(x)
        with pytest.raises(CaptureError, match="No token-to-token attention") as error:
            attention.take()
    assert says(error, type(model).__name__)
    return error


def affinity_loss(view: View | None = None, **kwargs: Any) -> AllPairsConsistencyLoss:
    return AllPairsConsistencyLoss(view or HorizontalFlip(), activation_weight=0, **kwargs)


def refusal_of_the_loss(maps: AttentionMaps, **kwargs: Any) -> pytest.ExceptionInfo[LayoutError]:
    with pytest.raises(LayoutError) as error:
        affinity_loss(**kwargs)(maps, maps)
    return error
