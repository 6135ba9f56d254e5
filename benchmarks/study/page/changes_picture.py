"""The picture of what ACR changes in class maps: a dot for each seed, a larger one for their mean, better to the
right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.study.page.changes import AGREEMENTS, ASPECTS, Aspect, Changes, changes, changes_by_set
from benchmarks.study.page.tables import NOT_RUN
from benchmarks.study.settings import NETWORKS, SETS

STYLES = {  # name, colour, marker, shift in the row
    "both": ("with ACR", "#0072b2", "o", -0.18),
    "misreported": ("control: flip not undone", "#d55e00", "s", 0.18),
}
MISREAD = tuple(AGREEMENTS.values())  # correlations would be misread on the axis of pixel shares
ROW = 0.3  # inches


def draw_changes(path: Path, results: Path) -> bool:
    """A row of panels for each network and a column for each set; agreement stands below on an axis of its own. The
    description in the file is the table on the page. Draws nothing and returns False without test cells."""
    rows: list[tuple[str, Sequence[Aspect], Mapping[str, Changes]]] = []
    for network in NETWORKS.values():
        found = changes_by_set(results, network)
        known = [aspect for aspect in ASPECTS if any(aspect in each.without for each in found.values())]
        rows.append((network.title, [aspect for aspect in known if aspect not in MISREAD], found))
        rows.append(("agreement (correlation)", [aspect for aspect in known if aspect in MISREAD], found))
    rows = [row for row in rows if row[1]]
    if not rows:
        return False
    heights = [len(shown) + 2.0 for _, shown, _ in rows]
    figure = Figure(figsize=(6.4, ROW * sum(heights) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(SETS), squeeze=False, gridspec_kw={"height_ratios": heights})
    shares: list[Axes] = []
    correlations: list[Axes] = []
    for axes, (title, shown, by_set) in zip(grid, rows, strict=True):
        for axis, photos in zip(axes, SETS, strict=True):
            axis.set_title(f"{SETS[photos].title}\n{title}", fontsize=10)
            _prepare(axis, len(shown))
            if photos in by_set:
                _draw(axis, shown, by_set[photos].changes)
                (correlations if shown[0] in MISREAD else shares).append(axis)
            else:
                axis.text(0.5, 0.5, NOT_RUN, transform=axis.transAxes, ha="center", va="center", fontsize=10)
                axis.set_xticks([])
        axes[0].set_yticklabels([aspect.improvement for aspect in shown], fontsize=10)
    _align(shares)
    _align(correlations)
    keys = [_key(*style[:3]) for style in STYLES.values()]
    figure.legend(handles=keys, loc="outside upper center", ncols=2, fontsize=10, frameon=False)
    figure.supxlabel("change from two views without ACR; better to the right", fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Description": changes(results)}, pil_kwargs={"optimize": True})
    return True


def _prepare(axis: Axes, rows: int) -> None:
    for row in range(rows):
        axis.axhline(row, color="0.93", lw=14, zorder=0)
    axis.set(ylim=(rows - 0.4, -0.6), yticks=range(rows), yticklabels=[])
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _draw(axis: Axes, shown: Sequence[Aspect], found: Mapping[str, Mapping[Aspect, list[float]]]) -> None:
    axis.axvline(0, color="0.3", lw=1, zorder=1)
    for name, by_aspect in found.items():
        _, colour, marker, shift = STYLES[name]
        for row, aspect in enumerate(shown):
            values = aspect.better * np.array(by_aspect.get(aspect, []))
            if not len(values):
                continue
            at = np.full(len(values), row + shift)
            axis.scatter(values, at, s=18, c=colour, marker=marker, alpha=0.5, lw=0, zorder=2)
            axis.scatter(values.mean(), at[0], s=60, c=colour, marker=marker, edgecolors="black", lw=0.8, zorder=3)


def _align(axes: Sequence[Axes]) -> None:
    """One scale, with zero in the middle."""
    reach = max((abs(end) for axis in axes for end in axis.get_xlim()), default=0)
    for axis in axes:
        axis.set_xlim(-reach, reach)


def _key(title: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, ls="", markersize=8, markeredgecolor="black", label=title)
