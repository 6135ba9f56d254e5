"""nn.DataParallel where devices are not at hand."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from tests.support.capturing import modes


def replica_of(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module for each device, where devices are at hand."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters(recurse=False):
        replica._parameters.pop(name, None)
        setattr(replica, name, parameter.clone())
    for name, child in module.named_children():
        replica._modules[name] = replica_of(child)
    return replica


class Parallel(nn.Module):
    """nn.DataParallel with one worker, on the device at hand."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        replica, results = replica_of(self.module), []

        def work() -> None:
            try:
                results.append(replica(x))
            except BaseException as error:
                results.append((error, modes()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(results[0], tuple):
            error, left = results[0]
            assert left == 0, "a mode was left behind on the worker"
            raise error
        return results[0]
