"""What the class token looks at, straight from the maps: its rows of one layer, or of all layers multiplied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from acr_reg.attention.layer import LayerAttention, rows_of_block
from acr_reg.attention.maps import AttentionMaps
from acr_reg.cam.refinement import check_finite, layers_on_one_grid
from acr_reg.errors import LayoutError
from acr_reg.tokens import class_token_index, patch_index


def class_attention(maps: AttentionMaps, layer: int = -1, class_token: int | None = None) -> Tensor:
    """Returns the attention of the class token to the patches, for each head of one layer: (B, heads, h, w).

    It is A[class row, patches], on the layer's key grid.

    The values are the layer's own probabilities, at least in float32 and on the model's graph. They do not sum to 1
    over the patches, because the class token also attends to itself and to the other tokens that are not patches. Only
    one row of a fused layer is formed, never its N x N map.

    Args:
        maps: the maps of a capture, or your own by :meth:`AttentionMaps.from_tensors`.
        layer: index of the layer in the model; negative counts from the last recorded layer.
        class_token: which class token if there are several, such as c for class c; None takes the only one.

    Raises :class:`~acr_reg.LayoutError` for a layer without a class token or without a known grid, IndexError for a
    layer or class token that does not exist, and ValueError for NaN and for several class tokens without a choice.

    >>> import torch
    >>> tensors = [torch.rand(2, 3, 1 + 4 * 6, 1 + 4 * 6).softmax(-1) for _ in range(2)]
    >>> maps = AttentionMaps.from_tensors(tensors, num_prefix_tokens=1, grid=(4, 6))
    >>> class_attention(maps).shape, class_attention(maps).mean(1).shape
    (torch.Size([2, 3, 4, 6]), torch.Size([2, 4, 6]))
    """
    chosen = maps.select([layer])[0]
    token = _chosen(chosen, class_token, "Use layer.weights().mean(2), the mean over all queries.")
    row = chosen.weights(token)[:, :, 0]
    check_finite(row, "The rows of the class token")
    return _on_grid(row, chosen)


def attention_rollout(
    maps: AttentionMaps,
    layers: Iterable[int] | None = None,
    class_token: int | None = None,
    query: Literal["class", "all"] = "class",
) -> Tensor:
    """Attention rollout of the class token over the patches, (B, h, w) >= 0 (Abnar & Zuidema, ACL 2020,
    arXiv 2005.00928):

        R = A'_L ... A'_2 A'_1   with   A'_l = 1/2 mean_h A_l + 1/2 I, each row divided by its sum

    and of R the class row at the patches: how much of each patch reaches the class token if every block adds its
    attention to its input in equal parts. The values do not sum to 1, because the other tokens have shares too. The row
    is multiplied by one layer after the other, from the last to the first, in blocks of rows: no N x N product and no
    N x N map of a fused layer is formed. With a graph, autograd keeps the blocks for the backward pass.

    Args:
        maps: the maps of a capture, or your own by :meth:`AttentionMaps.from_tensors`.
        layers: the layers in the product (negative: from the last), multiplied in the model's order; None takes all.
        class_token: which class token if there are several, such as c for class c; None takes the only one.
        query: "class" reads the class row of R; "all" averages all rows, for models without a class token.

    Raises :class:`~acr_reg.LayoutError` if the last of the layers has no class token, or if the layers cannot be
    multiplied because their tokens differ, as in windows, in reduced keys and from stage to stage. Raises IndexError
    for layers and class tokens that do not exist, and ValueError for NaN, for maps with values below 0, and for several
    class tokens without a choice.

    >>> import torch
    >>> tensors = [torch.rand(2, 3, 1 + 4 * 6, 1 + 4 * 6).softmax(-1) for _ in range(2)]
    >>> maps = AttentionMaps.from_tensors(tensors, num_prefix_tokens=1, grid=(4, 6))
    >>> attention_rollout(maps).shape
    torch.Size([2, 4, 6])
    """
    if query not in ("class", "all"):
        raise ValueError(f'query={query!r} is unknown. Choose "class" or "all".')
    chosen = sorted({*layers_on_one_grid(maps, layers, "Roll out")}, key=lambda layer: layer.index)
    _check_same_tokens(chosen)
    last = chosen[-1]
    tokens = torch.arange(last.shape[2], device=last.device)
    if query == "class":
        tokens = _chosen(last, class_token, 'Pass query="all" for the mean over all queries.')
    # share (B, N): how much of each token reaches the result from the layer above; only `tokens` have a share.
    share = torch.zeros(last.shape[0], last.shape[2], device=last.device)
    share[:, tokens] = 1 / len(tokens)
    with torch.autocast(last.device.type, enabled=False):
        for layer in reversed(chosen):
            share = _shares_below(layer, share.to(layer.device), tokens.to(layer.device))
            tokens = torch.arange(layer.shape[2], device=layer.device)
    check_finite(share, "The rollout")
    return _on_grid(share, chosen[0])


def _shares_below(layer: LayerAttention, share: Tensor, tokens: Tensor) -> Tensor:
    """``share`` A', (B, N) -> (B, N), where only ``tokens`` (R,) have a share."""
    below = torch.zeros_like(share)
    for rows in tokens.split(rows_of_block(layer)):
        attended = layer.weights(rows).mean(1)
        if not layer.stochastic and bool((attended < 0).any()):
            raise ValueError(
                f"layer {layer.index} ({layer.name}): the map was mixed after softmax and has values below 0, which no "
                "share has. Choose other layers=."
            )
        given = share[:, rows].to(attended) / (1 + attended.sum(-1))  # of A + I, whose rows A' is made of
        below = below + (given[:, None] @ attended)[:, 0]
        below = below.index_add(1, rows, given)
    return below


def _chosen(layer: LayerAttention, class_token: int | None, instead: str) -> Tensor:
    """(1,): the class token's index among the layer's queries."""
    name, count = f"layer {layer.index} ({layer.name})", len(layer.layout.known_class_tokens())
    if not count:
        raise LayoutError(f"{name} has no class token. {instead}")
    if class_token is None and count > 1:
        raise ValueError(f"{name} has {count} class tokens. Choose one by class_token=0 to {count - 1}.")
    place = class_token or 0
    if not -count <= place < count:
        raise IndexError(
            f"class_token={class_token} does not exist: {name} has {count} of them. Choose 0 to {count - 1}."
        )
    return class_token_index(layer.layout, str(layer.device))[place % count][None]


def _check_same_tokens(layers: list[LayerAttention]) -> None:
    first = layers[0]
    for layer in layers[1:]:
        a, b = first.layout, layer.layout
        if a.other_tokens != b.other_tokens:
            raise LayoutError(
                f"layer {first.index} has {a.describe('query')} tokens and layer {layer.index} {b.describe('query')}, "
                "so their maps cannot be multiplied. Choose layers= with the same tokens."
            )


def _on_grid(row: Tensor, layer: LayerAttention) -> Tensor:
    """(..., M) -> (..., h, w): the patches among the keys."""
    grid = layer.layout.key
    return row[..., patch_index(layer.layout, "key", str(row.device))].unflatten(-1, (grid.height, grid.width))
