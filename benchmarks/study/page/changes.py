"""What ACR changes in the class maps of test photos: kinds of errors, object sizes, numbers of labels, the agreement of
both views and the threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.marked_page import wrapped
from benchmarks.study.counts import ImageCounts
from benchmarks.study.page.tables import NOT_RUN, Record, groups, moments, signed_spread, spread, table, tested
from benchmarks.study.scoring import RAW
from benchmarks.study.settings import NETWORKS, REFERENCE, SEEDS, SETS, Network

COMPARED = {"both": "with ACR", "misreported": "with the control"}
UNKNOWN = "-"


@dataclass(frozen=True)
class Aspect:
    """A figure of class maps. ``better`` is the sign of a change for the better, which ``improvement`` names."""

    title: str
    improvement: str
    better: int = 1


MIOU = Aspect("mIoU", "mIoU")
FALSE_POSITIVES = Aspect("false positives, pixels over the union", "fewer false positives", -1)
MISSES = Aspect("misses, pixels over the union", "fewer misses", -1)
SIZES = (
    Aspect("IoU, the class covers little of the photo", "IoU, small objects"),
    Aspect("IoU, the class covers a middling share", "IoU, middling objects"),
    Aspect("IoU, the class covers much of the photo", "IoU, large objects"),
)
LABELS = (
    Aspect("IoU, photos with one label", "IoU, one label"),
    Aspect("IoU, photos with two labels", "IoU, two labels"),
    Aspect("IoU, photos with three or more", "IoU, three or more"),
)
LOST = Aspect("mIoU lost to the threshold (oracle less held-out)", "less lost to threshold", -1)
AGREEMENTS = {
    RAW: Aspect("agreement of the views (correlation)", "agreement of the views"),
    "patch": Aspect("agreement, the head's map", "agreement, head's map"),
    "attention": Aspect("agreement, class attention", "agreement, attention"),
}
ASPECTS = (MIOU, FALSE_POSITIVES, MISSES, *SIZES, *LABELS, LOST, *AGREEMENTS.values())

Figures = Mapping[Aspect, float]  # without those that are not known
Parts = Mapping[Aspect, NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Changes:
    """Figures of the test cells of one set. ``without`` are those without ACR; ``changes`` holds, for each condition
    compared, the differences to them by seed. ``cuts`` are the shares of the photo that part small, middling and large
    objects."""

    cuts: tuple[float, float]
    without: Mapping[Aspect, list[float]]
    changes: Mapping[str, Mapping[Aspect, list[float]]]


def changes_by_set(results: Path, network: Network) -> dict[str, Changes]:
    """The changes on each set that has test cells of a network."""
    found = groups(results / network.folder)
    made = {
        photos: changes_of({name: group.records for name, group in tested(found, photos).items()}) for photos in SETS
    }
    return {photos: changes for photos, changes in made.items() if changes is not None}


def changes_of(tested: Mapping[str, Mapping[int, Record]]) -> Changes | None:
    """None without cells of the reference, or without any to compare with it."""
    shared = {name: sorted(tested.get(REFERENCE, {}).keys() & tested.get(name, {}).keys()) for name in COMPARED}
    if not any(shared.values()):
        return None
    cuts, parts = parts_of(list(tested[REFERENCE].values()))
    without = {seed: figures_of(record, parts) for seed, record in tested[REFERENCE].items()}
    changes = {}
    for name, seeds in shared.items():
        others = [(figures_of(tested[name][seed], parts), without[seed]) for seed in seeds]
        changes[name] = _by_aspect([{key: a[key] - b[key] for key in a.keys() & b.keys()} for a, b in others])
    return Changes(cuts, _by_aspect(list(without.values())), changes)


def _by_aspect(found: Sequence[Figures]) -> dict[Aspect, list[float]]:
    """The values of the aspects that every cell has."""
    return {aspect: [each[aspect] for each in found] for aspect in ASPECTS if found and all(aspect in f for f in found)}


# ------------------------------------------------------------ one cell


def parts_of(records: Sequence[Record]) -> tuple[tuple[float, float], Parts]:
    """The pairs of photo and class (images, C) in thirds by the class's share of the photo, and by the photo's number
    of labels. The records are of the same photos.

    A label whose class the mask lacks is seen only if some record predicts it. Without a background, photos with one
    label are left out: they are always right."""
    counts = [ImageCounts.unpack(record[RAW]["counts"]) for record in records]
    background = _has_background(records[0])
    truth = counts[0].truth
    present = np.any([(each.truth > 0) | (each.predicted > 0) for each in counts], axis=0)
    present[:, : int(background)] = False
    labels = present.sum(1, keepdims=True)
    pairs = present & (truth > 0) & (background | (labels > 1))
    share = truth / np.maximum(truth.sum(1, keepdims=True), 1)
    low, high = np.quantile(share[pairs], [1 / 3, 2 / 3])
    by_size = (share < low, (share >= low) & (share < high), share >= high)
    by_labels = (labels == 1, labels == 2, labels > 2)
    parts = zip((*SIZES, *LABELS), (*by_size, *by_labels), strict=True)
    return (float(low), float(high)), {aspect: pairs & part for aspect, part in parts}


def figures_of(record: Record, parts: Parts) -> Figures:
    """The figures that a cell has. The IoU of a part is the mean over its pairs of photo and class."""
    found, counts = record[RAW], ImageCounts.unpack(record[RAW]["counts"])
    iou = counts.correct / np.maximum(counts.predicted + counts.truth - counts.correct, 1)
    figures = {
        MIOU: found["miou"],
        FALSE_POSITIVES: found["false_positive"],
        MISSES: found["false_negative"],
        **{aspect: float(iou[part].mean()) for aspect, part in parts.items() if part.any()},
    }
    if _has_background(record):
        figures[LOST] = found["oracle"] - found["miou"]
    recorded = {aspect: record.get(maps, {}).get("agreement") for maps, aspect in AGREEMENTS.items()}
    return figures | {aspect: value for aspect, value in recorded.items() if value is not None}


def _has_background(record: Record) -> bool:
    return record[RAW]["threshold"] is not None


# ------------------------------------------------------------ Markdown


def changes(results: Path) -> str:
    """A table for each network, then how objects were sorted by size."""
    found = {name: changes_by_set(results, network) for name, network in NETWORKS.items()}
    if not any(found.values()):
        return NOT_RUN
    shown = [_table(NETWORKS[name], by_set) for name, by_set in found.items()]
    cuts = {photos: each.cuts for by_set in found.values() for photos, each in by_set.items()}
    sizes = "; ".join(f"{SETS[photos].title}, {low:.2f} and {high:.2f}" for photos, (low, high) in cuts.items())
    return "\n\n".join([*shown, wrapped(f"Shares of the photo that part little, middling and much: {sizes}.")])


def _table(network: Network, by_set: Mapping[str, Changes]) -> str:
    if not by_set:
        return f"{network.title.capitalize()}: {NOT_RUN}."
    header = [f"{network.title}, test photos"]
    for photos, found in by_set.items():
        header += [f"{SETS[photos].title}: without ACR", *(_change(found, name) for name in COMPARED)]
    known = [aspect for aspect in ASPECTS if any(aspect in each.without for each in by_set.values())]
    rows = [[aspect.title, *(cell for each in by_set.values() for cell in _cells(each, aspect))] for aspect in known]
    return table(header, rows)


def _change(found: Changes, name: str) -> str:
    """The heading of a column; it says if seeds are missing."""
    seeds = len(found.changes[name].get(MIOU, []))
    return f"change {COMPARED[name]}" + ("" if seeds == len(SEEDS) else f" ({seeds} of {len(SEEDS)} seeds)")


def _cells(found: Changes, aspect: Aspect) -> list[str]:
    """Without ACR, then the change with each condition."""
    without = found.without.get(aspect)
    changed = (by_aspect.get(aspect) for by_aspect in found.changes.values())
    level = UNKNOWN if without is None else spread(moments(without))
    return [level, *(UNKNOWN if values is None else signed_spread(moments(values)) for values in changed)]
