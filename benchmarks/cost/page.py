"""The measured costs as Markdown: a short table for README.md, all cases for docs/explanation/cost.md, and those of a
GPU for docs/explanation/gpu_cost.md.

    python -m benchmarks.cost page            # prints them
    python -m benchmarks.cost page --write    # puts them into the pages

It reads the JSON files in benchmarks/cost/results/ and measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost.gpu.page import section
from benchmarks.cost.models import Setting
from benchmarks.marked_page import begin, fill

HERE = Path(__file__).resolve().parent / "results"
ROOT = HERE.parents[2]
README = ROOT / "README.md"
PAGE, GPU_PAGE = (ROOT / "docs" / "explanation" / name for name in ("cost.md", "gpu_cost.md"))
BEGIN = begin("cost page --write")
ORDER = ("tiny", "small", "base")
NAMES = {
    "published": "published procedure",
    "dense": "dense",
    "blockwise": "blockwise",
    "rows": "blockwise, `rows=0.25`",
}
FOLDERS = (
    "batches of 1, no worker",
    "batches of 8, no worker",
    "batches of 1, a worker reads",
    "batches of 8, a worker reads",
    "no worker",
    "two workers",
    "counting alone, no files",
)
SHORT = (("tiny", 224, 1), ("tiny", 224, 4), ("small", 384, 1), ("small", 768, 1))  # model, px, batch
Row = Mapping[str, Any]


def results(name: str) -> list[Row]:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["results"]


def short_table() -> str:
    """README's table: the default against the published procedure, a case that loses first."""
    steps = {(r["model"], r["size"], r["batch"], r["variant"]): r for r in results("step")}
    lines = [
        "| training step | time added: published | acr_reg | acr_reg / published | in memory |",
        "|---|---|---|---|---|",
    ]
    for case in SHORT:
        published, ours = (steps[(*case, variant)] for variant in ("published", Setting(*case).default))
        model, size, batch = case
        lines.append(
            f"| ViT-{model[0].upper()}, {size} px, batch of {batch} | {_seconds(published)} | {_seconds(ours)} "
            f"| {_ratio(ours['extra_cpu_over_published'])} | {ours['extra_mb_over_published']:.3f} |"
        )
    return "\n".join(lines)


def _seconds(row: Row) -> str:
    low, median, high = row["extra_cpu_seconds"]
    return f"{median:+.2f} s ({low:.2f} to {high:.2f})"


def _ratio(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def step_table(rows: Iterable[Row]) -> str:
    lines = [
        "| ViT | px | tokens | batch | step | rounds | extra CPU s (quartiles) | of published | extra MB "
        "| of published | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(rows, key=_case)
    in_noise = {_case(r)[:3] for r in ordered if r["variant"] == "published" and not _above_zero(r)}
    for r in ordered:
        if r["variant"] == "plain":
            continue
        chosen = Setting(r["model"], r["size"], r["batch"], r["depth"]).default
        name = f"{NAMES[r['variant']]}{' (default)' * (r['variant'] == chosen)}"
        head = f"| {r['model'][0].upper()} | {r['size']} | {r['tokens']} | {r['batch']} | {name} |"
        if r["skipped"] is not None:
            lines.append(f"{head} | not run: {r['skipped']} | | | | |")
            continue
        low, median, high = r["extra_cpu_seconds"]
        ratio = "in noise" if _case(r)[:3] in in_noise else _ratio(r["extra_cpu_over_published"])
        lines.append(
            f"{head} {r['rounds']} | {median:+.2f} ({low:.2f} to {high:.2f}) "
            f"| {ratio} | {r['extra_mb']:+.0f} "
            f"| {_ratio(r['extra_mb_over_published'], 3)} | {r.get('measured', 'earlier')} |"
        )
    return "\n".join(lines)


def _above_zero(published: Row) -> bool:
    """Whether ratios to this extra mean anything: they do not if its quartiles enclose zero."""
    return published["skipped"] is not None or published["extra_cpu_seconds"][0] > 0


def _case(row: Row) -> tuple[Any, ...]:
    return ORDER.index(row["model"]), row["size"], row["batch"], ("plain", *NAMES).index(row["variant"])


def cam_table() -> str:
    lines = [
        "| present classes | variant | CPU s (quartiles) | over the forward passes | less than published "
        "| extra MB | of published |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(results("cam"), key=lambda r: (r["present"], r["cpu_seconds"][1])):
        low, median, high = r["cpu_seconds"]
        lines.append(
            f"| {r['present']} | {r['variant']} | {median:.2f} ({low:.2f} to {high:.2f}) | {r['over_forward'][1]:.2f} "
            f"| {r['published_over_this'][1]:.1f} | {r['extra_mb']:+.0f} | {r['extra_mb_over_published']:.2f} |"
        )
    return "\n".join(lines)


def folder_table() -> str:
    lines = [
        "| job | variant | images | an image: ms (quartiles) | of the first | CPU ms | of the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(results("folders"), key=lambda r: FOLDERS.index(r["variant"])):
        low, median, high = (1000 * seconds / r["images"] for seconds in r["wall_seconds"])
        cpu = 1000 * r["cpu_seconds"][1] / r["images"]
        lines.append(
            f"| {r['job']} | {r['variant']} | {r['images']} | {median:.0f} ({low:.0f} to {high:.0f}) "
            f"| {r['wall_ratio'][1]:.2f} | {cpu:.0f} | {r['cpu_ratio'][1]:.2f} |"
        )
    return "\n".join(lines)


def capture_table() -> str:
    lines = [
        "| model | forward: ms | with the capture: ms | added: ms (quartiles) | added | by a mode alone: ms |",
        "|---|---|---|---|---|---|",
    ]
    for r in results("capture"):
        low, high = r["added_quartiles"]
        lines.append(
            f"| {r['model']} | {r['without']:.1f} | {r['with_capture']:.1f} "
            f"| {r['added']:.1f} ({low:.1f} to {high:.1f}) | {r['added_percent']:.1f} % | {r['added_by_mode']:.1f} |"
        )
    return "\n".join(lines)


def metrics_table() -> str:
    lines = ["| variant | images | CPU ms an image |", "|---|---|---|"]
    for r in results("metrics"):
        lines.append(f"| {r['variant']} | {r['images']} | {1000 * r['cpu_seconds'][1] / r['images']:.1f} |")
    return "\n".join(lines)


def view_table() -> str:
    lines = [
        "| view | CPU ms | of torchvision (quartiles) | with backward: CPU ms | of torchvision |",
        "|" + "---|" * 5,
    ]
    rows = {(r["view"], r["backward"]): r for r in results("views")}
    for name in dict.fromkeys(view for view, _ in rows):
        alone, both = rows[name, False], rows[name, True]
        low, ratio, high = alone["over_torchvision"]
        lines.append(
            f"| {name} | {1000 * alone['cpu_seconds'][1]:.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) "
            f"| {1000 * both['cpu_seconds'][1]:.0f} | {both['over_torchvision'][1]:.2f} |"
        )
    return "\n".join(lines)


def slope_table() -> str:
    about = json.loads((HERE / "scaling.json").read_text(encoding="utf-8"))
    lines = ["| step | sizes, px | slope of extra memory | slope of extra CPU time |", "|---|---|---|---|"]
    for slope in about["slopes"]:
        memory, cpu = ("" if slope[k] is None else f"{slope[k]:.2f}" for k in ("memory", "cpu"))
        sizes = ", ".join(str(size) for size in slope["sizes"])
        lines.append(f"| {NAMES[slope['variant']]} | {sizes} | {memory} | {cpu} |")
    return "\n".join(lines)


def sections() -> dict[Path, str]:
    scaling = step_table(results("scaling"))
    full = (
        f"## Training step\n\n{step_table(results('step'))}\n\n"
        f"## Growth with the tokens\n\n{slope_table()}\n\n{scaling}\n\n"
        f"## Class maps, ViT-S at 384 px, an image and its flip\n\n{cam_table()}\n\n"
        f"## The capture alone, a forward pass\n\n{capture_table()}\n\n"
        f"## Views of {results('views')[0]['images']} images of {results('views')[0]['size']} px\n\n{view_table()}\n\n"
        f"## mIoU at 100 thresholds\n\n{metrics_table()}\n\n"
        f"## Folders: class maps of a ViT-S at 224 px, and scores of saved maps\n\n{folder_table()}"
    )
    return {README: short_table(), PAGE: full, GPU_PAGE: section(HERE / "gpu.json")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost page", description="The measured costs as Markdown.")
    parser.add_argument(
        "--write", action="store_true", help="write them into README.md, docs/explanation/cost.md and gpu_cost.md"
    )
    args = parser.parse_args(arguments)
    for path, table in sections().items():
        print(table)
        if args.write:
            fill(path, BEGIN, table)
    return 0
