"""Random numbers of its own for a block of code, on whichever devices the code draws them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Inside the block torch draws the numbers of ``seed``; afterwards every device goes on as before.

    It keeps all devices in use, because an offloaded model computes where it holds no parameter.
    ``torch.random.fork_rng`` keeps one kind of device, and warns if there are several GPUs.
    """
    of_cpu = torch.get_rng_state()
    kept = [(module, number, module.get_rng_state(*number)) for module, number in _generators()]
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds devices that are not in use yet
        for module in {module for module, *_ in kept}:
            getattr(module, "manual_seed_all", module.manual_seed)(seed)
        yield
    finally:
        torch.set_rng_state(of_cpu)
        for module, number, state in kept:
            module.set_rng_state(state, *number)


def _generators() -> Iterator[tuple[Any, tuple[int, ...]]]:
    """For each generator of a device: the module of torch that has its state, and the device's number if it counts."""
    for name in ("cuda", "xpu"):
        module = getattr(torch, name, None)  # torch 2.1 has no xpu
        if module is not None and module.is_initialized():
            yield from ((module, (number,)) for number in range(module.device_count()))
    if torch.backends.mps.is_available():
        yield torch.mps, ()
