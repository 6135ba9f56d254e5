"""How a run is told: a table for each seed, paired differences over seeds, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from acr_reg.demo.comparison import ALL_BACKGROUND, CONTROL, WITH, WITHOUT, Plan, Row

Numbers = dict[str, float]


# ---------------------------------------------------------------- tables


def table(title: str, rows: Sequence[Row]) -> Table:
    kinds = list(rows[-1].maps)  # a network's
    first, *others = ("\n".join([*kind.split(), "mIoU"]) for kind in kinds)  # narrow: a terminal has 80 columns
    costs = ("time\ns", "CPU\ns", "RAM\nGiB")  # of the training
    result = new_table(title, ("mAP", first, "at\nthres-\nhold", *others, "attn.\nentropy", *costs))
    for row in rows:
        result.add_row(row.name, *cells(row, kinds[1:]))
    return result


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line for each kind of maps that found nothing: they score no more than background at every pixel."""
    background = max((row.headline.miou for row in rows if row.name == ALL_BACKGROUND), default=0.0)
    nothing: dict[str, list[str]] = {}
    for row in rows:
        for kind, found in row.maps.items():
            if row.mean_ap is not None and found.miou < background + 0.0005:  # alike as printed
                nothing.setdefault(kind, []).append(row.name)
    return [f"{kind} that scores no more than all background: {', '.join(names)}." for kind, names in nothing.items()]


def new_table(title: str, columns: Sequence[str]) -> Table:
    """Names on the left, without a heading, and columns of numbers."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    result.add_column("")
    for column in columns:
        result.add_column(column, justify="right")
    return result


def cells(row: Row, others: Sequence[str]) -> list[str]:
    """`others` are the kinds of maps after the first."""
    training = row.training
    return [
        number(row.mean_ap),
        number(row.headline.miou),
        number(row.headline.threshold, 2),
        *[number(row.maps[kind].miou if kind in row.maps else None) for kind in others],
        number(row.terms["entropy"] if row.terms else None),
        number(training.seconds if training else None, 0),
        number(training.cpu_seconds if training else None, 0),
        number(training.peak_memory / 2**30 if training and training.peak_memory else None, 2),
    ]


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def figures(row: Row) -> Numbers:
    """The figures that are compared between conditions."""
    assert row.mean_ap is not None and row.terms is not None
    return {
        "mAP": row.mean_ap,
        **{f"{kind} mIoU": found.miou for kind, found in row.maps.items()},
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
    result = new_table(title, ("mean", "standard deviation", "rises in"))
    for name in found[0]:
        values = np.array([difference[name] for difference in found])
        up = f"{(values > 0).sum()} of {len(values)}"
        result.add_row(name, f"{values.mean():+.3f}", f"{values.std(ddof=1):.3f}", up)
    return result


# ---------------------------------------------------------------- verdict


def verdict(runs: Sequence[Sequence[Row]], plan: Plan) -> list[str]:
    """Whether ACR helped the class maps that people use, and what else it changed. `runs` holds each seed's rows."""
    found = paired_differences(runs)
    # The control may classify worse: that is a result of its own and does not void the comparison.
    lowest = min(figures(named(rows, name))["mAP"] for rows in runs for name in (WITHOUT, WITH))
    if plan.quick or lowest < plan.needed_map:
        nothing = f"mAP is only {lowest:.3f}: the networks do not know the classes, so their class maps mean nothing."
        return [nothing, *changes(runs, found)]
    kind = next(iter(named(runs[0], WITH).maps))
    gains, controls = gains_of(runs, WITH), gains_of(runs, CONTROL)
    lines = [judgement(gains, kind, plan.where), *changes(runs, found), alignment(gains, controls, kind)]
    baseline = max(row.headline.miou for row in runs[0] if row.mean_ap is None)
    if max(named(runs[0], name).headline.miou for name in (WITHOUT, WITH)) < baseline:
        lines.append(f"A baseline without a network scores {baseline:.3f}: the {kind} is not useful yet.")
    return lines


def gains_of(runs: Sequence[Sequence[Row]], condition: str) -> list[float]:
    """What a condition changes in the headline mIoU of each seed. Empty if it was not run."""
    return [
        row.headline.miou - named(rows, WITHOUT).headline.miou for rows in runs for row in rows if row.name == condition
    ]


def changes(runs: Sequence[Sequence[Row]], found: Sequence[Numbers]) -> list[str]:
    """A heading, and one line for each figure: its mean without ACR and with it."""
    start = {name: float(np.mean([figures(named(rows, WITHOUT))[name] for rows in runs])) for name in found[0]}
    change = {name: float(np.mean([difference[name] for difference in found])) for name in start}
    width = max(map(len, start))
    moves = [f"  {name:{width}}  {start[name]:.3f} -> {start[name] + change[name]:.3f}" for name in start]
    return ["ACR changed, from without to with:", *moves]


def alignment(gains: Sequence[float], controls: Sequence[float], kind: str) -> str:
    """What the control says of the gain. Only undoing the flip tells consistency from smoothing of attention."""
    if not controls:
        return "Smoothing of attention alone may help as much. Run with --controls to tell them apart."
    gain, control = float(np.mean(gains)), float(np.mean(controls))
    said = f'"{CONTROL}" changes {kind} mIoU by {control:+.3f}'
    if gain > control:
        return f"{said}: undoing the flip adds {gain - control:+.3f}."
    return f"{said}: smoothing explains the change of {gain:+.3f}."


def judgement(gains: Sequence[float], kind: str, where: str) -> str:
    """What the paired gains in the mIoU of a kind of maps say. One seed only states its change."""
    gain = float(np.mean(gains))
    if len(gains) == 1:
        return f"ACR changes {kind} mIoU by {gain:+.3f}. One seed is not evidence: --seeds 5 shows the spread."
    helps = "helps" if gain > 0 else "does not help"
    spread = float(np.std(gains, ddof=1))
    if abs(gain) <= spread:
        helps = "makes no clear difference"
    return f"ACR {helps} {where}: {kind} mIoU {gain:+.3f}, standard deviation {spread:.3f} over {len(gains)} seeds."
