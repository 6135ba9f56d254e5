"""The consistency terms as pure functions.

After "All-pairs Consistency Learning for Weakly Supervised Semantic Segmentation" (Sun et al., ICCV 2023 workshop,
arXiv 2308.04321), and SEAM's equivariance of class maps (Wang et al., CVPR 2020, arXiv 2004.04581).

With attention maps A1, A2 of an image and of its view, and P the view's permutation of patch tokens:

    activation = | A1[class, patches] - A2[class, patches] P |            which patches the class token attends to
    affinity   = | A1[patches, patches] - P^T A2[patches, patches] P |    which patches attend to each other

Everything here is aligned by :func:`align_layer` first, and is differentiable to both views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from acr_reg.attention import LayerAttention, at_least_float32
from acr_reg.views import LatticeMap, View, lattice_map

Distance = Literal["l1", "l2", "js"] | Callable[[Tensor, Tensor], Tensor]
Normalize = Literal["row", "mean"]


def row_distance(a: Tensor, b: Tensor, distance: Distance = "l1") -> Tensor:
    """The distance of two non-negative rows (..., M) -> (...).

    "l1": sum |a - b|, in [0, 2] for probabilities. "l2": sum (a - b)^2. "js": the Jensen-Shannon divergence in nats,
    1/2 sum a ln(a/m) + b ln(b/m) with m = (a + b)/2, which stays non-negative for rows that do not sum to 1. A callable
    is given both and reduces the last axis.
    """
    if distance == "l1":
        return (a - b).abs().sum(-1)
    if distance == "l2":
        return (a - b).square().sum(-1)
    if distance == "js":
        middle = (a + b) / 2
        # The floor keeps 0 ln 0 = 0 and its gradient finite.
        tiny = torch.finfo(a.dtype).tiny
        log_middle = middle.clamp_min(tiny).log()
        pairs = a * (a.clamp_min(tiny).log() - log_middle) + b * (b.clamp_min(tiny).log() - log_middle)
        # Each pair's share is >= 0, except by rounding where a and b nearly agree.
        return 0.5 * pairs.clamp_min(0).sum(-1)
    if not callable(distance):
        raise ValueError(f'found distance={distance!r}; expected "l1", "l2", "js" or a callable; choose one of these')
    result = distance(a, b)
    if result.shape != a.shape[:-1]:
        raise ValueError(
            f"found a distance of shape {tuple(result.shape)} for rows of shape {tuple(a.shape)}; expected "
            f"{tuple(a.shape[:-1])}; reduce the last axis only"
        )
    return result


@dataclass(frozen=True, eq=False)
class AlignedLayer:
    """One layer of both views on the first view's tokens, each (B, H, rows, keys) over patch keys only.

    ``activation_*`` holds the class tokens' rows (none: 0 rows), ``affinity_*`` the patch rows (all, or those sampled).
    ``keys_valid`` (B or 1, keys) and ``rows_valid`` (B or 1, rows) are True where both views show the token.
    ``entropy`` is the mean entropy of the rows over ln M, in [0, 1], detached; NaN for maps that are no probabilities.
    """

    activation_a: Tensor
    activation_b: Tensor
    affinity_a: Tensor
    affinity_b: Tensor
    keys_valid: Tensor
    rows_valid: Tensor
    entropy: Tensor


def align_layer(
    a: LayerAttention,
    b: LayerAttention,
    view: View,
    valid: Tensor | None = None,
    rows: float = 1.0,
) -> AlignedLayer:
    """Carries layer ``b``, computed on ``view(images)``, onto the tokens of layer ``a``, computed on ``images``.

    Where the lattices fall on each other (flips, quarter turns), tokens of query and key are permuted before any
    product; elsewhere both axes are resampled by the same weights and each row keeps the mass it gave to patches.
    ``valid`` (B, H, W) is False where the images are padding. ``rows`` in (0, 1] samples that share of the patch rows
    (torch's global generator).
    """
    _check_pair(a, b, view)
    inverse = view.inverse
    device = str(a.device)
    queries = lattice_map(inverse, b.layout.query, a.layout.query, device)
    keys = lattice_map(inverse, b.layout.key, a.layout.key, device)
    prefix_a, prefix_b = a.layout.num_prefix_tokens, b.layout.num_prefix_tokens
    classes_a, classes_b = a.layout.class_tokens or (), b.layout.class_tokens or ()

    sampled = _sample_rows(len(a.layout.query), rows, device)
    rows_a = _rows(classes_a, prefix_a + sampled)
    map_a = a.weights(queries=rows_a)
    if queries.is_exact and keys.is_exact:
        rows_b = _rows(classes_b, prefix_b + queries.index()[sampled])
        keys_b = torch.cat([torch.arange(prefix_b, device=device), prefix_b + keys.index()])
        if keys.is_permutation:
            map_b = b.weights(queries=rows_b, keys=keys_b)
        else:  # the softmax still needs the keys that this view's frame leaves out
            map_b = b.weights(queries=rows_b).index_select(-1, keys_b)
        patches_b = map_b[..., prefix_b:]
    else:
        map_b = b.weights()
        patches_b = _resample(map_b[..., prefix_b:], keys, b.stochastic)
        patches_b = torch.cat(
            [patches_b[:, :, list(classes_b)], queries.tokens(patches_b[:, :, prefix_b:], dim=-2)[:, :, sampled]],
            dim=-2,
        )
    patches_a = map_a[..., prefix_a:]
    count = len(classes_a)

    keys_valid, rows_valid = keys.valid[None], queries.valid[None]
    if valid is not None:
        _check_valid(valid, a.shape[0])
        keys_valid = keys_valid & valid_tokens(valid, a.layout.key.height, a.layout.key.width)
        rows_valid = rows_valid & valid_tokens(valid, a.layout.query.height, a.layout.query.width)
    return AlignedLayer(
        patches_a[:, :, :count],
        patches_b[:, :, :count],
        patches_a[:, :, count:],
        patches_b[:, :, count:],
        keys_valid,
        rows_valid[:, sampled],
        (entropy(map_a) + entropy(map_b)) / 2
        if a.stochastic and b.stochastic
        else torch.full((), math.nan, device=device),
    )


def _check_pair(a: LayerAttention, b: LayerAttention, view: View) -> None:
    name = f"layer {a.index} ({a.name})"
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"{name}: found {a.shape[0]} images with {a.shape[1]} heads in one view and {b.shape[0]} with {b.shape[1]} "
            "in the other; expected the same; take both views' maps from the same model and images"
        )
    for kind, grid_a, grid_b in (("query", a.layout.query, b.layout.query), ("key", a.layout.key, b.layout.key)):
        expected = view.output_size((grid_a.height, grid_a.width))
        rounding = 0 if view.zoom == (1.0, 1.0) else 1  # a scaled image need not hold a whole number of patches
        if abs(grid_b.height - expected[0]) > rounding or abs(grid_b.width - expected[1]) > rounding:
            raise ValueError(
                f"{name}: found {kind} grids of {grid_a} and {grid_b}; expected {expected[0]} x {expected[1]} for the "
                f"second under {view!r}; pass the view that was applied to the second view's images"
            )
    if len(a.layout.class_tokens or ()) != len(b.layout.class_tokens or ()):
        raise ValueError(
            f"{name}: found class tokens {a.layout.class_tokens} and {b.layout.class_tokens}; expected as many in both "
            "views; capture both with the same class_tokens="
        )


def _sample_rows(count: int, share: float, device: str) -> Tensor:
    if not 0 < share <= 1:
        raise ValueError(f"found rows={share}; expected a share in (0, 1]; 1.0 uses every query row")
    if share == 1:
        return torch.arange(count, device=device)
    return torch.randperm(count)[: max(1, round(share * count))].sort().values.to(device)


def _rows(class_tokens: tuple[int, ...], patches: Tensor) -> Tensor:
    return torch.cat([torch.tensor(class_tokens, dtype=torch.long, device=patches.device), patches])


def _resample(patches: Tensor, keys: LatticeMap, stochastic: bool) -> Tensor:
    """Resamples where rows look, and gives each row back the mass it had."""
    moved = keys.tokens(patches)
    if not stochastic:  # mixed rows hold values of either sign, whose sum says nothing: keep their mass per area
        return moved * (len(keys.source) / len(keys.target))
    mass = patches.sum(-1, keepdim=True)
    return moved * (mass / moved.sum(-1, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny))


def valid_tokens(valid: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W), True on image and False on padding -> (B, height * width), True where at least half a token is
    image."""
    share = torch.nn.functional.adaptive_avg_pool2d(valid[:, None].float(), (height, width))
    return share[:, 0].flatten(1) >= 0.5


def _check_valid(valid: Tensor, batch: int) -> None:
    if not isinstance(valid, Tensor):
        raise TypeError(
            f"found valid of type {type(valid).__name__}; expected a tensor (B, H, W); pass one mask per image"
        )
    if valid.ndim != 3 or valid.shape[0] != batch:
        raise ValueError(
            f"found valid of shape {tuple(valid.shape)}; expected ({batch}, H, W); pass one mask per image"
        )


def entropy(rows: Tensor) -> Tensor:
    """Mean entropy of probability rows (..., M) over its maximum ln M: 0 is one key only, 1 is collapse to uniform.
    Detached."""
    rows = rows.detach()
    return torch.special.entr(rows).sum(-1).mean() / math.log(rows.shape[-1])


def _consistency(
    a: Tensor, b: Tensor, distance: Distance, normalize: Normalize, keys_valid: Tensor | None, row_weight: Tensor | None
) -> Tensor:
    """Mean over images, heads and rows of the distance of rows (B, H, R, M), weighted by ``row_weight`` (B or 1, R)."""
    keys: Tensor | int = a.shape[-1]
    if keys_valid is not None:
        a, b = (rows.masked_fill(~keys_valid[:, None, None, :], 0) for rows in (a, b))
        keys = keys_valid.sum(-1).clamp_min(1)[:, None, None]
    distances = row_distance(a, b, distance)
    if normalize == "mean":
        distances = distances / keys
    elif normalize != "row":
        raise ValueError(
            f'found normalize={normalize!r}; expected "row" (per query row) or "mean" (the paper\'s); choose one'
        )
    if row_weight is None:
        return distances.mean()
    weight = row_weight.to(distances.dtype)[:, None].expand(distances.shape)
    return (distances * weight).sum() / weight.sum().clamp_min(1)


def activation_consistency(
    a: Tensor,
    b: Tensor,
    distance: Distance = "l1",
    normalize: Normalize = "row",
    keys_valid: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Region activation consistency (L_act of arXiv 2308.04321): a scalar >= 0, differentiable.

    ``a``, ``b``: class-token rows over aligned patches, (B, H, C, M), C class tokens. ``keys_valid`` (B or 1, M) and
    ``present`` (B, C) leave out padding and absent classes. With ``normalize="mean"`` this is 1/(B C M) sum |a - b|,
    the published form; "row" is M times that: the distance per query row, which means the same at every token count.

    >>> import torch
    >>> a, b = torch.tensor([[[[0.5, 0.25]]]]), torch.tensor([[[[0.25, 0.5]]]])
    >>> activation_consistency(a, b).item(), activation_consistency(a, b, normalize="mean").item()
    (0.5, 0.25)
    """
    return _consistency(a, b, distance, normalize, keys_valid, present)


def affinity_consistency(
    a: Tensor,
    b: Tensor,
    distance: Distance = "l1",
    normalize: Normalize = "row",
    keys_valid: Tensor | None = None,
    rows_valid: Tensor | None = None,
) -> Tensor:
    """Region affinity consistency (L_aff of arXiv 2308.04321): a scalar >= 0, differentiable.

    ``a``, ``b``: patch rows over aligned patches, (B, H, N, M). ``rows_valid`` (B or 1, N) and ``keys_valid`` (B or 1,
    M) leave out tokens that one view does not show. With ``normalize="mean"`` this is 1/(B N M) sum |a - b|, the
    published form; "row" is M times that.
    """
    return _consistency(a, b, distance, normalize, keys_valid, rows_valid)


def normalize_cam(cam: Tensor, mode: Literal["max", "minmax"] = "max") -> Tensor:
    """Class maps (B, C, h, w) in [0, 1], per image and class: relu(cam) over its maximum, or min-max. An empty map
    stays 0."""
    cam = at_least_float32(cam)
    if mode == "minmax":
        cam = cam - cam.amin((-2, -1), keepdim=True)
    elif mode != "max":
        raise ValueError(f'found mode={mode!r}; expected "max" or "minmax"; choose one')
    cam = cam.relu()
    return cam / cam.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)


def cam_consistency(
    cam_a: Tensor,
    cam_b: Tensor,
    view: View,
    distance: Distance = "l1",
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    normalize: Literal["max", "minmax"] | None = "max",
) -> Tensor:
    """Equivariance of class maps (SEAM's L_ER, eq. 4 of arXiv 2004.04581): a scalar >= 0, differentiable.

    ``cam_a`` (B, C, h, w) of images, ``cam_b`` (B, C, h', w') of ``view(images)``; the mean distance per pixel over
    classes with ``labels`` (B, C) > 0 and pixels where ``valid`` (B, H, W). Each map is normalised by itself before it
    is aligned.
    """
    if cam_a.ndim != 4 or cam_b.ndim != 4 or cam_a.shape[:2] != cam_b.shape[:2]:
        raise ValueError(
            f"found class maps of shapes {tuple(cam_a.shape)} and {tuple(cam_b.shape)}; expected (B, C, h, w) with the "
            "same B and C; pass the maps of the same images and classes"
        )
    expected = view.output_size(cam_a.shape[-2:])
    if any(abs(found - size) > 1 for found, size in zip(cam_b.shape[-2:], expected, strict=True)):
        raise ValueError(
            f"found cam_a of {tuple(cam_a.shape[-2:])} and cam_b of {tuple(cam_b.shape[-2:])}; expected cam_b of about "
            f"{expected} under {view!r}; pass the view that was applied to the images of cam_b"
        )
    cam_a, cam_b = at_least_float32(cam_a), at_least_float32(cam_b)
    if normalize is not None:
        cam_a, cam_b = normalize_cam(cam_a, normalize), normalize_cam(cam_b, normalize)
    cam_b = view.align(cam_b, cam_a.shape[-2:])
    keys_valid = None
    if valid is not None:
        _check_valid(valid, cam_a.shape[0])
        keys_valid = valid_tokens(valid, *cam_a.shape[-2:])
    present = None if labels is None else labels > 0
    # Classes are the rows and pixels the keys of the other terms; per pixel, since maps are no distributions.
    rows_a, rows_b = cam_a.flatten(2)[:, None], cam_b.flatten(2)[:, None]
    return _consistency(rows_a, rows_b, distance, "mean", keys_valid, present)
