"""What a model's modules are: their names, which look like attention, and where their tokens sit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from acr_reg._torch_private import BatchNorm, children_of, is_compiled, is_exported, is_replica
from acr_reg.attention.call import SeenCall
from acr_reg.errors import CaptureError, LayoutError
from acr_reg.placement.grids import ModelFields, infer_layout, read_fields
from acr_reg.placement.kinds import Locate, Placement, place, unordered_tokens
from acr_reg.placement.windows import Spot, WindowedOp, WindowTrace
from acr_reg.tokens import Lattice, TokenLayout

Hints = tuple[Any, Any, Any]  # patch size, number of prefix tokens, class tokens, as the user gives them

_NEAREST = 4  # modules around an attention module that may say its window


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm module of a model, whichever kind."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def refuse_traced(model: nn.Module) -> None:
    """Modules whose kernels hooks and modes do not see would lose their layers without a word."""
    kinds = {
        "compiled": is_compiled,
        "scripted or traced by torch.jit": lambda module: isinstance(module, torch.jit.ScriptModule),
        "exported": is_exported,
        "a replica of nn.DataParallel": is_replica,
    }
    for name, module in model.named_modules():
        for kind, is_kind in kinds.items():
            if is_kind(module):
                raise CaptureError(
                    f"found {name or 'a model'} ({type(module).__name__}), which is {kind}; expected modules that run "
                    "as Python wrote them; capture the original model and run that"
                )


def _named(model: nn.Module, module: str | nn.Module) -> nn.Module:
    known = dict(model.named_modules())
    found = known.get(module) if isinstance(module, str) else module
    if found is None or not any(found is m for m in known.values()):
        raise ValueError(
            f"found {module!r}, which is no module of {type(model).__name__}; expected names from "
            f"model.named_modules(), such as {[name for name in known if name][:4]}; correct modules="
        )
    return found


class ModuleIndex:
    """The modules of one model, as they were when the capture began, and what was found out about them."""

    def __init__(self, model: nn.Module, within: Iterable[str | nn.Module] | None, hints: Hints) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"found a {type(model).__name__}; expected a torch.nn.Module; pass the model itself")
        refuse_traced(model)
        self.model = model
        self.names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self.registered = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._modules = dict(model.named_modules())
        self._within = None if within is None else {m for part in within for m in _named(model, part).modules()}
        self._hints = hints
        self.likely = {
            module for module, name in self.names.items() if self.counts(module) and _may_attend(name, module)
        }
        self._batch_norms = batch_norms(model)
        self._unordered = unordered_tokens(model)
        self._alike: set[nn.Module] | None = None
        self._children = {module: children_of(module) for module in self.names}
        self._attending, self._parents = 0, set[nn.Module]()  # how many modules attend, and what they lie in
        self._fields: ModelFields | None = None
        self._trace = WindowTrace()
        self._placements: dict[Any, Placement | str] = {}

    def counts(self, module: nn.Module) -> bool:
        """Whether attention in this module was asked for."""
        return self._within is None or module in self._within

    def training_batch_norms(self) -> list[str]:
        return [self.names[m] for m in self._batch_norms if m.training]

    def alike(self, attention: set[nn.Module]) -> set[nn.Module]:
        """The modules that look like those in which attention was seen: of their class, or of such a name and in the
        same place of another block."""
        if self._alike is None or not attention <= self._alike:
            kinds = {type(m) for m in attention}
            places = {_name_pattern(self.names[m]) for m in attention}
            self._alike = {
                module
                for module, name in self.names.items()
                if self.counts(module)
                and (type(module) in kinds or (module in self.likely and _name_pattern(name) in places))
            }
        return self._alike

    def joined(self, attention: set[nn.Module]) -> list[str]:
        """Modules that may be attention and were not there when the capture began: no hook is on them. They are looked
        for where attention is: among the children of what it lies in."""
        if len(attention) != self._attending:
            self._attending = len(attention)
            self._parents = {self.model, *(above for m in attention for above in self._lineage(m)[1:])}
        if all(children_of(parent) == self._children[parent] for parent in self._parents):
            return []
        kinds = {type(m) for m in attention}
        return [
            name
            for name, module in self.model.named_modules()
            if module not in self.names and (type(module) in kinds or _may_attend(name, module))
        ]

    def beside(self, silent: set[nn.Module], fired: Iterable[nn.Module]) -> list[str]:
        """Of modules in which nothing was seen, those that may be attention by their names and are no part of one in
        which something was."""
        seen = [f"{self.names[m]}." for m in fired]
        names = [self.names[m] for m in silent & self.likely]
        return [name for name in names if not any(name.startswith(other) for other in seen)]

    def named_attention(self) -> list[str]:
        return [f"{n} ({type(m).__name__})" for m, n in self.names.items() if _is_named_attention(n, m)]

    def placement(self, seen: SeenCall, images: tuple[int, int, int] | None, is_pyramid: bool) -> Placement | str:
        """Where the tokens of a call sit, or why it is not token-to-token self-attention. Each sort of call is looked
        at once."""
        known = (seen.sort, images, is_pyramid)
        if known not in self._placements:
            around = self._lineage(seen.module)[:_NEAREST] or [seen.module]
            placement = place(seen, around, images, self._locating(is_pyramid), self._unordered)
            if isinstance(placement, Placement) and placement.layout is not None and images is not None:
                placement = replace(placement, layout=self._centred(placement.layout, seen, images[1:]))
            self._placements[known] = placement
        return self._placements[known]

    def trace(
        self,
        ops: Mapping[str, WindowedOp],
        images: tuple[int, int, int] | None,
        preceded: Mapping[nn.Module, tuple[int, int]],
    ) -> None:
        """Remembers what a run shows of windows: its ops by name, in order, and how many of them came before the first
        and the last call of every module that attends. A run that shows less than one before it is passed over."""
        if images is not None and len(ops) >= len(self._trace.ops):
            calls: dict[str, tuple[int, int]] = {}
            for module, (first, last) in preceded.items():
                known = calls.get(self._part(module), (first, last))
                calls[self._part(module)] = min(first, known[0]), max(last, known[1])
            self._trace = WindowTrace(tuple(ops.values()), images, calls)

    def _part(self, module: nn.Module) -> str:
        """The part of the model that makes the keys and queries of attention in a module, by name: the module, or what
        directly holds it, where that is named attention too. "" is the whole model."""
        name = "" if module is self.model else self.names[module]
        above = name.rpartition(".")[0]
        around = self._modules.get(above)
        if not above or around is None or isinstance(around, (nn.ModuleList, nn.Sequential)):
            return name
        return above if _is_named_attention(above, around) else name

    def _centred(self, layout: TokenLayout, seen: SeenCall, size: tuple[int, int]) -> TokenLayout:
        """A layout whose lattices stand where the model's windows put their tokens, on images of ``size``. Only the
        windows of the attention itself can have made the smaller of two lattices."""
        if self._hints[0] is not None:  # the user says where they stand
            return layout
        part, trace = self._part(seen.module), self._trace
        shape = seen.input_shape or ()
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

    def _lineage(self, module: nn.Module) -> list[nn.Module]:
        """The module and what it lies in, the innermost first, up to the children of the model."""
        parts = self.names[module].split(".")
        names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        return [self._modules[name] for name in names if name in self._modules]

    def _locating(self, is_pyramid: bool) -> Locate:
        if self._fields is None:
            self._fields = read_fields(self.model)
        fields = replace(self._fields, is_pyramid=is_pyramid)

        def locate(queries: int, keys: int, size: tuple[int, int] | None) -> tuple[TokenLayout | None, str | None]:
            try:
                return infer_layout(queries, size, fields, *self._hints, num_keys=keys), None
            except LayoutError as error:
                return None, str(error)

        return locate


def _name_pattern(name: str) -> str:
    """A module's name without the number of its block: blocks.3.attn is in the place of blocks.0.attn."""
    head, number, tail = re.match(r"(.*?)(\d*)(\D*)$", name, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{head}#{tail}" if number else name


def _is_named_attention(name: str, module: nn.Module) -> bool:
    called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return re.search(r"attn|attention|mhsa|\batt\b", called) is not None


def _may_attend(name: str, module: nn.Module) -> bool:
    """Whether a module is named attention and holds linear maps, which pooling in its place does not."""
    projects = any(isinstance(m, (nn.Linear, nn.MultiheadAttention)) for m in module.modules())
    return projects and _is_named_attention(name, module)
