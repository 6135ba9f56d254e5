"""What a run says: a table for each seed, the paired difference over seeds, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from acr_reg.demo.comparison import Plan
from acr_reg.demo.conditions import CONTROL, WITH, WITHOUT, Row

HEADLINE = "raw CAM mIoU"

Numbers = dict[str, float]


def table(title: str, rows: Sequence[Row]) -> Table:
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("")
    for column in ("mAP", "CAM mIoU\nraw", "CAM mIoU\npropagated", "threshold\nraw prop.", "attention\nentropy"):
        result.add_column(column, justify="right")
    for column in ("seconds", "CPU\nseconds", "peak\nGiB"):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(row.name, *cells(row))
    return result


def cells(row: Row) -> list[str]:
    training = row.training
    maps = [row.raw, row.propagated] if row.propagated else [row.raw]
    return [
        number(row.mean_ap),
        number(row.raw.miou),
        number(row.propagated.miou if row.propagated else None),
        " ".join(number(score.threshold, 2) for score in maps),
        number(row.terms["entropy"] if row.terms else None),
        number(training.seconds if training else None, 0),
        number(training.cpu_seconds if training else None, 0),
        number(training.peak_memory / 2**30 if training and training.peak_memory else None, 2),
    ]


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def figures(row: Row) -> Numbers:
    """The figures that are compared between conditions."""
    assert row.propagated is not None and row.mean_ap is not None and row.terms is not None
    return {
        "mAP": row.mean_ap,
        HEADLINE: row.raw.miou,
        "propagated CAM mIoU": row.propagated.miou,
        "attention entropy": row.terms["entropy"],
        "view distance, class rows": row.terms["activation"],
        "view distance, patch rows": row.terms["affinity"],
    }


def named(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)


def paired_differences(runs: Sequence[Sequence[Row]]) -> list[Numbers]:
    """With ACR minus without, one dict per run."""
    pairs = [(figures(named(rows, WITH)), figures(named(rows, WITHOUT))) for rows in runs]
    return [{name: with_acr[name] - without[name] for name in without} for with_acr, without in pairs]


def paired_table(found: Sequence[Numbers]) -> Table:
    """Mean and standard deviation of the paired difference over seeds."""
    title = f"With ACR minus without, paired over {len(found)} seeds"
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "mean", "standard deviation", "seeds up"):
        result.add_column(column, justify="left" if not column else "right")
    for name in found[0]:
        values = np.array([difference[name] for difference in found])
        up = f"{(values > 0).sum()} of {len(values)}"
        result.add_row(name, f"{values.mean():+.3f}", f"{values.std(ddof=1):.3f}", up)
    return result


def verdict(runs: Sequence[Sequence[Row]], plan: Plan) -> list[str]:
    """Whether ACR helped, by the raw class maps, and what else it changed. `runs` are the rows of every seed."""
    found = paired_differences(runs)
    start = {name: float(np.mean([figures(named(rows, WITHOUT))[name] for rows in runs])) for name in found[0]}
    change = {name: float(np.mean([difference[name] for difference in found])) for name in start}
    moves = [f"{name} {start[name]:.3f} -> {start[name] + change[name]:.3f}" for name in start]
    changed = f"What ACR changed: {', '.join(moves)}."
    # The control may well classify worse: that is its own result and does not make the two compared meaningless.
    lowest = min(figures(named(rows, name))["mAP"] for rows in runs for name in (WITHOUT, WITH))
    if plan.quick or lowest < plan.needed_map:
        return [f"mAP {lowest:.3f}: the networks do not know the classes, so their class maps mean nothing.", changed]
    lines = [f"ACR {judgement([difference[HEADLINE] for difference in found])} {plan.where}.", changed]
    lines.append(alignment(runs, [difference[HEADLINE] for difference in found]))
    baseline = max(row.raw.miou for row in runs[0] if row.mean_ap is None)
    if max(named(runs[0], name).raw.miou for name in (WITHOUT, WITH)) < baseline:
        lines.append(f"A baseline that knows no network scores {baseline:.3f}: the raw maps are not yet useful.")
    return lines


def alignment(runs: Sequence[Sequence[Row]], gains: Sequence[float]) -> str:
    """What the control says of the gain: undoing the flip is what consistency has over mere smoothing of attention."""
    if not any(row.name == CONTROL for row in runs[0]):
        return "Smoothing alone may gain too: --controls trains once more with the flip not undone, to tell them apart."
    controls = [named(rows, CONTROL).raw.miou - named(rows, WITHOUT).raw.miou for rows in runs]
    gain, control = float(np.mean(gains)), float(np.mean(controls))
    said = f"With the flip not undone the raw CAM mIoU moves by {control:+.3f}"
    if gain > control:
        return f"{said}: undoing it adds {gain - control:+.3f}."
    return f"{said}, no less than with it undone ({gain:+.3f}): here the gain is smoothing of attention, not alignment."


def judgement(gains: Sequence[float]) -> str:
    """What paired gains in the headline say, to stand between "ACR" and where."""
    gain = float(np.mean(gains))
    helps = "helps" if gain > 0 else "does not help"
    if len(gains) == 1:
        return f"{helps} (raw CAM mIoU {gain:+.3f}, one seed; --seeds 5 shows the spread)"
    spread = float(np.std(gains, ddof=1))
    if abs(gain) <= spread:
        helps = "makes no clear difference"
    return f"{helps} (raw CAM mIoU {gain:+.3f}, standard deviation {spread:.3f} over {len(gains)} seeds)"
