"""Which modules a model has, and which of them attend."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import nn

from acr_reg._torch_private import BatchNorm, children_of, is_compiled, is_exported, is_replica
from acr_reg.errors import CaptureError, listed


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm module of a model, whichever kind."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def refuse_traced(model: nn.Module) -> None:
    """Raises for modules whose kernels hooks do not see: their layers would be missing silently."""
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
                    f"{name or 'The model'} ({type(module).__name__}) is {kind}: hooks do not see its kernels. Capture "
                    "the original model and run that."
                )


def _named(model: nn.Module, module: str | nn.Module) -> nn.Module:
    known = dict(model.named_modules())
    found = known.get(module) if isinstance(module, str) else module
    if found is None or not any(found is m for m in known.values()):
        raise ValueError(
            f"{module!r} is not a module of {type(model).__name__}. Pass modules= by names of model.named_modules(), "
            f"such as {[name for name in known if name][:4]}."
        )
    return found


class ModuleIndex:
    """The modules of one model when the capture began, and the modules in which attention was seen since."""

    def __init__(self, model: nn.Module, within: Iterable[str | nn.Module] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the model itself.")
        refuse_traced(model)
        self.model = model
        self.names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self.registered = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.attending: set[nn.Module] = set()
        self._modules = dict(model.named_modules())
        parts = None if within is None else listed("modules", within)
        self._within = None if parts is None else {m for part in parts for m in _named(model, part).modules()}
        self.likely = {
            module for module, name in self.names.items() if self.counts(module) and _may_attend(name, module)
        }
        self._batch_norms = batch_norms(model)
        self._alike: set[nn.Module] | None = None
        self._children = {module: children_of(module) for module in self.names}
        self._parents = 0, set[nn.Module]()  # how many attended, and what holds them

    def counts(self, module: nn.Module) -> bool:
        """Whether attention in this module was asked for."""
        return self._within is None or module in self._within

    def training_batch_norms(self) -> list[str]:
        return [self.names[m] for m in self._batch_norms if m.training]

    def alike(self) -> set[nn.Module]:
        """The modules that resemble an attending one: same class, or same name in another block."""
        if self._alike is None or not self.attending <= self._alike:
            attending = list(self.attending)  # at once, because other threads add to it
            kinds = {type(m) for m in attending}
            places = {_name_pattern(self.names[m]) for m in attending}
            self._alike = {
                module
                for module, name in self.names.items()
                if self.counts(module)
                and (type(module) in kinds or (module in self.likely and _name_pattern(name) in places))
            }
        return self._alike

    def joined(self) -> list[str]:
        """Modules that may be attention and joined after the capture began, so without hooks. Only the children of the
        modules that hold attention are searched."""
        attending = list(self.attending)  # at once, because other threads add to it
        count, parents = self._parents
        if len(attending) != count:
            parents = {self.model, *(above for m in attending for above in self.lineage(m)[1:])}
            self._parents = len(attending), parents
        if all(children_of(parent) == self._children[parent] for parent in parents):
            return []
        kinds = {type(m) for m in attending}
        return [
            name
            for name, module in self.model.named_modules()
            if module not in self.names and (type(module) in kinds or _may_attend(name, module))
        ]

    def beside(self, silent: set[nn.Module], fired: Iterable[nn.Module]) -> list[str]:
        """The ``silent`` modules that may be attention by name and are not part of one that ``fired``."""
        seen = [f"{self.names[m]}." for m in fired]
        names = [self.names[m] for m in silent & self.likely]
        return [name for name in names if not any(name.startswith(other) for other in seen)]

    def named_attention(self) -> list[str]:
        return [f"{n} ({type(m).__name__})" for m, n in self.names.items() if _is_named_attention(n, m)]

    def part(self, module: nn.Module) -> str:
        """The name of the part that makes a module's queries and keys: the module, or its parent if that is named
        attention too. "" is the whole model."""
        name = "" if module is self.model else self.names[module]
        above = name.rpartition(".")[0]
        around = self._modules.get(above)
        if not above or around is None or isinstance(around, (nn.ModuleList, nn.Sequential)):
            return name
        return above if _is_named_attention(above, around) else name

    def pattern(self, module: nn.Module) -> str:
        """The module's name without its block number."""
        return _name_pattern(self.names[module])

    def lineage(self, module: nn.Module) -> list[nn.Module]:
        """The module and the modules that hold it, innermost first, up to the children of the model."""
        parts = self.names[module].split(".")
        names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        return [self._modules[name] for name in names if name in self._modules]


@lru_cache(maxsize=4096)  # asked for each attention call that the first run told nothing of
def _name_pattern(name: str) -> str:
    """A module's name without its block number, so that blocks.3.attn equals blocks.0.attn."""
    head, number, tail = re.match(r"(.*?)(\d*)(\D*)$", name, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{head}#{tail}" if number else name


def _is_named_attention(name: str, module: nn.Module) -> bool:
    called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return re.search(r"attn|attention|mhsa|\batt\b", called) is not None


def _may_attend(name: str, module: nn.Module) -> bool:
    """Whether a module is named attention and holds linear maps; pooling in its place holds none."""
    projects = any(isinstance(m, (nn.Linear, nn.MultiheadAttention)) for m in module.modules())
    return projects and _is_named_attention(name, module)
