"""The all-pairs consistency loss (Sun et al., arXiv 2308.04321) as a Module over :mod:`acr_reg.functional`."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from acr_reg._torch import is_freed
from acr_reg.attention import AttentionMaps, LayerAttention
from acr_reg.functional import (
    Distance,
    Normalize,
    activation_consistency,
    affinity_consistency,
    align_layer,
    cam_consistency,
)
from acr_reg.views import Compose, View, require_view

# The paper's weight of 100 on a mean over 576 tokens is 100 / 576 of the distance per row.
DEFAULT_WEIGHT = 0.17
DEFAULT_CAM_WEIGHT = 1.0

Terms = Mapping[str, Tensor]


class AllPairsConsistencyLoss(nn.Module):
    """Holds attention, and class maps where given, consistent between images and a view of them.

        loss = scale * (activation_weight * activation + affinity_weight * affinity + cam_weight * cam)

    activation and affinity are means over layers of :func:`~acr_reg.functional.activation_consistency` and
    :func:`~acr_reg.functional.affinity_consistency`; cam is :func:`~acr_reg.functional.cam_consistency`. Both views
    carry gradient unless one is detached. Uniform attention is a trivial minimum: watch the ``entropy`` term (1 is
    collapse).

    Args:
        view: what leads from the images of the first maps to those of the second; may be given per call instead.
        activation_weight, affinity_weight: default 0.17 per row, which is the paper's 100 at 576 tokens.
        cam_weight: default 1, used when class maps are passed.
        distance: "l1", "l2", "js" or a callable of two (..., M) rows that reduces the last axis.
        normalize: "row" is the distance per query row, independent of the number of tokens; "mean" the paper's mean
            over pairs.
        layers: indices of the layers to use (negative: from the last); None uses all. Layers without gradient (a frozen
            lower half) are left out of the mean.
        heads: "mean" compares the average over heads, as published; "each" compares head by head.
        rows: the share in (0, 1] of patch query rows compared in each call, sampled anew; class rows are always
            compared.
        cam_normalize: "max" (relu, then over the maximum per image and class), "minmax" or None.

    A term that cannot exist (no class token, no class maps) raises where its weight was given, else it is left out and
    said once.

    >>> import torch
    >>> from acr_reg import AttentionMaps, HorizontalFlip
    >>> logits = torch.randn(2, 3, 25, 25, requires_grad=True)
    >>> attention = AttentionMaps.from_tensors([logits.softmax(-1)], num_prefix_tokens=1, grid=(4, 6))
    >>> acr = AllPairsConsistencyLoss(HorizontalFlip())
    >>> loss, terms = acr(attention, attention, return_terms=True)
    >>> sorted(terms), bool(loss > 0)
    (['activation', 'affinity', 'entropy'], True)
    """

    def __init__(
        self,
        view: View | None = None,
        activation_weight: float | None = None,
        affinity_weight: float | None = None,
        cam_weight: float | None = None,
        distance: Distance = "l1",
        normalize: Normalize = "row",
        layers: Iterable[int] | None = None,
        heads: Literal["mean", "each"] = "mean",
        rows: float = 1.0,
        cam_normalize: Literal["max", "minmax"] | None = "max",
    ) -> None:
        super().__init__()
        if view is not None:
            require_view(view)
        _check_choice("normalize", normalize, ("row", "mean"))
        _check_choice("heads", heads, ("mean", "each"))
        _check_choice("cam_normalize", cam_normalize, ("max", "minmax", None))
        if not callable(distance):
            _check_choice("distance", distance, ("l1", "l2", "js"))
        if not 0 < rows <= 1:
            raise ValueError(f"found rows={rows}; expected a share in (0, 1]; 1.0 uses every query row")
        self.view = view
        self.weights = {
            "activation": DEFAULT_WEIGHT if activation_weight is None else float(activation_weight),
            "affinity": DEFAULT_WEIGHT if affinity_weight is None else float(affinity_weight),
            "cam": DEFAULT_CAM_WEIGHT if cam_weight is None else float(cam_weight),
        }
        given = {"activation": activation_weight, "affinity": affinity_weight, "cam": cam_weight}
        self._insisted = {name for name, weight in given.items() if weight}
        if any(not 0 <= weight < float("inf") for weight in self.weights.values()):
            raise ValueError(f"found weights {self.weights}; expected finite weights >= 0; 0 leaves a term out")
        self.distance: Distance = distance
        self.normalize: Normalize = normalize
        if isinstance(layers, int):
            raise TypeError(f"found layers={layers}; expected several indices, or None for all; pass layers=[{layers}]")
        self.layers = None if layers is None else tuple(layers)
        self.heads = heads
        self.rows = rows
        self.cam_normalize = cam_normalize
        self._said: set[str] = set()

    @classmethod
    def paper(cls, view: View | None = None, weight: float = 100.0) -> AllPairsConsistencyLoss:
        """The published setting: L1, mean over pairs, all layers, head mean, ``weight`` on both terms (100; 125 on
        VOC).

        That weight was tuned for 576 tokens (384 px, patch 16): at N tokens the same pull per row is ``weight * N /
        576``.
        """
        return cls(view, weight, weight, normalize="mean")

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}_weight={weight:g}" for name, weight in self.weights.items())
        return (
            f"{self.view!r}, {weights}, distance={self.distance!r}, normalize={self.normalize!r}, heads={self.heads!r}"
        )

    def forward(
        self,
        attn_a: AttentionMaps,
        attn_b: AttentionMaps,
        cam_a: Tensor | None = None,
        cam_b: Tensor | None = None,
        *,
        view: View | None = None,
        view_a: View | None = None,
        labels: Tensor | None = None,
        valid: Tensor | None = None,
        scale: float = 1.0,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, Terms]:
        """The loss, a float32 (float64 for float64 maps) scalar >= 0; with ``return_terms`` also its terms.

        Args:
            attn_a, attn_b: the maps of the images and of ``view(images)``, from the same model.
            cam_a, cam_b: class maps (B, C, h, w) of both, differentiable; None leaves the cam term out.
            view: overrides the view given at construction. With ``view_a``, the first maps were made on
                ``view_a(images)`` and the second on ``view(images)``.
            labels: (B, C), > 0 for the classes present: leaves out the class-token rows and class maps of absent
                classes.
            valid: (B, H, W), False where the first view's images are padding, at any resolution.
            scale: the caller's schedule, e.g. a warm-up; multiplies the loss, not the terms.

        The terms (activation, affinity, cam where used, unweighted; entropy) are detached. Raises ValueError where
        shapes, layers or grids disagree, where no map carries gradient although gradients are enabled, and where a map
        holds NaN.
        """
        for name, maps in (("attn_a", attn_a), ("attn_b", attn_b)):
            if not isinstance(maps, AttentionMaps):
                raise TypeError(
                    f"found {name} of type {type(maps).__name__}; expected AttentionMaps; take() them from "
                    "capture_attention, or wrap tensors by AttentionMaps.from_tensors(list, num_prefix_tokens=, grid=)"
                )
        if not math.isfinite(scale):
            raise ValueError(f"found scale={scale}; expected a finite number; look at the schedule that computed it")
        relation = self._relation(view, view_a)
        pairs = self._pairs(attn_a, attn_b)
        _check_placed(pairs)
        first = pairs[0][0]
        _check_cams(cam_a, cam_b, first.shape[0], torch.is_grad_enabled() and self.weights["cam"] > 0)
        _check_labels(labels, first.shape[0], None if cam_a is None else cam_a.shape[1])
        wanted = self._wanted(first, cam_a)

        terms: dict[str, Tensor] = {}
        if not return_terms:
            wanted = {name for name in wanted if self.weights[name]}
        with torch.autocast(first.device.type, enabled=False):
            if wanted & {"activation", "affinity"}:
                terms |= self._attention_terms(pairs, relation, labels, valid, wanted)
            if "cam" in wanted:
                assert cam_a is not None and cam_b is not None
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights["cam"] > 0):
                    terms["cam"] = cam_consistency(
                        cam_a, cam_b, relation, self.distance, labels, valid, self.cam_normalize
                    )
        weighted = [self.weights[name] * terms[name] for name in ("activation", "affinity", "cam") if name in terms]
        loss = scale * (torch.stack(weighted).sum() if weighted else torch.zeros((), device=first.device))
        if not torch.isfinite(loss):
            raise ValueError(_not_finite(pairs, cam_a, cam_b))
        if not return_terms:
            return loss
        return loss, {name: term.detach().float() for name, term in terms.items()}

    def _relation(self, view: View | None, view_a: View | None) -> View:
        view = view if view is not None else self.view
        if view is None:
            raise ValueError(
                "found no view; expected the one applied to the second maps' images; "
                "AllPairsConsistencyLoss(HorizontalFlip()) or acr(..., view=HorizontalFlip())"
            )
        require_view(view)
        if view_a is None:
            return view
        require_view(view_a)
        return Compose([view_a.inverse, view])

    def _pairs(self, attn_a: AttentionMaps, attn_b: AttentionMaps) -> list[tuple[LayerAttention, LayerAttention]]:
        """The pairs of layers to compare: those chosen, less those in which neither view carries gradient."""
        _check_same_modules(attn_a, attn_b)
        if self.layers is not None:
            attn_a, attn_b = attn_a.select(self.layers), attn_b.select(self.layers)
        pairs = list(zip(attn_a, attn_b, strict=True))
        if not torch.is_grad_enabled() or not any(self.weights[name] for name in ("activation", "affinity")):
            return pairs
        learning = [(a, b) for a, b in pairs if a.requires_grad or b.requires_grad]
        if not learning:
            raise ValueError(
                f"found no gradient in the maps of either view (layers {attn_a.layers}); expected at least one view to "
                "carry it; run the model outside torch.no_grad with unfrozen query and key weights, or compute the "
                "value alone under torch.no_grad"
            )
        _check_alive(learning)
        return learning

    def _wanted(self, layer: LayerAttention, cam_a: Tensor | None) -> set[str]:
        """The terms that can exist here; an error where one that was asked for cannot."""
        missing = {}
        if not (layer.layout.known_class_tokens() if self.weights["activation"] else layer.layout.class_tokens):
            missing["activation"] = (
                "found no class token; expected one for the activation term; set activation_weight=0"
            )
        if cam_a is None:
            missing["cam"] = (
                "found no class maps; expected cam_a and cam_b for the cam term; pass both, or leave cam_weight out"
            )
        for name, message in missing.items():
            if name in self._insisted:
                raise ValueError(message)
            if name == "activation" and self.weights[name] and name not in self._said:
                self._said.add(name)
                warnings.warn(f"{message} to say so; the term is left out", stacklevel=5)
        return {"activation", "affinity", "cam"} - set(missing)

    def _attention_terms(
        self,
        pairs: list[tuple[LayerAttention, LayerAttention]],
        view: View,
        labels: Tensor | None,
        valid: Tensor | None,
        wanted: set[str],
    ) -> dict[str, Tensor]:
        """Means over layers of both attention terms and of the entropy."""
        sums: dict[str, list[Tensor]] = {}
        learns = any(self.weights[name] for name in wanted & {"activation", "affinity"})
        for a, b in pairs:
            if self.distance == "js" and not (a.stochastic and b.stochastic):
                raise ValueError(
                    f"layer {a.index} ({a.name}): found a map that is mixed after softmax; expected probabilities for "
                    '"js"; choose distance="l1" or "l2"'
                )
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                layer = align_layer(a, b, view, valid, self.rows)
                rows = (layer.activation_a, layer.activation_b, layer.affinity_a, layer.affinity_b)
                if self.heads == "mean":
                    rows = tuple(r.mean(1, keepdim=True) for r in rows)  # type: ignore[assignment]
                if "activation" in wanted:
                    term = activation_consistency(
                        rows[0], rows[1], self.distance, self.normalize, layer.keys_valid, _present(a, labels)
                    )
                    sums.setdefault("activation", []).append(term)
                if "affinity" in wanted:
                    term = affinity_consistency(
                        rows[2], rows[3], self.distance, self.normalize, layer.keys_valid, layer.rows_valid
                    )
                    sums.setdefault("affinity", []).append(term)
                sums.setdefault("entropy", []).append(layer.entropy)
        return {name: torch.stack(values).mean() for name, values in sums.items()}


def _check_same_modules(attn_a: AttentionMaps, attn_b: AttentionMaps) -> None:
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


def _check_alive(pairs: list[tuple[LayerAttention, LayerAttention]]) -> None:
    """The first layer tells for all of its forward."""
    for side, layer in zip("ab", pairs[0], strict=True):
        tensor = layer.recorded.output if layer.recorded.output is not None else layer.recorded.seen
        if tensor.grad_fn is not None and is_freed(tensor):
            raise ValueError(
                f"found maps of view {side} whose graph backward() has already freed; expected maps of a forward that "
                "is still to be differentiated; take() them anew in each step, and add the loss before backward()"
            )


def _check_placed(pairs: list[tuple[LayerAttention, LayerAttention]]) -> None:
    """Says why a layer is on no grid before anything counts its images: windows hold several maps an image."""
    for pair in pairs:
        for layer in pair:
            _ = layer.layout


def _present(layer: LayerAttention, labels: Tensor | None) -> Tensor | None:
    """(B, C), True for class-token rows to compare; None compares all: one class token serves whatever is present."""
    count = len(layer.layout.known_class_tokens())
    if labels is None or count <= 1:
        return None
    if labels.shape[1] != count:
        raise ValueError(
            f"found labels of width {labels.shape[1]}; expected {count}, one for each class token; pass labels without "
            "background, in the order of the class tokens"
        )
    return labels > 0


def _check_cams(cam_a: Tensor | None, cam_b: Tensor | None, batch: int, learns: bool) -> None:
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


def _check_labels(labels: Tensor | None, batch: int, classes: int | None) -> None:
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


def _check_choice(name: str, found: object, choices: tuple[object, ...]) -> None:
    if found not in choices:
        raise ValueError(
            f"found {name}={found!r}; expected one of {', '.join(map(repr, choices))}; choose one of these"
        )


def _not_finite(pairs: list[tuple[LayerAttention, LayerAttention]], cam_a: Tensor | None, cam_b: Tensor | None) -> str:
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
