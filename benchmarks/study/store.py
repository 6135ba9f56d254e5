"""Results on disk, and the rules that keep test.txt for last.

A result is written once, complete, and never computed again. A test cell needs a committed frozen.json that names its
setting, reading and seed, and it is refused if its result exists.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.settings import Cell, Reading, Setting, StudyError

FROZEN = "frozen.json"
BASELINES = "baselines"


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path} is no result of this study ({error}). If it is a dev or train cell, delete it and run the cell "
            "again."
        ) from error


def load(results: Path, cell: Cell) -> dict[str, Any] | None:
    """The cell's result; None if there is none yet. Raises StudyError if the file holds that of another cell."""
    path = results / cell.file
    if not path.exists():
        return None
    found = read_json(path)
    if Setting(**found["setting"]) != cell.setting or found["seed"] != cell.seed:  # older files lack newer fields
        raise StudyError(
            f"{path} holds seed {found['seed']} of {found['setting']}, not seed {cell.seed} of {asdict(cell.setting)}: "
            "the defaults have changed since. Move the file away."
        )
    if cell.split != "dev" and found["reading"] != asdict(cell.reading):
        raise StudyError(
            f"{path} has the reading {found['reading']}, not {asdict(cell.reading)}. A cell has one reading. Use the "
            "frozen one."
        )
    return found


def all_cells(results: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for path in sorted(results.glob("*/*/*-s*.json")):
        found = read_json(path)
        yield Cell(Setting(**found["setting"]), found["seed"], found["split"], Reading(**found["reading"])), found


@contextmanager
def claimed(cache: Path, cell: Cell) -> Iterator[bool]:
    """Yield whether this process may run the cell: no other runs it, on any split, because all splits share the network
    that one process trains. A claim ends with its process."""
    path = cache / "claims" / cell.setting.network / f"{cell.setting.photos}-{cell.setting.slug}-s{cell.seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


# ------------------------------------------------------------ the rules of test.txt


def frozen(results: Path) -> dict[str, Any]:
    """The frozen settings, as committed."""
    path = results / FROZEN
    if not path.exists():
        raise StudyError(
            f"{path} does not exist. Choose settings by dev cells, freeze and commit them, then score test.txt."
        )
    if _git(path, "ls-files", "--error-unmatch", path.name) != 0:
        raise StudyError(f"{path} is not committed. Commit it before test.txt is scored.")
    if _git(path, "diff", "--quiet", "HEAD", "--", path.name) != 0:
        raise StudyError(
            f"{path} has changed since it was committed. Restore the committed file before scoring test.txt."
        )
    return read_json(path)


def frozen_entries(results: Path) -> list[dict[str, Any]]:
    """The entries of frozen.json, committed or not; none if there is no such file yet."""
    path = results / FROZEN
    return read_json(path)["cells"] if path.exists() else []


def frozen_setting(results: Path, photos: str, condition: str) -> Setting | None:
    """The setting of a condition in frozen.json; None if it is not frozen yet."""
    settings = [Setting(**entry["setting"]) for entry in frozen_entries(results)]
    return next((found for found in settings if (found.photos, found.condition) == (photos, condition)), None)


def _git(path: Path, *arguments: str) -> int:
    return subprocess.run(["git", *arguments], cwd=path.parent, capture_output=True).returncode


def frozen_cells(results: Path, plan: str | None = None) -> list[Cell]:
    """The test cells that may be scored, of one plan ("primary", "main") or of all."""
    return [
        Cell(Setting(**entry["setting"]), seed, "test", Reading(**entry["reading"]))
        for entry in frozen(results)["cells"]
        if plan in (None, entry["plan"])
        for seed in entry["seeds"]
    ]


def check_test(results: Path, cell: Cell) -> None:
    """Raise StudyError if this test cell may not be scored: it is not frozen, or it is scored already."""
    if cell not in frozen_cells(results):
        raise StudyError(
            f"{results / FROZEN} does not name the test cell {cell.file} with {cell.reading}. Score it on dev, or "
            "freeze it before a test cell is scored."
        )
    if (results / cell.file).exists():
        raise StudyError(
            f"{results / cell.file} exists: this test cell has been scored, and test.txt is scored once. Read the "
            "result there."
        )
