"""The study's appendix of the synthetic scenes: the demo's results, reduced to what the page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acr_reg.demo.comparison import CONTROL, WITH, WITHOUT
from acr_reg.demo.record import write_json
from benchmarks.marked_page import wrapped
from benchmarks.study.page.tables import moments, number, spread, table
from benchmarks.study.settings import StudyError
from benchmarks.study.store import read_json

FILE = "scenes.json"
EARLIER = "scenes_one_token.json"  # of the demo before it had class tokens; kept as data
TRAINED = (WITHOUT, WITH, CONTROL)


def keep(demos: Sequence[Path], results: Path) -> None:
    """Reduce the demo's JSONs of runs with ``--controls`` on test scenes, each of other seeds, to
    ``results``/scenes.json."""
    runs = [_kept(demo) for demo in demos]
    first = runs[0]
    for demo, run in zip(demos, runs, strict=True):
        if (run["settings"], run["versions"]) != (first["settings"], first["versions"]):
            raise StudyError(f"{demo} and {demos[0]} differ in settings or versions. Run all seeds with the same.")
    seeds = {seed: rows for run in runs for seed, rows in run["seeds"].items()}
    if len(seeds) < sum(len(run["seeds"]) for run in runs):
        raise StudyError("Two of the runs hold the same seed. Give each seed once.")
    kept = {"commands": [run.pop("command") for run in runs]} | first | {"seeds": seeds}
    write_json(results / FILE, kept, lines=True)


def _kept(demo: Path) -> dict[str, Any]:
    try:
        run = json.loads(demo.read_text(encoding="utf-8"))
        seeds = {str(each["seed"]): {row["name"]: _reduced(row) for row in each["rows"]} for each in run["seeds"]}
        kept = {name: run[name] for name in ("command", "settings", "split", "versions", "machine")}
        kept["command"] = _without_output(kept["command"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{demo} is no result of the demo ({error!r}). Run python -m acr_reg demo --controls."
        ) from error
    missing = [name for name in TRAINED if any(name not in rows for rows in seeds.values())]
    if missing or kept["split"] != "test":
        raise StudyError(
            f"{demo} is of {kept['split']} scenes and lacks {', '.join(missing) or 'no condition'}. Run the demo on "
            "test scenes with --controls."
        )
    return kept | {"seeds": seeds}


def _without_output(command: list[str]) -> list[str]:
    """The demo's arguments without --output DIR, a folder of the machine that ran it."""
    if "--output" not in command:
        return command
    at = command.index("--output")
    return command[:at] + command[at + 2 :]


def _reduced(row: Mapping[str, Any]) -> dict[str, Any]:
    """The mIoU of each kind of class maps, the headline first, and what else is shown."""
    found: dict[str, Any] = {kind: score["miou"] for kind, score in row["maps"].items()}
    if row["training"] is not None:
        found |= {"mean_ap": row["mean_ap"], "entropy": row["terms"]["entropy"]}
        found |= {"cpu_seconds": row["training"]["cpu_seconds"]}
    return found


def scenes(results: Path) -> str:
    """The page: every seed and the means, with the baselines, of the demo today and of the one before."""
    about = (
        "Small ViTs are trained from scratch on the demo's synthetic scenes. The settings were chosen on other seeds. "
        "Each network is scored once on the test scenes, at the threshold that is best on development scenes. `python "
        "-m benchmarks.study report` writes this page; the [study](study.md) has the summary."
    )
    parts = ["# Study: every table of the synthetic scenes\n", wrapped(about) + "\n"]
    parts += ["## A token for each class, and a head on the patches\n", *_tables(results / FILE)]
    parts += ["## The demo before: one class token, maps by gradient\n", *_tables(results / EARLIER)]
    return "\n".join(parts)


def _tables(path: Path) -> list[str]:
    if not path.exists():
        return ["Not run yet.\n"]
    run = read_json(path)
    seeds: dict[str, dict[str, Any]] = run["seeds"]
    kinds, commands = _kinds(seeds), run.get("commands") or [run["command"]]
    columns = {"mean_ap": 3, **dict.fromkeys(kinds, 3), "entropy": 3, "cpu_seconds": 0}
    rows, by_seed = [], []
    for name in next(iter(seeds.values())):
        found = [of_seed[name] for of_seed in seeds.values()]
        rows.append([name, *[_mean(found, key, digits) for key, digits in columns.items()]])
        by_seed.append([name, *[number(each[kinds[0]]) for each in found]])
    return [
        "```bash\n" + "\n".join(f"python -m acr_reg {' '.join(each)}" for each in commands) + "\n```\n",
        f"Means over {len(seeds)} seeds:\n",
        table(["", "mAP", *kinds, "entropy", "CPU s"], rows) + "\n",
        f"By seed, mIoU ({kinds[0]}):\n",
        table(["", *[f"seed {seed}" for seed in seeds]], by_seed) + "\n",
        "Differences in mIoU, paired by seed:\n",
        _differences(seeds) + "\n",
    ]


def differences(results: Path) -> str:
    """A table of the three contrasts."""
    path = results / FILE
    return _differences(read_json(path)["seeds"]) if path.exists() else "Not run yet."


def _differences(seeds: Mapping[str, Mapping[str, Any]]) -> str:
    kinds = _kinds(seeds)
    rows = [
        [f"from {first} to {second}", *[_paired(seeds, first, second, kind) for kind in kinds]]
        for first, second in ((WITHOUT, WITH), (CONTROL, WITH), (WITHOUT, CONTROL))
    ]
    return table([f"test scenes, {len(seeds)} seeds; mean change (range), seeds above zero", *kinds], rows)


def _kinds(seeds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of the class maps, the headline first."""
    return [key for key in next(iter(seeds.values()))[WITH] if key not in _OTHERS]


_OTHERS = ("mean_ap", "entropy", "cpu_seconds")


def _mean(found: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [each[key] for each in found if key in each]
    return spread(moments(values), digits) if values else ""


def _paired(seeds: Mapping[str, Mapping[str, Any]], first: str, second: str, maps: str) -> str:
    values = [rows[second][maps] - rows[first][maps] for rows in seeds.values()]
    above = sum(value > 0 for value in values)
    spread_of = f"{min(values):+.3f} to {max(values):+.3f}"
    return f"{np.mean(values):+.3f} ({spread_of}), {above} of {len(values)}"
