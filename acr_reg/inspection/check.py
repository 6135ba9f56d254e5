"""Runs a captured model on images and on a view of them, and checks every layer: see :func:`~acr_reg.check`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acr_reg._torch_private import shards_parameters
from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.capture.evaluation import eval_mode, running_view
from acr_reg.capture.handle import alone, capture_attention
from acr_reg.capture.refusals import refuse_sharded
from acr_reg.errors import CaptureError, LayoutError, listed
from acr_reg.inspection.encoders import choose_run, off_the_image, other_encoders
from acr_reg.inspection.offsets import LayerOffsets, Offset, first_line, token_offsets
from acr_reg.inspection.report import Check, LayerCheck, row_sum
from acr_reg.losses.all_pairs import AllPairsConsistencyLoss
from acr_reg.random_numbers import own_random_numbers
from acr_reg.tokens import Lattice, TokenSide
from acr_reg.views.constructors import HorizontalFlip
from acr_reg.views.view import View, require_view

_OFF = 1e-4  # of rows from sum 1, and of the product with the values
_OFF_IN_HALF = 1e-2  # where the layer computed in half precision
_HALF = (torch.float16, torch.bfloat16)
_OFF_GRID = 2.0  # tokens; a token farther from its place belongs to another order or grid
_OFF_READ = 0.25  # of what a token reads
_OFF_STRIDE = 0.25  # of a token; matched tokens farther apart see rather different pixels
_OFF_OVERLAP = 0.5  # of a token, where the offset of overlapping windows is known and only their weights' lean is left


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
    num_suffix_tokens: int | None = None,
    class_tokens: int | Sequence[int] | None = None,
    no_grad: bool = False,
) -> Check:
    """Runs a model on images (B, C, H, W) and on a view of them, and reports what a capture would give to the loss.

    For every layer the report says what was captured and on which grids, what the map's rows sum to, how far the map's
    product with the values is off the layer's own output, and how far apart on the image matched tokens lie. This
    distance is measured by the gradient of a token with respect to the pixels. It reveals an overlapping stem, padding,
    or another order of tokens. Where no gradient reaches the pixels it is None, and a warning says why. If several
    encoders run, the report is about the first whose tokens lie on the images, and a warning names them.

    Args:
        model: as for :func:`~acr_reg.capture_attention`. It runs in eval mode and is left as it was.
        images: two or more also show whether the images of a batch stay separate; a few take seconds.
        view: the view that training will use; by default HorizontalFlip().
        forward: runs the model, if ``model(images)`` does not, e.g. ``model.forward_features``.
        modules, layers, patch_size, num_prefix_tokens, num_suffix_tokens, class_tokens, no_grad: as for
            :func:`~acr_reg.capture_attention`.

    ``problems`` lists whatever a capture or the loss would refuse; the model's own errors are raised.

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
            f"The images are {_described(images)}. Pass a floating point tensor (B, C, H, W): a few photos, normalised "
            "as in training."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}. Pass a torch.nn.Module.")
    view = HorizontalFlip() if view is None else view
    require_view(view)
    hints: dict[str, Any] = {
        "modules": modules,
        "patch_size": patch_size,
        "num_prefix_tokens": num_prefix_tokens,
        "num_suffix_tokens": num_suffix_tokens,
        "class_tokens": class_tokens,
        "image_channels": images.shape[1],
        "no_grad": no_grad,
    }
    call = model if forward is None else forward
    chosen = None if layers is None else listed("layers", layers)
    skipped: tuple[tuple[str, str], ...] = ()
    with own_random_numbers(0), torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
        try:
            if shards_parameters(model):
                refuse_sharded()
            with capture_attention(model, keep="all", record_products=True, **hints) as attention:

                def runs_of(batch: Tensor) -> list[AttentionMaps]:
                    attention.clear()
                    with alone(attention), running_view(batch, images):
                        call(batch.clone())  # a leaf that needs a gradient may not be written into
                    return attention.take_all()

                def observe(batch: Tensor) -> AttentionMaps:
                    maps = choose_run(runs_of(batch))
                    return maps if chosen is None else maps.select(chosen)

                batch_a, batch_b = images.detach(), view(images.detach())
                try:
                    beside, why_unmeasured = _first_runs(runs_of, batch_a)
                    if why_unmeasured is None:
                        batch_a, batch_b = (each.clone().requires_grad_() for each in (batch_a, batch_b))
                    maps_a = observe(batch_a)  # from the second run on only attention modules are watched
                    maps_b = observe(batch_b)
                finally:
                    skipped = attention.skipped
                offsets = {0: LayerOffsets(why_unmeasured=why_unmeasured)}
                if why_unmeasured is None:
                    offsets = token_offsets(observe, images, view.of_image(0))
        except (CaptureError, LayoutError) as error:
            return Check(type(model).__name__, view, (), skipped, (str(error),), {}, 0, 0)
    checked = tuple(_layer(layer, offsets.get(position, LayerOffsets()), view) for position, layer in enumerate(maps_a))
    terms, refusal = _terms(maps_a, maps_b, view)
    problems = [*_by_layer((layer, layer.problem) for layer in checked), *off_the_image(maps_a)]
    if refusal is not None and not problems:
        problems.append(refusal)
    dense, factors = (2 * sum(_bytes(layer)[i] for layer in maps_a) for i in (0, 1))
    found = (*beside, *_warnings(maps_a, checked, offsets))
    return Check(type(model).__name__, view, checked, skipped, tuple(problems), terms, dense, factors, found)


def _first_runs(runs_of: Callable[[Tensor], list[AttentionMaps]], images: Tensor) -> tuple[list[str], str | None]:
    """Runs the model on images that need a gradient, so that a frozen backbone is seen as a whole. Returns warnings of
    other encoders and, if the model runs only on images that need no gradient, the reason."""
    try:
        return list(other_encoders(runs_of(images.clone().requires_grad_()))), None
    except CaptureError:
        raise
    except RuntimeError as error:  # of numpy, for instance
        found = list(other_encoders(runs_of(images)))  # or the model's own error
        return found, f"the model does not run on images that need a gradient: {first_line(error)}"


def _by_layer(found: Iterable[tuple[LayerCheck, str | None]]) -> list[str]:
    """Each text once, behind the layers that it is about."""
    same: dict[str, list[str]] = {}
    for layer, text in found:
        if text:
            same.setdefault(text, []).append(f"{layer.index} ({layer.name})")
    return [f"layer {', '.join(names)}: {text}" for text, names in same.items()]


def _warnings(maps: AttentionMaps, checked: Sequence[LayerCheck], offsets: Mapping[int, LayerOffsets]) -> Iterator[str]:
    if not any(layer.requires_grad for layer in maps):
        yield "No map carries a gradient, so the loss would train nothing. Run the layers with gradients enabled."
    yield from _by_layer(
        (
            found,
            f"The rows sum to {row_sum(found)}, not 1: the map was changed after softmax. The loss scales sums above "
            "1; entropy omits it.",
        )
        for layer, found in zip(maps, checked, strict=True)
        if not layer.stochastic and max(abs(total - 1) for total in found.row_sums) > _allowed(layer)
    )
    yield from _by_layer(
        (checked[position], f"Where its tokens lie was not measured: {of_layer.why_unmeasured}.")
        for position, of_layer in offsets.items()
        if of_layer.why_unmeasured
    )


def _allowed(layer: LayerAttention) -> float:
    half = any(t is not None and t.dtype in _HALF for t in (layer.recorded.seen, layer.recorded.output))
    return _OFF_IN_HALF if half else _OFF


def _layer(layer: LayerAttention, offsets: LayerOffsets, view: View) -> LayerCheck:
    layout = layer.placed
    tokens = (layout.query, layout.key) if layout else layer.shape[2:]
    with torch.no_grad():
        sums = layer.weights().sum(-1)
    row_error, product_error = reconstruction_errors(layer)
    problem = layer.why_unplaced if layer.window is None else None
    if layout is not None:
        for side, offset in offsets.sides.items():
            problem = problem or _offset_problem(side, layout.lattice(side), offset, view)
    allowed = _allowed(layer)
    if row_error is not None and row_error > allowed:
        problem = f"The rows of the map sum to 1 only within {row_error:.1e}. Please report this model."
    if product_error is not None and product_error > allowed:
        problem = f"The map times V is {product_error:.1e} off the layer's own output. Please report this model."
    tensors = {"map": sums, "value": layer.value, "output": layer.output}
    not_finite = [name for name, tensor in tensors.items() if tensor is not None and not tensor.isfinite().all()]
    if not_finite:
        problem = f"Its {not_finite[0]} holds NaN or infinite values. Look for half-precision overflow or masked rows."
    return LayerCheck(
        index=layer.index,
        name=layer.name,
        kind=layer.kind if layer.window is None else str(layer.window),
        source="fused" if layer.is_factored else "explicit" if layer.stochastic else "mixed",
        heads=layer.shape[1],
        queries=str(tokens[0]),
        keys=str(tokens[1]),
        prefix=layout.num_prefix_tokens if layout else None,
        between=len(layout.between) if layout else None,
        suffix=layout.num_suffix_tokens if layout else None,
        class_tokens=layout.class_tokens if layout else None,
        row_sums=(sums.min().item(), sums.max().item()),
        row_error=row_error,
        product_error=product_error,
        query_offset=_under_view(offsets, "query"),
        key_offset=_under_view(offsets, "key"),
        problem=problem,
    )


def _under_view(offsets: LayerOffsets, side: TokenSide) -> float | None:
    return offsets.sides[side].under_view if side in offsets.sides else None


def _offset_problem(side: str, lattice: Lattice, offset: Offset, view: View) -> str | None:
    if offset.from_lattice > _OFF_GRID * max(lattice.stride):
        return (
            f"The {side} tokens lie {offset.from_lattice:.0f} px from where the {lattice} grid puts them. Name their "
            "grid and order by AttentionMaps.from_tensors."
        )
    # A stem whose windows overlap reads more than its stride, and its kernels may lean to one side of it.
    allowed = max(
        (_OFF_OVERLAP if any(lattice.offset) else _OFF_STRIDE) * min(lattice.stride), _OFF_READ * offset.width
    )
    if offset.under_view > allowed:
        return (
            f"{view.brief} matches {side} tokens of {min(lattice.stride):g} px that lie {offset.under_view:.1f} px "
            "apart. If the model pads, use whole patches; else leave the layer out (layers=)."
        )
    return None


def reconstruction_errors(layer: LayerAttention) -> tuple[float | None, float | None]:
    """How far rows are from sum 1, and A V from the layer's own output (relative); None if unknown."""
    with torch.no_grad():
        weights = layer.weights()
        rows = (weights.sum(-1) - 1).abs().max().item() if layer.stochastic else None
        value = layer.value
        output = layer.output
        if value is None or output is None or layer.dropout:
            return rows, None
        if value.shape[-2] != weights.shape[-1] or output.shape[-2:] != (weights.shape[-2], value.shape[-1]):
            return rows, None  # the map met something else than values, such as weights of another mix
        found = weights @ value.to(weights)
        expected = output.to(weights)
        off, size = (torch.linalg.vector_norm(each) for each in (found - expected, expected))
        return rows, (off / size.clamp_min(1e-30)).item()


def _terms(maps_a: AttentionMaps, maps_b: AttentionMaps, view: View) -> tuple[dict[str, float], str | None]:
    layout = maps_a[0].placed
    without_class_token = layout is not None and layout.class_tokens == ()  # None is unknown, which the loss refuses
    acr = AllPairsConsistencyLoss(view, activation_weight=0.0 if without_class_token else None)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown offsets, which are measured here
            _, terms = acr(maps_a, maps_b, return_terms=True)
    except ValueError as error:
        return {}, str(error)
    values = {name: value.item() for name, value in terms.items()}
    lost = [name for name, value in values.items() if not math.isfinite(value)]
    return values, f"The terms {', '.join(lost)} are NaN or infinite. Do not train on them." if lost else None


def _bytes(layer: LayerAttention) -> tuple[int, int]:
    batch, heads, queries, keys = layer.shape
    value = layer.recorded.query if layer.is_factored else layer.recorded.value
    width = value.shape[-1] if value is not None else 0
    return 4 * batch * heads * queries * keys, 4 * batch * heads * width * 2 * (queries + keys)


def _described(images: object) -> str:
    if isinstance(images, Tensor):
        return f"{images.dtype} of shape {tuple(images.shape)}"
    return f"a {type(images).__name__}"
