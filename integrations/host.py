"""What the files of all host codebases share: the host runs the first view itself, and the second is run beside it.

Each file of a host family has the same three functions:

- ``capture(model)`` starts the capture of the host's encoder and returns a :class:`HostCapture`;
- ``second_view(host, images)`` runs what the loss needs on the other view and returns a :class:`HostView`;
- ``cams(view)`` is the host's own class map of a view, (B, C, h, w), on the graph.

In the host's training loop, ``first = host.take()`` follows the host's forward pass, then ``second_view`` and the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acr_reg import AttentionCapture, AttentionMaps
from acr_reg.capture.hooks import HookSet, is_recomputing
from acr_reg.capture.removable import Removable
from acr_reg.errors import CaptureError

Keep = Literal["only", "first", "last", "all"]


@dataclass(frozen=True)
class HostView:
    """What one view's forward pass left. Delete it after ``backward``: it holds the graph.

    ``features`` is the tensor that the host's class maps are made of, with its graph; None where the host has none.
    ``output`` is what the forward pass returned, known for second views. ``network`` is the host's model without DDP.
    """

    attention: AttentionMaps
    features: Tensor | None
    output: Any
    network: nn.Module


class HostCapture(Removable):
    """A running capture of a host's encoder, and of one tensor beside it. Made by ``capture`` of a host's file."""

    def __init__(self, model: nn.Module, attention: AttentionCapture, features: FeatureRecorder | None = None) -> None:
        self.model = model
        """The model as it was given, which may be DistributedDataParallel."""
        self.network = unwrap(model)
        self._attention = attention
        self._features = features
        # Drawing the second view's dropout from the host's own numbers would change every later step of the host.
        self._seeds = torch.Generator().manual_seed(torch.initial_seed() % 2**62 + _rank())

    def take(self, run: int | None = None) -> HostView:
        """What the host's forward pass left since the last take, on its graph; with ``keep="all"``, ``run`` says which
        of several. Raises ``CaptureError`` where there was no such pass: none at all, or under ``torch.no_grad``, or
        one that did not reach the host's class maps."""
        return self._view(None, None, run)

    def run(self, forward: Callable[[], Any], features: Callable[[Any], Tensor] | None = None) -> HostView:
        """The view that ``forward()`` computes, with dropout and stochastic depth drawn from numbers of its own: the
        host's go on as if it had not run. ``features(output)`` is for a pass that ends below the watched module."""
        self.clear()
        with self._numbers_of_its_own():
            output = forward()
        return self._view(output, None if features is None else features(output))

    def _view(self, output: Any, features: Tensor | None, run: int | None = None) -> HostView:
        try:
            attention = self._attention.take(run)
            if features is None and self._features is not None:
                features = self._features.take(run)
            return HostView(attention, features, output, self.network)
        finally:
            self.clear()

    def clear(self) -> None:
        """Forgets what was not taken, for instance after an exception in a training step."""
        self._attention.clear()
        if self._features is not None:
            self._features.clear()

    def remove(self) -> None:
        """Removes every hook. May be called again."""
        self._attention.remove()
        if self._features is not None:
            self._features.remove()

    @contextmanager
    def _numbers_of_its_own(self) -> Iterator[None]:
        devices = {p.device for p in self.network.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self._seeds)))
            yield


class FeatureRecorder:
    """The tensor that ``module`` returned, or was given first, in the last pass (``keep="first"``: the first one;
    "all": the one that ``take`` names) that has a graph. ``pick`` takes it out of a module's result that is no tensor.
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
        # Under no_grad hosts compute their pseudo labels; within backward, checkpointing repeats a pass.
        if not torch.is_grad_enabled() or is_recomputing():
            return
        if self._keep == "all":
            self._found.append(tensor)
        elif self._keep != "first" or not self._found:
            self._found = [tensor]

    def take(self, run: int | None = None) -> Tensor:
        """``run`` counts passes that reach the module: with ``keep="all"``, each run of the encoder has to."""
        found, self._found = self._found, []
        index = 0 if run is None or self._keep != "all" else run
        if not -len(found) <= index < len(found):
            raise CaptureError(
                f"found a pass through the encoder that did not reach {self._name}, of which the host's class maps are "
                "made; expected the host's whole forward pass; take() right after it"
            )
        return found[index]

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
    """(B, H, W), True inside of ``boxes`` (B, 4) of top, bottom, left, right, as data sets give them that pad small
    photos to the crop (AFA, ToCo and their heirs): the ``valid`` of the loss."""
    sides = boxes.to(images.device).unflatten(1, (2, 2))
    held = []
    for axis, size in enumerate(images.shape[-2:]):
        at = torch.arange(size, device=images.device)
        held.append((at >= sides[:, axis, :1]) & (at < sides[:, axis, 1:]))
    return held[0].unsqueeze(2) & held[1].unsqueeze(1)


def part(network: nn.Module, name: str, family: str) -> nn.Module:
    """The submodule of that name, or a clear error for a model of another family."""
    found = dict(network.named_modules()).get(name)
    if found is None:
        raise ValueError(
            f"found a {type(network).__name__} without {name!r}; expected a model of the {family} family; call capture "
            "of the file that serves this host (README, table of hosts), or capture_attention where none does"
        )
    return found
