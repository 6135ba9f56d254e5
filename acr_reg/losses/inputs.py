"""Checks everything that the loss is given in a call, turns it into one value, and holds every refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from acr_reg._tensors import refuse_labels, require_tensor
from acr_reg._torch_private import is_freed
from acr_reg.alignment.token_maps import check_valid, valid_tokens
from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.tokens import Lattice
from acr_reg.views.constructors import Compose, Identity
from acr_reg.views.view import View, require_view

LayerPair = tuple[LayerAttention, LayerAttention]


@dataclass(frozen=True, eq=False)
class LossInputs:
    """The inputs of the loss: ``pairs`` of layers and, if given, class maps ``cams`` whose pixels lie on ``lattices``.

    ``view`` maps the images of each pair's first layer to the images of the second. ``valid`` (B, H, W) is False where
    the first images are padding, ``labels`` (B, C) are > 0 for the classes present. ``terms`` names the terms to
    compute; ``warnings`` holds one warning for each subject.
    """

    pairs: Sequence[LayerPair]
    cams: tuple[Tensor, Tensor] | None
    lattices: tuple[Lattice, Lattice] | None
    view: View
    valid: Tensor | None
    labels: Tensor | None
    terms: frozenset[str]
    warnings: Mapping[str, str]


def check_inputs(
    *,
    attention: tuple[AttentionMaps, AttentionMaps],
    cams: tuple[Tensor | None, Tensor | None],
    views: tuple[View | None, View | None],
    labels: Tensor | None,
    valid: Tensor | None,
    layers: Sequence[int] | None,
    weights: Mapping[str, float],
    required: set[str],
    distance: object,
    report: bool,
) -> LossInputs:
    """The inputs of a call; raises TypeError or ValueError if they do not fit each other or the loss's options. A term
    without inputs is an error if it is ``required``. Terms of weight 0 are computed only for a ``report``."""
    for name, maps in zip(("attn_a", "attn_b"), attention, strict=True):
        if not isinstance(maps, AttentionMaps):
            raise TypeError(
                f"{name} has type {type(maps).__name__}, not AttentionMaps. Pass what take() returns, or wrap your "
                "tensors with AttentionMaps.from_tensors."
            )
    warnings: dict[str, str] = {}
    pairs = _layers_to_compare(*attention, layers, any(weights[name] for name in ("activation", "affinity")))
    for layer in (layer for pair in pairs for layer in pair):
        _ = layer.layout  # says why a layer has no grid, before its images are counted: windows are several per image
    batch = pairs[0][0].shape[0]
    if valid is not None:
        check_valid(valid, batch)
    view, valid = _relate(*views, valid, warnings)
    _warn_of_unknown_offsets(pairs, view, warnings)
    both_cams = _check_cams(*cams, batch, torch.is_grad_enabled() and weights["cam"] > 0)
    terms = _terms_with_inputs(pairs[0][0], both_cams is not None, weights, required, warnings)
    terms = {name for name in terms if weights[name] or report}
    class_tokens = [len(a.layout.known_class_tokens()) for a, _ in pairs if "activation" in terms]
    class_maps = [] if both_cams is None else [both_cams[0].shape[1]]
    _check_labels(labels, batch, class_maps + [count for count in class_tokens if count > 1])
    for a, b in pairs:
        if terms - {"cam"} and distance == "js" and not (a.stochastic and b.stochastic):
            raise ValueError(
                f'layer {a.index} ({a.name}): "js" needs probabilities, but this map was mixed after softmax. Choose '
                'distance="l1" or "l2".'
            )
    lattices = None if both_cams is None else _lattices(*attention, both_cams)
    device = pairs[0][0].device  # once, and not for every layer
    return LossInputs(
        pairs=[(a, _beside(a, b)) for a, b in pairs],
        cams=both_cams,
        lattices=lattices,
        view=view,
        valid=None if valid is None else valid.to(device),
        labels=None if labels is None else labels.to(device),
        terms=frozenset(terms),
        warnings=warnings,
    )


def _relate(
    view_a: View | None, view: View | None, valid: Tensor | None, warnings: dict[str, str]
) -> tuple[View, Tensor | None]:
    """The view from the first maps' images to the second maps' images, and ``valid`` for the first maps' images."""
    if view is None:
        raise ValueError(
            "The loss has no view. Pass the one applied to the second images, as view=HorizontalFlip(), to the loss or "
            "its call."
        )
    require_view(view)
    if view_a is None:
        return view, valid
    require_view(view_a)
    relation = Compose([view_a.inverse, view])
    if not relation.shows_anything:
        warnings["apart"] = (
            f"The views {view_a.brief} and {view.brief} show nothing in common, so the loss is 0. Draw larger crops."
        )
    if valid is not None:
        if (size := view_a.input_size) is not None:  # at any resolution, as without view_a
            valid = valid_tokens(valid, Lattice(*size)).unflatten(1, size)
        valid = view_a(valid.float()) >= 0.5
    return relation, valid


def _layers_to_compare(
    attn_a: AttentionMaps, attn_b: AttentionMaps, layers: Sequence[int] | None, trained: bool
) -> list[LayerPair]:
    """Pairs of the chosen layers, except those in which neither view carries a gradient."""
    _check_same_modules(attn_a, attn_b)
    if layers is not None:
        attn_a, attn_b = attn_a.select(layers), attn_b.select(layers)
    pairs = list(zip(attn_a, attn_b, strict=True))
    if not torch.is_grad_enabled():
        return pairs
    learning = [(a, b) for a, b in pairs if a.requires_grad or b.requires_grad]
    if not trained:
        return learning or pairs  # a report covers the same layers as training
    if not learning:
        raise ValueError(
            f"There is no gradient in layers {attn_a.layers} of either view. Unfreeze their queries and keys, or run "
            "the loss under torch.no_grad."
        )
    for side, layer in zip("ab", learning[0], strict=True):  # one layer tells for its whole forward
        tensor = layer.recorded.output if layer.recorded.output is not None else layer.recorded.seen
        if tensor.grad_fn is not None and is_freed(tensor):
            raise ValueError(
                f"backward() has already freed the graph of attn_{side}. Take the maps anew in each step, and add this "
                "loss before backward()."
            )
    return learning


def _beside(a: LayerAttention, b: LayerAttention) -> LayerAttention:
    """Layer ``b`` on the device of ``a``, such as that of a teacher on another GPU, as far as its map needs it."""
    if b.device == a.device:
        return b
    kept = {name: getattr(b.recorded, name) for name in ("query", "key", "map", "mask")}
    moved: dict[str, Any] = {name: None if tensor is None else tensor.to(a.device) for name, tensor in kept.items()}
    return replace(b, recorded=replace(b.recorded, value=None, output=None, **moved))


def _check_same_modules(attn_a: AttentionMaps, attn_b: AttentionMaps) -> None:
    if attn_a.layers != attn_b.layers:
        raise ValueError(
            f"attn_a has layers {attn_a.layers} and attn_b has layers {attn_b.layers}. Take both from the same model, "
            "with one take() per forward."
        )
    # Two branches, or a student and a teacher, may name the same block differently: its number must agree.
    other = [(a.name, b.name) for a, b in zip(attn_a, attn_b, strict=True) if _block(a.name) != _block(b.name)]
    if other:
        raise ValueError(
            f"attn_a holds {other[0][0]} where attn_b holds {other[0][1]}. Pass maps of the same blocks; switch off "
            "random dropping of layers (LayerDrop)."
        )
    if None not in (attn_a.run, attn_b.run) and attn_a.run != attn_b.run:
        raise ValueError(
            f"attn_a is from encoder run {attn_a.run} since take(), attn_b from run {attn_b.run}. Capture with "
            'keep="first", or keep="all" and take(i).'
        )


def _block(name: str) -> str:
    numbers = re.findall(r"\d+", name)
    return numbers[-1] if numbers else ""


def _warn_of_unknown_offsets(pairs: Sequence[LayerPair], view: View, warnings: dict[str, str]) -> None:
    layouts = [(a, side) for a, _ in pairs for side in ("query", "key") if not a.layout.lattice(side).offset_known]
    if layouts and view != Identity():
        layer, side = layouts[0]
        warnings["offset"] = (
            f"layer {layer.index} ({layer.name}): overlapping windows hide where its {side} tokens are: "
            f"{view.brief} may misalign them. Run acr_reg.check, or omit it by layers=."
        )


def _check_cams(cam_a: Tensor | None, cam_b: Tensor | None, batch: int, trained: bool) -> tuple[Tensor, Tensor] | None:
    if (cam_a is None) != (cam_b is None):
        raise ValueError("Class maps of one view only were given. Pass both cam_a and cam_b, or neither.")
    if cam_a is None or cam_b is None:
        return None
    for name, cam in (("cam_a", cam_a), ("cam_b", cam_b)):
        require_tensor(cam, name, "(B, C, h, w)")
    if cam_a.ndim == 4 and cam_a.shape[0] != batch:
        raise ValueError(
            f"cam_a has shape {tuple(cam_a.shape)}, but the attention is of {batch} images. Pass class maps and "
            "attention of the same forward."
        )
    if trained and not (cam_a.requires_grad or cam_b.requires_grad):
        raise ValueError(
            "There is no gradient in cam_a or cam_b. Make them with create_graph=True, or set cam_weight=0 to report "
            "the term only."
        )
    return cam_a, cam_b


def _check_labels(labels: Tensor | None, batch: int, widths: Sequence[int]) -> None:
    """``widths`` are the numbers of class maps and of class tokens."""
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels has type {type(labels).__name__}. Pass a tensor (B, C) of 0 and 1.")
    wrong = [width for width in widths if labels.shape[-1:] != (width,)]
    if labels.ndim != 2 or labels.shape[0] != batch or wrong:
        expected = [*wrong, *widths, "C"][0]
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, not ({batch}, {expected}). Pass one row per image and one column "
            "per class map or class token, without background."
        )


def _terms_with_inputs(
    layer: LayerAttention, has_cams: bool, weights: Mapping[str, float], required: set[str], warnings: dict[str, str]
) -> set[str]:
    """The terms that can be computed here. A term without inputs is an error if it is required."""
    missing = {}
    if not (layer.layout.known_class_tokens() if weights["activation"] else layer.layout.class_tokens):
        missing["activation"] = "There is no class token for the activation term. Set activation_weight=0."
    if not has_cams:
        missing["cam"] = "There are no class maps for the cam term. Pass cam_a and cam_b, or leave cam_weight out."
    for name, message in missing.items():
        if name in required:
            raise ValueError(message)
    if "activation" in missing and weights["activation"]:
        warnings["activation"] = (
            "There is no class token, so the activation term is left out. Set activation_weight=0 to silence this."
        )
    return {"activation", "affinity", "cam"} - set(missing)


def _lattices(
    attn_a: AttentionMaps, attn_b: AttentionMaps, cams: tuple[Tensor, Tensor]
) -> tuple[Lattice, Lattice] | None:
    """Where class maps lie on the images, taken from the last layer whose grid has the maps' size."""
    for a, b in zip(reversed(attn_a), reversed(attn_b), strict=True):
        if a.placed is not None and b.placed is not None:
            grids = a.placed.query, b.placed.query
            if [(grid.height, grid.width) for grid in grids] == [cam.shape[-2:] for cam in cams]:
                return grids
    return None


def check_choice(name: str, found: object, choices: tuple[object, ...]) -> None:
    if found not in choices:
        raise ValueError(f"{name}={found!r} is not an option. Choose one of {', '.join(map(repr, choices))}.")


def check_finite(loss: Tensor, inputs: LossInputs) -> None:
    """Names what makes a loss NaN or infinite, and refuses such labels. It reads the device once."""
    known = torch.isfinite(loss if inputs.labels is None else inputs.labels).all()
    if torch.isfinite(loss) & known:
        return
    if inputs.labels is not None and not known:
        refuse_labels()
    with torch.no_grad():
        places = ", ".join(_not_finite(inputs)) or "the distance"
    raise ValueError(
        f"There are NaN or infinite values in {places}. Look for half-precision overflow, fully masked rows, or "
        "division by 0 in distance."
    )


def _not_finite(inputs: LossInputs) -> Iterator[str]:
    for pair in inputs.pairs:
        for side, layer in zip("ab", pair, strict=True):
            if not layer.weights().isfinite().all():
                yield f"layer {layer.index} ({layer.name}) of attn_{side}"
    for name, cam in zip(("cam_a", "cam_b"), inputs.cams or (), strict=False):
        if not cam.isfinite().all():
            yield name
