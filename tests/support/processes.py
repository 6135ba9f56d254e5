"""Fresh processes that need not import torch again: a server that only imported forks them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import warnings
from multiprocessing import reduction
from pathlib import Path

import torch

from tests.support.paths import ROOT

# Importing torch takes 2 s, with timm 5 s. Forking this process would take no time either, but autograd refuses to run
# in the child of a process that ran it. Not acr_reg: the server would take it from the working folder.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
FRESH = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    FRESH.set_forkserver_preload(["torch.distributed.run", "torch.distributed.fsdp", "timm", "rich.progress"])


class Program:
    """``python ARGUMENTS`` in such a process, in the place of ``subprocess.Popen``.

    ``-W error`` or nothing, then ``-m MODULE``, ``-c CODE`` or the path of a script, then what it is given. A variable
    that is None is taken out of the environment. ``stderr`` is the descriptor of a terminal; without it,
    ``communicate`` returns what was written."""

    def __init__(
        self, *arguments: object, cwd: Path = ROOT, stderr: int | None = None, **variables: str | None
    ) -> None:
        self._output: list[str] = []
        self._files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        outputs = [_Handed(self._files[0].fileno()), _Handed(stderr or self._files[1].fileno())]
        wanted = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
        self._process = FRESH.Process(target=_run, args=([str(a) for a in arguments], cwd, wanted, outputs))
        self._process.start()
        self.wait, self.kill = self._process.join, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float = 100) -> tuple[str, str]:
        """Standard output and error, once the process has ended."""
        self.wait(timeout)
        assert self.returncode is not None, f"the process has not ended after {timeout:g} s"
        if not self._output:
            for file in self._files:
                with file:
                    file.seek(0)
                    self._output.append(file.read())
        out, err = self._output
        return out, err


class _Handed:
    """A descriptor of this process, which is a number of its own in the one that it is sent to."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(sent: reduction.DupFd) -> int:
    return sent.detach()


def programs(world: int, *arguments: object, port: int = 0, cwd: Path = ROOT, **variables: str | None) -> list[Program]:
    """As many of them, with the variables that torchrun sets; torchrun itself is one more process that loads torch."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [Program(*arguments, cwd=cwd, **{**shared, **rank, **variables}) for rank in ranks]


def free_port() -> int:
    """A port of this machine at which processes can meet."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def _run(arguments: list[str], cwd: Path, variables: dict[str, str], outputs: list[int]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
        os.close(output)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
    if "OMP_NUM_THREADS" in variables:  # which torch reads when it is loaded
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    multiprocessing.set_start_method(None, force=True)  # this process was told to start its own as it was
    if arguments[:2] == ["-W", "error"]:
        del arguments[:2]
        warnings.simplefilter("error")
    sys.argv = arguments[1:] if arguments[0].startswith("-") else arguments
    if arguments[0] == "-c":
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
