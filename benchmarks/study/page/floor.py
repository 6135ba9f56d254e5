"""The study's tables of why views other than the flip lost: distances before training, and cells that test causes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.study.page.tables import (
    NOT_RUN,
    Group,
    mean_ap_of,
    number,
    on_dev,
    paired_mean,
    propagated_of,
    raw_of,
    signed_spread,
    table,
)
from benchmarks.study.plans import FEW
from benchmarks.study.settings import CONDITIONS, REFERENCE
from benchmarks.study.store import frozen_setting, read_json

FLOOR = "floor.json"
SIZES = (112, 224)  # px, of the three that were measured
SHOWN = ("as it was", "resampling alone", "blurred alike")
CAUSES = ("flip", "scale", "crop")
TRIED = ("both", "affinity", "blurred", "alike")


def distances(results: Path) -> str:
    """The affinity distance of two views before training, by factor."""
    path = results / FLOOR
    if not path.exists():
        return NOT_RUN
    measured = read_json(path)["rows"]
    header = [
        "affinity distance before training, MSRC dev photos",
        *(f"{size} px: {name}" for size in SIZES for name in SHOWN),
    ]
    rows = []
    for of_sizes in zip(*([row for row in measured if row["size"] == size] for size in SIZES), strict=True):
        first, second = (row["view"].partition(" (")[0] for row in of_sizes)
        name = first if first == second else f"{first} ({second.rpartition('through ')[2]})"
        rows.append([name, *(number(row[kind]["affinity"], 2) for row in of_sizes for kind in SHOWN)])
    return table(header, rows)


def causes(results: Path, found: Sequence[Group]) -> str:
    """The changes from two such views without ACR, on the seeds of other views; cells that were not run are left
    out."""
    leader = frozen_setting(results, "msrc", "both")
    if leader is None:
        return NOT_RUN
    dev = on_dev(found)
    rows = []
    for view in CAUSES:
        setting = replace(leader, view=view)
        reference = dev.get(setting.with_condition(REFERENCE))
        for name in TRIED:
            group = dev.get(setting.with_condition(name, leader.weight))
            if reference is None or group is None:
                continue
            few = group.of_seeds(FEW)
            gains = [paired_mean(reference, few, figure) for figure in (raw_of, propagated_of, mean_ap_of)]
            shown = [NOT_RUN if gain is None else signed_spread(gain) for gain in gains]
            seeds = "" if gains[0] is None else str(gains[0][2])
            rows.append([f"{view}: {CONDITIONS[name].title}", *shown, seeds])
    return table(
        [
            f"dev photos, weight {leader.weight:g}; change from such views without ACR",
            "raw mIoU",
            "propagated",
            "mAP",
            "seeds",
        ],
        rows,
    )
