"""Carries tokens and attention maps from a view back onto the image's tokens, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from acr_reg._tensors import at_least_float32, select
from acr_reg.alignment.token_maps import NO_MASS, check_lattices
from acr_reg.tokens import Lattice, TokenLayout, TokenSide, token_order
from acr_reg.views.view import View, map_between


def align_tokens(
    tokens: Tensor,
    view: View,
    source: Lattice,
    target: Lattice,
    num_prefix_tokens: int = 0,
    dim: int = -2,
    *,
    num_suffix_tokens: int = 0,
) -> Tensor:
    """Carries values of a view's tokens back onto the tokens of the image.

    Along ``dim`` the view has prefix tokens, the ``source`` lattice and suffix tokens. The image has ``target``.
    Use ``dim=-2`` for token features (B, N, D), ``dim=-1`` for class-token rows (B, H, C, N). Prefix and suffix tokens
    stay before and behind the patches; tokens that the view does not show become 0 (:func:`~acr_reg.token_validity`
    tells which). Differentiable, on any dtype and device. Raises ValueError if the number of tokens does not fit.

    >>> import torch
    >>> from acr_reg import HorizontalFlip, Lattice
    >>> row = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    >>> align_tokens(row, HorizontalFlip(), Lattice(1, 3), Lattice(1, 3), num_prefix_tokens=1, dim=-1).tolist()
    [[9.0, 3.0, 2.0, 1.0]]
    """
    layout = TokenLayout(source, source, num_prefix_tokens, num_suffix_tokens=num_suffix_tokens)
    _check_count(tokens, dim, layout, "query")
    view.check_batch(tokens.shape[0])
    check_lattices("align_tokens", view, source, target)
    prefix, patches, suffix = tokens.split([num_prefix_tokens, len(source), num_suffix_tokens], dim)
    moved = map_between(view.inverse, source, target, str(tokens.device)).tokens(patches, dim)
    return torch.cat([prefix, moved, suffix], dim)


def align_attention(maps: Tensor, view: View, source: TokenLayout, target: TokenLayout) -> Tensor:
    """Carries attention maps (B, H, N', M') of a view back onto the image's tokens: P^T A P of shape (B, H, N, M).

    Queries and keys use their own lattices. Rows and columns of tokens that are no patches go to the places of these
    tokens in ``target``, and each row keeps the mass that it gave to patches visible in the image. Rows and columns
    that the view does not show become 0. Raises ValueError if the numbers of tokens do not fit.

    >>> import torch
    >>> from acr_reg import HorizontalFlip, Lattice, TokenLayout
    >>> layout = TokenLayout(Lattice(1, 3), Lattice(1, 3))
    >>> align_attention(torch.arange(9.0).reshape(1, 1, 3, 3), HorizontalFlip(), layout, layout)[0, 0].tolist()
    [[8.0, 7.0, 6.0], [5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]
    """
    if maps.ndim != 4:
        raise ValueError(f"The maps have shape {tuple(maps.shape)}, not (B, H, N, M). Stack the heads on axis 1.")
    sides: tuple[tuple[int, TokenSide], ...] = ((-2, "query"), (-1, "key"))
    for dim, side in sides:
        _check_count(maps, dim, source, side)
    if source.num_other_tokens != target.num_other_tokens:
        raise ValueError(
            f"The source has {source.other_names} and the target {target.other_names}. Pass layouts of one model."
        )
    view.check_batch(maps.shape[0])
    check_lattices("align_attention", view, source.key, target.key)
    device, others = str(maps.device), source.num_other_tokens
    found = at_least_float32(maps)
    for dim, side in sides:
        found = select(found, dim, token_order(source, side, device))
    other, patches = found.split([others, len(source.key)], -1)
    columns = torch.cat([other, _carry_keys(patches, view, source.key, target.key)], -1)
    found = align_tokens(columns, view, source.query, target.query, others)
    for dim, side in sides:
        order = token_order(target, side, device)
        found = select(found, dim, None if order is None else order.argsort())
    return found.to(maps.dtype)


def _carry_keys(patches: Tensor, view: View, source: Lattice, target: Lattice) -> Tensor:
    """Carries rows (..., M') over patch keys; each keeps the mass that it gave to keys visible in the image."""
    device = str(patches.device)
    back, seen = map_between(view.inverse, source, target, device), map_between(view, target, source, device)
    moved = back.tokens(patches)
    if back.is_exact:
        return moved
    if not seen.is_complete:
        patches = patches * seen.valid[:, None, None]
    # Divided first: the gradient of mass / sum is mass / sum^2, which overflows if the sum is 1e-20.
    return moved / moved.sum(-1, keepdim=True).clamp_min(NO_MASS) * patches.sum(-1, keepdim=True)


def token_validity(view: View, source: Lattice, target: Lattice) -> Tensor:
    """Says which tokens of the image have their centre in the view: a bool tensor (1 or B, target tokens).

    >>> from acr_reg import Crop, Lattice
    >>> view = Crop(0, 16, 16, 32, image_size=(16, 64))  # tokens of 16 px
    >>> token_validity(view, Lattice(1, 2), Lattice(1, 4)).tolist()
    [[False, True, True, False]]
    """
    check_lattices("token_validity", view, source, target)
    return map_between(view.inverse, source, target, "cpu").valid


def _check_count(values: Tensor, dim: int, layout: TokenLayout, side: TokenSide) -> None:
    expected = layout.num_queries if side == "query" else layout.num_keys
    if values.shape[dim] != expected:
        raise ValueError(
            f"Dimension {dim} of {tuple(values.shape)} has {values.shape[dim]} tokens, not {expected} "
            f"({layout.describe(side)}). Correct source, num_prefix_tokens or num_suffix_tokens."
        )
