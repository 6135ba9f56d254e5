"""Does all-pairs consistency make class maps better on photos?

export ACR_REG_DATA=...   # the folder of msrc21/, voc2012-animals/ and vit_small_patch14/weights_fp16.npz
python -m benchmarks.study cell --set msrc --condition both --weight 0.5 --seed 0
python -m benchmarks.study run --set msrc --plan dev          # continues after an interruption; --list shows the cells;
                                                              # start one process for each core, they share the cells
python -m benchmarks.study freeze --set msrc                  # after dev; commit benchmarks/study/results/frozen.json
python -m benchmarks.study run --set msrc --plan primary      # scores test.txt, once
                                                              # then both with --plan main: the other conditions
python -m benchmarks.study floor                              # how far two views' attention is apart before training
python -m benchmarks.study pictures --set msrc                # docs/explanation/study/*.png, of dev photos
python -m benchmarks.study changes                            # docs/explanation/study/changes.png, of test cells
python -m acr_reg demo --first-seed 3 --seeds 5 --controls    # synthetic scenes, from scratch
python -m benchmarks.study scenes acr_demo/demo.json          # several files, if each holds other seeds
python -m benchmarks.study report                             # the study's pages and tables
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from acr_reg.demo.record import versions, write_json
from acr_reg.errors import CommandError
from acr_reg.integrations.jobs.progress import show_progress
from benchmarks.marked_page import fill, write_page
from benchmarks.study.cells import Bench, commit
from benchmarks.study.choice import choose, entries
from benchmarks.study.floor.measure import SIZES as FLOOR_SIZES
from benchmarks.study.floor.measure import measured, smooth
from benchmarks.study.page.blocks import blocks
from benchmarks.study.page.changes_picture import draw_changes
from benchmarks.study.page.floor import FLOOR
from benchmarks.study.page.pictures import chosen_cells, draw_affinities, draw_class_maps, draw_curves
from benchmarks.study.page.report import appendix
from benchmarks.study.page.scenes import keep, scenes
from benchmarks.study.photos import Places
from benchmarks.study.plans import PLANS, plan
from benchmarks.study.settings import (
    CONDITIONS,
    LAYERS,
    NETWORKS,
    ONE_TOKEN,
    PROPAGATIONS,
    SETS,
    SPLITS,
    Cell,
    Reading,
    Setting,
    StudyError,
    base,
)
from benchmarks.study.store import BASELINES, FROZEN, all_cells, claimed, frozen_entries, load
from benchmarks.study.views import VIEWS

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "explanation" / "study.md"
WEIGHTS = Path("vit_small_patch14", "weights_fp16.npz")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.results = args.results or HERE / "results" / NETWORKS[args.network].folder
    try:
        with show_progress(bars=False) as progress:  # bars would take part of the CPU time that is measured
            progress.begin(f"benchmarks.study {args.name}", None)
            return int(args.command(args))
    except (StudyError, CommandError) as error:  # the second names a photo or mask that cannot be read
        print(f"study: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add(
        "--data",
        type=Path,
        default=os.environ.get("ACR_REG_DATA"),
        metavar="DIR",
        help="folder of the photo sets (default: $ACR_REG_DATA)",
    )
    add("--weights", type=Path, metavar="FILE", help=f"weights of the backbone (default: {WEIGHTS} in --data)")
    add(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "acr_reg_study",
        metavar="DIR",
        help="folder of tokens and networks",
    )
    add("--network", choices=NETWORKS, default=ONE_TOKEN, help="kind of network (default: one_token)")
    add("--results", type=Path, metavar="DIR", help="folder of the JSON files (default: that of the network)")
    add("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    plain = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser("python -m benchmarks.study", description=__doc__, formatter_class=plain)
    commands = result.add_subparsers(required=True, dest="name")

    cell = commands.add_parser("cell", parents=[shared], help="run one cell")
    cell.add_argument("--set", dest="photos", choices=SETS, required=True)
    cell.add_argument("--condition", choices=CONDITIONS, required=True)
    cell.add_argument("--seed", type=int, default=0)
    cell.add_argument("--split", choices=SPLITS, default="dev")
    cell.add_argument("--view", choices=VIEWS)
    cell.add_argument("--layers", choices=LAYERS)
    cell.add_argument("--distance", choices=("l1", "l2", "js"))
    cell.add_argument("--precision", choices=("float32", "bfloat16"))
    cell.add_argument("--stop-gradient", action="store_true", default=None)
    for name in ("size", "epochs", "frozen", "batch_size", "cam_start"):
        cell.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("weight", "cam_weight", "warmup", "rate", "head_rate"):
        cell.add_argument(f"--{name.replace('_', '-')}", type=float)
    cell.add_argument("--start-layer", type=int, default=Reading().start)
    cell.add_argument("--propagation", choices=PROPAGATIONS, default=Reading().propagation)
    cell.set_defaults(command=run_cell)

    run = commands.add_parser("run", parents=[shared], help="run the cells of a plan that are not done yet")
    run.add_argument("--set", dest="photos", choices=SETS, required=True)
    run.add_argument("--plan", choices=PLANS, required=True)
    run.add_argument("--seed", type=int, help="only the cells of this seed")
    run.add_argument("--list", action="store_true", help="list the cells, done or not, and the CPU hours left")
    run.set_defaults(command=run_plan)

    rows = commands.add_parser("baselines", parents=[shared], help="score the baselines without training")
    rows.add_argument("--set", dest="photos", choices=SETS, required=True)
    rows.add_argument("--split", choices=SPLITS, default="dev")
    rows.set_defaults(command=run_baselines)

    floor = commands.add_parser(
        "floor", parents=[shared], help="measure what resampling adds to the distance of two views of dev photos"
    )
    floor.set_defaults(command=run_floor)

    freeze = commands.add_parser(
        "freeze", parents=[shared], help="choose settings by dev and write frozen.json, which you then commit"
    )
    freeze.add_argument("--set", dest="photos", choices=SETS, required=True)
    freeze.add_argument(
        "--plan", choices=PLANS[1:], default="primary", help="primary (default), or main: the other conditions"
    )
    freeze.set_defaults(command=run_freeze)

    pictures = commands.add_parser(
        "pictures", parents=[shared], help="draw docs/explanation/study/*.png, of dev photos"
    )
    pictures.add_argument("--set", dest="photos", choices=SETS, required=True)
    pictures.add_argument("--output", type=Path, default=PAGE.with_suffix(""), metavar="DIR")
    pictures.set_defaults(command=run_pictures)

    drawn = commands.add_parser("changes", parents=[shared], help="draw what ACR changes in the maps of test photos")
    drawn.add_argument("--output", type=Path, default=PAGE.with_suffix(""), metavar="DIR")
    drawn.set_defaults(command=run_changes)

    scenes = commands.add_parser("scenes", parents=[shared], help="keep the demo's results on test scenes")
    scenes.add_argument("demos", type=Path, nargs="+", metavar="demo.json", help="several, if each holds other seeds")
    scenes.set_defaults(command=run_scenes)

    tables = commands.add_parser(
        "report",
        parents=[shared],
        help="write the study's appendices, and the tables in README.md, docs/explanation and docs/guides/weights.md",
    )
    tables.add_argument(
        "--output", type=Path, default=PAGE.parent, metavar="DIR", help="another folder gets the appendices alone"
    )
    tables.set_defaults(command=run_report)
    return result


def bench(args: argparse.Namespace) -> Bench:
    if args.data is None:
        raise StudyError("The folder of the photo sets is not given. Pass --data, or set ACR_REG_DATA.")
    weights = args.data / WEIGHTS if args.weights is None else args.weights
    if not weights.is_file():
        raise StudyError(f"The weights of the backbone are not at {weights}. Pass --weights FILE.")

    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    return Bench(Places(args.data, weights, args.cache), args.results, say)


def run_cell(args: argparse.Namespace) -> int:
    names = {field.name for field in fields(Setting)} - {"photos", "condition", "network"}
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    setting = base(args.photos, args.condition, network=args.network, **given)
    bench(args).run(Cell(setting, args.seed, args.split, Reading(args.start_layer, args.propagation)))
    return 0


def run_plan(args: argparse.Namespace) -> int:
    cells = [
        cell for cell in plan(args.plan, args.photos, args.results, args.network) if args.seed in (None, cell.seed)
    ]
    waiting = [cell for cell in cells if load(args.results, cell) is None]
    if args.list:
        for cell in cells:
            print(f"{'-' if cell in waiting else 'done':5}{cell.file}")
        print(f"{len(cells) - len(waiting)} of {len(cells)} cells are done{_hours(args.results, cells, waiting)}.")
        return 0
    running, failed = bench(args), 0
    split = "dev" if args.plan == "dev" else "test"
    if cells and args.network == ONE_TOKEN and not (args.results / args.photos / split / f"{BASELINES}.json").exists():
        running.run_baselines(args.photos, SETS[args.photos].size, split)
    for cell in waiting:
        with claimed(args.cache, cell) as mine:
            if not mine or load(args.results, cell) is not None:  # another process runs it, or has run it
                continue
            try:
                running.run(cell)
            except StudyError:
                raise
            except (
                Exception
            ):  # one failing cell must not cost a night: the others run, and the failure is reported at the end
                failed += 1
                print(f"{cell.file} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    if failed:
        raise StudyError(f"{failed} of {len(waiting)} cells failed. Read the log above.")
    return 0


def _hours(results: Path, cells: list[Cell], waiting: list[Cell]) -> str:
    """An estimate of the time left, from the mean time per photo token and epoch of the cells that are done."""
    done = [(cell, record) for cell in cells if cell not in waiting and (record := load(results, cell)) is not None]
    if not done:
        return ""
    spent = sum(r["training"]["cpu_seconds"] + r["scoring"]["cpu_seconds"] for _, r in done)
    each = spent / sum(_work(cell) for cell, _ in done)
    left = each * sum(_work(cell) for cell in waiting) / 3600
    return f"; {spent / len(done) / 60:.1f} CPU minutes each so far, about {left:.1f} CPU hours left"


def _work(cell: Cell) -> float:
    return cell.setting.size**2 * cell.setting.epochs


def run_baselines(args: argparse.Namespace) -> int:
    content = bench(args).run_baselines(args.photos, SETS[args.photos].size, args.split)
    for row in content["rows"]:
        print(f"{row['name']:45} {row['miou']:.3f}")
    return 0


def run_floor(args: argparse.Namespace) -> int:
    running = bench(args)
    rows = []
    for size, count in FLOOR_SIZES.items():
        photos = running.photos("msrc", size, 6)
        found = measured(photos, photos.images("dev", torch.arange(count)))
        rows += [{"size": size, "photos": count, **row} for row in found]
    smoothed = [{"size": size, **row} for size in FLOOR_SIZES for row in smooth(size)]
    content = {"weights": photos.origin, "rows": rows, "smooth": smoothed, "versions": versions(), "commit": commit()}
    write_json(args.results / FLOOR, content, lines=True)
    print(f"Written: {args.results / FLOOR}")
    return 0


def run_freeze(args: argparse.Namespace) -> int:
    path, before = args.results / FROZEN, frozen_entries(args.results)
    plans = {entry["plan"] for entry in before if entry["setting"]["photos"] == args.photos}
    if args.plan in plans:
        raise StudyError(
            f"{path} has the plan {args.plan} of {args.photos} already, and settings are frozen once. Continue with "
            f"run --plan {args.plan}."
        )
    if args.plan == "main" and not plans:
        raise StudyError(
            f"{path} has no plan primary of {args.photos}, whose weight the controls take. Run freeze --plan primary "
            "first."
        )
    added = entries(choose(all_cells(args.results), args.photos, before), args.plan)
    write_json(path, {"commit": commit(), "cells": [*before, *added]}, lines=True)
    print(f"Written: {path}. Commit it before you run the plan {args.plan}.")
    return 0


def run_pictures(args: argparse.Namespace) -> int:
    cells = chosen_cells(args.results, args.photos)
    setting = next(iter(cells.values())).setting
    photos = bench(args).photos(args.photos, setting.size, setting.frozen)
    args.output.mkdir(parents=True, exist_ok=True)
    draw_class_maps(args.output / f"{args.photos}_cams.png", photos, cells)
    draw_affinities(args.output / f"{args.photos}_affinities.png", photos, cells)
    draw_curves(args.output / f"{args.photos}_curves.png", args.results, args.photos, photos.origin)
    print(f"Written: {args.output}/{args.photos}_*.png")
    return 0


def run_changes(args: argparse.Namespace) -> int:
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "changes.png"
    if not draw_changes(path, args.results):
        raise StudyError(f"{args.results} has no test cells with and without ACR. Run the plan primary first.")
    print(f"Written: {path}")
    return 0


def run_scenes(args: argparse.Namespace) -> int:
    keep(args.demos, args.results)
    return 0


def run_report(args: argparse.Namespace) -> int:
    for name, text in appendices(args.results, args.output).items():
        write_page(args.output / name, text)
        print(f"Written: {args.output / name}")
    if args.output == PAGE.parent:
        for page, found in blocks(args.results).items():
            for marker, block in found.items():
                fill(page, marker, block)
            print(f"Written: the tables of the study in {page}")
    return 0


def appendices(results: Path, folder: Path) -> dict[str, str]:
    """File name -> page: one for each set of photos and network, and that of the scenes."""
    pages = {
        "_".join(filter(None, (PAGE.stem, photos, about.folder))) + ".md": appendix(
            results / about.folder, photos, folder / PAGE.stem, network
        )
        for network, about in NETWORKS.items()
        for photos in SETS
    }
    return pages | {f"{PAGE.stem}_scenes.md": scenes(results)}


if __name__ == "__main__":
    sys.exit(main())
