"""The all-pairs consistency loss (Sun et al., arXiv 2308.04321) as a Module over :mod:`acr_reg.losses.functional`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from acr_reg.alignment.pairs import AlignedPair, sample_rows
from acr_reg.alignment.resampled import check_valid, valid_tokens
from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.losses.blockwise import evaluate_blockwise
from acr_reg.losses.functional import Distance, Normalize, cam_consistency
from acr_reg.losses.inputs import (
    check_alive,
    check_cams,
    check_choice,
    check_labels,
    check_placed,
    check_same_modules,
    not_finite,
)
from acr_reg.losses.terms import LayerTerms, Term, can_be_blockwise, evaluate_dense
from acr_reg.tokens import Lattice
from acr_reg.views.constructors import Compose, Identity
from acr_reg.views.view import View, require_view

# The paper's weight of 100 on a mean over 576 tokens is 100 / 576 of the distance per row.
DEFAULT_WEIGHT = 0.17
# Not the paper's, which has no such term. At 1, alone, it cost gradient CAMs 0.1 of mIoU on dev photos (docs/study.md).
DEFAULT_CAM_WEIGHT = 0.1

Terms = Mapping[str, Tensor]


class AllPairsConsistencyLoss(nn.Module):
    """Holds attention, and class maps where given, consistent between images and a view of them.

        loss = scale * (activation_weight * activation + affinity_weight * affinity + cam_weight * cam)

    activation and affinity are means over layers of :func:`~acr_reg.losses.functional.activation_consistency` and
    :func:`~acr_reg.losses.functional.affinity_consistency`; cam is
    :func:`~acr_reg.losses.functional.cam_consistency`. Both views carry gradient unless one is
    detached. Uniform attention is a trivial minimum: watch the ``entropy`` term (1 is collapse).

    Args:
        view: what leads from the images of the first maps to those of the second; may be given per call instead.
        activation_weight, affinity_weight: default 0.17 per row, which is the paper's 100 at 576 tokens.
        cam_weight: default 0.1, used when class maps are passed; per pixel of maps in [0, 1].
        distance: "l1", "l2", "js" or a callable of two (..., M) rows that reduces the last axis.
        normalize: "row" is the distance per query row, independent of the number of tokens; "mean" the paper's mean
            over pairs.
        layers: indices of the layers to use (negative: from the last); None uses all. Layers without gradient (a frozen
            lower half) are left out of the mean, unless no layer has any; under ``torch.no_grad`` they cannot be told.
        heads: "mean" compares the average over heads, as published; "each" compares head by head.
        rows: the share in (0, 1] of patch query rows compared in each call, sampled anew; class rows are always
            compared.
        cam_normalize: "max" (relu, then over the maximum per image and class), "minmax" or None.
        blockwise: evaluates fused layers in blocks of query rows, without an N x N map (None, True), or the maps of a
            layer at once (False), which alone can be differentiated twice. Explicit maps are evaluated at once.
        block_rows: query rows of a block, of all images and heads; None chooses them from the shapes: maps of 4 MB,
            at least 64 rows.

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
        *,
        cam_weight: float | None = None,
        distance: Distance = "l1",
        normalize: Normalize = "row",
        layers: Iterable[int] | None = None,
        heads: Literal["mean", "each"] = "mean",
        rows: float = 1.0,
        cam_normalize: Literal["max", "minmax"] | None = "max",
        blockwise: bool | None = None,
        block_rows: int | None = None,
    ) -> None:
        super().__init__()
        if view is not None:
            require_view(view)
        check_choice("normalize", normalize, ("row", "mean"))
        check_choice("heads", heads, ("mean", "each"))
        check_choice("cam_normalize", cam_normalize, ("max", "minmax", None))
        if not callable(distance):
            check_choice("distance", distance, ("l1", "l2", "js"))
        if not 0 < rows <= 1:
            raise ValueError(f"found rows={rows}; expected a share in (0, 1]; 1.0 uses every query row")
        if block_rows is not None and block_rows < 1:
            raise ValueError(f"found block_rows={block_rows}; expected at least 1; None chooses it from the shapes")
        self.view = view
        self.weights = {
            "activation": DEFAULT_WEIGHT if activation_weight is None else float(activation_weight),
            "affinity": DEFAULT_WEIGHT if affinity_weight is None else float(affinity_weight),
            "cam": DEFAULT_CAM_WEIGHT if cam_weight is None else float(cam_weight),
        }
        given = {"activation": activation_weight, "affinity": affinity_weight, "cam": cam_weight}
        self._explicit_weights = {name for name, weight in given.items() if weight}
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
        self.blockwise, self.block_rows = blockwise, block_rows
        self._warned: set[str] = set()

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
            view: overrides the view given at construction.
            view_a: where both are augmented: the first maps were made on ``view_a(images)``, the second on
                ``view(images)``. They are compared on what both show of the images.
            labels: (B, C), > 0 for the classes present: leaves out the class-token rows and class maps of absent
                classes.
            valid: (B, H, W), False where the images, before either view, are padding, at any resolution. What a view
                itself adds or cuts off it leaves out without being told.
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
        relation, valid = self._relation(view, view_a, valid)
        pairs = self._pairs(attn_a, attn_b)
        check_placed(pairs)
        self._warn_unknown_offsets(pairs, relation)
        first = pairs[0][0]
        check_cams(cam_a, cam_b, first.shape[0], torch.is_grad_enabled() and self.weights["cam"] > 0)
        check_labels(labels, first.shape[0], None if cam_a is None else cam_a.shape[1])
        wanted = self._active_terms(first, cam_a)

        terms: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        if not return_terms:
            wanted = {name for name in wanted if self.weights[name]}
        with torch.autocast(first.device.type, enabled=False):
            if wanted & {"activation", "affinity"}:
                attention, terms = self._attention_terms(pairs, relation, labels, valid, wanted, return_terms)
                weighted.append(attention)
            if "cam" in wanted:
                assert cam_a is not None and cam_b is not None
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights["cam"] > 0):
                    cam = cam_consistency(
                        cam_a,
                        cam_b,
                        relation,
                        self.distance,
                        labels,
                        valid,
                        self.cam_normalize,
                        _lattices(attn_a, attn_b, cam_a, cam_b),
                    )
                weighted.append(self.weights["cam"] * cam)
                terms["cam"] = cam
        loss = scale * (torch.stack(weighted).sum() if weighted else torch.zeros((), device=first.device))
        if not torch.isfinite(loss):
            raise ValueError(not_finite(pairs, cam_a, cam_b))
        if not return_terms:
            return loss
        return loss, {name: term.detach().float() for name, term in terms.items()}

    def _relation(self, view: View | None, view_a: View | None, valid: Tensor | None) -> tuple[View, Tensor | None]:
        """The view that leads from the first maps' images to the second's, and where the first are no padding."""
        view = view if view is not None else self.view
        if view is None:
            raise ValueError(
                "found no view; expected the one applied to the second maps' images; "
                "AllPairsConsistencyLoss(HorizontalFlip()) or acr(..., view=HorizontalFlip())"
            )
        require_view(view)
        if view_a is None:
            return view, valid
        require_view(view_a)
        relation = Compose([view_a.inverse, view])
        if not relation.shows_anything:
            self._warn_once(
                "apart",
                f"found views that show nothing in common, {view_a.brief} and {view.brief}; expected a common region; "
                "what they compare is 0: draw larger crops",
            )
        if valid is not None:
            check_valid(valid, valid.shape[0])
            if (size := view_a.input_size) is not None:  # at any resolution, as without view_a
                valid = valid_tokens(valid, Lattice(*size)).unflatten(1, size)
            valid = view_a(valid.float()) >= 0.5
        return relation, valid

    def _warn_once(self, what: str, message: str) -> None:
        """Warns of each thing once."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, stacklevel=6)

    def _pairs(self, attn_a: AttentionMaps, attn_b: AttentionMaps) -> list[tuple[LayerAttention, LayerAttention]]:
        """The pairs of layers to compare: those chosen, less those in which neither view carries gradient."""
        check_same_modules(attn_a, attn_b)
        if self.layers is not None:
            attn_a, attn_b = attn_a.select(self.layers), attn_b.select(self.layers)
        pairs = list(zip(attn_a, attn_b, strict=True))
        if not torch.is_grad_enabled():
            return pairs
        learning = [(a, b) for a, b in pairs if a.requires_grad or b.requires_grad]
        if not any(self.weights[name] for name in ("activation", "affinity")):
            return learning or pairs  # reported alone, of the same layers as where they are trained
        if not learning:
            raise ValueError(
                f"found no gradient in the maps of either view (layers {attn_a.layers}); expected at least one view to "
                "carry it; run the model outside torch.no_grad with unfrozen query and key weights, or compute the "
                "value alone under torch.no_grad"
            )
        check_alive(learning)
        return learning

    def _warn_unknown_offsets(self, pairs: list[tuple[LayerAttention, LayerAttention]], view: View) -> None:
        layouts = [(a, side) for a, _ in pairs for side in ("query", "key") if not a.layout.lattice(side).offset_known]
        if layouts and view != Identity():
            first, side = layouts[0]
            self._warn_once(
                "offset",
                f"found a stem of overlapping windows, and nothing that tells where it puts the {side} tokens of layer "
                f"{first.index} ({first.name}) on the image; expected to know, or {view.brief} may match tokens that "
                "are apart; measure by acr_reg.check, and leave such layers out (layers=) or name their lattice by "
                "with_layout(grid=Lattice(..., offset=))",
            )

    def _active_terms(self, layer: LayerAttention, cam_a: Tensor | None) -> set[str]:
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
            if name in self._explicit_weights:
                raise ValueError(message)
            if name == "activation" and self.weights[name]:
                self._warn_once(name, f"{message} to say so; the term is left out")
        return {"activation", "affinity", "cam"} - set(missing)

    def _attention_terms(
        self,
        pairs: list[tuple[LayerAttention, LayerAttention]],
        view: View,
        labels: Tensor | None,
        valid: Tensor | None,
        wanted: set[str],
        with_entropy: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Means over layers: of the weighted sum of both attention terms, and of each and of the entropy, detached."""
        names: tuple[Term, ...] = ("activation", "affinity")
        weights = {name: self.weights[name] for name in names if name in wanted}
        learns = any(weights.values())
        evaluated = []
        for a, b in pairs:
            if self.distance == "js" and not (a.stochastic and b.stochastic):
                raise ValueError(
                    f"layer {a.index} ({a.name}): found a map that is mixed after softmax; expected probabilities for "
                    '"js"; choose distance="l1" or "l2"'
                )
            pair = AlignedPair(a, b, view, valid, with_entropy)
            layer = LayerTerms(
                pair,
                weights,
                sample_rows(len(a.layout.query), self.rows, str(a.device)),
                _present(a, labels) if "activation" in weights else None,
                self.distance,
                self.normalize,
                self.heads,
            )
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                blockwise = can_be_blockwise(pair) if self.blockwise is None else self.blockwise
                evaluated.append(evaluate_blockwise(layer, self.block_rows) if blockwise else evaluate_dense(layer))
        terms = {name: torch.stack([each.terms[name] for each in evaluated]).mean() for name in evaluated[0].terms}
        return torch.stack([each.weighted for each in evaluated]).mean(), terms


def _lattices(
    attn_a: AttentionMaps, attn_b: AttentionMaps, cam_a: Tensor, cam_b: Tensor
) -> tuple[Lattice, Lattice] | None:
    """Where class maps lie on the images: where the tokens of a grid of their size do, of the last layer with such."""
    for a, b in zip(reversed(attn_a), reversed(attn_b), strict=True):
        if a.placed is not None and b.placed is not None:
            grids = a.placed.query, b.placed.query
            sizes = [(grid.height, grid.width) for grid in grids]
            if sizes == [cam.shape[-2:] for cam in (cam_a, cam_b)]:
                return grids
    return None


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
