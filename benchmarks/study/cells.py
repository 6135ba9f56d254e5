"""Runs one cell: trains its network or loads it from the cache, scores it, writes the result."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from acr_reg.demo.record import Meter, machine, versions, write_json
from benchmarks.study.baselines import baselines
from benchmarks.study.counts import multi_label
from benchmarks.study.photos import Photos, Places
from benchmarks.study.scoring import figures, keys_of, score
from benchmarks.study.settings import Cell, StudyError
from benchmarks.study.store import BASELINES, check_test, frozen, load
from benchmarks.study.training.train import trained

Say = Callable[[str], None]


class Bench:
    """Runs cells; photo sets are opened, and their tokens computed, once for all of them."""

    def __init__(self, places: Places, results: Path, say: Say = print) -> None:
        self.places, self.results, self.say = places, results, say
        self._photos: dict[tuple[str, int, int], Photos] = {}

    def photos(self, name: str, size: int, frozen_blocks: int) -> Photos:
        key = (name, size, frozen_blocks)
        if key not in self._photos:
            self._photos[key] = Photos(*key, self.places)
        return self._photos[key]

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's result, from its file or computed now. check_test() decides whether a test cell may run."""
        if cell.split == "test":
            check_test(self.results, cell)
        done = load(self.results, cell)
        if done is not None:
            self.say(f"{cell.file}: already done")
            return done
        held_out = None if cell.split == "dev" else self._held_out(cell)
        setting = cell.setting
        photos = self.photos(setting.photos, setting.size, setting.frozen)
        result = trained(photos, setting, cell.seed)
        with Meter() as meter:
            every = cell.split == "dev"
            found = score(photos, result.model, cell.split, setting.network, cell.reading, every_reading=every)
        record: dict[str, Any] = {
            "setting": asdict(setting),
            "seed": cell.seed,
            "split": cell.split,
            "reading": asdict(cell.reading),
            "weights": photos.origin,
            "names": list(photos.folder.names),
            "images": len(photos.labels(cell.split)),
            "multi_label_images": int(multi_label(photos.present(cell.split)).sum()),
            "mean_ap": found.mean_ap,
            "entropies": [[round(value, 4) for value in layer] for layer in found.entropies],
        }
        keys = keys_of(setting.network, cell.reading)
        for name, key in keys.items():
            threshold = None if held_out is None else held_out[name]
            record[name] = asdict(figures(found.totals[key], found.images[key], photos.present(cell.split), threshold))
            record[name]["agreement"] = found.agreement[key]
        record["readings"] = [
            {"start": start, "propagation": how, "miou": scores.best_miou, "threshold": scores.best_threshold}
            for (start, how), scores in ((key, total.compute()) for key, total in found.totals.items())
        ]
        record["training"] = asdict(result.record)
        record["scoring"] = {"seconds": meter.seconds, "cpu_seconds": meter.cpu_seconds}
        record |= {"versions": versions(), "machine": machine(), "commit": commit()}
        write_json(self.results / cell.file, record, lines=True)
        self.say(
            f"{cell.file}: mAP {record['mean_ap']:.3f}, raw {record['raw']['miou']:.3f}, propagated "
            f"{record['propagated']['miou']:.3f}; trained in {result.record.cpu_seconds:.0f} s, scored in "
            f"{meter.cpu_seconds:.0f} s of CPU time"
        )
        return record

    def _held_out(self, cell: Cell) -> dict[str, float | None]:
        """The best thresholds on dev, for the cell's reading. Dev cells use the default reading, so that their tables
        compare; they also record the threshold of every reading."""
        dev = self.run(Cell(cell.setting, cell.seed))
        wanted = keys_of(cell.setting.network, cell.reading)
        found = {(each["start"], each["propagation"]): each["threshold"] for each in dev["readings"]}
        return {name: found[key] for name, key in wanted.items()}

    def run_baselines(self, name: str, size: int, split: str, frozen_blocks: int = 6) -> dict[str, Any]:
        """Score the baselines without training on a split; on test.txt once, and only when settings are frozen."""
        path = self.results / name / split / f"{BASELINES}.json"
        if path.exists():
            raise StudyError(f"{path} exists: the baselines were scored already. Read them there.")
        if split == "test":
            frozen(self.results)
        photos = self.photos(name, size, frozen_blocks)
        rows = baselines(photos, split)
        content = {"photos": name, "split": split, "size": size, "weights": photos.origin, "rows": rows}
        write_json(path, content | {"commit": commit()}, lines=True)
        return content


def commit() -> str:
    """The commit of the code, for the record."""
    here = Path(__file__).parent
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"
