"""The mathematics of the loss, as pure functions: the distance of two rows, its mean over rows, and the CAM term.

Formulas change here and nowhere else. They follow "All-pairs Consistency Learning for Weakly Supervised Semantic
Segmentation" (Sun et al., ICCV 2023 workshop, arXiv 2308.04321), and SEAM's equivariance of class maps (Wang et al.,
CVPR 2020, arXiv 2004.04581).

With attention maps A1, A2 of an image and of its view, and P the view's permutation of patch tokens:

    activation = | A1[class, patches] - A2[class, patches] P |            which patches the class token attends to
    affinity   = | A1[patches, patches] - P^T A2[patches, patches] P |    which patches attend to each other

Both are :func:`row_consistency`, of class-token rows and of patch rows that
:class:`~acr_reg.alignment.pairs.AlignedPair` has aligned. Everything is differentiable in both views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from acr_reg._tensors import at_least_float32
from acr_reg.alignment.token_maps import check_valid, valid_tokens
from acr_reg.cam.refinement import normalize_cam
from acr_reg.tokens import Lattice
from acr_reg.views.view import View, map_between

Distance = Literal["l1", "l2", "js"] | Callable[[Tensor, Tensor], Tensor]

Normalize = Literal["row", "mean"]

# If both views show less than this share of rows and mass, a term fades out instead of growing noisier.
OVERLAP_FLOOR = 0.25


def row_distance(a: Tensor, b: Tensor, distance: Distance = "l1") -> Tensor:
    """Computes the distance of non-negative rows ``a`` and ``b``: (..., M) to (...).

    "l1" is ``sum |a - b|``, in [0, 2] for probabilities. "l2" is the squared distance, ``sum (a - b)^2``. "js" is the
    Jensen-Shannon divergence in nats, ``1/2 sum a ln(a/m) + b ln(b/m)`` with m = (a + b)/2; it stays non-negative for
    rows that do not sum to 1. A callable takes both rows and reduces the last axis.
    """
    if distance == "l1":
        return (a - b).abs().sum(-1)
    if distance == "l2":
        return (a - b).square().sum(-1)
    if distance == "js":
        # ln(a/m) = -log1p((b - a) / 2a) keeps its digits where rows nearly agree, as in training, and a difference of
        # two logarithms loses them. The floor gives 0 ln 0 = 0, and second derivatives below overflow.
        floor = torch.finfo(a.dtype).tiny ** (1 / 3)
        a, b = a.clamp_min(floor), b.clamp_min(floor)
        half = (b - a) / 2
        # Each row is >= 0, except for rounding if a and b agree in all digits.
        return (a * (half / a).log1p() + b * (-half / b).log1p()).sum(-1).mul(-0.5).clamp_min(0)
    if not callable(distance):
        raise ValueError(f'distance={distance!r} is unknown. Choose "l1", "l2", "js" or a callable.')
    result = distance(a, b)
    if result.shape != a.shape[:-1]:
        raise ValueError(
            f"The distance has shape {tuple(result.shape)} for rows of shape {tuple(a.shape)}, not "
            f"{tuple(a.shape[:-1])}. Reduce the last axis only."
        )
    return result


@dataclass(frozen=True, eq=False)
class RowSum:
    """Sums over rows: ``total`` sums distances times weights, ``weight`` sums the weights, ``count`` counts the rows
    compared. The sums of several blocks add up."""

    total: Tensor
    weight: Tensor
    count: Tensor

    def __add__(self, other: RowSum) -> RowSum:
        return RowSum(self.total + other.total, self.weight + other.weight, self.count + other.count)

    def norm(self) -> Tensor:
        """The divisor of ``total``: the weight of the rows, but at least OVERLAP_FLOOR of their count, so that images
        with little overlap count little."""
        tiny = torch.finfo(self.count.dtype).tiny
        return self.weight.maximum(OVERLAP_FLOOR * self.count).clamp_min(tiny)

    def mean(self) -> Tensor:
        return self.total / self.norm()


def row_distances(
    a: Tensor,
    b: Tensor,
    distance: Distance = "l1",
    normalize: Normalize = "row",
    keys_valid: Tensor | None = None,
) -> Tensor:
    """:func:`row_distance` over valid keys, (B, H, R), or its mean over these keys."""
    keys: Tensor | int = a.shape[-1]
    if keys_valid is not None:
        hidden = ~keys_valid[:, None, None, :]
        a, b = a.masked_fill(hidden, 0), b.masked_fill(hidden, 0)
        keys = keys_valid.sum(-1).clamp_min(1)[:, None, None]
    distances = row_distance(a, b, distance)
    if normalize == "mean":
        return distances / keys
    if normalize != "row":
        raise ValueError(f'normalize={normalize!r} is unknown. Choose "row" (per row) or "mean" (the paper\'s).')
    return distances


def sum_rows(distances: Tensor, rows_valid: Tensor | None = None, overlap: Tensor | None = None) -> RowSum:
    """:func:`row_consistency` of these distances before it is divided, so that blocks of rows can be added."""
    if rows_valid is None and overlap is None:
        rows = distances.new_full((), distances.numel())
        return RowSum(distances.sum(), rows, rows)
    weight = torch.ones_like(distances)
    if rows_valid is not None:
        weight = weight * rows_valid.to(distances.dtype)[:, None]
    rows = weight.sum()
    if overlap is not None:
        weight = weight * overlap.to(distances.dtype)
    return RowSum((distances * weight).sum(), weight.sum(), rows)


def row_consistency(
    a: Tensor,
    b: Tensor,
    distance: Distance = "l1",
    normalize: Normalize = "row",
    keys_valid: Tensor | None = None,
    rows_valid: Tensor | None = None,
    overlap: Tensor | None = None,
) -> Tensor:
    """Computes the mean distance of aligned rows ``a`` and ``b`` (B, H, R, M), a differentiable scalar >= 0.

    With ``normalize="mean"`` these are both terms of arXiv 2308.04321, for H = 1 (the mean over heads) and M patches::

        L_act = 1/(B C M) sum |a - b|    of the rows of C class tokens, region activation consistency
        L_aff = 1/(B N M) sum |a - b|    of the rows of N patches, region affinity consistency

    "row" gives M times as much: the distance per row, which does not depend on the number of tokens. ``keys_valid``
    (B or 1, M) and ``rows_valid`` (B or 1, R) leave out padding and, in L_act, absent classes. ``overlap`` (B, H, R) in
    [0, 1] weights rows by overlap; :meth:`~acr_reg.alignment.pairs.AlignedRows.comparable` computes it.

    >>> import torch
    >>> a, b = torch.tensor([[[[0.5, 0.25]]]]), torch.tensor([[[[0.25, 0.5]]]])
    >>> row_consistency(a, b).item(), row_consistency(a, b, normalize="mean").item()
    (0.5, 0.25)
    """
    return sum_rows(row_distances(a, b, distance, normalize, keys_valid), rows_valid, overlap).mean()


def cam_consistency(
    cam_a: Tensor,
    cam_b: Tensor,
    view: View,
    distance: Distance = "l1",
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    normalize: Literal["max", "minmax"] | None = "max",
    lattices: tuple[Lattice, Lattice] | None = None,
) -> Tensor:
    """Measures how far class maps follow the view (SEAM's L_ER, eq. 4 of arXiv 2004.04581): a scalar >= 0.

    ``cam_a`` (B, C, h, w) belongs to images and ``cam_b`` (B, C, h', w') to ``view(images)``. The result is the mean
    distance per pixel, over classes with ``labels`` (B, C) > 0 and over pixels that both views show and that are True
    in ``valid`` (B, H, W). Each map is normalised by itself, over those pixels, before it is aligned. ``lattices`` say
    where the pixels of both maps lie on their images; by default they divide the images evenly.
    """
    if cam_a.ndim != 4 or cam_b.ndim != 4 or cam_a.shape[:2] != cam_b.shape[:2]:
        raise ValueError(
            f"The class maps have shapes {tuple(cam_a.shape)} and {tuple(cam_b.shape)}. Pass maps (B, C, h, w) of the "
            "same B images and C classes."
        )
    view.check_batch(cam_a.shape[0])
    expected = view.output_size(cam_a.shape[-2:])
    if any(abs(found - size) > 1 for found, size in zip(cam_b.shape[-2:], expected, strict=True)):
        raise ValueError(
            f"cam_b is {tuple(cam_b.shape[-2:])}, but {view.brief} of cam_a, {tuple(cam_a.shape[-2:])}, is {expected}. "
            "Pass the view that was applied to the images of cam_b."
        )
    cam_a, cam_b = at_least_float32(cam_a), at_least_float32(cam_b).to(cam_a.device)
    grid_a, grid_b = lattices or (Lattice(*cam_a.shape[-2:]), Lattice(*cam_b.shape[-2:]))
    device = str(cam_a.device)
    there, back = map_between(view, grid_a, grid_b, device), map_between(view.inverse, grid_b, grid_a, device)
    keys_valid = overlap = shown_a = shown_b = None
    if valid is not None or not (there.is_complete and back.is_complete):
        keys_valid, shown = back.valid, there.valid
        if valid is not None:
            check_valid(valid, cam_a.shape[0])
            image = valid_tokens(valid, grid_a).to(device)
            keys_valid, shown = keys_valid & image, shown & (there.tokens(image.to(cam_a)) >= 0.5)
        shown_a, shown_b = keys_valid.unflatten(-1, cam_a.shape[-2:]), shown.unflatten(-1, cam_b.shape[-2:])
        of_image = keys_valid.shape[-1] if valid is None else image.sum(-1, keepdim=True).clamp_min(1)
        overlap = (keys_valid.sum(-1, keepdim=True) / of_image)[:, None].expand(cam_a.shape[0], 1, cam_a.shape[1])
    if normalize is not None:
        cam_a, cam_b = normalize_cam(cam_a, normalize, shown_a), normalize_cam(cam_b, normalize, shown_b)
    if valid is not None and not back.is_exact:  # padding beside the image is not mixed into it
        assert shown_b is not None
        image = shown_b[:, None].to(cam_b).expand(cam_b.shape[0], 1, -1, -1)
        cam_b = back(cam_b * image) / back(image).clamp_min(torch.finfo(cam_b.dtype).tiny)
    else:
        cam_b = back(cam_b)
    present = None if labels is None else labels.to(device) > 0
    # Classes play the rows and pixels the keys of the other terms. Per pixel, because maps are not distributions.
    rows_a, rows_b = cam_a.flatten(2)[:, None], cam_b.flatten(2)[:, None]
    return row_consistency(rows_a, rows_b, distance, "mean", keys_valid, present, overlap)
