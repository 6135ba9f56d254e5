"""Runs a function in two processes that talk by gloo on the CPU, and brings its results back."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.processes import METHOD

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(rank)``, a function of a module, returns on each rank: tensors, texts and numbers in containers."""
    torch.multiprocessing.start_processes(_run, (work, folder), nprocs=2, start_method=METHOD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _run(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(work(rank), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that this rank may hold as a part, gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of a tensor from the expected one of its name, relative to that one.

    Those that are 0 but for rounding, as the gradient of a key's bias, count relative to the largest.
    """
    assert found.keys() == expected.keys()
    norms = {name: tensor.norm().item() for name, tensor in expected.items()}
    least = 1e-6 * max(norms.values())
    assert least > 0
    return max((found[name] - expected[name]).norm().item() / max(norms[name], least) for name in expected)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
