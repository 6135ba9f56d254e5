"""The all-pairs consistency loss (Sun et al., arXiv 2308.04321) as a Module over :mod:`acr_reg.losses.functional`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from acr_reg.alignment.pairs import AlignedPair, plan_of
from acr_reg.alignment.plan import Plan
from acr_reg.attention.maps import AttentionMaps
from acr_reg.errors import listed
from acr_reg.losses.blockwise import are_small, can_be_blockwise, evaluate_blockwise, size_of_block
from acr_reg.losses.functional import Distance, Normalize, cam_consistency
from acr_reg.losses.inputs import LossInputs, check_choice, check_finite, check_inputs
from acr_reg.losses.terms import LayerTerms, Term, evaluate_dense, sample_rows
from acr_reg.views.view import View, require_view

# The paper's weight of 100 on a mean over 576 tokens is 100 / 576 of the distance per row.
DEFAULT_WEIGHT = 0.17
# The paper has no such term. A weight of 1, alone, cost gradient CAMs 0.1 of mIoU on dev photos: docs/explanation.
DEFAULT_CAM_WEIGHT = 0.1


class AllPairsConsistencyLoss(nn.Module):
    """Keeps attention, and class maps if given, consistent between images and a view of them.

        loss = scale * (activation_weight * activation + affinity_weight * affinity + cam_weight * cam)

    activation and affinity are :func:`~acr_reg.losses.functional.row_consistency` of class-token rows and of patch
    rows, averaged over layers; cam is :func:`~acr_reg.losses.functional.cam_consistency`. Both views carry gradient
    unless you detach one. Uniform attention is a trivial minimum: watch the ``entropy`` term, 1 means collapse.

    Maps that a model changed after softmax need not sum to 1. Both maps of such a layer are divided by one constant for
    each image::

        s = max(1, mean over both views, heads and rows of sum_j |A_ij|)

    A map summed over H heads thus counts like one map. A gate in [0, 1] lowers the loss of its layer, as it lowers the
    layer's share of the output.

    Args:
        view: the view that was applied to the images of the second maps; may be given per call instead.
        activation_weight, affinity_weight: 0.17 per row by default, which is the paper's 100 at 576 tokens.
        cam_weight: 0.1 by default, used when class maps are passed; per pixel of maps in [0, 1].
        distance: "l1", "l2", "js", or a callable that reduces the last axis of two tensors of rows (..., M).
        normalize: "row" uses the distance per query row, which does not depend on the number of tokens; "mean" uses the
            paper's mean over pairs.
        layers: indices of the layers to use (negative counts from the last); None uses all. Frozen layers are skipped
            unless all are frozen (under ``torch.no_grad`` they cannot be told apart).
        blur_alike: where a view resamples the second maps, which blurs them, the first are blurred as much. False
            compares sharp maps with blurred ones.
        heads: "mean" compares the average over heads, as published; "each" compares head by head.
        rows: the share in (0, 1] of patch query rows to compare, sampled anew in each call. Class rows are always
            compared.
        cam_normalize: as you score class maps: "max" (relu over the maximum per image and class), "minmax", or None.
        blockwise: True never forms an N x N map of fused layers. False forms the maps of all layers and keeps them for
            the backward pass, which second derivatives need. None forms them if all, of both views, take at most 128
            MB; it is faster where maps are small, and holds twice that where a view resamples. Explicit maps are
            compared at once.
        block_rows: query rows per block, of all images and heads; fewer save memory, more save time. None: 16 MB of
            maps per block, 64 MB on a GPU, of whole images or of at least 64 rows of one, or 4 rows of the grid where a
            view resamples. Blocks are whole rows of the grid.

    A term without inputs (no class token, no class maps) raises if you set its weight; otherwise it is skipped, with
    one warning for the class token.

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
        blur_alike: bool = True,
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
            raise ValueError(f"rows={rows} is not a share in (0, 1]. Use 1.0 to compare every query row.")
        if block_rows is not None and block_rows < 1:
            raise ValueError(f"block_rows={block_rows} is not at least 1. Use None to choose it from the shapes.")
        self.view = view
        given = {"activation": activation_weight, "affinity": affinity_weight, "cam": cam_weight}
        default = {"activation": DEFAULT_WEIGHT, "affinity": DEFAULT_WEIGHT, "cam": DEFAULT_CAM_WEIGHT}
        self.weights = {name: default[name] if weight is None else float(weight) for name, weight in given.items()}
        self._explicit_weights = {name for name, weight in given.items() if weight}
        if any(not 0 <= weight < float("inf") for weight in self.weights.values()):
            raise ValueError(f"The weights {self.weights} are not all finite and >= 0. Use 0 to leave a term out.")
        self.distance: Distance = distance
        self.normalize: Normalize = normalize
        self.layers = None if layers is None else listed("layers", layers)
        self.blur_alike = blur_alike
        self.heads = heads
        self.rows = rows
        self.cam_normalize = cam_normalize
        self.blockwise, self.block_rows = blockwise, block_rows
        self._warned: set[str] = set()

    @classmethod
    def paper(cls, view: View | None = None, weight: float = 100.0) -> AllPairsConsistencyLoss:
        """The published setting: L1, mean over pairs, all layers, head mean, ``weight`` on both terms (100; VOC: 125).

        The weight was tuned for 576 tokens (384 px, patch 16); for the same pull per row at N tokens, use
        ``weight * N / 576``.
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
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        """The loss, a scalar >= 0 in float32 (float64 for float64 maps); with ``return_terms`` also its terms.

        Args:
            attn_a, attn_b: the maps of the images and of ``view(images)``, from the same model. Each layer is compared
                on its device in ``attn_a``; the loss lies on that of the first.
            cam_a, cam_b: class maps (B, C, h, w) of both, differentiable; None leaves the cam term out.
            view: overrides the view given at construction.
            view_a: pass it if both views are augmented: the first maps belong to ``view_a(images)``, the second to
                ``view(images)``. They are compared on what both show of the images.
            labels: (B, C), > 0 for the classes present; leaves out class-token rows and class maps of absent classes.
            valid: (B, H, W), False where the images, before either view, are padding, at any resolution. What a view
                itself adds or cuts off is left out in any case.
            scale: your schedule, e.g. a warm-up; multiplies the loss, not the terms.

        The terms (activation, affinity, cam if used, all unweighted; entropy) are detached. The entropy is the mean
        over layers whose rows are probabilities; without such a layer the term is absent. Raises ValueError if shapes,
        layers or grids disagree, if no map carries gradient although gradients are enabled, or if a map holds NaN.
        """
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale} is not a finite number. Look at the schedule that computed it.")
        given = check_inputs(
            attention=(attn_a, attn_b),
            cams=(cam_a, cam_b),
            views=(view_a, self.view if view is None else view),
            labels=labels,
            valid=valid,
            layers=self.layers,
            weights=self.weights,
            required=self._explicit_weights,
            distance=self.distance,
            report=return_terms,
        )
        for subject, message in given.warnings.items():
            if subject not in self._warned:
                self._warned.add(subject)
                warnings.warn(message, stacklevel=4)

        device = given.pairs[0][0].device
        loss, terms = torch.zeros((), device=device), dict[str, Tensor]()
        with torch.autocast(device.type, enabled=False):
            if given.terms - {"cam"}:
                attention, terms = self._attention_terms(given, return_terms)
                loss = loss + attention
            if "cam" in given.terms:
                terms["cam"] = self._cam_term(given).to(device)
                loss = loss + self.weights["cam"] * terms["cam"]
        loss = scale * loss
        check_finite(loss, given)
        return (loss, {name: term.detach().float() for name, term in terms.items()}) if return_terms else loss

    def _attention_terms(self, given: LossInputs, with_entropy: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Means over layers: activation_weight * activation + affinity_weight * affinity, then each term and entropy
        over the layers that have it, detached. Weights apply within a layer, because its terms share one gradient of
        query and key."""
        names: tuple[Term, ...] = ("activation", "affinity")
        weights = {name: self.weights[name] for name in names if name in given.terms}
        weighted, reports, plans, device = [], [], dict[Hashable, Plan](), given.pairs[0][0].device
        small = are_small(given.pairs, self.rows)
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(weights.values())):
            for a, b in given.pairs:
                blockwise = self.blockwise
                if blockwise is None:
                    blockwise = not small and can_be_blockwise(a, b)
                images, rows = size_of_block(a, b, self.rows, self.block_rows) if blockwise else (0, None)
                plan = plan_of(a, b, given.view, given.valid, blur_alike=self.blur_alike, rows=rows, known=plans)
                blocks, share = sample_rows(plan, self.rows)
                layer = LayerTerms(
                    AlignedPair(a, b, plan, with_entropy),
                    weights,
                    blocks,
                    given.labels,
                    self.distance,
                    self.normalize,
                    self.heads,
                    share,
                )
                value, report = evaluate_blockwise(layer, images) if blockwise else evaluate_dense(layer)
                weighted.append(value.to(device))  # layers may lie on several devices
                reports.append({name: term.to(device) for name, term in report.items()})
        reported = dict.fromkeys(name for report in reports for name in report)
        terms = {name: torch.stack([r[name] for r in reports if name in r]).mean() for name in reported}
        return torch.stack(weighted).mean(), terms

    def _cam_term(self, given: LossInputs) -> Tensor:
        assert given.cams is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights["cam"] > 0):
            return cam_consistency(
                *given.cams, given.view, self.distance, given.labels, given.valid, self.cam_normalize, given.lattices
            )
