"""The primary contrast's section of the page: every seed, and the verdict by the rule that was written down before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.study.choice import PRIMARY
from benchmarks.study.counts import Difference
from benchmarks.study.page.tables import (
    WEIGHTS_NOTE,
    Group,
    baseline_rows,
    difference,
    mean_ap_of,
    moments,
    number,
    paired_mean,
    raw_of,
    signed,
    spread,
    table,
)
from benchmarks.study.settings import SEEDS, SETS
from benchmarks.study.store import read_json

FILE = "primary.json"
MOVED = {"benchmarks/study_choice.py": "benchmarks/study/choice.py"}  # primary.json is frozen, files are not
EXCLUDING = 3  # so many of the seeds' intervals must exclude zero
TRADED = 0.01  # mAP that a gain may lose
STUDENT = 2.776  # the 97.5 % point of Student's t with four degrees of freedom (five seeds)
HELPS, HARMS, UNCLEAR = "a gain", "a loss", "no clear difference"


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two conditions on the test photos of one set, compared by seed: the second less the first."""

    first: Group
    second: Group

    @property
    def seeds(self) -> list[int]:
        return [seed for seed in self.first.records if seed in self.second.records]

    @cached_property
    def raw(self) -> list[Difference]:
        return self._differences("raw")

    def _differences(self, maps: str) -> list[Difference]:
        return [difference(self.first.records[seed], self.second.records[seed], maps) for seed in self.seeds]

    def rows(self) -> list[list[str]]:
        rows = []
        for seed, raw, propagated in zip(self.seeds, self.raw, self._differences("propagated"), strict=True):
            one, other = self.first.records[seed], self.second.records[seed]
            rows.append(
                [
                    f"{self.second.title} less {self.first.title}",
                    str(seed),
                    f"{one['mean_ap']:.3f} to {other['mean_ap']:.3f}",
                    f"{one['raw']['miou']:.3f} to {other['raw']['miou']:.3f}",
                    signed(raw),
                    f"{one['propagated']['miou']:.3f} to {other['propagated']['miou']:.3f}",
                    signed(propagated),
                ]
            )
        return rows

    def verdict(self) -> str:
        """The verdict by the rule of primary.json, in a sentence that can be checked against the rows."""
        above = sum(each.value > 0 for each in self.raw)
        clear = sum(each.low > 0 or each.high < 0 for each in self.raw)
        found = moments([each.value for each in self.raw])
        counts = (
            f"{spread(found)}, above zero in {above} of {len(self.raw)} seeds, intervals that exclude zero: {clear}"
        )
        pair = f"- {self.second.title} less {self.first.title}"
        if len(self.raw) < len(SEEDS):
            return f"{pair}: {counts}; {len(SEEDS) - len(self.raw)} seeds are missing, so nothing is said yet."
        mean, deviation, seeds = found
        half = STUDENT * deviation / seeds**0.5
        counts += f"; 95 % over seeds {mean - half:+.3f} to {mean + half:+.3f}"
        said = judged(self.raw)
        gained = paired_mean(self.first, self.second, mean_ap_of)
        if said == HELPS and gained is not None and gained[0] < -TRADED:
            said = f"a trade, not a gain: mAP falls by {-gained[0]:.3f}"
        return f"{pair}: {counts}: **{said}**."


def judged(found: Sequence[Difference]) -> str:
    """A gain or a loss if the differences of all seeds have one sign and three or more intervals exclude zero."""
    for said, sign in ((HELPS, 1), (HARMS, -1)):
        clear = sum(min(sign * each.low, sign * each.high) > 0 for each in found)
        if all(sign * each.value > 0 for each in found) and clear >= EXCLUDING:
            return said
    return UNCLEAR


def by_seed(contrasts: Sequence[Contrast]) -> str:
    """A table of all contrasts, with a row for each seed that both conditions have."""
    header = ["contrast", "seed", "mAP", "raw CAM mIoU", "difference", "propagated", "difference"]
    return table(header, [row for contrast in contrasts for row in contrast.rows()])


def primary(results: Path, found: Sequence[Group]) -> str:
    path = results / FILE
    if not path.exists():
        return "## Primary contrast\n\nNot written down yet.\n"
    plan = read_json(path)
    lines = ["## Primary contrast, written down before it was run\n", *plan["text"], ""]
    lines += [f"(Today {old} is {new}.)\n" for old, new in MOVED.items() if old in "\n".join(plan["text"])]
    for photos, about in SETS.items():
        scored = [group for group in found if (group.setting.photos, group.split) == (photos, "test")]
        own = [group for group in scored if group.setting.condition in PRIMARY]
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
    if not any(contrast.seeds for contrast in found):
        return "Not scored yet."
    lines = [f"- Frozen on dev: {'; '.join(f'{g.title}, {g.setting.epochs} epochs' for g in own)}."]
    lines += [contrast.verdict() for contrast in found if contrast.seeds]
    if baselines:
        lines += [_against(group, baselines) for group in own if group.setting.condition == plan["contrasts"][0][1]]
    return "\n".join([*lines, "", by_seed(found)])


def _against(group: Group, baselines: Sequence[Mapping[str, Any]]) -> str:
    best = max(baselines, key=lambda row: row["miou"])
    mean = group.mean(raw_of)
    said = "above it" if mean[0] > best["miou"] else "below it: **not yet useful**"
    return (
        f"- The best row that knows no training is {best['name']}, {number(best['miou'])}; raw maps of {group.title}, "
        f"{spread(mean)}, are {said}."
    )
