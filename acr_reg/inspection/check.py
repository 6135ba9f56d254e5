"""What a capture sees of a model: the first thing to run on a new one. See :func:`check`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.capture.handle import capture_attention
from acr_reg.errors import CaptureError, LayoutError
from acr_reg.inspection.offsets import Offset, TokenSide, token_offsets
from acr_reg.inspection.report import Check, LayerCheck
from acr_reg.losses.all_pairs import AllPairsConsistencyLoss
from acr_reg.tokens import Lattice
from acr_reg.views.constructors import HorizontalFlip
from acr_reg.views.view import View, require_view

_OFF_ROWS = 1e-4

_OFF_PRODUCT = 1e-4

_OFF_IN_HALF = 1e-2  # both, where the layer computed in half precision

_HALF = (torch.float16, torch.bfloat16)

_OFF_GRID = 2.0  # tokens: farther from its place, a token stands in another order or grid

_OFF_STRIDE = 0.25  # of a token: matched tokens farther apart see rather different pixels

_OFF_OVERLAP = 0.5  # where the offset of overlapping windows is known: what is left is how their weights lean


def check(
    model: nn.Module,
    images: Tensor,
    view: View | None = None,
    *,
    forward: Callable[[Tensor], Any] | None = None,
    modules: Iterable[str | nn.Module] | None = None,
    layers: Iterable[int] | None = None,
    patch_size: int | Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    class_tokens: int | Sequence[int] | None = None,
) -> Check:
    """Runs a model on images (B, C, H, W) and on a view of them, and says what a capture would give to the loss.

    For every layer: what was captured, on which grids, how far the rows of the map are from 1 and its product with the
    values from the layer's own result, and how far the tokens that the view matches are apart on the image, measured by
    the gradient of a token to the pixels (an overlapping stem, padding or another order of tokens shows there).

    Args:
        model: as for :func:`~acr_reg.capture_attention`; runs in eval mode, and is left as it was.
        images: two or more show best whether the batch is kept apart; a few take seconds.
        view: what the second view will be; HorizontalFlip() if not given.
        forward: how the model is called, where ``model(images)`` is not how, e.g. ``model.forward_features``.
        modules, layers, patch_size, num_prefix_tokens, class_tokens: as for ``capture_attention``.

    What a capture or the loss would refuse is listed in ``problems`` and not raised; the model's own errors are.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    >>> class Vit(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.patch_embed, self.block = torch.nn.Conv2d(3, 32, 8, 8), layer
    ...     def forward(self, images):
    ...         return self.block(self.patch_embed(images).flatten(2).mT).mean(1)
    >>> report = check(Vit(), torch.randn(2, 3, 32, 48))
    >>> report.ok, report.layers[0].kind, report.layers[0].queries
    (True, 'global', '4 x 6')
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not images.numel():
        raise ValueError(
            f"found images of {_shape(images)}; expected a floating point tensor (B, C, H, W); stack a few photos, "
            "normalised as in training"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"found a {type(model).__name__}; expected a torch.nn.Module; pass the model itself")
    view = HorizontalFlip() if view is None else view
    require_view(view)
    hints: dict[str, Any] = {
        "modules": modules,
        "patch_size": patch_size,
        "num_prefix_tokens": num_prefix_tokens,
        "class_tokens": class_tokens,
    }
    call = model if forward is None else forward
    skipped: tuple[tuple[str, str], ...] = ()
    with _left_as_it_was(model):
        try:
            with capture_attention(model, layers=layers, keep="first", record_products=True, **hints) as attention:

                def observe(batch: Tensor) -> AttentionMaps:
                    attention.clear()
                    call(batch)
                    return attention.take()

                # Gradient from the images on, so that a frozen backbone is seen as a whole.
                batch = images.detach().clone().requires_grad_()
                try:
                    observe(batch)
                    maps_a = observe(batch)  # once more: from the second run on only attention modules are watched
                    maps_b = observe(view(images.detach()).clone().requires_grad_())
                finally:
                    skipped = attention.skipped
                offsets = token_offsets(observe, images, view.of_image(0))
        except (CaptureError, LayoutError) as error:
            return Check(type(model).__name__, view, (), skipped, (str(error),), {}, 0, 0)
    checked = tuple(_layer(layer, offsets.get(position, {}), view) for position, layer in enumerate(maps_a))
    terms, refusal = _terms(maps_a, maps_b, view)
    same: dict[str, list[str]] = {}
    for layer in checked:
        if layer.problem:
            same.setdefault(layer.problem, []).append(f"{layer.index} ({layer.name})")
    problems = [f"layer {', '.join(names)}: {problem}" for problem, names in same.items()]
    if refusal is not None and not problems:
        problems.append(refusal)
    dense, factors = (2 * sum(_bytes(layer)[i] for layer in maps_a) for i in (0, 1))
    return Check(type(model).__name__, view, checked, skipped, tuple(problems), terms, dense, factors)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; modes and random state as they were outside."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True


def _layer(layer: LayerAttention, offsets: Mapping[TokenSide, Offset], view: View) -> LayerCheck:
    layout = layer.placed
    tokens = (layout.query, layout.key) if layout else layer.shape[2:]
    row_error, product_error = errors(layer)
    problem = layer.why_unplaced if layer.window is None else None
    for side, offset in offsets.items():
        assert layout is not None
        problem = problem or _offset_problem(side, layout.lattice(side), offset, view)
    half = any(t is not None and t.dtype in _HALF for t in (layer.recorded.seen, layer.recorded.output))
    if row_error is not None and row_error > (_OFF_IN_HALF if half else _OFF_ROWS):
        problem = f"found rows that sum to 1 only within {row_error:.1e}; expected probabilities; report this model"
    if product_error is not None and product_error > (_OFF_IN_HALF if half else _OFF_PRODUCT):
        problem = f"found a map whose product with V is {product_error:.1e} off; expected the same; report this model"
    return LayerCheck(
        layer.index,
        layer.name,
        layer.kind if layer.window is None else str(layer.window),
        "fused" if layer.is_factored else "explicit" if layer.stochastic else "mixed",
        layer.shape[1],
        str(tokens[0]),
        str(tokens[1]),
        layout.num_prefix_tokens if layout else None,
        layout.class_tokens if layout else None,
        row_error,
        product_error,
        offsets["query"].under_view if "query" in offsets else None,
        offsets["key"].under_view if "key" in offsets else None,
        problem,
    )


def _offset_problem(side: str, lattice: Lattice, offset: Offset, view: View) -> str | None:
    if offset.from_lattice > _OFF_GRID * max(lattice.stride):
        return (
            f"found {side} tokens {offset.from_lattice:.0f} px from where a grid of {lattice} puts them; expected rows "
            "of a grid over the image; name the grid and order yourself by AttentionMaps.from_tensors"
        )
    allowed = _OFF_OVERLAP if any(lattice.offset) else _OFF_STRIDE
    if offset.under_view > allowed * min(lattice.stride):
        return (
            f"found {side} tokens of {min(lattice.stride):g} px that {view.brief} matches {offset.under_view:.1f} px "
            "apart; expected the same place; windows overlap that no module tells of, or the image is padded: resize "
            "to whole patches, name the lattice by with_layout(), or leave the layer out of the loss (layers=)"
        )
    return None


def errors(layer: LayerAttention) -> tuple[float | None, float | None]:
    """How far rows are from summing to 1, and A V from the layer's own output (relative); None where not to be told."""
    with torch.no_grad():
        weights = layer.weights()
        rows = (weights.sum(-1) - 1).abs().max().item() if layer.stochastic else None
        value = layer.value
        output = layer.output
        if value is None or output is None or layer.dropout:
            return rows, None
        found = weights @ value.to(weights)
        expected = output.to(weights)
        return rows, ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _terms(maps_a: AttentionMaps, maps_b: AttentionMaps, view: View) -> tuple[dict[str, float], str | None]:
    layout = maps_a[0].placed
    without_class_token = layout is not None and not layout.class_tokens
    acr = AllPairsConsistencyLoss(view, activation_weight=0.0 if without_class_token else None)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of offsets that are not known: they are measured here
            _, terms = acr(maps_a, maps_b, return_terms=True)
    except ValueError as error:
        return {}, str(error)
    return {name: value.item() for name, value in terms.items()}, None


def _bytes(layer: LayerAttention) -> tuple[int, int]:
    batch, heads, queries, keys = layer.shape
    value = layer.recorded.query if layer.is_factored else layer.recorded.value
    width = value.shape[-1] if value is not None else 0
    return 4 * batch * heads * queries * keys, 4 * batch * heads * width * 2 * (queries + keys)


def _shape(images: Any) -> str:
    return (
        f"shape {tuple(images.shape)} and {images.dtype}"
        if isinstance(images, Tensor)
        else f"type {type(images).__name__}"
    )
