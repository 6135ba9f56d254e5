"""Results on disk, and the rules that keep test.txt for last.

A result is written once, whole, and never computed again. A test cell needs a committed frozen.json that names its
setting, reading and seed, and is refused where its result is there already.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.settings import Cell, Reading, Setting, StudyError

FROZEN = "frozen.json"
BASELINES = "baselines"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A line for each entry, long lists included. Under another name first: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items()]
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path} cannot be read ({error}); expected a result of this study; delete it if it is a dev or train "
            "cell, and run that again"
        ) from error


def load(results: Path, cell: Cell) -> dict[str, Any] | None:
    """The cell's result, or None where there is none yet. Raises StudyError where the file holds another cell's."""
    path = results / cell.file
    if not path.exists():
        return None
    found = read_json(path)
    if found["setting"] != asdict(cell.setting) or found["seed"] != cell.seed:
        raise StudyError(
            f"{path} holds the setting {found['setting']}, seed {found['seed']}; expected {asdict(cell.setting)}, seed "
            f"{cell.seed}; the defaults have changed since: move that file away"
        )
    if cell.split != "dev" and found["reading"] != asdict(cell.reading):
        raise StudyError(
            f"{path} was read by {found['reading']}; expected {asdict(cell.reading)}; a cell has one reading: keep to "
            "the one that is frozen"
        )
    return found


def all_cells(results: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for path in sorted(results.glob("*/*/*-s*.json")):
        found = read_json(path)
        yield Cell(Setting(**found["setting"]), found["seed"], found["split"], Reading(**found["reading"])), found


@contextmanager
def claimed(cache: Path, cell: Cell) -> Iterator[bool]:
    """Whether no other process runs this cell, on whatever split: they share a network, which one of them trains. A
    claim ends with its process, however that ends."""
    path = cache / "claims" / f"{cell.setting.photos}-{cell.setting.slug}-s{cell.seed}"
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
    advice = "choose settings by dev cells, write them there and commit the file, and only then score test.txt"
    if not path.exists():
        raise StudyError(f"found no {path}; expected the settings frozen before test.txt is scored; {advice}")
    if _git(path, "ls-files", "--error-unmatch", path.name) != 0:
        raise StudyError(f"found {path}, which is not committed; expected it in the history; {advice}")
    if _git(path, "diff", "--quiet", "HEAD", "--", path.name) != 0:
        raise StudyError(f"found {path} changed since it was committed; expected the committed file; {advice}")
    return read_json(path)


def frozen_entries(results: Path) -> list[dict[str, Any]]:
    """Those of frozen.json, committed or not; none where there is none yet."""
    path = results / FROZEN
    return read_json(path)["cells"] if path.exists() else []


def frozen_setting(results: Path, photos: str, condition: str) -> Setting | None:
    """That of a condition in frozen.json; None where it is not frozen yet."""
    settings = [Setting(**entry["setting"]) for entry in frozen_entries(results)]
    return next((found for found in settings if (found.photos, found.condition) == (photos, condition)), None)


def _git(path: Path, *arguments: str) -> int:
    return subprocess.run(["git", *arguments], cwd=path.parent, capture_output=True).returncode


def frozen_cells(results: Path, plan: str | None = None) -> list[Cell]:
    """The test cells that may be scored: of one plan ("primary", "main"), or of all."""
    return [
        Cell(Setting(**entry["setting"]), seed, "test", Reading(**entry["reading"]))
        for entry in frozen(results)["cells"]
        if plan in (None, entry["plan"])
        for seed in entry["seeds"]
    ]


def check_test(results: Path, cell: Cell) -> None:
    """Raises StudyError where this test cell may not be scored: not frozen, or scored already."""
    if cell not in frozen_cells(results):
        raise StudyError(
            f"found the test cell {cell.file} with {cell.reading}, which {results / FROZEN} does not name; expected "
            "one of the frozen settings, readings and seeds; score it on dev, or freeze it before a test cell is scored"
        )
    if (results / cell.file).exists():
        raise StudyError(
            f"found {results / cell.file}: this test cell has been scored; expected one that has not, since "
            "test.txt is scored once; read the result there"
        )
