"""Carries tokens and attention maps from a view back onto the image's tokens, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from acr_reg._tensors import at_least_float32
from acr_reg.alignment.token_maps import AlignmentMaps, check_lattices
from acr_reg.tokens import Lattice, TokenLayout
from acr_reg.views.view import View, map_between


def align_tokens(
    tokens: Tensor,
    view: View,
    source: Lattice,
    target: Lattice,
    num_prefix_tokens: int = 0,
    dim: int = -2,
) -> Tensor:
    """Carries values of a view's tokens, prefix + ``source`` along ``dim``, back onto the image's ``target`` lattice.

    Use ``dim=-2`` for token features (B, N, D), ``dim=-1`` for class-token rows (B, H, C, N). Prefix tokens stay in
    place; tokens that the view does not show become 0 (:func:`~acr_reg.token_validity` tells which). Differentiable,
    on any dtype and device. Raises ValueError if the number of tokens does not fit.

    >>> import torch
    >>> from acr_reg import HorizontalFlip, Lattice
    >>> row = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    >>> align_tokens(row, HorizontalFlip(), Lattice(1, 3), Lattice(1, 3), num_prefix_tokens=1, dim=-1).tolist()
    [[9.0, 3.0, 2.0, 1.0]]
    """
    _check_count(tokens, dim, num_prefix_tokens + len(source), f"{num_prefix_tokens} prefix + {source}")
    view.check_batch(tokens.shape[0])
    check_lattices("align_tokens", view, source, target)
    prefix, patches = tokens.split([num_prefix_tokens, len(source)], dim)
    moved = map_between(view.inverse, source, target, str(tokens.device)).tokens(patches, dim)
    return torch.cat([prefix, moved], dim)


def align_attention(maps: Tensor, view: View, source: TokenLayout, target: TokenLayout) -> Tensor:
    """Carries attention maps (B, H, N', M') of a view back onto the image's tokens: P^T A P, (B, H, N, M).

    Queries and keys use their own lattices. Prefix rows and columns stay in place, and each row keeps the mass that it
    gave to patches visible in the image. Rows and columns that the view does not show become 0.

    >>> import torch
    >>> from acr_reg import HorizontalFlip, Lattice, TokenLayout
    >>> layout = TokenLayout(Lattice(1, 3), Lattice(1, 3))
    >>> align_attention(torch.arange(9.0).reshape(1, 1, 3, 3), HorizontalFlip(), layout, layout)[0, 0].tolist()
    [[8.0, 7.0, 6.0], [5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]
    """
    if maps.ndim != 4:
        raise ValueError(f"The maps have shape {tuple(maps.shape)}, not (B, H, N, M). Stack the heads on axis 1.")
    for dim, count, lattice in ((-2, source.num_queries, source.query), (-1, source.num_keys, source.key)):
        _check_count(maps, dim, count, f"{source.num_prefix_tokens} prefix + {lattice}")
    view.check_batch(maps.shape[0])
    check_lattices("align_attention", view, source.key, target.key)
    maps_back = AlignmentMaps(view, source, target, str(maps.device))
    prefix, patches = at_least_float32(maps).split([source.num_prefix_tokens, len(source.key)], -1)
    columns = torch.cat([prefix, maps_back.carry_patches(patches, stochastic=True)], -1)
    return align_tokens(columns, view, source.query, target.query, source.num_prefix_tokens).to(maps.dtype)


def token_validity(view: View, source: Lattice, target: Lattice) -> Tensor:
    """(1 or B, target tokens) bool: True for image tokens whose centre the view shows.

    >>> from acr_reg import Crop, Lattice
    >>> view = Crop(0, 16, 16, 32, image_size=(16, 64))  # tokens of 16 px
    >>> token_validity(view, Lattice(1, 2), Lattice(1, 4)).tolist()
    [[False, True, True, False]]
    """
    check_lattices("token_validity", view, source, target)
    return map_between(view.inverse, source, target, "cpu").valid


def _check_count(values: Tensor, dim: int, expected: int, made_of: str) -> None:
    if values.shape[dim] != expected:
        raise ValueError(
            f"Dimension {dim} of {tuple(values.shape)} has {values.shape[dim]} tokens, not {expected} ({made_of}). "
            "Correct source or num_prefix_tokens."
        )
