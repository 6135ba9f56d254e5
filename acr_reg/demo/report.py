"""How a run is shown: a table for each seed, paired differences over seeds, the verdict, and a PNG of class maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from acr_reg.demo.comparison import ALL_BACKGROUND, CONTROL, WITH, WITHOUT, Picture, Plan, Row

HEADLINE = "raw CAM mIoU"
COLUMNS = (  # narrow headings: the table fits a terminal of 80 columns
    *("mAP", "raw\nCAM\nmIoU", "at\nthres-\nhold", "propa-\ngated\nmIoU", "at\nthres-\nhold", "attn.\nentropy"),
    *("time\ns", "CPU\ns", "RAM\nGiB"),  # of the training
)

_STRENGTH = 0.85  # share of a pixel that a map value of 1 colours
_UNKNOWN = 255

Numbers = dict[str, float]
Floats = NDArray[np.floating]


# ---------------------------------------------------------------- tables


def table(title: str, rows: Sequence[Row]) -> Table:
    result = new_table(title, COLUMNS)
    for row in rows:
        result.add_row(row.name, *cells(row))
    return result


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line on propagated maps that found nothing: they score no more than background at every pixel."""
    background = max((row.raw.miou for row in rows if row.name == ALL_BACKGROUND), default=0.0)
    scored = [(row.name, row.propagated.miou) for row in rows if row.propagated is not None]
    nothing = [name for name, miou in scored if miou < background + 0.0005]  # alike as printed
    return [f"Propagated maps that score no more than all background: {', '.join(nothing)}."] if nothing else []


def new_table(title: str, columns: Sequence[str]) -> Table:
    """Names on the left, without a heading, and columns of numbers."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    result.add_column("")
    for column in columns:
        result.add_column(column, justify="right")
    return result


def cells(row: Row) -> list[str]:
    training, propagated = row.training, row.propagated
    return [
        number(row.mean_ap),
        number(row.raw.miou),
        number(row.raw.threshold, 2),
        number(propagated.miou if propagated else None),
        number(propagated.threshold if propagated else None, 2),
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
    result = new_table(title, ("mean", "standard deviation", "rises in"))
    for name in found[0]:
        values = np.array([difference[name] for difference in found])
        up = f"{(values > 0).sum()} of {len(values)}"
        result.add_row(name, f"{values.mean():+.3f}", f"{values.std(ddof=1):.3f}", up)
    return result


# ---------------------------------------------------------------- verdict


def verdict(runs: Sequence[Sequence[Row]], plan: Plan) -> list[str]:
    """Whether ACR helped the raw class maps, and what else it changed. `runs` holds the rows of each seed."""
    found = paired_differences(runs)
    gains = [difference[HEADLINE] for difference in found]
    # The control may classify worse: that is a result of its own and does not void the comparison.
    lowest = min(figures(named(rows, name))["mAP"] for rows in runs for name in (WITHOUT, WITH))
    if plan.quick or lowest < plan.needed_map:
        nothing = f"mAP is only {lowest:.3f}: the networks do not know the classes, so their class maps mean nothing."
        return [nothing, *changes(runs, found)]
    lines = [judgement(gains, plan.where), *changes(runs, found), alignment(runs, gains)]
    baseline = max(row.raw.miou for row in runs[0] if row.mean_ap is None)
    if max(named(runs[0], name).raw.miou for name in (WITHOUT, WITH)) < baseline:
        lines.append(f"A baseline without a network scores {baseline:.3f}: the raw class maps are not useful yet.")
    return lines


def changes(runs: Sequence[Sequence[Row]], found: Sequence[Numbers]) -> list[str]:
    """A heading, and one line for each figure: its mean without ACR and with it."""
    start = {name: float(np.mean([figures(named(rows, WITHOUT))[name] for rows in runs])) for name in found[0]}
    change = {name: float(np.mean([difference[name] for difference in found])) for name in start}
    width = max(map(len, start))
    moves = [f"  {name:{width}}  {start[name]:.3f} -> {start[name] + change[name]:.3f}" for name in start]
    return ["ACR changed, from without to with:", *moves]


def alignment(runs: Sequence[Sequence[Row]], gains: Sequence[float]) -> str:
    """What the control says of the gain. Only undoing the flip tells consistency from smoothing of attention."""
    if not any(row.name == CONTROL for row in runs[0]):
        return "Smoothing of attention alone may help as much. Run with --controls to tell them apart."
    controls = [named(rows, CONTROL).raw.miou - named(rows, WITHOUT).raw.miou for rows in runs]
    gain, control = float(np.mean(gains)), float(np.mean(controls))
    said = f'"{CONTROL}" changes {HEADLINE} by {control:+.3f}'
    if gain > control:
        return f"{said}: undoing the flip adds {gain - control:+.3f}."
    return f"{said}: smoothing explains the change of {gain:+.3f}."


def judgement(gains: Sequence[float], where: str) -> str:
    """What the paired gains in raw mIoU say. One seed only states its change."""
    gain = float(np.mean(gains))
    if len(gains) == 1:
        return f"ACR changes {HEADLINE} by {gain:+.3f}. One seed is not evidence: --seeds 5 shows the spread."
    helps = "helps" if gain > 0 else "does not help"
    spread = float(np.std(gains, ddof=1))
    if abs(gain) <= spread:
        helps = "makes no clear difference"
    return f"ACR {helps} {where}: {HEADLINE} {gain:+.3f}, standard deviation {spread:.3f} over {len(gains)} seeds."


# ---------------------------------------------------------------- picture


def draw(
    path: Path, pictures: Sequence[Picture], names: Sequence[str], background: bool, title: str, dpi: int = 100
) -> None:
    """Writes the PNG: a column for each image; rows for the image, the truth and the raw class maps of each condition.

    `names[i]` is the class with id i. With a background, a map's value is its opacity; without one, each pixel takes
    the colour of its highest map.
    """
    columns = [panels(picture, background) for picture in pictures]
    headings = list(columns[0])
    figure = Figure(figsize=(1.9 * len(columns) + 0.3, 1.9 * len(headings) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(headings), len(columns), squeeze=False)
    for column, contents in enumerate(columns):
        for row, panel in enumerate(contents.values()):
            axes[row, column].imshow(panel, aspect="auto")
            axes[row, column].set(xticks=[], yticks=[])
    for row, heading in enumerate(headings):
        axes[row, 0].set_ylabel(heading, fontsize=9)
    seen = sorted({label for picture in pictures for label in picture.present})
    patches = [Patch(color=colour(label), label=names[label]) for label in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(seen), 8), fontsize=8, frameon=False)
    figure.savefig(path, dpi=dpi)


def panels(picture: Picture, background: bool) -> dict[str, Floats]:
    """The panels of one column by the name of their row, each (H,W,3) in 0..1."""
    height, width = picture.mask.shape
    image = np.asarray(Image.fromarray(picture.image).resize((width, height), Image.Resampling.BICUBIC)) / 255
    truth = picture.mask == np.array(picture.present).reshape(-1, 1, 1)
    shown = {"image": image, "truth": overlay(image, truth, picture)}
    for condition, maps in picture.maps.items():
        highest = maps == maps.max(axis=0, initial=0.0)
        opacity = highest * (maps if background else 1.0)
        shown[f"CAM {condition}"] = overlay(image, opacity, picture)
    return shown


def overlay(image: Floats, opacity: Floats, picture: Picture) -> Floats:
    """Paints the classes with opacities (K,H,W) over the grey image. Pixels with an unknown mask are white."""
    blended = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    blended[picture.mask == _UNKNOWN] = 1.0
    for label, share in zip(picture.present, _STRENGTH * opacity[..., None], strict=True):
        blended = blended * (1 - share) + share * np.array(colour(label))
    return blended


def colour(label: int) -> tuple[float, float, float]:
    """A saturated colour. Successive ids are a golden section of the colour wheel apart."""
    red, green, blue = hsv_to_rgb((label * 0.618 % 1.0, 0.85, 0.95))
    return float(red), float(green), float(blue)
