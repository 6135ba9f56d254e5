"""Chooses settings and readings by dev cells alone, by one rule for all conditions, and writes them to be frozen.

The rule: for each condition, of all epochs and weights that were run on dev with the flip at the set's own size (other
options at their defaults), and of all start layers, those with the highest mean raw CAM mIoU over the seeds that all of
them have; then, for them, the propagation with the highest propagated mIoU. The reference and "both" choose among the
same epochs; the other conditions take the reference's, and choose among the same readings. The controls of "both"
(misreported, smoothing) take the weight, epochs and reading of "both".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from study_scoring import RAW
from study_settings import CONDITIONS, PROPAGATIONS, REFERENCE, SEEDS, STARTS, Cell, Reading, Setting, StudyError, base

PRIMARY = ("two", "both", "misreported")
FOLLOWERS = {"misreported": "both", "smoothing": "both"}
_MAIN_SEEDS = SEEDS[:3]

Found = Iterable[tuple[Cell, Mapping[str, Any]]]
Entry = Mapping[str, Any]
Chosen = Mapping[str, tuple[Setting, Reading]]


def choose(found: Found, photos: str, fixed: Iterable[Entry] = ()) -> Chosen:
    """The setting and reading of each condition that has cells for the set. ``fixed`` are the entries of frozen.json:
    what they name is not chosen again, whatever cells have come since. Raises StudyError where a condition of the
    primary contrast has neither."""
    candidates: dict[str, dict[Setting, list[Mapping[str, Any]]]] = {name: {} for name in CONDITIONS}
    for cell, record in found:
        if cell.split == "dev" and _is_candidate(cell.setting, photos):
            candidates[cell.setting.condition].setdefault(cell.setting, []).append(record)
    known = {e["setting"]["condition"]: e for e in fixed if e["setting"]["photos"] == photos}
    chosen = {name: (Setting(**e["setting"]), Reading(**e["reading"])) for name, e in known.items()}
    leaders = [name for name in PRIMARY if name not in FOLLOWERS]
    missing = [name for name in leaders if name not in chosen and not candidates[name]]
    if missing:
        raise StudyError(
            f"found no dev cell of {', '.join(missing)} for {photos}; expected at least one of each; run the plan dev"
        )
    for name in leaders:
        if name not in chosen:
            chosen[name] = _best(candidates[name])
    epochs = chosen[REFERENCE][0].epochs
    for name in CONDITIONS:
        comparable = {setting: rows for setting, rows in candidates[name].items() if setting.epochs == epochs}
        if name not in chosen and name not in FOLLOWERS and comparable:
            chosen[name] = _best(comparable)
    for condition, leader in FOLLOWERS.items():
        setting, reading = chosen[leader]
        chosen.setdefault(condition, (replace(setting, condition=condition), reading))
    return chosen


def entries(chosen: Chosen, plan: str) -> list[Entry]:
    """What frozen.json says of one plan: "primary", or "main" for all other conditions."""
    return [
        {
            "plan": plan,
            "setting": asdict(setting),
            "reading": asdict(reading),
            "seeds": list(SEEDS if plan == "primary" else _MAIN_SEEDS),
        }
        for condition, (setting, reading) in chosen.items()
        if (condition in PRIMARY) == (plan == "primary")
    ]


def _is_candidate(setting: Setting, photos: str) -> bool:
    plain = base(photos, setting.condition, setting.weight, setting.cam_weight, epochs=setting.epochs)
    return setting == plain


def _best(candidates: Mapping[Setting, list[Mapping[str, Any]]]) -> tuple[Setting, Reading]:
    shared = set.intersection(*({row["seed"] for row in rows} for rows in candidates.values()))
    if not shared:
        found = "; ".join(f"{setting.slug}: {[row['seed'] for row in rows]}" for setting, rows in candidates.items())
        raise StudyError(
            f"found no seed that all candidates have ({found}); expected one: seeds differ more than settings do; run "
            "the plan dev to its end"
        )
    compared = {s: [row for row in rows if row["seed"] in shared] for s, rows in candidates.items()}
    ranked = [
        (mean_of(rows, start, RAW), -abs(start), setting.epochs, setting, start)
        for setting, rows in compared.items()
        for start in STARTS
    ]
    *_, setting, start = max(ranked, key=lambda entry: entry[:3])
    return setting, Reading(start, max(PROPAGATIONS, key=lambda name: mean_of(compared[setting], start, name)))


def mean_of(rows: Iterable[Mapping[str, Any]], start: int, propagation: str) -> float:
    """The mean over seeds of the dev mIoU by one reading."""
    values = [
        reading["miou"]
        for row in rows
        for reading in row["readings"]
        if (reading["start"], reading["propagation"]) == (start, propagation)
    ]
    return float(np.mean(values))
