"""Finds where the tokens of a captured call sit on the image, or why that is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from acr_reg.attention.call import AttentionCall
from acr_reg.attention.observed import Observed
from acr_reg.errors import LayoutError
from acr_reg.placement.arrangement import arrange
from acr_reg.placement.grids import LayoutHints, ModelFields, read_fields
from acr_reg.placement.kinds import Images, Placement, is_pyramid, place, unordered_tokens
from acr_reg.placement.modules import ModuleIndex
from acr_reg.placement.windows import Spot, WindowsSeen, WindowTrace
from acr_reg.tokens import Lattice, TokenLayout

_NEAREST = 4  # modules around attention that may know its window


class Placer:
    """Places the attention calls of one model by its fields, its windows and what the user says."""

    def __init__(self, index: ModuleIndex, hints: LayoutHints) -> None:
        self.index = index
        self._hints = hints
        self.image_channels = hints.image_channels
        self._unordered = unordered_tokens(index.model)
        self._trace = WindowTrace()
        self._placements: dict[Any, Placement] = {}
        self._plans: dict[Images | None, tuple[list[Any], list[Placement]]] = {}  # the last run on images of each size
        self.needs_more_images: set[tuple[nn.Module, int]] = set()
        """Calls with images and heads in one axis: a single image does not show which comes first."""
        self._observed: dict[tuple[nn.Module, int], Observed] = {}
        self._observed_alike: dict[tuple[str, int], Observed] = {}

    @cached_property
    def _fields(self) -> ModelFields:
        return read_fields(self.index.model, self.image_channels)

    def placements(self, calls: Sequence[AttentionCall], images: Images | None) -> list[Placement]:
        """The placement of each call of a run: those of the last run on as many images of the same size, if that made
        the same sorts of calls."""
        sorts = [call.sort for call in calls]
        planned, found = self._plans.get(images, ([], []))
        if sorts != planned:
            pyramid = is_pyramid(calls)
            found = [self._placement(call, images, pyramid) for call in calls]
            self._plans[images] = sorts, found
        return found

    def _placement(self, call: AttentionCall, images: Images | None, is_pyramid: bool) -> Placement:
        """The placement of a call, computed once for each sort of call."""
        known = (call.sort, images, is_pyramid)
        if known not in self._placements:
            around = self.index.lineage(call.module)[:_NEAREST] or [call.module]
            fields = replace(self._fields, is_pyramid=is_pyramid)

            def locate(queries: int, keys: int, size: tuple[int, int] | None) -> tuple[TokenLayout | None, str | None]:
                try:
                    return arrange(queries, keys, size, fields, self._hints, call.observed), None
                except LayoutError as error:
                    return None, str(error)

            placement = place(call, around, images, locate, self._unordered)
            if placement.layout is not None and images is not None:
                placement = replace(placement, layout=self._centred(placement.layout, call, images[1:]))
            self._placements[known] = placement
        return self._placements[known]

    def remember(self, call: AttentionCall, module: nn.Module, number: int) -> None:
        """Remembers what a run shows of a module's attention call ``number``. If it shows nothing, the call gets what
        an earlier run showed of this call, or of the same call in another block."""
        now, here = call.observed, (module, number)
        if now is None and here in self._observed:
            call.observed = self._observed[here]
            return
        alike = self.index.pattern(module), number
        if now is None:
            call.observed = self._observed_alike.get(alike)
            return
        self._observed[here] = self._observed_alike[alike] = now
        heads_are_flat = call.recorded.heads is None and call.recorded.seen.ndim == 3
        if heads_are_flat and now.queries is not None and now.queries.groups > 1 and now.queries.images == 1:
            self.needs_more_images.add(here)
        else:
            self.needs_more_images.discard(here)

    def trace(self, seen: WindowsSeen, images: Images | None) -> None:
        """Remembers the windows of a run, unless an earlier run showed more."""
        if images is not None and len(seen.ops) >= len(self._trace.ops):
            calls: dict[str, tuple[int, int]] = {}
            for module, (first, last) in seen.preceded.items():
                known = calls.get(self.index.part(module), (first, last))
                calls[self.index.part(module)] = min(first, known[0]), max(last, known[1])
            before, self._trace = self._trace, WindowTrace(tuple(seen.ops.values()), images, calls, self.image_channels)
            if self._trace != before:
                self._placements.clear()
                self._plans.clear()

    def _centred(self, layout: TokenLayout, call: AttentionCall, size: tuple[int, int]) -> TokenLayout:
        """The layout with its lattices moved to where the model's windows put the tokens, on images of ``size``. Only
        windows within the attention can have made the smaller of two lattices."""
        if self._hints.patch_size is not None:  # the user places them
            return layout
        part, trace = self.index.part(call.module), self._trace
        shape = call.input_shape or ()
        widths = {*shape[-1:], *(shape[1:2] if len(shape) == 4 else ())}  # rows of channels, or a map of (B, C, h, w)

        def centred(lattice: Lattice, spot: Spot | None) -> Lattice:
            if spot is None:
                return replace(lattice, offset_known=not trace.displaces(part))
            return replace(lattice, stride=spot.stride, offset=spot.offset)

        large, small = sorted((layout.query, layout.key), key=len, reverse=True)
        at_large = trace.find(part, size, (large.height, large.width), widths)
        at_small = at_large
        if len(large) != len(small):
            grid = small.height, small.width
            at_small = trace.find(part, size, grid, widths, inside=True)
            if at_small is None and at_large is not None and at_large.inside:  # the larger was made of the smaller
                at_small = trace.find(part, size, grid, widths)
        large, small = centred(large, at_large), centred(small, at_small)
        if at_small is None:  # side by side, as far as is known
            small = replace(small, offset=large.offset)
        query, key = (large, small) if layout.num_queries >= layout.num_keys else (small, large)
        return replace(layout, query=query, key=key)
