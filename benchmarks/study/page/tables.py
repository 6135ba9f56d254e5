"""Rows of the study's tables: cells grouped over seeds, their figures, and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.counts import Difference, ImageCounts, paired_bootstrap
from benchmarks.study.settings import CONDITIONS, REFERENCE, SETS, Setting
from benchmarks.study.store import BASELINES, all_cells, read_json
from benchmarks.study.views import VIEWS

Record = Mapping[str, Any]
Figure = Callable[[Record], float]

WEIGHTS_NOTE = "saliency-tuned weights, not image-level WSSS"
NOT_RUN = "not run"


@dataclass(frozen=True, eq=False)
class Group:
    """The cells of one setting on one split, by seed."""

    setting: Setting
    split: str
    records: dict[int, Record]

    def mean(self, figure: Figure) -> tuple[float, float, int]:
        """Mean, standard deviation (NaN of one) and number of seeds."""
        return moments([figure(record) for record in self.records.values()])

    def of_seeds(self, seeds: Iterable[int]) -> Group:
        """The cells of these seeds, as far as they were run."""
        return replace(self, records={seed: self.records[seed] for seed in seeds if seed in self.records})

    @property
    def title(self) -> str:
        """The condition and its options, except the table's size, epochs, view and precision."""
        setting = self.setting
        parts = [CONDITIONS[setting.condition].title]
        parts += [f"weight {setting.weight:g}"] if setting.weight else []
        parts += [f"CAM weight {setting.cam_weight:g}"] if setting.cam_weight else []
        parts += [VIEWS[setting.view]] if setting.view != "flip" else []
        parts += [setting.distance] if setting.distance != "l1" else []
        parts += [f"{setting.layers} layers"] if setting.layers != "all" else []
        parts += ["second view fixed"] if setting.stop_gradient else []
        parts += [f"warm-up {setting.warmup:g}"] if setting.warmup else []
        return ", ".join(parts)


def groups(results: Path) -> list[Group]:
    """All groups, in the order of the conditions, then of the weights."""
    found: dict[tuple[Setting, str], dict[int, Record]] = {}
    for cell, record in all_cells(results):
        found.setdefault((cell.setting, cell.split), {})[cell.seed] = record
    order = list(CONDITIONS)
    made = [Group(setting, split, dict(sorted(records.items()))) for (setting, split), records in found.items()]
    return sorted(made, key=lambda g: (order.index(g.setting.condition), g.setting.weight, g.setting.cam_weight))


def tested(found: Iterable[Group], photos: str) -> dict[str, Group]:
    """The test cells at the set's own size by condition: one setting of each is frozen, and no other may be scored."""
    wanted = photos, SETS[photos].size, "test"
    return {g.setting.condition: g for g in found if (g.setting.photos, g.setting.size, g.split) == wanted}


def on_dev(found: Iterable[Group]) -> dict[Setting, Group]:
    """The dev cells by their setting."""
    return {group.setting: group for group in found if group.split == "dev"}


def reference_of(group: Group, among: Iterable[Group]) -> Group | None:
    """Two views without consistency, with the same photos, size, epochs, view and precision, on the same split."""
    same = ("photos", "size", "epochs", "view", "precision", "frozen", "batch_size", "rate", "head_rate")
    for other in among:
        if (other.setting.condition, other.split) != (REFERENCE, group.split):
            continue
        if all(getattr(other.setting, name) == getattr(group.setting, name) for name in same):
            return other
    return None


def baseline_rows(results: Path, photos: str, split: str) -> list[Record]:
    """The rows without training. A network in a folder of its own shares those of the folder above."""
    paths = (folder / photos / split / f"{BASELINES}.json" for folder in (results, results.parent))
    found = next((path for path in paths if path.exists()), None)
    return [] if found is None else read_json(found)["rows"]


def difference(first: Record, second: Record, maps: str = "raw") -> Difference:
    """Second less first, with images resampled in pairs."""
    return paired_bootstrap(ImageCounts.unpack(first[maps]["counts"]), ImageCounts.unpack(second[maps]["counts"]))


def mean_ap_of(record: Record) -> float:
    return record["mean_ap"]


def figure_of(maps: str, name: str) -> Figure:
    """A figure of the "raw" or "propagated" class maps, of the training, ..."""
    return lambda record: record[maps][name]


raw_of = figure_of("raw", "miou")
propagated_of = figure_of("propagated", "miou")
cpu_of = figure_of("training", "cpu_seconds")


def paired_mean(first: Group, second: Group, figure: Figure) -> tuple[float, float, int] | None:
    """Mean, deviation and number of the paired differences, over the seeds that both have; None without any."""
    seeds = [seed for seed in first.records if seed in second.records]
    values = [figure(second.records[seed]) - figure(first.records[seed]) for seed in seeds]
    return moments(values) if values else None


def moments(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard deviation (NaN of one) and number."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"), len(values)


# ------------------------------------------------------------ Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def tables(header: Sequence[str], rows: Sequence[Sequence[str]], widest: int = 9) -> str:
    """A table of many columns, in parts that repeat the first column."""
    parts = [range(first, min(first + widest - 1, len(header))) for first in range(1, len(header), widest - 1)]
    return "\n\n".join(table(*_columns(header, rows, part)) for part in parts)


def _columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], part: Iterable[int]
) -> tuple[list[str], list[list[str]]]:
    kept = [0, *part]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def spread(found: tuple[float, float, int], digits: int = 3) -> str:
    mean, deviation, _ = found
    return number(mean, digits) if np.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def signed_spread(found: tuple[float, float, int]) -> str:
    return ("+" if found[0] >= 0 else "") + spread(found)


def signed(found: Difference) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
