"""Reads the images of a run ahead of their use, in worker processes if asked. An error fails its image alone."""

from __future__ import annotations

import gc
import pickle
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset


class StopRun(RuntimeError):
    """Raised when the next image would fail in the same way."""


@dataclass(frozen=True)
class Failure:
    """Why an image is skipped. ``blame`` names the argument whose code failed, if not the file alone."""

    text: str
    blame: str = ""


def failure_of(error: Exception, blame: str = "") -> Failure:
    reason = str(error)
    if isinstance(error, MemoryError) and not reason:
        reason = "The memory is too small for this image. Use fewer workers, or make the image smaller."
    return Failure(reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}", blame)


@contextmanager
def reading(names: Sequence[str], read: Callable[[str], Any], workers: int) -> Iterator[Iterator[tuple[str, Any]]]:
    """Yields an iterator of (name, ``read(name)`` or its :class:`Failure`), in order. The workers start at once, before
    the caller starts threads, which a fork would copy in any state. They end with the context.

    Raises:
        ValueError: ``workers`` is negative, or ``read`` cannot be sent to them.
        StopRun: ``read`` raised it, or a worker died.
    """
    if workers < 0:
        raise ValueError(f"workers={workers} is negative. Pass the number of worker processes; 0 reads in this one.")
    results = _Results(names, read)
    here = map(results.__getitem__, range(len(names)))
    with closing(_items(names, _started(results, workers) if workers and names else here)) as items:
        yield items


@dataclass(frozen=True)
class _Stop:
    text: str


class _Results(Dataset[Any]):
    def __init__(self, names: Sequence[str], read: Callable[[str], Any]) -> None:
        self.names, self.read = names, read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(self.names[index])
        except StopRun as error:  # a worker's exception would arrive inside a text of DataLoader
            return _Stop(str(error))
        except Exception as error:
            return failure_of(error)


def _as_it_is(item: Any) -> Any:
    return item


def _started(results: _Results, workers: int) -> Iterator[Any]:
    with warnings.catch_warnings():
        # The number of workers is the user's choice; and they may run beside threads of torch, as always.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        warnings.filterwarnings("ignore", "Got pickle error", UserWarning)  # the error itself is worded below
        try:
            return iter(DataLoader(results, None, num_workers=min(workers, len(results)), collate_fn=_as_it_is))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"The worker processes could not start: {error}. Define your functions at the top of a module, or pass "
                "workers=0."
            ) from error


def _items(names: Sequence[str], results: Iterator[Any]) -> Generator[tuple[str, Any], None, None]:
    interrupted = False
    for name in names:
        try:
            result = next(results)
        except KeyboardInterrupt:
            interrupted = True
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).rstrip(".")
            result = _Stop(f"A worker died: {reason}. Memory, or /dev/shm, may be too small: pass fewer workers=.")
        if interrupted:
            # Raised anew, since the traceback of the first holds the workers, which end with the last reference.
            del results
            gc.collect()  # some versions of torch leave a cycle
            raise KeyboardInterrupt
        if isinstance(result, _Stop):
            del results
            raise StopRun(result.text)
        yield name, result
