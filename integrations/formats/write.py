"""Writes files that nobody sees unfinished, and numpy files that hold a pickle, so that old versions open them."""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")
_SECONDS_OF_A_WRITE = 600.0  # no file takes longer


def write_object(file: BinaryIO, content: dict[Any, Any]) -> None:
    """``content`` as np.save would write it."""
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(file, header)
    # numpy 2 writes names under numpy._core, which numpy 1 (codebases of the torch 1.7 era) cannot import. The old
    # names work in both. In pickle protocol 3 names are lines of text, so they can be replaced.
    data = pickle.dumps(np.array(content, dtype=object), protocol=3)
    file.write(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which replaces it at the end: an old file stays until the new one is
    whole. On an error no new file stays. The folder must exist."""
    unfinished = path.with_name(f".{path.name[:20]}.{uuid4().hex}")  # names are limited to 255 bytes, on some disks 143
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:  # else a machine that loses power may keep the name without the content
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk does not say where
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of :func:`replacing`. Younger files stay: another run may be writing them."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            with suppress(OSError):  # another run removed it, or may not write here
                if time.time() - path.stat().st_mtime > _SECONDS_OF_A_WRITE:
                    path.unlink()
