"""What users give in place of a capture: maps of a repository, and the grid that its tokens are on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from acr_reg._tensors import at_least_float32
from acr_reg.tokens import Lattice, LayoutError, TokenLayout, class_token_positions

Grid = tuple[int, int] | Lattice


def grid_layout(
    grid: Grid,
    num_prefix_tokens: int,
    class_tokens: int | Sequence[int] | None,
    key_grid: Grid | None = None,
) -> TokenLayout:
    query = _lattice(grid)
    key = query if key_grid is None else _lattice(key_grid)
    if key_grid is not None and not isinstance(key_grid, Lattice):  # over the same image
        stride = (query.extent[0] / key.height, query.extent[1] / key.width)
        key = replace(key, stride=stride, extent=query.extent)
    return TokenLayout(query, key, num_prefix_tokens, class_token_positions(class_tokens, num_prefix_tokens))


def _lattice(grid: Grid) -> Lattice:
    if isinstance(grid, Lattice):
        return grid
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise LayoutError(
            f"found grid={grid!r}; expected (height, width) in tokens, or a Lattice; pass grid=(14, 14) for 196"
        )
    return Lattice(*grid)


def check_tokens(shape: Sequence[int], index: int, layout: TokenLayout) -> None:
    if tuple(shape[-2:]) != (layout.num_queries, layout.num_keys):
        prefix, query, key = layout.num_prefix_tokens, layout.query, layout.key
        keys = f" and {layout.num_keys} keys ({prefix} prefix + {key})" if key != query else ""
        raise LayoutError(
            f"layer {index}: found {shape[-2]} queries and {shape[-1]} keys; expected {layout.num_queries} "
            f"({prefix} prefix + {query}){keys}; correct grid= or num_prefix_tokens={', or key_grid=' if keys else ''}"
        )


def check_probabilities(maps: Tensor, index: int, layout: TokenLayout) -> None:
    if maps.ndim != 4 or not maps.is_floating_point():
        raise ValueError(
            f"layer {index}: found a {maps.dtype} tensor of shape {tuple(maps.shape)}; expected floating point of (B, "
            "H, N, M) or (B, N, M); give the probabilities, not stacked or flattened"
        )
    check_tokens(maps.shape, index, layout)
    rows = at_least_float32(maps.detach())
    off = (rows.sum(-1) - 1).abs().max().item()
    allowed = 5e-3 if maps.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if math.isnan(off) or math.isinf(off):
        raise ValueError(
            f"layer {index}: found NaN or infinite values; expected probabilities; look for the step that made them"
        )
    if off > allowed or rows.min().item() < 0:
        raise ValueError(
            f"layer {index}: found rows that sum to 1 only within {off:.2g} (smallest value {rows.min().item():.2g}); "
            f"expected probabilities, within {allowed:g}; apply softmax(-1) to logits, and take the maps before dropout"
        )
