"""What every host must show in training: shared by the tests of the host files, for small models and real checkouts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import os
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import acr_reg
from acr_reg.integrations.added_lines import Added, with_added_lines
from acr_reg.integrations.added_lines import added_lines as added_lines  # the tests take it from here
from tests.support.processes import FRESH

# ---------------------------------------------------------------- what training with the added lines must show


@dataclass
class Step:
    """What one call of the loss was given and returned."""

    layers: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    terms: dict[str, float]
    gradients: dict[str, float]  # of this loss alone, name of parameter -> l2 norm


@contextlib.contextmanager
def observed(watched: Callable[[], dict[str, Tensor]], weight: float | None = None) -> Iterator[list[Step]]:
    """Every ``AllPairsConsistencyLoss`` made inside notes what it sees; ``weight`` sets all its weights."""
    steps: list[Step] = []

    class Observed(acr_reg.AllPairsConsistencyLoss):
        def __init__(self, view=None, activation_weight=None, affinity_weight=None, cam_weight=None, **options):
            if weight is not None:
                activation_weight = affinity_weight = cam_weight = weight
            super().__init__(view, activation_weight, affinity_weight, cam_weight=cam_weight, **options)

        def forward(self, attn_a, attn_b, cam_a=None, cam_b=None, **options):
            loss, terms = super().forward(attn_a, attn_b, cam_a, cam_b, return_terms=True, **options)
            norms = {}
            if weight is None:
                parameters = watched()
                found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
                norms = {name: 0.0 if g is None else g.norm().item() for name, g in zip(parameters, found, strict=True)}
            assert attn_a.layers == attn_b.layers
            shapes = tuple(layer.shape for layer in attn_a)
            steps.append(Step(attn_a.layers, shapes, {k: v.item() for k, v in terms.items()}, norms))
            return loss

    original = acr_reg.AllPairsConsistencyLoss
    acr_reg.AllPairsConsistencyLoss = Observed
    try:
        yield steps
    finally:
        acr_reg.AllPairsConsistencyLoss = original


def check_training(
    build: Callable[[], nn.Module],
    train: Callable[[nn.Module, bool], None],
    *,
    layers: int,
    watched: Callable[[str], bool],
    terms: frozenset[str] = frozenset({"activation", "affinity", "cam", "entropy"}),
    calls: int = 1,
) -> list[Step]:
    """``train(model, patched)`` takes two optimizer steps of the host's own loop, with or without the added lines;
    ``watched`` names the query and key weights; ``calls`` of the loss, one for each encoder, reach them together."""

    def trained(patched: bool, weight: float | None = None) -> tuple[list[Step], dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = build()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.manual_seed(1)
        with observed(lambda: {n: p for n, p in model.named_parameters() if watched(n)}, weight) as steps:
            train(model, patched)
        return steps, before, {name: p.detach() for name, p in model.named_parameters()}

    steps, before, after = trained(True)
    assert len(steps) == 2 * calls, f"{len(steps)} calls of the loss in two optimizer steps"
    for step in steps:
        assert step.layers == tuple(range(layers)), step.layers
        assert step.terms.keys() == terms, step.terms
        assert all(0 < value < float("inf") for value in step.terms.values()), step.terms
    assert steps[0].gradients, "no query or key weight is watched"
    reached = {name: [step.gradients[name] > 0 for step in steps[:calls]] for name in steps[0].gradients}
    assert all(sum(by_call) == 1 for by_call in reached.values()), reached
    moved = [name for name in steps[0].gradients if not torch.equal(before[name], after[name])]
    assert moved == list(steps[0].gradients)

    plain_steps, _, plain = trained(False)
    assert plain_steps == []
    zero_steps, _, zero = trained(True, weight=0.0)
    assert len(zero_steps) == 2 * calls
    different = [name for name in plain if not torch.equal(plain[name], zero[name])]
    assert different == [], f"weights 0 changed {different[:4]}"
    assert any(not torch.equal(plain[name], after[name]) for name in plain)
    return steps


def maps_of_first_loss(model: nn.Module, train: Callable[[nn.Module, bool], object]) -> list[Tensor]:
    """Of each view, the maps of all layers that the first loss of ``train``, with the added lines, was given."""
    taken: list[Tensor] = []

    class Noting(acr_reg.AllPairsConsistencyLoss):
        def forward(self, attn_a, attn_b, *rest, **options):
            if not taken:
                taken.extend(torch.stack([m.weights().detach() for m in attn]) for attn in (attn_a, attn_b))
            return super().forward(attn_a, attn_b, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acr_reg, "AllPairsConsistencyLoss", Noting)
        train(model, True)
    return taken


# ---------------------------------------------------------------- a block of timm's names, for small models of a host


class Block(nn.Module):
    """Unfused attention behind a norm, its output dropped for some images in training, as drop_path does."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        query, key, value = self.attn.qkv(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        keep = (torch.rand(len(x), 1, 1) > 0.1) / 0.9 if self.training else 1.0
        return x + keep * (weights @ value).transpose(1, 2).flatten(2)


def is_query_and_key(name: str) -> bool:
    return ".attn.qkv.weight" in name


# ---------------------------------------------------------------- checkouts


def checkout(name: str, commit: str) -> Path:
    """The folder of a host's checkout, owner+name or owner+name@commit, at that commit; skips without ACR_REG_HOSTS."""
    root = os.environ.get("ACR_REG_HOSTS")
    if not root:
        pytest.skip(f"set ACR_REG_HOSTS to a folder that holds a checkout of {name} at {commit} to run this")
    folder = name.replace("/", "+")
    for candidate in (Path(root) / f"{folder}@{commit}", Path(root) / folder):
        if candidate.is_dir():
            head = subprocess.run(
                ["git", "-C", str(candidate), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
            ).stdout
            if head.startswith(commit):
                return candidate
    pytest.skip(f"ACR_REG_HOSTS={root} holds no checkout of {name} at {commit}, as {folder} or {folder}@{commit}")


def in_fresh_process(function: Callable[..., object], *arguments: object) -> object:
    """Hosts overwrite timm's registry and import modules of common names (models, utils): not in this process."""
    with concurrent.futures.ProcessPoolExecutor(1, FRESH) as pool:
        return pool.submit(function, *arguments).result()


def host_on_path(folder: Path, absent: tuple[str, ...] = ()) -> None:
    """In a fresh process: the host's modules can be imported, without CUDA and without the ``absent`` packages, which
    its training step does not call."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(folder))
    for name in absent:
        sys.modules[name] = Absent(name)
    torch.Tensor.cuda = lambda self, *_, **__: self
    nn.Module.cuda = lambda self, *_, **__: self
    torch.cuda.synchronize = lambda *_: None


class Absent(types.ModuleType):
    """In place of a package that is imported and not called."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


# ---------------------------------------------------------------- the lines that a host file's docstring adds


def patched_module(folder: Path, file: str, lines: list[Added] | None, as_name: str | None = None) -> types.ModuleType:
    """The host's file as a module, with the lines added; None leaves it as it is. ``as_name="__main__"`` runs it."""
    path = folder / file
    source = path.read_text(encoding="utf-8")
    name = file.removesuffix(".py").replace("/", ".")
    package = name.rpartition(".")[0]
    if package:
        importlib.import_module(package)
    module = types.ModuleType(as_name or name)
    module.__file__ = str(path)
    module.__package__ = package
    exec(compile(source if lines is None else with_added_lines(source, lines), str(path), "exec"), module.__dict__)
    return module


# ---------------------------------------------------------------- two ranks

Gradients = dict[str, Tensor]


def gradients_of_two_ranks(*calls: tuple[Any, ...]) -> list[list[list[Gradients]]]:
    """For each call (function, *arguments): of both ranks, the gradients together with the other and alone.

    ``function(data, *arguments)`` starts the process group itself and returns the gradients (name -> tensor) of one
    step on the data of that number, another for each rank."""
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in calls]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in free]
    with concurrent.futures.ProcessPoolExecutor(2, FRESH) as pool:
        ranks = [pool.submit(_together_and_alone, rank, ports, calls) for rank in (0, 1)]
        found = [rank.result(timeout=900) for rank in ranks]
    return [list(of_call) for of_call in zip(*found, strict=True)]


def _together_and_alone(rank: int, ports: list[int], calls: tuple[tuple[Any, ...], ...]) -> list[list[Gradients]]:
    torch.set_num_threads(1)
    found: list[list[Gradients]] = []
    for port, (function, *arguments) in zip(ports, calls, strict=True):
        found.append([])
        for place, world, at in ((rank, 2, port), (0, 1, 0)):
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(at), RANK=str(place), WORLD_SIZE=str(world))
            found[-1].append(function(10 + rank, *arguments))
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return found


def check_mean_of_ranks(found: list[list[Gradients]]) -> None:
    """Of two ranks, each with data of its own, both must have the mean of what each has alone."""
    (together, alone), (other, other_alone) = found
    assert together.keys() == other.keys() == alone.keys() == other_alone.keys() != set()
    assert any(not torch.equal(alone[name], other_alone[name]) for name in alone), "both ranks had the same data"
    for name, gradient in together.items():
        assert torch.equal(gradient, other[name]), f"{name} differs between ranks"
        mean = (alone[name] + other_alone[name]) / 2
        error = (gradient - mean).norm() / mean.norm().clamp_min(1e-12)
        assert error < 1e-3, f"{name}: {error:.1e} off the mean of both"
