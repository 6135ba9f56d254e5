"""Lays the tokens of a call out on the image: as a run showed them, as the user says, or as the model's fields say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from acr_reg.attention.observed import Observed, ObservedTokens
from acr_reg.errors import LayoutError
from acr_reg.placement.grids import LayoutHints, ModelFields, infer_layout
from acr_reg.tokens import Lattice, TokenLayout, with_class_tokens


def arrange(
    num_queries: int,
    num_keys: int,
    image_size: tuple[int, int] | None,
    fields: ModelFields,
    hints: LayoutHints,
    observed: Observed | None,
) -> TokenLayout:
    """The layout of a call's queries and keys on images of ``image_size``. Raises :class:`~acr_reg.LayoutError`."""
    told = hints.num_prefix_tokens is not None or hints.num_suffix_tokens is not None
    seen = None if observed is None else observed.queries
    is_outdated = seen is not None and _is_outdated(seen, num_queries)
    if is_outdated and seen is not None and not told and not seen.between:  # dropping patches keeps the others
        classes = hints.class_tokens if hints.class_tokens is not None else _class_tokens(seen)
        counts = seen.num_prefix_tokens, classes, seen.num_suffix_tokens
        return infer_layout(num_queries, image_size, fields, LayoutHints(hints.patch_size, *counts), num_keys)
    if observed is None or seen is None or observed.keys is None or is_outdated:
        layout = infer_layout(num_queries, image_size, fields, hints, num_keys)
        if layout.num_other_tokens and not told and not fields.states_prefix:
            count, hidden_by = layout.num_other_tokens, observed and observed.hidden_by
            raise LayoutError(
                f"{num_queries} tokens are {layout.query} and {count} others, before or behind them"
                f"{f', which {hidden_by} hides' if hidden_by else ''}. Pass num_prefix_tokens={count} or "
                f"num_suffix_tokens={count}."
            )
        return layout
    if told and not _agree(seen, hints):
        raise LayoutError(
            f"{_counts(hints)} was given, but {seen.num_prefix_tokens} tokens stand before the patches and "
            f"{seen.num_suffix_tokens} behind them."
        )
    why = seen.why_no_grid or observed.keys.why_no_grid
    if told and why is not None:
        return infer_layout(num_queries, image_size, fields, hints, num_keys)
    if why is not None:
        raise LayoutError(
            f"{num_queries} tokens lie on no grid of the image: {why}. Leave the layer out (layers=), or name the grid "
            "by with_layout()."
        )
    return _as_observed(num_queries, num_keys, image_size, fields, hints, seen, observed.keys)


def _is_outdated(seen: ObservedTokens, count: int) -> bool:
    """Whether tokens were seen without a grid, but other tokens than now: some may have been dropped then."""
    return seen.of_image and seen.grid is None and seen.count not in (0, count)


def _agree(seen: ObservedTokens, hints: LayoutHints) -> bool:
    if seen.grid is None:
        return True  # the user knows more
    pairs = (hints.num_prefix_tokens, seen.num_prefix_tokens), (hints.num_suffix_tokens, seen.num_suffix_tokens)
    return all(told in (None, found) for told, found in pairs)


def _counts(hints: LayoutHints) -> str:
    counts = {name: getattr(hints, name) for name in ("num_prefix_tokens", "num_suffix_tokens")}
    return ", ".join(f"{name}={count}" for name, count in counts.items() if count is not None)


def _as_observed(
    num_queries: int,
    num_keys: int,
    image_size: tuple[int, int] | None,
    fields: ModelFields,
    hints: LayoutHints,
    queries: ObservedTokens,
    keys: ObservedTokens,
) -> TokenLayout:
    if len(queries.others) != len(keys.others) or queries.num_prefix_tokens != keys.num_prefix_tokens:
        raise LayoutError(
            f"{len(queries.others)} of the queries and {len(keys.others)} of the keys are no patches. Leave the layer "
            "out (layers=)."
        )
    if queries.between and num_queries != queries.count:
        raise LayoutError(
            f"Tokens stand between the patches at {queries.count} tokens; where they do at {num_queries} is unknown. "
            "Capture anew for this image size."
        )
    if fields.num_class_tokens == 0 and len(queries.others) > (fields.num_prefix_tokens or 0):
        fields = replace(fields, num_class_tokens=None)  # the fields know of no tokens such as these
    counts = LayoutHints(
        hints.patch_size,
        queries.num_prefix_tokens,
        hints.class_tokens if hints.class_tokens is not None else _class_tokens(queries),
        queries.num_suffix_tokens,
        queries.between,
    )
    was_seen = (num_queries, num_keys, image_size) == (queries.count, keys.count, queries.image_size)
    layout, error = None, None
    for known in _choices(fields, queries, num_queries, None if was_seen or hints.patch_size else _step(queries)):
        try:
            layout = infer_layout(num_queries, image_size, known, counts, num_keys)
            break
        except LayoutError as found:
            error = error or found
    if layout is None and error is not None and not (was_seen and hints.patch_size is None):
        raise error
    grids = None if layout is None else tuple((grid.height, grid.width) for grid in (layout.query, layout.key))
    if not was_seen or grids == (queries.grid, keys.grid):
        assert layout is not None
        return layout
    others = counts.num_prefix_tokens or 0, counts.num_suffix_tokens or 0
    seen = TokenLayout(_lattice(queries), _lattice(keys), others[0], (), others[1], tuple(counts.between))
    if counts.class_tokens is None and (fields.num_class_tokens or 0) <= seen.num_other_tokens:
        return with_class_tokens(seen, fields.num_class_tokens)
    return with_class_tokens(seen, counts.class_tokens)


def _choices(fields: ModelFields, seen: ObservedTokens, count: int, step: tuple[int, int] | None) -> list[ModelFields]:
    """What may tell the grid of ``count`` tokens, in order: the ``step`` from patch to patch that was seen, if any, and
    the model's fields. Where these leave a choice of grids, fewer tokens may be what dropping left."""
    if step is None:
        return [fields]
    by_step = replace(fields, patch_size=step, reads_patches=True, is_pyramid=False)
    if fields.reads_patches and fields.patch_size is not None and not fields.is_pyramid:
        return [fields, by_step]
    may_be_other = fields.is_pyramid or (count == seen.count and (fields.patch_size or fields.stem) is not None)
    return [by_step, fields] if may_be_other else [by_step]


def _class_tokens(tokens: ObservedTokens) -> tuple[int, ...] | None:
    """Their positions; those behind the patches count from the last, so that they hold for other grids."""
    first = tokens.num_prefix_tokens
    return tuple(p if p < first or p in tokens.between else p - tokens.count for p in tokens.class_tokens) or None


def _step(tokens: ObservedTokens) -> tuple[int, int] | None:
    """Rows and columns of pixels from one patch to the next, if these are whole and everywhere the same."""
    steps = [{b - a for a, b in pairwise(at)} for at in (tokens.rows or (), tokens.columns or ())]
    found = [step.pop() for step in steps if len(step) == 1]
    return (int(found[0]), int(found[1])) if len(found) == 2 and all(f == int(f) for f in found) else None


def _lattice(tokens: ObservedTokens) -> Lattice:
    assert tokens.rows is not None and tokens.columns is not None and tokens.image_size is not None
    height, width = float(tokens.image_size[0]), float(tokens.image_size[1])
    steps = [
        (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else length
        for at, length in ((tokens.rows, height), (tokens.columns, width))
    ]
    return Lattice(len(tokens.rows), len(tokens.columns), (steps[0], steps[1]), (0.0, 0.0), (height, width))
