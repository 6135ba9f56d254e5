"""Holds the report of a check, and prints its table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from acr_reg.views.view import View


@dataclass(frozen=True)
class LayerCheck:
    """One captured layer. ``row_sums`` are the smallest and the largest sum of a row of its map, ``row_error`` is how
    far they are from 1, None for a mixed map. Errors are relative; offsets are in pixels of the images, None if not
    measured."""

    index: int
    name: str
    kind: str
    source: str
    """"fused": query and key of a fused kernel; "explicit": the map; "mixed": a map mixed after softmax."""
    heads: int
    queries: str
    keys: str
    prefix: int | None
    between: int | None
    suffix: int | None
    class_tokens: tuple[int, ...] | None
    row_sums: tuple[float, float]
    row_error: float | None
    product_error: float | None
    query_offset: float | None
    key_offset: float | None
    problem: str | None


@dataclass(frozen=True)
class Check:
    """The report of :func:`~acr_reg.check`. Print it to see the table; ``ok`` says whether a loss on all its layers
    would be right. ``warnings`` are no errors: rows that do not sum to 1, offsets that could not be measured, other
    encoders that ran.

    ``dense_bytes`` is the memory of all layers' maps if a loss forms them. ``factor_bytes`` is the memory of query,
    key, value and output if they outlive the graph. Both count two views.
    """

    model: str
    view: View
    layers: tuple[LayerCheck, ...]
    skipped: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    terms: dict[str, float]
    dense_bytes: int
    factor_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return "\n".join(_lines(self))


_HEADINGS = {
    "index": "layer",
    "class_tokens": "class",
    "row_sums": "row sum",
    "product_error": "A V off",
    "query_offset": "query off, px",
    "key_offset": "key off, px",
}


def _lines(report: Check) -> Iterator[str]:
    yield f"{report.model}: {len(report.layers)} layers of token-to-token attention captured, view {report.view!r}"
    names = [f.name for f in fields(LayerCheck) if f.name not in ("problem", "row_error")]
    for name in ("between", "suffix"):  # few models have such tokens
        if not any(getattr(layer, name) for layer in report.layers):
            names.remove(name)
    rows = [[_HEADINGS.get(name, name) for name in names]]
    rows += [
        [row_sum(layer) if name == "row_sums" else _cell(getattr(layer, name)) for name in names]
        for layer in report.layers
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if report.layers:
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for name, reason in report.skipped:
        yield f"skipped {name}: {reason}"
    if report.layers:
        yield (
            f"memory of both views: {report.dense_bytes / 2**20:.1f} MiB where maps are formed, "
            f"{report.factor_bytes / 2**20:.1f} MiB where factors outlive the graph"
        )
    if report.terms:
        yield "terms: " + ", ".join(f"{name} {value:.3f}" for name, value in report.terms.items())
    yield from (f"warning: {warning}" for warning in report.warnings)
    yield from (f"problem: {problem}" for problem in report.problems)
    yield "ok" if report.ok else f"problems: {len(report.problems)}"


def row_sum(layer: LayerCheck) -> str:
    """The sum of the rows to three digits, as "1" or "0.5 to 0.7"."""
    return " to ".join(dict.fromkeys(f"{value:.3g}" for value in layer.row_sums))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if value == 0.0:
        return "0"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 0.01 else f"{value:.2f}"
    if isinstance(value, tuple):
        return "all" if len(value) > 3 else ",".join(map(str, value)) or "none"
    return str(value)
