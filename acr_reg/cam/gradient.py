"""Class maps from a class token's attention gradient, their propagation over the affinity, and merging over views.

The map of class c sums, over layers l from ``start_layer`` up, the positive part of how much the class score y_c would
change with the class token's attention (GETAM, Sun et al., arXiv 2112.02841; ACR, arXiv 2308.04321):

    M_c = sum_l mean_h relu(dy_c / dA_l^h)[class row, patches]

From a fused kernel's output O = A V that gradient is dy/dA = (dy/dO) V^T, exactly, so the kernel stays.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from acr_reg._tensors import at_least_float32, select
from acr_reg.attention.layer import LayerAttention, rows_of_block
from acr_reg.attention.maps import AttentionMaps
from acr_reg.cam.refinement import _check_finite

Method = Literal["grad", "grad_s", "cam_grad", "cam_grad_s"]


def class_token_gradient_cam(
    logits: Tensor,
    attention: AttentionMaps,
    labels: Tensor | None = None,
    start_layer: int = -2,
    method: Method = "grad",
    query: Literal["class", "all"] = "class",
    create_graph: bool = False,
) -> Tensor:
    """Class maps (B, C, h, w) >= 0, not normalised, from the gradient of ``logits`` (B, C) by ``attention``.

    With G = dy_c / dA, of the class row, a layer contributes

        "grad": mean_h relu(G)                       "grad_s": mean_h relu(G) squared, element by element
        "cam_grad": mean_h relu(G * A)               "cam_grad_s": mean_h relu(G * A) * mean_h relu(G)

    Args:
        logits: (B, C), before the loss, on the same graph as ``attention``. The graph is kept.
        attention: the maps of the run that made ``logits``.
        labels: (B, C), > 0 for the classes wanted; the maps of the others are 0. None computes every class.
        start_layer: the first layer used: an index of the model's, or negative from the last recorded layer.
        query: "class" reads the class token's row (class c reads token c where there is one per class); "all" averages
            the contributions of all query rows, as LeGrad does (arXiv 2404.03214), for models without a class token.
        create_graph: let the map itself carry gradient. A fused kernel has no second derivative: capture the model with
            ``double_backward=True`` first.

    One backward pass serves one class of every image, so a batch takes as many as its most-labelled image has labels.
    Each stops at the first layer used and computes no parameter's gradient; ``.grad``, modes and flags stay as they
    are.

    Raises ValueError for labels or logits of other shapes, attention dropout active in a fused layer (dy/dA is then not
    dO V^T), BatchNorm in training mode (it couples the images), and maps that are not on the graph of ``logits``.

    >>> import torch
    >>> A = torch.randn(1, 2, 7, 7, requires_grad=True).softmax(-1)
    >>> maps = AttentionMaps.from_tensors([A], num_prefix_tokens=1, grid=(2, 3))
    >>> logits = (A @ torch.randn(7, 4)).mean((1, 2))
    >>> class_token_gradient_cam(logits, maps, labels=torch.tensor([[1, 0, 0, 1]]), start_layer=0).shape
    torch.Size([1, 4, 2, 3])
    """
    layers = _layers_from(attention, start_layer)
    grids = [layer.layout.key for layer in layers]  # says which is on none, before anything counts images
    wanted = _check_cam_inputs(logits, attention, layers, labels, method, query)
    grid = grids[0]  # where the rows look, whichever they are
    batch, classes = logits.shape
    maps = torch.zeros(batch, classes, len(grid), dtype=at_least_float32(logits).dtype, device=logits.device)
    _check_differentiable(logits, layers, create_graph)

    with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
        silent = set(range(len(layers)))
        for image, label in _passes(wanted):
            chosen = logits[image, label]
            gradients = _gradients(chosen.sum(), layers, create_graph)
            contributions = []
            for position, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
                if gradient is None:
                    continue
                contribution = _contribution(layer, gradient, image, label, method, query)
                contributions.append(contribution)
                if position in silent and bool((contribution.detach() != 0).any()):
                    silent.discard(position)
            if contributions:
                maps = maps.index_put((image, label), torch.stack(contributions).sum(0).to(maps.dtype))
    if silent and wanted.any():
        _warn_silent([layers[i] for i in sorted(silent)], query)
    maps = maps if create_graph else maps.detach()
    _check_finite(maps, "the class maps")
    return rearrange(maps, "b c (h w) -> b c h w", h=grid.height)


def _layers_from(attention: AttentionMaps, start_layer: int) -> list[LayerAttention]:
    first = attention.layers[start_layer] if -len(attention) <= start_layer < 0 else start_layer
    layers = [layer for layer in attention if layer.index >= first]
    if not layers or (start_layer < 0 and -start_layer > len(attention)):
        raise ValueError(
            f"found start_layer={start_layer}; expected one of the captured layers {attention.layers}; choose an index "
            f"among those, or one from {-len(attention)} to -1"
        )
    return layers


def _check_cam_inputs(
    logits: Tensor,
    attention: AttentionMaps,
    layers: list[LayerAttention],
    labels: Tensor | None,
    method: str,
    query: str,
) -> Tensor:
    """(B, C) bool: the classes wanted."""
    if method not in ("grad", "grad_s", "cam_grad", "cam_grad_s") or query not in ("class", "all"):
        raise ValueError(
            f"found method={method!r}, query={query!r}; expected a method of grad, grad_s, cam_grad, cam_grad_s and a "
            "query of class, all; choose among those"
        )
    if logits.ndim != 2 or logits.shape[0] != attention.batch_size:
        raise ValueError(
            f"found logits of shape {tuple(logits.shape)} for attention of {attention.batch_size} images; expected (B, "
            "C) of the same images; take() the maps of the run that made these logits, or chunk() them as the logits "
            "were"
        )
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(
            f"found labels of type {type(labels).__name__}; expected a tensor {tuple(logits.shape)}; wrap them by "
            "torch.tensor"
        )
    if labels is not None and labels.shape != logits.shape:
        raise ValueError(
            f"found labels of shape {tuple(labels.shape)}; expected {tuple(logits.shape)}; pass one row of 0 and 1 per "
            "image"
        )
    if attention.batch_norms and logits.shape[0] > 1:
        raise ValueError(
            f"found BatchNorm in training mode ({', '.join(attention.batch_norms[:3])}), which couples the images of a "
            "batch; expected each score to depend on its own image; call eval() on the BatchNorm modules before the "
            "forward"
        )
    for layer in layers:
        if layer.is_factored and layer.dropout > 0:
            raise ValueError(
                f"layer {layer.index} ({layer.name}): found attention dropout {layer.dropout} active in a fused "
                "kernel, where dy/dA is not dO V^T; expected none; run the forward in eval mode, or with attention "
                "dropout 0"
            )
        if query == "class":
            tokens = layer.layout.known_class_tokens()
            if len(tokens) not in (1, logits.shape[1]):
                raise ValueError(
                    f"layer {layer.index} ({layer.name}): found {len(tokens)} class tokens for {logits.shape[1]} "
                    "classes; expected 1 or one "
                    'per class; pass class_tokens= to capture_attention, or query="all" for a model without class '
                    "tokens"
                )
        if layer.layout.query != layers[0].layout.query or layer.layout.key != layers[0].layout.key:
            raise ValueError(
                f"found layers on grids {layers[0].layout.key} and {layer.layout.key}; expected one grid; choose a "
                "start_layer in the last stage"
            )
    wanted = torch.ones_like(logits, dtype=torch.bool) if labels is None else labels.to(logits.device) > 0
    return wanted


def _check_differentiable(logits: Tensor, layers: list[LayerAttention], create_graph: bool) -> None:
    targets = [_target(layer) for layer in layers]
    lost = [layer for layer, target in zip(layers, targets, strict=True) if not target.requires_grad]
    if not logits.requires_grad or lost:
        what = "the logits" if not logits.requires_grad else ", ".join(f"layer {x.index} ({x.name})" for x in lost)
        raise ValueError(
            f"found no graph under {what}; expected logits and attention of one forward with gradients enabled; run it "
            "outside torch.no_grad, do not detach, and where the whole backbone is frozen use "
            "capture_attention(model, graph_from=) with the start_layer of the class map"
        )
    fused = [layer for layer in layers if layer.is_factored and not _has_second_derivative(layer)]
    if create_graph and fused:
        raise ValueError(
            f"found create_graph=True on fused attention ({', '.join(f'layer {x.index} ({x.name})' for x in fused)}), "
            "whose backward has no derivative; expected a differentiable kernel; capture_attention(model, "
            "double_backward=True)"
        )


def _has_second_derivative(layer: LayerAttention) -> bool:
    """The math kernel leaves ordinary operations on the graph, the fused ones a node named after themselves."""
    output = layer.recorded.output
    return output is not None and "ScaledDotProduct" not in type(output.grad_fn).__name__


def _target(layer: LayerAttention) -> Tensor:
    """The tensor whose gradient tells dy/dA: the map itself, or the kernel's output. Whole batch, as it lies on the
    graph."""
    target = layer.recorded.output if layer.is_factored else layer.recorded.map
    assert target is not None
    return target


def _passes(wanted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Splits the wanted (image, class) pairs into passes with at most one class per image: [(images, classes), ...]."""
    rank = wanted.cumsum(1)
    most = int(rank[:, -1].max()) if wanted.numel() else 0
    passes = []
    for turn in range(1, most + 1):
        image, label = torch.nonzero(wanted & (rank == turn), as_tuple=True)
        passes.append((image, label))
    return passes


def _gradients(score: Tensor, layers: list[LayerAttention], create_graph: bool) -> list[Tensor | None]:
    targets = [_target(layer) for layer in layers]
    try:
        found = torch.autograd.grad(score, targets, retain_graph=True, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "second time" in str(error) or "freed" in str(error):
            raise RuntimeError(
                "found a graph that backward() has already freed; expected it alive; compute the CAM before "
                "loss.backward(), or call backward(retain_graph=True)"
            ) from error
        raise
    if all(gradient is None for gradient in found):
        raise ValueError(
            "found logits that do not depend on these maps; expected the maps of the run that made the logits; take() "
            "after that forward"
        )
    return [layer.batched(gradient) for layer, gradient in zip(layers, found, strict=True)]


def _contribution(
    layer: LayerAttention, gradient: Tensor, image: Tensor, label: Tensor, method: Method, query: str
) -> Tensor:
    """(pairs, patches): what one layer adds to the maps of the (image, label) pairs of one pass."""
    gradient = gradient[image]
    value = None if layer.value is None else layer.value[image]
    part = layer.of_images(image) if method.startswith("cam_grad") else None
    prefix = layer.layout.num_prefix_tokens
    if query == "class":
        tokens = torch.tensor(layer.layout.known_class_tokens(), device=gradient.device)
        rows = tokens[label] if len(tokens) > 1 else tokens.expand(len(label))
        return _row_maps(gradient, value, part, prefix, rows[:, None], method).mean(1)
    # The gradient to all rows at once would be an N x N map of every head.
    count = gradient.shape[2]
    block = rows_of_block([layer])
    blocks = []
    for start in range(0, count, block):
        rows = torch.arange(start, min(start + block, count), device=gradient.device)
        blocks.append(_row_maps(gradient, value, part, prefix, rows, method).sum(1))
    return torch.stack(blocks).sum(0) / count


def _row_maps(
    gradient: Tensor, value: Tensor | None, layer: LayerAttention | None, prefix: int, rows: Tensor, method: Method
) -> Tensor:
    """(pairs, R, patches): the contribution of these query rows, (R,) or for each pair (pairs, R). ``gradient`` is to
    the output of a fused layer, whose ``value`` is given, or to the map; the ``layer`` gives the weights, if wanted."""
    grads = at_least_float32(select(gradient, 2, rows))
    if value is not None:
        grads = grads @ at_least_float32(value).transpose(-2, -1)
    patches = slice(prefix, None)
    grad = grads[..., patches].relu().mean(1)
    if method == "grad":
        return grad
    if method == "grad_s":
        return grad * grad
    assert layer is not None
    weights = layer.weights(rows)[..., patches]
    weighted = (grads[..., patches] * weights).relu().mean(1)
    return weighted if method == "cam_grad" else weighted * grad


def _warn_silent(layers: list[LayerAttention], query: str) -> None:
    names = ", ".join(f"{layer.index} ({layer.name})" for layer in layers)
    row = "class row" if query == "class" else "rows"
    warnings.warn(
        f"the {row} of layer {names} received no positive gradient, so it adds nothing to the map; where the logits "
        "are pooled from "
        'patches that is so by construction: use an earlier layer, query="all", or the model\'s own patch CAM',
        stacklevel=3,
    )
