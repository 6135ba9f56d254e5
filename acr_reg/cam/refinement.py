"""Refines class maps: normalises them, propagates them over the affinity, and merges them over views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from acr_reg._tensors import at_least_float32, require_tensor, select
from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.capture.evaluation import running_view
from acr_reg.errors import LayoutError, listed
from acr_reg.tokens import Lattice, patch_index, token_order
from acr_reg.views.constructors import Compose, Scale
from acr_reg.views.view import View, map_between, require_view


def attend_patches(layer: LayerAttention, values: Tensor) -> Tensor:
    """mean_h A[patches, patches] @ ``values``: (B, N, C) -> (B, N, C)."""
    patches = patch_index(layer.layout, "query", str(values.device))  # and of the keys, which lie on the same grid
    if (explicit := layer.explicit) is not None:
        # Head by head: a float32 copy of all heads would be twice as large as the half precision map.
        heads = (head[:, patches][:, :, patches] for head in explicit.unbind(1))
        return torch.stack([at_least_float32(head).to(values.dtype) @ values for head in heads]).mean(0)
    query, key = layer.query, layer.key
    assert query is not None and key is not None
    query, key = at_least_float32(query)[:, :, patches], at_least_float32(key)
    mask = layer.batched_mask()
    if mask is not None:
        mask = mask.expand(-1, -1, layer.shape[2], -1)[:, :, patches]
        mask = mask if mask.dtype == torch.bool else mask.to(query)
    # Kernels are fast if values are as wide as the heads; other widths fall back to a kernel that forms the map. Tokens
    # that are no patches carry 0.
    width = query.shape[-1]
    order = token_order(layer.layout, "key", str(values.device))
    places = None if order is None else order.argsort()
    attended = []
    for chunk in values.to(query.dtype).split(width, -1):
        padded = F.pad(chunk, (0, width - chunk.shape[-1], layer.layout.num_other_tokens, 0))
        padded = select(padded, 1, places)[:, None].expand(-1, query.shape[1], -1, -1)
        result = F.scaled_dot_product_attention(query, key, padded, mask, scale=layer.recorded.scale)
        attended.append(result.mean(1)[..., : chunk.shape[-1]])
    return torch.cat(attended, -1)


def layers_on_one_grid(attention: AttentionMaps, layers: Iterable[int] | None, what: str) -> AttentionMaps:
    """The chosen layers (None: all), whose maps of the patches can be multiplied and added: queries and keys of all lie
    on one grid. Raises :class:`~acr_reg.LayoutError` else; ``what`` is the verb of its advice."""
    chosen = attention if layers is None else attention.select(layers)
    grid = chosen[-1].layout.key
    other = [layer.index for layer in chosen if layer.layout.query != grid or layer.layout.key != grid]
    if other:
        fitting = [layer.index for layer in chosen if layer.index not in other]
        raise LayoutError(
            f"Queries or keys of layers {other} are not on the {grid} grid of layer {chosen[-1].index}. {what} over "
            f"layers {fitting or 'of one stage without reduced keys'}."
        )
    return chosen


def propagate_cam(cam: Tensor, attention: AttentionMaps, layers: Iterable[int] | None = None, steps: int = 1) -> Tensor:
    """Propagates class maps (B, C, h, w) over the affinity of the patches, ``steps`` times (ACR, arXiv 2308.04321):

        M' = ( sum_l mean_h A_l[patches, patches] ) M

    ``layers`` chooses the layers in the sum (negative: from the last); None takes all, as published. The result is
    differentiable in both. A fused layer runs its kernel with the map in place of the values and forms no N x N map.
    """
    propagated = propagated_maps(cam, attention, layers, steps)
    check_finite(propagated, "The propagated maps")
    return propagated


def propagated_maps(cam: Tensor, attention: AttentionMaps, layers: Iterable[int] | None, steps: int) -> Tensor:
    """What :func:`propagate_cam` returns, which may not be finite. Reads no tensor."""
    require_tensor(cam, "cam", "(B, C, h, w)")
    chosen = layers_on_one_grid(attention, layers, "Propagate")
    grid = chosen[-1].layout.key
    if cam.ndim != 4 or cam.shape[0] != attention.batch_size or tuple(cam.shape[-2:]) != (grid.height, grid.width):
        raise ValueError(
            f"The class maps have shape {tuple(cam.shape)} and the layers need ({attention.batch_size}, C, "
            f"{grid.height}, {grid.width}). Propagate on the layers' own grid, before resizing."
        )
    if steps < 1:
        raise ValueError(f"steps={steps} is less than 1. For 0 steps leave propagate_cam out.")
    values = rearrange(at_least_float32(cam), "b c h w -> b (h w) c")
    with torch.autocast(cam.device.type, enabled=False):
        for _ in range(steps):
            attended = [attend_patches(layer, values.to(layer.device)).to(values.device) for layer in chosen]
            values = torch.stack(attended).sum(0)
    return rearrange(values, "b (h w) c -> b c h w", h=grid.height)


def check_finite(maps: Tensor, what: str) -> None:
    if not torch.isfinite(maps).all():
        refuse_infinite(what)


def refuse_infinite(what: str) -> NoReturn:
    raise ValueError(
        f"{what} have NaN or infinite values. Look for NaN in the logits or given maps, half-precision overflow, or "
        "fully masked rows."
    )


def multi_view_cam(
    cam_fn: Callable[[Tensor], Tensor | tuple[Tensor, Lattice]],
    images: Tensor,
    views: Sequence[View],
    merge: Literal["sum", "max", "mean"] = "sum",
    size: tuple[int, int] | None = None,
    scales: Iterable[float] = (1.0,),
) -> Tensor:
    """Merges the class maps of several views of ``images`` (B, 3, H, W), carried back onto the images: (B, C, h, w).

    Args:
        cam_fn: returns the maps (B, C, h', w') of the images it is given, alone or with the :class:`~acr_reg.Lattice`
            on which they lie (the tokens' lattice if a stem's windows overlap). Maps without a lattice divide their
            image evenly, as the result does.
        views: each is applied to the images; ``[Identity(), HorizontalFlip()]`` is the published choice.
        merge: "sum" adds the maps, as published for the flip. "max" keeps the largest value. "mean" averages over the
            views that show a pixel, for crops. A map is 0 where its view shows nothing.
        size: (h, w) of the result, by default the token grid of the first view at scale 1, else at the first scale.
        scales: multi-scale maps: every view at every scale, such as ``[0.5, 1.0, 1.5]``. The model must take images of
            these sizes (timm: ``dynamic_img_size=True``). Choose sizes of whole patches: padding moves tokens.

    >>> import torch
    >>> from acr_reg import HorizontalFlip, Identity
    >>> images, views = torch.rand(1, 3, 4, 6), [Identity(), HorizontalFlip()]
    >>> multi_view_cam(lambda x: x[:, :1], images, views, scales=[0.5, 1.0]).shape
    torch.Size([1, 1, 4, 6])
    """
    if merge not in ("sum", "max", "mean"):
        raise ValueError(f'merge={merge!r} is unknown. Choose "sum", "max" or "mean".')
    if not views:
        raise ValueError("There are no views. Pass at least one; Identity() is the image itself.")
    merged: Tensor | None = None
    shown: list[Tensor] = []  # for each view, where "mean" divides by their number
    for view in _at_scales(views, scales):
        seen = view(images)
        with running_view(seen, images):
            found = cam_fn(seen)
        maps, lattice = found if isinstance(found, tuple) else (found, None)
        if maps.ndim != 4 or maps.shape[0] != images.shape[0]:
            raise ValueError(
                f"cam_fn returned maps of shape {tuple(maps.shape)}. It must return ({images.shape[0]}, C, h, w), one "
                "map per image and class."
            )
        size = size if size is not None else view.inverse.output_size(maps.shape[-2:])
        lattice = Lattice(*maps.shape[-2:]) if lattice is None else lattice
        back = map_between(view.inverse, lattice, Lattice(*size), str(maps.device))
        aligned = back(maps)
        if merged is None:
            merged = aligned
        else:
            merged = torch.maximum(merged, aligned) if merge == "max" else merged + aligned
        if merge == "mean":
            shown.append(back.valid.to(maps).unflatten(-1, size)[:, None])
    assert merged is not None
    return merged / sum(shown).clamp_min(1) if merge == "mean" else merged  # type: ignore[union-attr]


def _at_scales(views: Sequence[View], scales: Iterable[float]) -> list[View]:
    """Every view at every scale, at 1 first: the first view gives the result its size."""
    for view in views:
        require_view(view)
    factors = sorted(listed("scales", scales), key=lambda factor: factor != 1)
    if not factors:
        raise ValueError("There are no scales. Pass at least one; scales=[1.0] is the image's own size.")
    return [view if factor == 1 else Compose([view, Scale(factor)]) for factor in factors for view in views]


def normalize_cam(cam: Tensor, mode: Literal["max", "minmax"] = "max", valid: Tensor | None = None) -> Tensor:
    """Normalises class maps (B, C, h, w) to [0, 1], per image and class.

    "max" divides relu(cam) by its maximum. "minmax" also subtracts the minimum first. An empty map stays 0. The minimum
    and maximum cover the ``valid`` pixels (B or 1, h, w), by default all; other pixels are clamped to [0, 1].
    """
    require_tensor(cam, "cam", "(B, C, h, w)")
    cam = at_least_float32(cam)
    outside = None if valid is None else ~valid[:, None]

    def bounded(maps: Tensor, fill: float) -> Tensor:
        return maps if outside is None else maps.masked_fill(outside, fill)

    if mode == "minmax":
        lowest = bounded(cam, torch.inf).amin((-2, -1), keepdim=True)
        cam = cam - (lowest if outside is None else lowest.where(lowest.isfinite() | lowest.isnan(), 0))
    elif mode != "max":
        raise ValueError(f'mode={mode!r} is unknown. Choose "max" or "minmax".')
    cam = cam.relu()
    cam = cam / bounded(cam, 0).amax((-2, -1), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)
    return cam if outside is None else cam.clamp(max=1)
