"""What is done to class maps once they are made: normalised, spread over the affinity, merged over views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from acr_reg._tensors import at_least_float32
from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.tokens import Lattice
from acr_reg.views.view import View, map_between, require_view


def attend_patches(layer: LayerAttention, values: Tensor) -> Tensor:
    """mean_h A[patches, patches] @ ``values``, (B, N, C) -> (B, N, C)."""
    prefix = layer.layout.num_prefix_tokens
    if (explicit := layer.explicit) is not None:
        # Head by head: of half precision a copy in float32 would be twice as large as what the model holds.
        spread = [at_least_float32(head[:, prefix:, prefix:]).to(values.dtype) @ values for head in explicit.unbind(1)]
        return torch.stack(spread).mean(0)
    query, key = layer.query, layer.key
    assert query is not None and key is not None
    query, key = at_least_float32(query)[:, :, prefix:], at_least_float32(key)
    mask = layer.batched_mask()
    if mask is not None:
        mask = mask.expand(-1, -1, layer.shape[2], -1)[:, :, prefix:]
        mask = mask if mask.dtype == torch.bool else mask.to(query)
    # Kernels are fast for values as wide as the heads; other widths fall back to one that forms the map. Prefix tokens
    # carry nothing.
    width = query.shape[-1]
    spread = []
    for chunk in values.to(query.dtype).split(width, -1):
        padded = F.pad(chunk, (0, width - chunk.shape[-1], prefix, 0))
        padded = padded[:, None].expand(-1, query.shape[1], -1, -1)
        result = F.scaled_dot_product_attention(query, key, padded, mask, scale=layer.recorded.scale)
        spread.append(result.mean(1)[..., : chunk.shape[-1]])
    return torch.cat(spread, -1)


def propagate_cam(cam: Tensor, attention: AttentionMaps, layers: Iterable[int] | None = None, steps: int = 1) -> Tensor:
    """Spreads class maps (B, C, h, w) over the patches' affinity, ``steps`` times (ACR, arXiv 2308.04321):

        M' = ( sum_l mean_h A_l[patches, patches] ) M

    ``layers`` (negative: from the last) chooses the layers summed; None takes all, as published. Differentiable to
    both. Of fused layers this is the attention kernel with the map in place of the values: no N x N map is formed.
    """
    chosen = attention if layers is None else attention.select(layers)
    grid = chosen[-1].layout.key
    other = [layer.index for layer in chosen if layer.layout.query != grid or layer.layout.key != grid]
    if other:
        fitting = [layer.index for layer in chosen if layer.index not in other]
        raise ValueError(
            f"found layers {other} whose queries or keys are not on the grid of {grid} of layer {chosen[-1].index}; "
            f"expected one grid for both; choose layers={fitting or 'those of one stage without reduced keys'}"
        )
    if cam.ndim != 4 or cam.shape[0] != attention.batch_size or tuple(cam.shape[-2:]) != (grid.height, grid.width):
        raise ValueError(
            f"found a map of shape {tuple(cam.shape)} for {attention.batch_size} images on a grid of {grid}; expected "
            f"({attention.batch_size}, C, {grid.height}, {grid.width}); propagate on the attention's own grid, before "
            "resizing"
        )
    if steps < 1:
        raise ValueError(f"found steps={steps}; expected at least 1; leave propagation out for 0")
    values = rearrange(at_least_float32(cam), "b c h w -> b (h w) c")
    with torch.autocast(cam.device.type, enabled=False):
        for _ in range(steps):
            spread = [attend_patches(layer, values) for layer in chosen]
            values = torch.stack(spread).sum(0)
    _check_finite(values, "the propagated map")
    return rearrange(values, "b (h w) c -> b c h w", h=grid.height)


def _check_finite(maps: Tensor, what: str) -> None:
    if not torch.isfinite(maps).all():
        raise ValueError(
            f"found NaN or infinite values in {what}; expected finite ones; look for NaN in the logits, the given map "
            "or the attention, such as an overflow in half precision or a row whose keys are all masked"
        )


def multi_view_cam(
    cam_fn: Callable[[Tensor], Tensor | tuple[Tensor, Lattice]],
    images: Tensor,
    views: Sequence[View],
    merge: Literal["sum", "max", "mean"] = "sum",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Class maps of several views of ``images`` (B, 3, H, W), carried back and merged: (B, C, h, w).

    ``cam_fn`` returns the maps (B, C, h', w') of any images given, or a pair of them and the Lattice on which they lie
    (that of the tokens, where a stem's windows overlap); without one they divide their image evenly, as the result
    does. Each is aligned onto ``size`` (h, w), by default that of the first view's maps carried back. "sum" adds them,
    as published for the flip; "max" keeps the largest; "mean" averages over the views that show a pixel, for crops.
    Where a view shows nothing its map is 0.

    >>> import torch
    >>> from acr_reg import HorizontalFlip, Identity
    >>> multi_view_cam(lambda x: x[:, :1], torch.rand(1, 3, 4, 6), [Identity(), HorizontalFlip()]).shape
    torch.Size([1, 1, 4, 6])
    """
    if merge not in ("sum", "max", "mean"):
        raise ValueError(f'found merge={merge!r}; expected "sum", "max" or "mean"; choose one of these')
    if not views:
        raise ValueError("found no views; expected at least one; Identity() is the image itself")
    merged: Tensor | None = None
    shown: list[Tensor] = []  # by each view: "mean" alone divides by how many
    for view in views:
        require_view(view)
        found = cam_fn(view(images))
        maps, lattice = found if isinstance(found, tuple) else (found, None)
        if maps.ndim != 4 or maps.shape[0] != images.shape[0]:
            raise ValueError(
                f"found maps of shape {tuple(maps.shape)} from cam_fn; expected ({images.shape[0]}, C, h, w); return "
                "one map per image and class"
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


def normalize_cam(cam: Tensor, mode: Literal["max", "minmax"] = "max", valid: Tensor | None = None) -> Tensor:
    """Class maps (B, C, h, w) in [0, 1], per image and class: relu(cam) over its maximum, or min-max. An empty map
    stays 0. Both are taken over the pixels ``valid`` (B or 1, h, w), by default all; the others are cut to [0, 1]."""
    cam = at_least_float32(cam)
    outside = None if valid is None else ~valid[:, None]

    def bounded(maps: Tensor, fill: float) -> Tensor:
        return maps if outside is None else maps.masked_fill(outside, fill)

    if mode == "minmax":
        lowest = bounded(cam, torch.inf).amin((-2, -1), keepdim=True)
        cam = cam - (lowest if outside is None else lowest.where(lowest.isfinite() | lowest.isnan(), 0))
    elif mode != "max":
        raise ValueError(f'found mode={mode!r}; expected "max" or "minmax"; choose one')
    cam = cam.relu()
    cam = cam / bounded(cam, 0).amax((-2, -1), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)
    return cam if outside is None else cam.clamp(max=1)
