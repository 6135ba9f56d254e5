"""The primary contrast's section of the page: every seed, and what the rule written down before says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from study_counts import Difference
from study_settings import SEEDS, SETS
from study_store import read_json
from study_tables import WEIGHTS_NOTE, Group, baseline_rows, difference, groups, moments, number, signed, spread, table

FILE = "primary.json"
EXCLUDING = 3  # of the seeds' intervals must exclude zero
TRADED = 0.01  # of mAP
HELPS, HARMS, UNCLEAR = "a gain", "a loss", "no clear difference"


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two conditions on the test photos of one set: the second less the first, by seed."""

    first: Group
    second: Group

    @property
    def seeds(self) -> list[int]:
        return [seed for seed in self.first.records if seed in self.second.records]

    def differences(self, maps: str = "raw") -> list[Difference]:
        return [difference(self.first.records[seed], self.second.records[seed], maps) for seed in self.seeds]

    def rows(self) -> list[list[str]]:
        pairs = zip(self.seeds, self.differences(), self.differences("propagated"), strict=True)
        return [[f"{self.second.title} less {self.first.title}", *self._row(*each)] for each in pairs]

    def _row(self, seed: int, raw: Difference, propagated: Difference) -> list[str]:
        one, other = self.first.records[seed], self.second.records[seed]

        def both(figure: Any) -> str:
            return f"{figure(one):.3f} to {figure(other):.3f}"

        return [
            str(seed),
            both(lambda record: record["mean_ap"]),
            both(lambda record: record["raw"]["miou"]),
            signed(raw),
            both(lambda record: record["propagated"]["miou"]),
            signed(propagated),
        ]

    def verdict(self) -> str:
        """By the rule of primary.json, in a sentence that can be checked against the rows."""
        found = self.differences()
        above = sum(each.value > 0 for each in found)
        clear = sum(each.low > 0 or each.high < 0 for each in found)
        counts = (
            f"{spread(moments([each.value for each in found]))}, above zero in {above} of {len(found)} seeds, "
            f"intervals that exclude zero: {clear}"
        )
        pair = f"- {self.second.title} less {self.first.title}"
        if len(found) < len(SEEDS):
            return f"{pair}: {counts}; {len(SEEDS) - len(found)} seeds are missing, so nothing is said yet."
        said = judged(found)
        if said == HELPS and self._lost_map() > TRADED:
            said = f"a trade, not a gain: mAP falls by {self._lost_map():.3f}"
        return f"{pair}: {counts}: **{said}**."

    def _lost_map(self) -> float:
        first, second = ([group.records[s]["mean_ap"] for s in self.seeds] for group in (self.first, self.second))
        return float(np.mean(first) - np.mean(second))


def judged(found: Sequence[Difference]) -> str:
    """Of the differences of all seeds: one sign in all of them, and intervals that exclude zero in three or more."""
    for said, sign in ((HELPS, 1), (HARMS, -1)):
        clear = sum(min(sign * each.low, sign * each.high) > 0 for each in found)
        if all(sign * each.value > 0 for each in found) and clear >= EXCLUDING:
            return said
    return UNCLEAR


def primary(results: Path) -> str:
    path = results / FILE
    if not path.exists():
        return "## Primary contrast\n\nNot written down yet.\n"
    plan = read_json(path)
    lines = ["## Primary contrast, written down before it was run\n", *plan["text"], ""]
    scored = [group for group in groups(results) if group.split == "test"]
    for photos, about in SETS.items():
        own = [group for group in scored if group.setting.photos == photos]
        lines += [
            f"### {about.title}, test photos ({WEIGHTS_NOTE})\n",
            _section(own, plan, baseline_rows(results, photos, "test")),
            "",
        ]
    return "\n".join(lines)


def _section(own: Sequence[Group], plan: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]) -> str:
    found = [
        Contrast(a, b)
        for first, second in plan["contrasts"]
        for a in own
        for b in own
        if (a.setting.condition, b.setting.condition) == (first, second)
    ]
    rows = [row for contrast in found for row in contrast.rows()]
    if not rows:
        return "Not scored yet."
    header = ["contrast", "seed", "mAP", "raw CAM mIoU", "difference", "propagated", "difference"]
    lines = [contrast.verdict() for contrast in found if contrast.seeds]
    if baselines:
        lines += [_against(group, baselines) for group in own if group.setting.condition == plan["contrasts"][0][1]]
    return "\n".join([*lines, "", table(header, rows)])


def _against(group: Group, baselines: Sequence[Mapping[str, Any]]) -> str:
    best = max(baselines, key=lambda row: row["miou"])
    mean = group.mean(lambda record: record["raw"]["miou"])
    said = "above it" if mean[0] > best["miou"] else "below it: **not yet useful**"
    return (
        f"- The best row that knows no training is {best['name']}, {number(best['miou'])}; raw maps of {group.title}, "
        f"{spread(mean)}, are {said}."
    )
