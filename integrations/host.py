"""The code that all host files share: the host runs the first view itself, and the second view runs beside it.

Each host file serves a family of hosts with the same three functions:

- ``capture(model)`` starts the capture of the host's encoder and returns a :class:`HostCapture`;
- ``second_view(host, images)`` runs what the loss needs on the second view and returns a :class:`HostView`;
- ``cams(view)`` returns the host's own class map of a view, (B, C, h, w), on the graph.

In the host's training loop, call ``first = host.take()`` after the host's forward pass, then ``second_view`` and the
loss. The docstring of each file lists its hosts and the lines to add; ``acr_reg.integrations.added_lines`` reads it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from acr_reg import AttentionCapture, AttentionMaps
from acr_reg.capture.evaluation import state_kept
from acr_reg.capture.handle import Removable
from acr_reg.capture.hooks import HookSet, is_recomputing
from acr_reg.errors import CaptureError
from acr_reg.random_numbers import own_random_numbers

Keep = Literal["only", "first", "last", "all"]


@dataclass(frozen=True)
class HostView:
    """The results of one view's forward pass. Delete them after ``backward``, because they hold the graph.

    ``features`` is the tensor that the host computes its class maps from, on the graph, or None if there is none.
    ``output`` is the result of the forward pass, None for the first view. ``network`` is the host's model without DDP.
    """

    attention: AttentionMaps
    features: Tensor | None
    output: Any
    network: nn.Module


class HostCapture(Removable):
    """A running capture of a host's encoder and of one more tensor. The ``capture`` of a host file makes it."""

    def __init__(self, model: nn.Module, attention: AttentionCapture, features: FeatureRecorder | None = None) -> None:
        self.model = model
        """The model that the caller passed, perhaps wrapped in DistributedDataParallel."""
        self.network = unwrap(model)
        self._attention = attention
        self._features = features
        # The second view's dropout has its own generator: drawing from the host's would change every later step.
        self._seeds = torch.Generator().manual_seed(torch.initial_seed() % 2**62 + _rank())

    def take(self, run: int | None = None) -> HostView:
        """The results of the host's forward pass since the last take, on the graph. With ``keep="all"``, ``run`` picks
        one of several passes. Raises ``CaptureError`` if there was no pass, if the pass ran under ``torch.no_grad``, or
        if it did not reach the host's class maps."""
        return self._view(None, None, run)

    def run(self, forward: Callable[[], Any], features: Callable[[Any], Tensor] | None = None) -> HostView:
        """Runs ``forward()`` and returns its view. If the pass does not reach the module whose tensor is recorded, pass
        ``features``, which gets that tensor from the output.

        Afterwards the host continues as if nothing had run. Dropout and stochastic depth draw from separate generators
        (torch, numpy and ``random``). The pass works on copies of all buffers, such as BatchNorm's running statistics,
        spectral norm's vectors and a queue of keys; DDP broadcasts into the copies. Attributes that the pass assigns to
        modules are set back. Three things are not undone: writes into parameters (a momentum encoder), writes into
        lists that a module holds, and effects of activation checkpointing, which repeats the pass in backward."""
        self.clear()
        with self._numbers_of_its_own(), state_kept(self.model):
            output = forward()
            found = None if features is None else features(output)
        return self._view(output, found)

    def _view(self, output: Any, features: Tensor | None, run: int | None = None) -> HostView:
        try:
            attention = self._attention.take(run)
            if features is None and self._features is not None:
                features = self._features.take(run)
            return HostView(attention, features, output, self.network)
        finally:
            self.clear()

    def clear(self) -> None:
        """Forgets passes that were not taken, for instance after an exception in a training step."""
        self._attention.clear()
        if self._features is not None:
            self._features.clear()

    def remove(self) -> None:
        """Removes all hooks. You may call it again."""
        self._attention.remove()
        if self._features is not None:
            self._features.remove()

    @contextmanager
    def _numbers_of_its_own(self) -> Iterator[None]:
        seed = int(torch.randint(2**62, (), generator=self._seeds, device="cpu"))
        of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what hosts draw from)
        with own_random_numbers(seed):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            try:
                yield
            finally:
                random.setstate(of_python)
                np.random.set_state(of_numpy)  # noqa: NPY002


class FeatureRecorder:
    """Records the tensor that ``module`` returns in a pass with a graph, or its first argument with ``what="input"``.

    ``keep`` works as in :func:`~acr_reg.capture_attention`. ``pick`` gets the tensor from a result of another type.
    """

    def __init__(
        self,
        module: nn.Module,
        what: Literal["input", "output"] = "output",
        keep: Keep = "only",
        pick: Callable[[Any], Tensor] = lambda result: result,
    ) -> None:
        self._name = f"the {what} of its {type(module).__name__}"
        self._what = what
        self._keep = keep
        self._pick = pick
        self._found: list[Tensor] = []
        self._hooks = HookSet(self)
        self._hooks.watch_only([module])

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        if self._what == "input":
            self._see(args[0])

    def left(self, module: nn.Module, result: Any, failed: bool) -> None:
        if self._what == "output" and not failed:
            self._see(self._pick(result))

    def _see(self, tensor: Tensor) -> None:
        # Hosts compute their pseudo labels under no_grad, and checkpointing repeats a pass within backward.
        if not torch.is_grad_enabled() or is_recomputing():
            return
        if self._keep == "all":
            self._found.append(tensor)
        elif self._keep != "first" or not self._found:
            self._found = [tensor]

    def take(self, run: int | None = None) -> Tensor:
        """The tensor of one pass. With ``keep="all"``, ``run`` counts the passes that reached the module, so each run
        of the encoder must reach it."""
        found = self.take_all()
        index = 0 if run is None or self._keep != "all" else run
        if not -len(found) <= index < len(found):
            raise CaptureError(
                f"A pass through the encoder did not reach {self._name}, which makes the class maps. Call take() right "
                "after the host's whole forward."
            )
        return found[index]

    def take_all(self) -> list[Tensor]:
        """The tensors recorded since the last take. There may be none."""
        found, self._found = self._found, []
        return found

    def clear(self) -> None:
        self._found = []

    def remove(self) -> None:
        self.clear()
        self._hooks.remove()


def _rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or DataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel):
        model = model.module
    return model


def inside(boxes: Tensor, images: Tensor) -> Tensor:
    """The pixels inside each image's box, for the loss's ``valid``: (B, H, W), True inside.

    ``boxes`` (B, 4) holds top, bottom, left and right. Data sets that pad small photos to the crop return such boxes
    (AFA, ToCo and the hosts built on them).
    """
    sides = boxes.to(images.device).unflatten(1, (2, 2))
    held = []
    for axis, size in enumerate(images.shape[-2:]):
        at = torch.arange(size, device=images.device)
        held.append((at >= sides[:, axis, :1]) & (at < sides[:, axis, 1:]))
    return held[0].unsqueeze(2) & held[1].unsqueeze(1)


def part(network: nn.Module, name: str, family: str) -> nn.Module:
    """The submodule of that name. Raises ValueError if there is none, because the model is of another family."""
    found = dict(network.named_modules()).get(name)
    if found is None:
        raise ValueError(
            f"{type(network).__name__} has no {name!r}, unlike the {family} family. Use the host file for it "
            "(docs/hosts), or capture_attention."
        )
    return found
