"""The results of a GPU as the tables of docs/explanation/gpu_cost.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost.gpu.cases import ALL_CAMS, CLASS_MAPS, KEYS, LARGEST, PROFILE, STEP, on_gpu
from benchmarks.cost.variants import STEPS
from benchmarks.marked_page import wrapped

Row = Mapping[str, Any]
SETTING = tuple(name for name in KEYS if name not in ("what", "variant"))
UNMEASURED = wrapped(
    "Unmeasured: there was no GPU. `tests/benchmarks/test_gpu.py` runs the command's code on the CPU, where every "
    "variant has the published loss, gradient and class maps."
)


def section(results: Path) -> str:
    if not results.exists():
        return UNMEASURED
    record = json.loads(results.read_text(encoding="utf-8"))
    rows = sorted(record["results"], key=_place)
    wrong = [row for row in rows if row["right"] is False]
    said = f"{len(wrong)} of {len(rows)} rows are wrong" if wrong else f"None of {len(rows)} rows is wrong"
    return "\n\n".join(
        [
            f"Measured on {record['device']} with torch {record['torch']}. {said}.",
            *(["\n".join(map(_wrong, wrong))] if wrong else []),
            "## Training step\n\nTime and peak memory of the plain step, and what each loss adds.",
            _table(rows, STEP, STEPS, _added),
            f"## Largest batch in {record['gibibytes']:g} GiB\n\nPowers of two, and images per second.",
            _table(rows, LARGEST, STEPS, _batch),
            "## Class maps\n\nOf an image and its flip, and times the forward passes alone.",
            _table(rows, CLASS_MAPS, ALL_CAMS, _over_forward),
            "## Errors\n\nThe largest over all settings, relative to the published procedure in float32.",
            _error_table(rows),
            *(_profile(row) for row in rows if row["what"] == PROFILE and row["operations"] is not None),
        ]
    )


def _place(row: Row) -> int:
    order = [tuple(case.key.values()) for case in on_gpu()]
    key = tuple(row[name] for name in KEYS)
    return order.index(key) if key in order else len(order)


def _table(rows: Iterable[Row], what: str, variants: Sequence[str], cell: Any) -> str:
    """A line for each setting, a column for each variant. ``cell`` gets a row and that of the first variant."""
    settings: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["what"] == what:
            settings.setdefault(tuple(row[name] for name in SETTING), {})[row["variant"]] = row
    shown = [i for i, name in enumerate(SETTING) if (name != "present" or what == CLASS_MAPS)]
    shown = [i for i in shown if SETTING[i] != "batch" or what != LARGEST]
    names = {"model": "ViT", "size": "px", "present": "classes"}
    head = [*(names.get(SETTING[i], SETTING[i]) for i in shown), *variants]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for setting, found in settings.items():
        first = found.get(variants[0])
        cells = [cell(found[v], first) if v in found else "not run" for v in variants]
        lines.append(f"| {' | '.join([*(str(setting[i]) for i in shown), *cells])} |")
    return "\n".join(lines)


def _added(row: Row, plain: Row | None) -> str:
    if row["milliseconds"] is None or plain is None or plain["milliseconds"] is None:
        return _failed(row)
    ms, mb = row["milliseconds"][1], row["peak_mb"] or 0
    if row is plain:
        return f"{ms:.1f} ms, {mb:.0f} MB"
    return f"{ms - plain['milliseconds'][1]:+.1f} ms, {mb - (plain['peak_mb'] or 0):+.0f} MB"


def _over_forward(row: Row, forward: Row | None) -> str:
    if row["milliseconds"] is None or forward is None or forward["milliseconds"] is None:
        return _failed(row)
    ms = row["milliseconds"][1]
    return f"{ms:.1f} ms" if row is forward else f"{ms:.1f} ms ({ms / forward['milliseconds'][1]:.2f})"


def _batch(row: Row, plain: Row | None) -> str:
    return _failed(row) if row["fits"] is None else f"{row['fits']} ({1000 * row['fits'] / row['milliseconds'][1]:.0f})"


def _failed(row: Row) -> str:
    return "failed" if row["right"] is False else row["note"] or "not run"


def _wrong(row: Row) -> str:
    about = ", ".join(f"{name} {row[name]}" for name in KEYS if row[name] is not None)
    return f"- {about}: {row['note'] or row['errors']}"


def _error_table(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["errors"] is not None:
            found.setdefault((row["what"], row["variant"], row["precision"]), []).append(row)
    lines = ["| what | variant | precision | settings | of the loss or maps | of the gradient |", "|" + "---|" * 6]
    for key in sorted(found):
        worst = [f"{max(each):.0e}" for each in zip(*(row["errors"] for row in found[key]), strict=True)]
        cells = [*key, str(len(found[key])), *worst, *[""] * (2 - len(worst))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _profile(row: Row) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in row["counts"].items())
    lines = [f"| {name} | {calls} | {ms:.2f} |" for name, calls, ms in row["operations"]]
    head = f"## Profile: {row['variant']} step, ViT-{row['model'][0].upper()} at {row['size']} px, batch {row['batch']}"
    head = f"{head}, {row['precision']}\n\n{counts}.\n\n| operation | calls | ms |\n|---|---|---|"
    return "\n".join([head, *lines])
