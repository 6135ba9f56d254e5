"""The primary contrast: every seed, and the verdict by the rule that was written down before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.study.counts import Difference
from benchmarks.study.page.tables import (
    Group,
    baseline_rows,
    difference,
    mean_ap_of,
    moments,
    number,
    paired_mean,
    raw_of,
    signed,
    signed_spread,
    spread,
    table,
)
from benchmarks.study.settings import CONDITIONS, NETWORKS, SEEDS
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

    @cached_property
    def title(self) -> str:
        return f"From {self.first.title} to {self.second.title}"

    def rows(self) -> list[list[str]]:
        rows = []
        for seed, raw, propagated in zip(self.seeds, self.raw, self._differences("propagated"), strict=True):
            one, other = self.first.records[seed], self.second.records[seed]
            rows.append(
                [
                    str(seed),
                    f"{one['mean_ap']:.3f} to {other['mean_ap']:.3f}",
                    f"{one['raw']['miou']:.3f} to {other['raw']['miou']:.3f}",
                    signed(raw),
                    f"{one['propagated']['miou']:.3f} to {other['propagated']['miou']:.3f}",
                    signed(propagated),
                ]
            )
        return rows

    @property
    def decided(self) -> str | None:
        """A gain, a loss, a trade or no clear difference, by the rule of primary.json; None while seeds are missing."""
        if len(self.raw) < len(SEEDS):
            return None
        said = judged(self.raw)
        gained = paired_mean(self.first, self.second, mean_ap_of)
        if said == HELPS and gained is not None and gained[0] < -TRADED:
            return f"a trade, not a gain: mAP falls by {-gained[0]:.3f}"
        return said

    def verdict(self) -> list[str]:
        """The figures and the verdict, as a row that can be checked against the rows of the seeds."""
        mean, deviation, seeds = found = moments([each.value for each in self.raw])
        above = sum(each.value > 0 for each in self.raw)
        clear = sum(each.low > 0 or each.high < 0 for each in self.raw)
        conditions = (group.setting.condition for group in (self.first, self.second))
        row = [*(CONDITIONS[condition].title for condition in conditions), signed_spread(found)]
        counts = [f"{above} of {seeds}", f"{clear} of {seeds}"]
        if self.decided is None:
            return [*row, "", *counts, f"nothing yet: {len(SEEDS) - seeds} of {len(SEEDS)} seeds are missing"]
        half = STUDENT * deviation / seeds**0.5
        return [*row, f"{mean - half:+.3f} to {mean + half:+.3f}", *counts, f"**{self.decided}**"]


def judged(found: Sequence[Difference]) -> str:
    """A gain or a loss if the differences of all seeds have one sign and three or more intervals exclude zero."""
    for said, sign in ((HELPS, 1), (HARMS, -1)):
        clear = sum(min(sign * each.low, sign * each.high) > 0 for each in found)
        if all(sign * each.value > 0 for each in found) and clear >= EXCLUDING:
            return said
    return UNCLEAR


def by_seed(contrasts: Sequence[Contrast]) -> str:
    """A table for each contrast, with a row for each seed that both conditions have."""
    maps = maps_of(contrasts)
    header = ["seed", "mAP", f"{maps['raw']} mIoU", "difference", maps["propagated"], "difference"]
    return "\n\n".join(f"{contrast.title}:\n\n{table(header, contrast.rows())}" for contrast in contrasts)


def maps_of(contrasts: Sequence[Contrast]) -> Mapping[str, str]:
    """How pages name the class maps of the network that is compared."""
    return NETWORKS[contrasts[0].first.setting.network].maps


def rule(results: Path) -> str:
    """What was written down before the study ran, word for word."""
    path = results / FILE
    if not path.exists():
        return "Not written down yet."
    text = "\n".join(read_json(path)["text"])
    return "\n\n".join([text, *(f"(Today {old} is {new}.)" for old, new in MOVED.items() if old in text)])


def contrasts(results: Path, found: Sequence[Group], photos: str) -> list[Contrast]:
    """The contrasts of primary.json on the test photos of one set, of which there are cells."""
    path = results / FILE
    pairs = read_json(path)["contrasts"] if path.exists() else []
    own = [group for group in found if (group.setting.photos, group.split) == (photos, "test")]
    made = [
        Contrast(a, b)
        for first, second in pairs
        for a in own
        for b in own
        if (a.setting.condition, b.setting.condition) == (first, second)
    ]
    return [contrast for contrast in made if contrast.seeds]


def primary(results: Path, found: Sequence[Group], photos: str) -> str:
    """The verdicts on one set, then every seed."""
    made = contrasts(results, found, photos)
    if not made:
        return "Not scored yet."
    frozen = {group.title: group.setting.epochs for contrast in made for group in (contrast.first, contrast.second)}
    chosen = "; ".join(f"{title}, {epochs} epochs" for title, epochs in frozen.items())
    settings = f"Settings, chosen on dev photos: {chosen}."
    return "\n\n".join([settings, verdicts(results, found, photos), by_seed(made)])


def verdicts(results: Path, found: Sequence[Group], photos: str) -> str:
    """A row for each contrast, and a sentence on the best row without training."""
    made = contrasts(results, found, photos)
    if not made:
        return "Not scored yet."
    baselines = baseline_rows(results, photos, "test")
    change = f"change of {maps_of(made)['raw']} mIoU"
    header = ["from", "to", change, "95 % over seeds", "seeds above 0", "intervals without 0", "verdict"]
    said = [table(header, [contrast.verdict() for contrast in made])]
    said += [_against(made[0].second, baselines)] if baselines else []
    return "\n\n".join(said)


def useful(group: Group, baselines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether raw maps are above the best row that needs no training."""
    return group.mean(raw_of)[0] > best_of(baselines)["miou"]


def best_of(baselines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(baselines, key=lambda row: row["miou"])


def _against(group: Group, baselines: Sequence[Mapping[str, Any]]) -> str:
    best = best_of(baselines)
    said = "above it" if useful(group, baselines) else "below it: **not yet useful**"
    maps = NETWORKS[group.setting.network].maps["raw"]
    return (
        f"The best row without training, {best['name']}, scores {number(best['miou'])}. The {maps} mIoU of "
        f"{CONDITIONS[group.setting.condition].title}, {spread(group.mean(raw_of))}, is {said}."
    )
