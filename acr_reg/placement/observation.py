"""Reads off an attention call's sources what its tokens are: patches of a grid, of windows, or of no image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from acr_reg.attention.observed import Observed, ObservedTokens
from acr_reg.placement.places import is_padded, split_places
from acr_reg.placement.sources import REORDERING, Source, Sources

_LARGEST = 2**20  # more pixels than an image has along an axis
_ELSEWHERE = "they do not come from the patches of the image"


def observe(sources: Sources | None, query: Tensor, key: Tensor) -> Observed | None:
    """Reads where query (..., N, d) and key (..., M, d) come from; None if no image was followed."""
    if sources is None or not sources.follows_images or min(query.ndim, key.ndim) < 3:
        return None
    return _observed(sources, sources.of(query), sources.of(key))


def observe_views(
    sources: Sources | None, operands: Sequence[Tensor], views: Callable[[list[Tensor]], tuple[Tensor, Tensor] | None]
) -> Observed | None:
    """The same for the two operands of a product, which ``views`` turns into query and key."""
    if sources is None or not sources.follows_images or len(operands) != 2:
        return None
    found = [sources.of(operand) for operand in operands]
    places = [o if s is None or s.places is None else s.places for o, s in zip(operands, found, strict=True)]
    turned = views(places)  # as the operands are, whose views nobody follows
    if turned is None or min(each.ndim for each in turned) < 3:
        return None
    query, key = (
        s if s is None or s.places is None else replace(s, places=view) for s, view in zip(found, turned, strict=True)
    )
    return _observed(sources, query, key)


def _observed(sources: Sources, query: Source | None, key: Source | None) -> Observed:
    queries, keys = _read(sources, query), _read(sources, key)
    same_source = query is not None and key is not None and bool(query.roots) and query.roots == key.roots
    same_places = None
    if query is not None and key is not None and query.places is not None and key.places is not None:
        apart = queries is None or keys is None or queries.windows > 1 or keys.windows > 1
        same_places = None if apart else _same_places(query.places, key.places)
    hidden_by = next((s.lost_in for s in (query, key) if s is not None and s.lost_in is not None), None)
    return Observed(queries, keys, same_source, same_places, hidden_by)


def _same_places(query: Tensor, key: Tensor) -> bool:
    q, k = (places.flatten(0, -3)[..., 0] for places in (query, key))
    if len(q) > len(k) > 0 and len(q) % len(k) == 0:  # heads of queries that share keys
        k = k.repeat_interleave(len(q) // len(k), 0)
    if q.shape == k.shape:
        return torch.equal(q, k)
    image_q, image_k = (torch.where(places > 0, split_places(places)[0], 0).amax(1) for places in (q, k))
    return len(q) != len(k) or torch.equal(image_q, image_k)


def _read(sources: Sources, source: Source | None) -> ObservedTokens | None:
    if source is None:
        return ObservedTokens(of_image=False, why_no_grid=_ELSEWHERE)
    if source.lost_in in REORDERING:
        return ObservedTokens(why_no_grid=f"torch's {source.lost_in}() joined or reordered them")
    if source.places is None:
        return None
    places = source.places.flatten(0, -3)  # (groups, tokens, channels)
    tokens = places[..., 0]
    are_patches = (tokens > 0) & ~is_padded(tokens)
    spread = places[:, 0]  # over the channels of the first token
    if bool((tokens == tokens[:, :1]).all() and (spread > 0).any() and (spread != spread[:, :1]).any()):
        return ObservedTokens(tokens.shape[1], are_channels=True, why_no_grid="they are channels")
    if not bool(are_patches.any()):
        return ObservedTokens(tokens.shape[1], of_image=False, why_no_grid=_ELSEWHERE)
    image, y, x = split_places(tokens)
    at = torch.where(are_patches, y * _LARGEST + x, torch.full_like(y, -1))
    image_of_group = torch.where(are_patches, image, 0).amax(1)
    images = len(image_of_group.unique())
    size = sources.image_size(int(image_of_group[0]))
    others = tuple((~are_patches[0]).nonzero()[:, 0].tolist())
    numbered = sorted(zip(tokens[0][~are_patches[0]].tolist(), others, strict=True), key=lambda numbered: -numbered[0])
    here = ObservedTokens(
        tokens.shape[1],
        others,
        tuple(position for number, position in numbered if number < 0),
        image_size=size,
        windows=-(-len(torch.cat([image_of_group[:, None], at], 1).unique(dim=0)) // images),
        groups=len(tokens) // images,
        images=images,
        is_padded=bool(is_padded(tokens).any()),
    )
    if here.windows > 1 or here.is_padded:
        return here
    if bool((are_patches & (image != image_of_group[:, None])).any()):
        return replace(here, why_no_grid="they belong to several images")
    if bool((at != at[:1]).any()):
        return replace(here, why_no_grid="they are other patches in every image, as after dropping or merging some")
    if here.groups > 1 and images > 1 and bool((image_of_group[: here.groups] != image_of_group[0]).any()):
        return replace(here, why_no_grid="heads stand before images in the batch axis")
    rows, columns = y[0][are_patches[0]].unique(), x[0][are_patches[0]].unique()
    if not torch.equal(at[0][are_patches[0]], (rows[:, None] * _LARGEST + columns).flatten()):
        return replace(here, why_no_grid="they are not the patches of a grid, row by row")
    if not _covers(rows.tolist(), columns.tolist(), size):
        return replace(here, why_no_grid="they are patches of a part of the image")
    return replace(here, rows=tuple(rows.tolist()), columns=tuple(columns.tolist()))


def _covers(rows: list[float], columns: list[float], size: tuple[int, int]) -> bool:
    """Whether patches reach the edges of the image, but for a margin of less than a patch."""
    steps = [at[1] - at[0] for at in (rows, columns) if len(at) > 1]
    if not steps:
        return True
    axes = zip((rows, columns), size, strict=True)
    return all(at[0] <= max(steps) and length - at[-1] <= 2 * max(steps) for at, length in axes)
