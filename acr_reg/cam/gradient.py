"""Class maps from the gradient of a class score with respect to the class token's attention.

The map of class c sums, over layers l from ``start_layer`` up, the positive part of the gradient of class score y_c
with respect to the class token's attention (GETAM, Sun et al., arXiv 2112.02841; ACR, arXiv 2308.04321):

    M_c = sum_l mean_h relu(dy_c / dA_l^h)[class row, patches]

A fused kernel's output O = A V gives that gradient exactly, as dy/dA = (dy/dO) V^T, so the kernel stays fused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from acr_reg._tensors import at_least_float32, refuse_labels, require_tensor, select
from acr_reg._torch_private import comes_from_shards
from acr_reg.attention.layer import LayerAttention, rows_of_block
from acr_reg.attention.maps import AttentionMaps
from acr_reg.cam.refinement import refuse_infinite
from acr_reg.capture.refusals import refuse_sharded
from acr_reg.tokens import class_token_index, patch_index

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
    """Makes class maps (B, C, h, w) from the gradient of ``logits`` with respect to ``attention``.

    The maps are >= 0 and not normalised.

    With G = dy_c / dA of the class row, a layer contributes

        "grad": mean_h relu(G)                       "grad_s": mean_h relu(G) squared, element by element
        "cam_grad": mean_h relu(G * A)               "cam_grad_s": mean_h relu(G * A) * mean_h relu(G)

    Args:
        logits: (B, C), before the loss, on the same graph as ``attention``. The graph is kept.
        attention: the maps of the run that made ``logits``.
        labels: (B, C), > 0 for the classes wanted; the other maps are 0. None computes every class.
        start_layer: the first layer used: a layer's index, or negative to count from the last recorded layer.
        query: "class" reads the class token's row (class c reads token c if there is one per class); "all" averages
            the contributions of all query rows, as LeGrad (arXiv 2404.03214), for models without a class token.
        create_graph: makes the maps differentiable. A fused kernel has no second derivative: capture the model with
            ``double_backward=True``.

    One backward pass computes one class of every image, so a batch takes as many passes as its most-labelled image has
    labels. Each pass stops at the first layer used and computes no parameter gradient; ``.grad``, modes and flags do
    not change.

    Raises ValueError for labels or logits of other shapes, labels that are NaN or infinite, attention dropout active in
    a fused layer (dy/dA is then not dO V^T), BatchNorm in training mode (it couples the images), and maps that are not
    on the graph of ``logits``.

    >>> import torch
    >>> A = torch.randn(1, 2, 7, 7, requires_grad=True).softmax(-1)
    >>> maps = AttentionMaps.from_tensors([A], num_prefix_tokens=1, grid=(2, 3))
    >>> logits = (A @ torch.randn(7, 4)).mean((1, 2))
    >>> class_token_gradient_cam(logits, maps, labels=torch.tensor([[1, 0, 0, 1]]), start_layer=0).shape
    torch.Size([1, 4, 2, 3])
    """
    layers = used_layers(logits, attention, labels, start_layer, method, query, create_graph)
    turns = Turns.of(labels, logits)
    maps, contributed = gradient_maps(logits, layers, turns, method, query, create_graph)
    settle(logits, layers, turns, query, contributed, {"The class maps": maps})
    return maps


@dataclass(frozen=True, eq=False)
class Turns:
    """The wanted (image, class) pairs in turns with at most one class of an image, on the logits' device.

    Only ``counts``, the number of wanted classes of each image, is known on the host."""

    counts: list[int]
    images: Tensor
    """(B,): the images, those with most wanted classes first."""
    classes: Tensor
    """(B, C): the classes of each image, those wanted first."""

    @classmethod
    def of(cls, labels: Tensor | None, logits: Tensor) -> Turns:
        """The turns of ``labels`` (B, C), > 0 for the classes wanted; None wants every class."""
        if labels is None:
            counts, wanted = [logits.shape[1]] * len(logits), torch.ones_like(logits, dtype=torch.bool)
        else:
            unknown = ~torch.isfinite(labels).all(1)
            counts, wanted = (labels > 0).sum(1).masked_fill(unknown, -1).tolist(), labels.to(logits.device) > 0
            if -1 in counts:
                refuse_labels()
        images = wanted.sum(1).argsort(descending=True, stable=True)
        return cls(counts, images, (~wanted).byte().argsort(dim=1, stable=True))

    @property
    def wanted(self) -> Tensor:
        """(B, K): the wanted classes of each image, and others where it has fewer than the most-labelled image."""
        return self.classes[:, : max([1, *self.counts])]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images (n,) of each turn and the class (n,) of each."""
        for turn in range(max(self.counts, default=0)):
            images = self.images[: sum(count > turn for count in self.counts)]
            yield images, self.classes[images, turn]


def used_layers(
    logits: Tensor,
    attention: AttentionMaps,
    labels: Tensor | None,
    start_layer: int,
    method: str,
    query: str,
    create_graph: bool = False,
) -> list[LayerAttention]:
    """The layers from ``start_layer`` up. Raises for what :func:`class_token_gradient_cam` cannot use."""
    require_tensor(logits, "logits", "(B, C)")
    if not isinstance(attention, AttentionMaps):
        raise TypeError(f"attention has type {type(attention).__name__}. Pass what take() of the capture returns.")
    layers = _layers_from(attention, start_layer)
    if any(layer.recorded.sharded for layer in layers) or comes_from_shards(logits):
        refuse_sharded()
    for layer in layers:
        _ = layer.layout  # raises for a layer without a grid, before anything counts images
    _check_cam_inputs(logits, attention, layers, labels, method, query)
    _check_differentiable(logits, layers, create_graph)
    return layers


def gradient_maps(
    logits: Tensor,
    layers: Sequence[LayerAttention],
    turns: Turns,
    method: Method,
    query: str,
    create_graph: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The class maps (B, C, h, w), and for each layer whether it contributed anything but 0. Reads no tensor."""
    grid = layers[0].layout.key
    maps = torch.zeros(*logits.shape, len(grid), dtype=at_least_float32(logits).dtype, device=logits.device)
    contributed = [torch.zeros((), dtype=torch.bool, device=maps.device)] * len(layers)
    with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
        for images, classes in turns:
            found = gradients(logits[images, classes].sum(), layers, create_graph)
            total = torch.zeros_like(maps[: len(images), 0])
            for i, (layer, gradient) in enumerate(zip(layers, found, strict=True)):
                if gradient is not None:
                    there = gradient.device
                    part = _contribution(layer, gradient, images.to(there), classes.to(there), method, query)
                    total = total + part.to(maps)
                    contributed[i] = contributed[i] | (part.detach() != 0).any().to(maps.device)
            maps = maps.index_put((images, classes), total)
    maps = maps if create_graph else maps.detach()
    return rearrange(maps, "b c (h w) -> b c h w", h=grid.height), contributed


def settle(
    logits: Tensor,
    layers: Sequence[LayerAttention],
    turns: Turns,
    query: str,
    contributed: list[Tensor],
    made: Mapping[str, Tensor],
) -> None:
    """Raises if any of the maps ``made``, by what they are, is not finite, and warns of layers that did not contribute.
    All is read from the device at once."""
    flags = torch.stack([*(torch.isfinite(maps).all() for maps in made.values()), *contributed]).tolist()
    for what, finite in zip(made, flags, strict=False):
        if not finite:
            refuse_infinite(what)
    silent = [layer for layer, spoke in zip(layers, flags[len(made) :], strict=True) if not spoke]
    if silent and any(turns.counts):
        moves = len(silent) < len(layers) or any(
            gradient is not None and bool(gradient.any())
            for images, classes in turns
            for gradient in gradients(logits[images, classes].sum(), layers)
        )
        _warn_silent(silent, query, moves)


def _layers_from(attention: AttentionMaps, start_layer: int) -> list[LayerAttention]:
    first = attention.layers[start_layer] if -len(attention) <= start_layer < 0 else start_layer
    layers = [layer for layer in attention if layer.index >= first]
    if not layers or (start_layer < 0 and -start_layer > len(attention)):
        raise ValueError(
            f"start_layer={start_layer} is none of the captured layers {attention.layers}. Choose one of them, or "
            f"{-len(attention)} to -1 from the last."
        )
    return layers


def _check_cam_inputs(
    logits: Tensor,
    attention: AttentionMaps,
    layers: list[LayerAttention],
    labels: Tensor | None,
    method: str,
    query: str,
) -> None:
    if method not in ("grad", "grad_s", "cam_grad", "cam_grad_s") or query not in ("class", "all"):
        raise ValueError(
            f"method={method!r} and query={query!r} are not both known. Choose method from grad, grad_s, cam_grad, "
            "cam_grad_s and query from class, all."
        )
    if logits.ndim != 2 or logits.shape[0] != attention.batch_size:
        raise ValueError(
            f"The logits have shape {tuple(logits.shape)} and the attention is of {attention.batch_size} images. Both "
            "must come from one forward, the logits as (B, C)."
        )
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(f"The labels are a {type(labels).__name__}. Pass a tensor of shape {tuple(logits.shape)}.")
    if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)}, as class indices have. Pass rows of 0 and 1: "
            f"torch.nn.functional.one_hot(labels, {logits.shape[1]})."
        )
    if labels is not None and labels.shape != logits.shape:
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}. Pass one row of 0 and "
            "1 per image, as wide as the logits."
        )
    if attention.batch_norms and logits.shape[0] > 1:
        raise ValueError(
            f"BatchNorm in training mode ({', '.join(attention.batch_norms[:3])}) couples the images of a batch. Call "
            "eval() on these modules before the forward."
        )
    for layer in layers:
        if layer.is_factored and layer.dropout > 0:
            raise ValueError(
                f"layer {layer.index} ({layer.name}): attention dropout {layer.dropout} is active in a fused kernel, "
                "where dy/dA is not dO V^T. Run the forward in eval mode."
            )
        if query == "class":
            tokens = layer.layout.known_class_tokens()
            if len(tokens) not in (1, logits.shape[1]):
                raise ValueError(
                    f"layer {layer.index} ({layer.name}) has {len(tokens)} class tokens for {logits.shape[1]} "
                    'classes, not 1 or one per class. Pass class_tokens= to the capture, or query="all".'
                )
        if layer.layout.query != layers[0].layout.query or layer.layout.key != layers[0].layout.key:
            raise ValueError(
                f"The layers lie on grids {layers[0].layout.key} and {layer.layout.key}. Choose a start_layer in the "
                "last stage, so that all lie on one."
            )


def _check_differentiable(logits: Tensor, layers: list[LayerAttention], create_graph: bool) -> None:
    lost = [layer for layer in layers if not has_graph(layer)]
    if lost:
        raise ValueError(
            f"There is no graph to {_named(lost)}. Enable gradients in the forward; for a frozen model use "
            "capture_attention(model, graph_from=)."
        )
    if not logits.requires_grad:
        raise ValueError("The logits have no graph. Compute them with gradients enabled, and do not detach them.")
    fused = [layer for layer in layers if layer.is_factored and not _has_second_derivative(layer)]
    if create_graph and fused:
        raise ValueError(
            f"create_graph=True needs a second derivative, which the fused {_named(fused)} lacks. Use "
            "capture_attention(model, double_backward=True)."
        )


def _named(layers: list[LayerAttention]) -> str:
    return ", ".join(f"layer {layer.index} ({layer.name})" for layer in layers)


def _has_second_derivative(layer: LayerAttention) -> bool:
    """The math kernel leaves ordinary operations on the graph; a fused kernel leaves a node with its own name."""
    output = layer.recorded.output if layer.recorded.kernel is None else None
    return output is not None and "ScaledDotProduct" not in type(output.grad_fn).__name__


def has_graph(layer: LayerAttention) -> bool:
    """Whether a gradient with respect to the layer's attention can be computed."""
    return _target(layer).requires_grad


def _target(layer: LayerAttention) -> Tensor:
    """The tensor whose gradient gives dy/dA, for the whole batch: the map itself, or the kernel's output."""
    target = layer.recorded.output if layer.is_factored else layer.recorded.map
    assert target is not None
    return target


def gradients(score: Tensor, layers: Sequence[LayerAttention], create_graph: bool = False) -> list[Tensor | None]:
    """The gradient with respect to each layer's output (fused) or map: (B, H, N, ...), or None without any."""
    targets = [_target(layer) for layer in layers]
    try:
        found = torch.autograd.grad(score, targets, retain_graph=True, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "second time" in str(error) or "freed" in str(error):
            raise RuntimeError(
                "backward() has already freed the graph. Compute class maps before loss.backward(), or call "
                "backward(retain_graph=True)."
            ) from error
        raise
    if all(gradient is None for gradient in found):
        raise ValueError("The logits do not depend on these maps. Logits and maps must come from the same forward.")
    return [layer.batched_output(gradient) for layer, gradient in zip(layers, found, strict=True)]


def _contribution(
    layer: LayerAttention, gradient: Tensor, images: Tensor, classes: Tensor, method: Method, query: str
) -> Tensor:
    """(pairs, patches): one layer's contribution to the maps of the (image, class) pairs of one turn."""
    value = None if layer.value is None else layer.value[images]
    gradient = gradient[images]
    part = layer.of_images(images) if method.startswith("cam_grad") else None
    patches = patch_index(layer.layout, "key", str(gradient.device))
    if query == "class":
        rows = class_token_index(layer.layout, str(gradient.device))
        rows = rows[classes][:, None] if len(rows) > 1 else rows
        return _row_maps(gradient, value, part, patches, rows, method).mean(1)
    # The gradient with respect to all rows at once would be an N x N map of every head.
    blocks = torch.arange(gradient.shape[2], device=gradient.device).split(rows_of_block(layer))
    sums = [_row_maps(gradient, value, part, patches, rows, method).sum(1) for rows in blocks]
    return torch.stack(sums).sum(0) / gradient.shape[2]


def _row_maps(
    gradient: Tensor,
    value: Tensor | None,
    layer: LayerAttention | None,
    patches: slice | Tensor,
    rows: Tensor,
    method: Method,
) -> Tensor:
    """(pairs, R, patches): the contributions of query ``rows``, (R,) or (pairs, R), to the keys at ``patches``.
    ``gradient`` is dy/dO (fused, needs ``value``) or dy/dA. ``layer`` gives the attention weights to methods that need
    them."""
    grads = at_least_float32(select(gradient, 2, rows))
    if value is not None:
        grads = grads @ at_least_float32(value).transpose(-2, -1)
    grad = grads[..., patches].relu().mean(1)
    if method == "grad":
        return grad
    if method == "grad_s":
        return grad * grad
    assert layer is not None
    weights = layer.weights(rows)[..., patches]
    weighted = (grads[..., patches] * weights).relu().mean(1)
    return weighted if method == "cam_grad" else weighted * grad


def _warn_silent(layers: list[LayerAttention], query: str, moves: bool) -> None:
    """``moves``: whether the logits depend on the attention of any token at all."""
    if not moves:
        warnings.warn(
            f"Every gradient of the logits to {_named(layers)} is 0, so the class maps are 0. Load trained weights: a "
            "head of zeros does this.",
            stacklevel=4,
        )
        return
    warnings.warn(
        f"No positive gradient reaches the {'class row' if query == 'class' else 'rows'} of {_named(layers)}. If "
        'logits pool patches, use query="all". An untrained LayerNorm\'s mean has none.',
        stacklevel=4,
    )
