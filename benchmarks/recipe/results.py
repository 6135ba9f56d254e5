"""What the recipe writes: results.json, whose schema is checked here, and the table of its page."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import acr_reg
from acr_reg.demo.record import write_json
from benchmarks.marked_page import begin, fill

STAGES = ("train", "cams", "evaluate")  # the host's commands of a run, in order
SCHEMA = "acr_reg/recipe_voc/1"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "hosts" / "recipe_mctformer_plus.md"
BEGIN = begin("recipe --write")

# key -> type, in results.json and in each of its runs; docs/hosts/recipe_mctformer_plus.md explains them
FIELDS: dict[str, Any] = {
    "schema": str,
    "host": str,
    "masks": str,
    "settings": dict,
    "versions": dict,
    "device": str,
    "runs": list,
    "summary": dict,
}
RUN_FIELDS: dict[str, Any] = {
    "arm": str,
    "seed": int,
    "best_miou": float,
    "best_threshold": float,
    "miou": list,
    "thresholds": list,
    "per_class_iou": list,
    "images": int,
    "host_miou": float,
    "host_threshold": float,
    "seconds": dict,
    "commands": dict,
    "source": str,
}


class RecipeError(RuntimeError):
    """Something is missing or wrong; the message says what to do."""


def collect(out: Path, settings: Mapping[str, Any], host: str, masks: str) -> dict[str, Any]:
    """Write and return results.json of the runs in the folder that have finished every stage."""
    needed = [*(f"{stage}.json" for stage in STAGES), "score.json"]
    folders = [folder for folder in sorted(out.glob("*-seed*")) if all((folder / name).is_file() for name in needed)]
    runs = [_run(folder) for folder in folders]
    names = ("torch", "torchvision", "timm", "numpy", "pillow")
    versions = {name: metadata.version(name) for name in names}
    results = {
        "schema": SCHEMA,
        "host": host,
        "masks": masks,
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), "acr_reg": acr_reg.__version__, **versions},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "runs": runs,
        "summary": summary(runs),
    }
    check_schema(results)
    write_json(out / "results.json", results)
    return results


def _run(folder: Path) -> dict[str, Any]:
    arm, _, seed = folder.name.rpartition("-seed")
    scores = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    records = {}
    for stage in STAGES:
        records[stage] = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
    host_miou, host_threshold = read_host_score(folder / "evaluate.log")
    return {
        "arm": arm,
        "seed": int(seed),
        **{name: scores[name] for name in ("best_miou", "best_threshold", "miou", "thresholds", "per_class_iou")},
        "images": scores["images"],
        "host_miou": host_miou,
        "host_threshold": host_threshold,
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
        "commands": {stage: record["command"] for stage, record in records.items()},
        "source": records["train"]["source"],
    }


def read_host_score(log: Path) -> tuple[float, float]:
    """(mIoU in [0, 1], threshold), as printed by the host's evaluation."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"Best background score: ([0-9.]+)\s+mIoU: ([0-9.]+)%", text)
    if found is None:
        raise RecipeError(f"The host's evaluation printed no best score. Read its log, {log}.")
    return float(found[2]) / 100, float(found[1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each arm the number of seeds, mean and sample standard deviation of best_miou; the difference of each seed
    that both arms have."""
    scores = {(run["arm"], run["seed"]): run["best_miou"] for run in runs}
    found: dict[str, Any] = {}
    for arm in ("without", "with"):
        values = [score for (name, _), score in scores.items() if name == arm]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            found[arm] = {"seeds": len(values), "mean": statistics.mean(values), "standard_deviation": deviation}
    both = sorted(seed for name, seed in scores if name == "with" and ("without", seed) in scores)
    if both:
        found["differences"] = {str(seed): scores["with", seed] - scores["without", seed] for seed in both}
    return found


def check_schema(results: Mapping[str, Any]) -> None:
    """Raise RecipeError unless keys and types are those of FIELDS and RUN_FIELDS."""
    for what, found, fields in (
        ("results", results, FIELDS),
        *((f"run {number}", run, RUN_FIELDS) for number, run in enumerate(results.get("runs", []))),
    ):
        wrong = sorted(found.keys() ^ fields.keys())
        wrong += [name for name, kind in fields.items() if name in found and not isinstance(found[name], kind)]
        if wrong:
            raise RecipeError(f"The fields {wrong} of {what} are wrong. {SCHEMA} has the fields {sorted(fields)}.")


def table(results: Mapping[str, Any]) -> str:
    lines = ["| arm | seed | mIoU, % | threshold | mIoU by the host, % |", "|---|---|---|---|---|"]
    for run in sorted(results["runs"], key=lambda run: (run["arm"] == "with", run["seed"])):
        lines.append(
            f"| {run['arm']} ACR | {run['seed']} | {100 * run['best_miou']:.2f} | {run['best_threshold']:.2f} | "
            f"{100 * run['host_miou']:.2f} |"
        )
    for arm in ("without", "with"):
        if of_arm := results["summary"].get(arm):
            spread = of_arm["standard_deviation"]
            shown = "" if spread is None else f" ± {100 * spread:.2f}"
            lines.append(f"| {arm} ACR | mean of {of_arm['seeds']} | {100 * of_arm['mean']:.2f}{shown} | | |")
    return "\n".join(lines)


def write_page(results: Mapping[str, Any], page: Path = PAGE) -> None:
    versions = results["versions"]
    measured = f"Measured on {results['device']}, torch {versions['torch']}, timm {versions['timm']}, masks of "
    fill(page, BEGIN, f"{measured}{results['masks']}:\n\n{table(results)}")
