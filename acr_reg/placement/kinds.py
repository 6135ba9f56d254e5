"""Tells the kind of an attention call: among all tokens, within windows, with reduced keys, or not between tokens.

A map alone does not say what its axes are. The module's input and output and the number of images do: see
:func:`place`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from acr_reg._tensors import is_dense
from acr_reg.attention.call import AttentionCall
from acr_reg.attention.layer import LayerAttention
from acr_reg.tokens import TokenLayout, Window

Images = tuple[int, int, int]  # (B, height, width)
Locate = Callable[[int, int, "tuple[int, int] | None"], "tuple[TokenLayout | None, str | None]"]

_CROSS = "cross-attention: {} queries attend to {} keys of other tokens"

_OTHER_TOKENS = {"key_value_states", "encoder_hidden_states", "memory", "context", "kv", "key", "k"}
_HEAD_NAMES = ("num_heads", "heads", "num_attention_heads", "n_heads")
_WINDOW_NAMES = ("window_size", "partition_size", "win_size", "ws")


@dataclass(frozen=True)
class Placement:
    """Where the tokens of a call sit, or the ``refusal``: why it is not token-to-token self-attention.

    ``heads`` counts heads flattened into the batch. ``why_unplaced`` is the reason if there is no ``layout``.
    ``may_be_self``: it is refused as cross-attention, but has as many keys as queries.
    """

    heads: int | None = None
    window: Window | None = None
    layout: TokenLayout | None = None
    why_unplaced: str | None = None
    refusal: str | None = None
    may_be_self: bool = False

    def layer(self, index: int, call: AttentionCall) -> LayerAttention:
        recorded = call.recorded if self.heads is None else replace(call.recorded, heads=self.heads)
        return LayerAttention(
            index,
            call.name,
            recorded,
            self.layout,
            call.dropout,
            call.stochastic,
            window=self.window,
            why_unplaced=self.why_unplaced,
        )


def first_tensor(*values: Any) -> Tensor | None:
    """The first tensor among values, which may be tuples or dicts of tensors. Nested tensors are passed over:
    their shapes are not all numbers."""
    for value in values:
        if is_dense(value):
            return value
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
        found = first_tensor(*inner) if inner else None
        if found is not None:
            return found
    return None


def token_counts(shape: Sequence[int] | None) -> frozenset[int]:
    """The numbers of tokens that a tensor may hold: (N, C), (B, N, C) or (N, B, C), (B, h, w, C) or (B, C, h, w)."""
    if shape is None or not 2 <= len(shape) <= 4:
        return frozenset()
    if len(shape) == 4:
        return frozenset([shape[1] * shape[2], shape[2] * shape[3]])
    return frozenset(shape[:-1])


def holds_rows(shape: Sequence[int] | None, module: nn.Module) -> bool:
    """Whether a module's input holds tokens as rows of channels: (B, N, C), or (B, h, w, C) for its linear maps."""
    if shape is None or len(shape) not in (3, 4):
        return False
    return len(shape) == 3 or shape[-1] in {m.in_features for m in module.modules() if isinstance(m, nn.Linear)}


def is_cross_attention(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a module was given keys of other tokens than its queries: two tensors, by name or in order."""
    second = args[1] if len(args) > 1 else None
    if second is None and _OTHER_TOKENS.isdisjoint(kwargs):
        return False
    query = first_tensor(args, {name: value for name, value in kwargs.items() if name not in _OTHER_TOKENS}, kwargs)
    named = [kwargs[name] for name in _OTHER_TOKENS & kwargs.keys()]
    if any(isinstance(other, Tensor) and other is not query for other in named):
        return True
    if query is None or not is_dense(second) or second is query or not second.is_floating_point():
        return False
    alike = second.ndim == query.ndim == 3 and second.shape[0] == query.shape[0]
    return alike and second.shape[1] != query.shape[1]


def place(
    call: AttentionCall, around: Sequence[nn.Module], images: Images | None, locate: Locate, unordered: str | None
) -> Placement:
    """Finds where the tokens of a call sit, or why it is not token-to-token self-attention.

    What a run showed of the tokens (``call.observed``) decides; shapes and names do where it showed nothing.
    ``around``: the attention module and the modules that hold it, innermost first. ``unordered``: why the
    model's tokens lie on no grid, or None.
    """
    recorded, heads = call.recorded, None
    seen = call.observed.queries if call.observed is not None and call.observed.is_known else None
    batch = recorded.seen.shape[0]
    if recorded.heads is None and recorded.seen.ndim == 3 and images is not None and batch % images[0] == 0:
        heads = batch // images[0]  # (B H, N, M) or (B, N, M): H is not stated
        if seen is not None and seen.of_image:
            heads = seen.groups // seen.windows
    layer = Placement(heads).layer(0, call)
    is_cross = call.cross if call.observed is None else call.observed.is_cross(call.cross)
    refusal = call.refusal or _refusal(layer, call, images, is_cross)
    if refusal is not None:
        return Placement(refusal=refusal)
    queries, keys = layer.shape[2:]
    window = _window(layer, call, around, images)
    if window is not None:
        return Placement(heads, window)
    if is_cross:
        return Placement(refusal=_CROSS.format(queries, keys), may_be_self=queries == keys)
    layout, why_unplaced = (None, unordered) if unordered and not seen else locate(queries, keys, images and images[1:])
    if layout is None and unordered:
        why_unplaced = unordered
    size = _first_attribute(around, _WINDOW_NAMES)
    if seen is None and layout is None and size is not None and size[0] * size[1] == keys:  # one window, padded
        return Placement(heads, Window(size, _shift(around), 1))
    if queries != keys:
        refusal = None if layout is not None and seen else _not_reduced(layer, call, images)
        if refusal is not None:
            return Placement(refusal=refusal)
        if any(isinstance(m, (nn.AvgPool1d, nn.MaxPool1d)) for m in call.module.modules()):
            layout = None
            why_unplaced = (
                f"The {keys} keys pooled along the sequence of {queries} tokens lie on no grid. Leave this layer out: "
                "choose layers= among the others."
            )
        elif layout is None and not unordered:
            refusal = f"pooling or cross-attention: {queries} queries and {keys} keys fit no two grids of the image"
            return Placement(refusal=refusal)
    return Placement(heads, None, layout, why_unplaced)


def _refusal(layer: LayerAttention, call: AttentionCall, images: Images | None, is_cross: bool) -> str | None:
    """Why a call is not token-to-token self-attention, judged by its shapes."""
    batch, _, queries, keys = layer.shape
    if queries == 1:
        return f"pooling or class attention: 1 query attends to {keys} keys"
    if is_cross and (queries != keys or images is None):
        return _CROSS.format(queries, keys)
    of_image = call.observed is None or call.observed.is_of_image
    if images is not None and (batch % images[0] if of_image else batch != images[0]):
        return f"not the tokens of the images: a batch of {batch} for {images[0]} images"
    if is_channels(layer, call):
        return f"channel attention: {queries} channels attend to {keys} channels over all tokens"
    return None


def is_channels(layer: LayerAttention, call: AttentionCall) -> bool:
    """Whether the map's axes are channels: a head's width is then the number of tokens.

    If there are as many channels as tokens, the order in memory decides: in (B, N, C) channels are contiguous.
    """
    if call.observed is not None and call.observed.queries is not None and call.observed.queries.of_image:
        return call.observed.queries.are_channels
    queries, keys = layer.shape[2:]
    width, inputs = call.value_width, token_counts(call.input_shape)
    if width not in inputs:
        return False
    if queries not in inputs and keys not in inputs:
        return True
    in_rows = holds_rows(call.input_shape, call.module)
    return queries == keys == width and in_rows and call.value_in_columns


def is_pyramid(calls: Sequence[AttentionCall]) -> bool:
    """Whether the calls have ever fewer tokens, counting windows together."""
    shapes = [call.recorded.seen.shape for call in calls if call.recorded.seen.ndim == 4]
    tokens = [shape[0] * shape[2] for shape in shapes if shape[2] > 1]
    return len(set(tokens)) > 1 and tokens == sorted(tokens, reverse=True)


def _not_reduced(layer: LayerAttention, call: AttentionCall, images: Images | None) -> str | None:
    """Why a layer whose numbers of queries and keys differ neither reduces its keys (PVT, SegFormer) nor connects
    two stages (LeViT)."""
    queries, keys = layer.shape[2:]
    if images is None:
        return f"reduced keys or cross-attention: no image tells the grids of {queries} queries and {keys} keys"
    outputs = token_counts(call.output_shape)
    if queries < keys and outputs and queries not in outputs:
        return f"pooling or cross-attention: the {queries} queries to {keys} keys are not the module's tokens"
    return None


def _window(
    layer: LayerAttention, call: AttentionCall, around: Sequence[nn.Module], images: Images | None
) -> Window | None:
    """The windows of a layer whose batch holds several groups of tokens per image, or that has a fifth axis."""
    groups = 1 if images is None else layer.shape[0] // images[0]
    seen = call.observed
    if seen is None or seen.queries is None or seen.keys is None or not seen.queries.of_image:
        is_apart = False
        if layer.recorded.seen.ndim > 4:
            groups *= _groups_beside_heads(layer, call)
    else:
        is_apart = max(seen.queries.windows, seen.keys.windows) > 1 or seen.queries.is_padded or seen.keys.is_padded
        if layer.recorded.seen.ndim > 4:
            groups *= max(layer.shape[1] * seen.queries.windows // seen.queries.groups, 1)
    if groups == 1 and not is_apart:
        return None
    size = _first_attribute(around, _WINDOW_NAMES)
    if size is not None and size[0] * size[1] != layer.shape[3]:  # a number of tokens, or something else
        size = None
    return Window(size, _shift(around), groups)


def _shift(around: Sequence[nn.Module]) -> tuple[int, int]:
    return _first_attribute(around, ("shift_size",)) or (0, 0)


def _groups_beside_heads(layer: LayerAttention, call: AttentionCall) -> int:
    """The number of windows in (B, windows, heads, N, .) or (B, heads, windows, N, .)."""
    beside = layer.shape[1]
    heads = next((n for name in _HEAD_NAMES if isinstance(n := getattr(call.module, name, None), int)), None)
    if heads and beside % heads == 0:
        return beside // heads
    return 1 if layer.shape[2] in token_counts(call.input_shape) else max(layer.recorded.seen.shape[1:-2])


def _first_attribute(modules: Sequence[nn.Module], names: Sequence[str]) -> tuple[int, int] | None:
    """The first number, or pair of numbers, under one of the names in one of the modules."""
    return next((pair for m in modules for name in names if (pair := _pair_or_none(getattr(m, name, None)))), None)


def _pair_or_none(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return (value[0], value[1]) if any(value) else None
    return None


def explain_windows(layers: Sequence[LayerAttention]) -> list[LayerAttention]:
    """The layers; each window layer says why it has no layout, and which layers to use instead."""
    usable = [layer.index for layer in layers if layer.window is None and layer.placed is not None]
    advice = (
        f"Use only layers {usable}, which see all of it."
        if usable
        else "No captured layer does: capture other modules, or use another model."
    )
    reason = "Tokens attend within {} ({} tokens each), not to the whole image. {}"
    return [
        replace(layer, placed=None, why_unplaced=reason.format(layer.window, layer.shape[2], advice))
        if layer.window
        else layer
        for layer in layers
    ]


def unordered_tokens(model: nn.Module) -> str | None:
    """Why the tokens of this model do not stand in rows over the image, or None."""
    names = [type(m).__name__ for m in model.modules() if type(m).__name__ == "Unroll" or hasattr(m, "unroll_schedule")]
    if not names:
        return None
    return (
        f"The tokens stand in the order of mask units ({names[0]}), not row by row. Reorder their maps and call "
        "AttentionMaps.from_tensors."
    )
