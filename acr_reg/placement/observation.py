"""Reads off an attention call's sources what its tokens are: patches of a grid, of windows, or of no image."""

from __future__ import annotations

from dataclasses import replace

import torch

from acr_reg.attention.observed import Observed, ObservedTokens
from acr_reg.placement.sources import Source, is_padded, split_places

_ELSEWHERE = "they do not come from the patches of the image"


def observe(query: Source | None, key: Source | None) -> Observed:
    """Reads the sources of query (..., N, d) and key (..., M, d)."""
    sources = [source for source in (query, key) if source is not None]
    lost_in = next((source.lost_in for source in sources if source.lost_in is not None), None)
    roots = [frozenset[int]() if source is None else source.roots for source in (query, key)]
    return Observed(_read(query), _read(key), roots[0] != roots[1], lost_in)


def _read(source: Source | None) -> ObservedTokens | None:
    if source is None:
        return ObservedTokens(of_image=False, why_no_grid=_ELSEWHERE)
    if source.places is None:
        return None
    places = source.places.flatten(0, -3)
    tokens = places[..., 0]  # (groups, tokens)
    are_patches = (tokens > 0) & ~is_padded(tokens)
    if not bool(are_patches.any()):
        return ObservedTokens(tokens.shape[1], of_image=False, why_no_grid=_ELSEWHERE)
    if bool((tokens == tokens[:, :1]).all()) and bool((places[:, :1] != places[:, :1, :1]).any()):
        return ObservedTokens(tokens.shape[1], are_channels=True, why_no_grid="they are channels")
    image, y, x = split_places(tokens)
    at = torch.where(are_patches, y * 2**16 + x, torch.tensor(-1.0, device=y.device))
    of_image, image = image, (image * are_patches).amax(1)
    images = len(image.unique())
    others = tuple((~are_patches[0]).nonzero()[:, 0].tolist())
    numbers = tokens[0][~are_patches[0]].tolist()
    here = ObservedTokens(
        tokens.shape[1],
        others,
        tuple(position for number, position in sorted(zip(numbers, others, strict=True), reverse=True) if number < 0),
        windows=-(-len(torch.cat([image[:, None], at], 1).unique(dim=0)) // images),
        groups=len(image) // images,
        padded=bool(is_padded(tokens).any()),
    )
    if here.windows > 1 or here.padded:
        return here
    why = None
    if bool((are_patches & (of_image != image[:, None])).any()):
        why = "they are tokens of several images together"
    elif bool((at != at[:1]).any()):
        why = "they are other patches in every image, as if tokens were dropped or merged"
    elif here.groups > 1 and images > 1 and bool((image[: here.groups] != image[0]).any()):
        why = "the heads stand before the images in the batch axis"
    rows, columns = y[0][are_patches[0]].unique(), x[0][are_patches[0]].unique()
    grid = (rows[:, None] * 2**16 + columns).flatten()
    if why is None and not torch.equal(at[0][are_patches[0]], grid):
        why = "they are not all patches of a grid, row by row"
    if why is not None:
        return replace(here, why_no_grid=why)
    return replace(here, rows=tuple(rows.tolist()), columns=tuple(columns.tolist()))
