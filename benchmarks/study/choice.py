"""Chooses settings and readings by dev cells alone, with one rule for all conditions, and lists them for frozen.json.

The rule: the candidates of a condition are all epochs and weights that were run on dev with the flip at the set's own
size and other options at their defaults, each with all start layers. They are compared by the mean raw CAM mIoU over
the seeds that all of them have. The reference and "both" are trained equally long: of the epochs that both were run at,
those with the highest mean of their best candidates. At these epochs each condition takes its best candidate and then
the propagation with the highest propagated mIoU. The other conditions take the same epochs and choose among the same
readings. The controls of "both" (misreported, smoothing) take its weight, epochs and reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from benchmarks.study.scoring import RAW
from benchmarks.study.settings import (
    CONDITIONS,
    NETWORKS,
    REFERENCE,
    SEEDS,
    Cell,
    Reading,
    Setting,
    StudyError,
    base,
)

PRIMARY = ("two", "both", "misreported")
FOLLOWERS = {"misreported": "both", "smoothing": "both"}
_MAIN_SEEDS = SEEDS[:3]

Found = Iterable[tuple[Cell, Mapping[str, Any]]]
Entry = Mapping[str, Any]
Candidates = dict[Setting, list[Mapping[str, Any]]]
Chosen = Mapping[str, tuple[Setting, Reading]]


def choose(found: Found, photos: str, fixed: Iterable[Entry] = ()) -> Chosen:
    """The setting and reading of each condition that has cells for the set. ``fixed`` are the entries of frozen.json,
    which are not chosen again, whatever cells have been added since. Raises StudyError if a condition of the primary
    contrast has neither an entry nor a dev cell."""
    candidates: dict[str, Candidates] = {name: {} for name in CONDITIONS}
    for cell, record in found:
        if cell.split == "dev" and _is_candidate(cell.setting, photos):
            candidates[cell.setting.condition].setdefault(cell.setting, []).append(record)
    known = {e["setting"]["condition"]: e for e in fixed if e["setting"]["photos"] == photos}
    chosen = {name: (Setting(**e["setting"]), Reading(**e["reading"])) for name, e in known.items()}
    leaders = [name for name in PRIMARY if name not in FOLLOWERS]
    missing = [name for name in leaders if name not in chosen and not candidates[name]]
    if missing:
        raise StudyError(f"{photos} has no dev cell of {', '.join(missing)}. Run the plan dev first.")
    if REFERENCE not in chosen:
        chosen |= _leaders({name: candidates[name] for name in leaders})
    epochs = chosen[REFERENCE][0].epochs
    for name in CONDITIONS:
        comparable = _at(candidates[name], epochs)
        if name not in chosen and name not in FOLLOWERS and comparable:
            chosen[name] = _best(_by_shared_seeds(comparable))
    for condition, leader in FOLLOWERS.items():
        setting, reading = chosen[leader]
        chosen.setdefault(condition, (replace(setting, condition=condition), reading))
    return chosen


def entries(chosen: Chosen, plan: str) -> list[Entry]:
    """The entries of frozen.json for one plan: "primary", or "main" for all other conditions."""
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
    plain = base(photos, setting.condition, setting.weight, setting.cam_weight, setting.network, epochs=setting.epochs)
    return setting == plain


def _leaders(candidates: Mapping[str, Candidates]) -> dict[str, tuple[Setting, Reading]]:
    """The settings and readings of the reference and "both", at the same epochs."""
    compared = {name: _by_shared_seeds(rows) for name, rows in candidates.items()}
    shared = set.intersection(*({setting.epochs for setting in rows} for rows in compared.values()))
    if not shared:
        found = "; ".join(f"{name}: {sorted({s.epochs for s in rows})}" for name, rows in candidates.items())
        raise StudyError(
            f"No epochs were run for all ({found}), but only equal trainings compare. Run the plan dev to its end."
        )

    def together(epochs: int) -> float:
        return sum(_first(_at(rows, epochs))[0] for rows in compared.values())

    epochs = max(sorted(shared), key=together)
    return {name: _best(_at(rows, epochs)) for name, rows in compared.items()}


def _at(candidates: Candidates, epochs: int) -> Candidates:
    return {setting: rows for setting, rows in candidates.items() if setting.epochs == epochs}


def _best(compared: Candidates) -> tuple[Setting, Reading]:
    _, setting, start = _first(compared)
    how = max(NETWORKS[setting.network].spread, key=lambda name: mean_of(compared[setting], start, name))
    return setting, Reading(start, how)


def _first(compared: Candidates) -> tuple[float, Setting, int]:
    """The highest mean raw mIoU, its setting and start layer; among equals the later start, then the longer
    training."""
    found = [
        (mean_of(rows, start, RAW), setting, start)
        for setting, rows in compared.items()
        for start in NETWORKS[setting.network].starts
    ]
    return max(found, key=lambda entry: (entry[0], entry[2], entry[1].epochs))


def _by_shared_seeds(candidates: Candidates) -> Candidates:
    shared = set.intersection(*({row["seed"] for row in rows} for rows in candidates.values()))
    if not shared:
        found = "; ".join(f"{setting.slug}: {[row['seed'] for row in rows]}" for setting, rows in candidates.items())
        raise StudyError(
            f"No seed was run for all candidates ({found}), but seeds differ more than settings. Run the plan dev to "
            "its end."
        )
    return {s: [row for row in rows if row["seed"] in shared] for s, rows in candidates.items()}


def mean_of(rows: Iterable[Mapping[str, Any]], start: int, propagation: str) -> float:
    """The dev mIoU of one reading, averaged over seeds."""
    values = [
        reading["miou"]
        for row in rows
        for reading in row["readings"]
        if (reading["start"], reading["propagation"]) == (start, propagation)
    ]
    return float(np.mean(values))
