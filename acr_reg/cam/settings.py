"""Finds the layers that class maps of a model can use, and says at once which settings it needs otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from acr_reg.attention.layer import LayerAttention
from acr_reg.cam.gradient import has_graph
from acr_reg.errors import CaptureError, LayoutError, some


@dataclass(frozen=True)
class CamSettings:
    """The settings of a :class:`~acr_reg.GradientCam` that depend on the model's layers."""

    start_layer: int
    query: str
    steps: int
    propagation_layers: tuple[int, ...] | None
    no_grad: bool | None

    def first_layer(self, model: str, seen: Sequence[LayerAttention], classes: int) -> int:
        """The index of the first layer whose gradient is used. ``seen``: every layer, on a graph if it can have one.

        Raises :class:`~acr_reg.LayoutError` if these settings do not suit the layers; it names all that do. Warns of
        layers that are left out because they have no graph.
        """
        bare = [layer for layer in seen if not has_graph(layer)]
        if len(bare) == len(seen):
            raise CaptureError(
                f"All {len(seen)} layers of {model} ran under torch.no_grad or reentrant checkpointing. Pass forward= "
                "that runs them with a graph."
            )
        if not self.no_grad:  # the others are then counted alone
            layers = [replace(layer, index=i) for i, layer in enumerate(filter(has_graph, seen))]
            model = f"{model} (layers that ran without a graph: {len(bare)})" if bare else model
        else:
            layers = list(seen)
        first = self._first_of(model, layers, classes)
        if bare and self.no_grad is None and self.steps:
            warnings.warn(
                f"Maps do not propagate over layers that ran without a graph: {some([layer.name for layer in bare])}. "
                "Pass no_grad=True to use them, False to leave them out.",
                stacklevel=4,
            )
        return first

    def _first_of(self, model: str, layers: Sequence[LayerAttention], classes: int) -> int:
        first = self.start_layer + len(layers) if self.start_layer < 0 else self.start_layer
        whys = [_why_unfit(layer, layers[-1]) for layer in layers]
        if whys[-1] is not None:
            raise LayoutError(f"{model} needs other settings: {whys[-1]}. {_instead_of_last(layers)}")
        lowest = max((index + 1 for index, why in enumerate(whys) if why is not None), default=0)
        reasons, needed = [], []
        if not lowest <= first < len(layers):
            within = 0 <= first < len(layers)
            none = f"start_layer={self.start_layer} is none of its layers {tuple(layer.index for layer in layers)}"
            reasons.append(str(whys[lowest - 1]) if within else none)
            first = max(lowest, len(layers) - 2)
            needed.append(f"start_layer={first - len(layers)}")
        lacks = [_lack_of_grid(layers[-1], self.query)]
        if self.query == "class":
            lacks.append(_lack_of_class_tokens(layers[first:], classes))
        if self.steps:
            lacks.append(self._lack_of_propagation(layers))
        for reason, instead in filter(None, lacks):
            reasons.append(reason)
            needed.append(instead)
        if needed:
            raise LayoutError(f"{model} needs other settings: {'; '.join(reasons)}. Pass {', '.join(needed)}.")
        return first

    def _lack_of_propagation(self, layers: Sequence[LayerAttention]) -> _Lack | None:
        _, grid = _place(layers[-1])
        everything = range(len(layers))
        chosen = everything if self.propagation_layers is None else self.propagation_layers
        fitting = [layer.index for layer in layers if _place(layer) == (grid, grid)]
        wrong = [i for i in chosen if i not in everything and i + len(layers) not in everything]
        wrong = wrong or [i for i in chosen if everything[i] not in fitting]
        if not wrong and chosen:
            return None
        instead = f"propagation_layers={fitting}" if fitting else "steps=0"
        return f"maps of {_said(layers[-1])} do not propagate over layers {wrong}", instead


_Lack = tuple[str, str]  # what is wrong, and what to pass instead


def _said(layer: LayerAttention) -> str:
    return f"layer {layer.index} ({layer.name})"


def _place(layer: LayerAttention) -> tuple[object, object]:
    """The grids of queries and keys, or if unknown their numbers."""
    if layer.window is not None:
        return None, layer.window
    return layer.shape[2:] if layer.placed is None else (layer.placed.query, layer.placed.key)


def _why_unfit(layer: LayerAttention, last: LayerAttention) -> str | None:
    """Why a layer gives no class maps on the grid of the last layer."""
    said, (queries, keys), grids = _said(layer), layer.shape[2:], _place(layer)
    if not has_graph(layer):
        return f"{said} ran without a graph, under torch.no_grad or reentrant checkpointing"
    if layer.window is not None:
        return f"{said} attends within {layer.window}"
    if layer.placed is None and queries != keys:
        return f"the grids of {queries} queries and {keys} keys of {said} are unknown"
    if grids != _place(last):
        return f"queries and keys of {said} lie on {grids[0]} and {grids[1]}, not on those of the last layer"
    return None


def _instead_of_last(layers: Sequence[LayerAttention]) -> str:
    """What to do if the last layer gives no class maps."""
    last = layers[-1]
    fitting = [layer for layer in layers if layer.placed is not None]
    fitting = [layer for layer in fitting if layer.placed == fitting[-1].placed]
    if not has_graph(last):
        return "Pass forward= that runs it with a graph."
    if fitting:
        start = ", start_layer=-1" if len(fitting) == 1 else ""
        return f"Pass modules={list(dict.fromkeys(layer.name for layer in fitting))}{start}."
    return "No layer sees the whole image. Use another model."


def _lack_of_grid(last: LayerAttention, query: str) -> _Lack | None:
    if last.placed is not None:
        return None
    reason = f"of {_said(last)}, {str(last.why_unplaced).partition('. ')[0]}"  # the rest advises on a capture
    tokens = (
        'query="all" (num_prefix_tokens= or num_suffix_tokens= if there is a class token)' if query == "class" else None
    )
    return reason, ", ".join(filter(None, ["grid=(height, width)", tokens]))


def _lack_of_class_tokens(layers: Sequence[LayerAttention], classes: int) -> _Lack | None:
    for layer in layers:
        layout, said = layer.placed, _said(layer)
        if layout is None:
            return None  # it shows once the grid is known
        if layout.class_tokens is None:
            return f"it is unknown which prefix tokens of {said} are class tokens", 'class_tokens= or query="all"'
        if len(layout.class_tokens) not in (1, classes):
            told = 'class_tokens= or query="all"' if layout.num_prefix_tokens else 'query="all"'
            return f"{said} has {len(layout.class_tokens)} class tokens for {classes} classes", told
    return None
