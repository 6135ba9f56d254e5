"""The command `python -m acr_reg demo`: train without and with ACR from one checkpoint, and show what differs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from acr_reg.demo.comparison import Plan, Report, SeedResult, run_seed
from acr_reg.demo.pictures import draw
from acr_reg.demo.record import run_details, write_json
from acr_reg.demo.report import paired_differences, paired_table, table, verdict
from acr_reg.demo.scene_task import QUICK, SceneSettings, plan_scenes
from acr_reg.errors import CommandError

PHOTO_OPTIONS = ("weights", "classes", "size", "epochs", "train_images", "frozen")

TEXT_WIDTH = 100  # columns, where the output is no terminal

_Settings = TypeVar("_Settings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("acr_demo"),
        metavar="DIR",
        help="of PNG and JSON (default: acr_demo)",
    )
    add("--seeds", type=int, default=1, metavar="K", help="repeat with K seeds, show mean and deviation (default: 1)")
    add("--first-seed", type=int, default=0, metavar="N", help="of those K (default: 0)")
    add("--split", choices=("dev", "test"), help="images scored (default: test; with --voc dev)")
    add("--controls", action="store_true", help="also train with ACR but the flip not undone: mere smoothing")
    add("--quick", action="store_true", help="under one minute, to see that it runs: its figures mean nothing")
    add("--threads", type=int, metavar="N", help="for torch (default: torch's own choice)")
    add("--activation-weight", type=float, metavar="W", help="of the class token's rows, per query row")
    add("--affinity-weight", type=float, metavar="W", help="of the patches' rows, per query row")
    add = parser.add_argument_group("photos instead of the synthetic scenes").add_argument
    add(
        "--voc", type=Path, metavar="DIR", help="JPEGImages, SegmentationClass[Aug], ImageSets/*.txt, image_labels.json"
    )
    add("--weights", type=Path, metavar="FILE", help="of vit_small_patch14_dinov2 (default: download)")
    add("--classes", metavar="NAMES", help="keep these, e.g. cat,dog (default: all); the others' pixels do not count")
    add("--size", type=int, metavar="PX", help="photos are stretched to this square; 14, 28, ... (default: 112)")
    add("--epochs", type=int, metavar="N", help="over the training photos")
    add("--train-images", type=int, metavar="N", help="use only some of them (default: all)")
    add("--frozen", type=int, metavar="N", help="lower blocks that do not train (default: 6 of 12)")


def run(args: argparse.Namespace) -> int:
    """Runs every seed; prints tables and verdict, writes demo.png and demo.json. Users' errors are CommandErrors."""
    check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    split = args.split or ("test" if args.voc is None else "dev")
    plan = make_plan(args)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else TEXT_WIDTH)
    results = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with progress_bar() as report:
            results.append(run_seed(plan, seed, split, report))
        console.print(table(f"{plan.title}; {split} images, seed {seed}", results[-1].rows))
    differences = paired_differences([result.rows for result in results])
    if len(results) > 1:
        console.print(paired_table(differences))
    lines = [*plan.notes, *verdict([result.rows for result in results], plan)]
    console.print("\n".join(lines), soft_wrap=True)
    save(args.output, plan, split, results, differences, lines)
    console.print(f"Written: {args.output / 'demo.png'}, {args.output / 'demo.json'}", soft_wrap=True)
    return 0


def check(args: argparse.Namespace) -> None:
    for name in ("seeds", "threads", "epochs", "train_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    for name in ("activation_weight", "affinity_weight"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise CommandError(f"--{name.replace('_', '-')} is {value}, expected a number of 0 or more")
    given = [name for name in PHOTO_OPTIONS if getattr(args, name) is not None]
    if args.voc is None and given:
        raise CommandError(f"--{given[0].replace('_', '-')} is for photos; give their folder by --voc DIR")
    if args.voc is not None and args.quick:
        raise CommandError("--quick is for the synthetic scenes; for a look at photos: --train-images 64 --epochs 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {args.output} cannot be made: {error}") from error


def make_plan(args: argparse.Namespace) -> Plan:
    if args.voc is None:
        return plan_scenes(override(QUICK if args.quick else SceneSettings(), args), args.controls, args.quick)
    from acr_reg.demo.photo_folder import open_folder
    from acr_reg.demo.photo_task import PhotoSettings, plan_photos

    folder = open_folder(args.voc, args.classes.split(",") if args.classes else None)
    return plan_photos(folder, args.weights, override(PhotoSettings(), args), args.controls)


def override(settings: _Settings, args: argparse.Namespace) -> _Settings:
    """The settings with whatever the options give in their place."""
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return dataclasses.replace(settings, **given)  # type: ignore[type-var]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Bars on standard error, where that is a terminal."""
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:

        def report(what: str, steps: int) -> Any:
            task = progress.add_task(what, total=steps)
            return lambda: progress.advance(task)

        yield report


def save(
    output: Path,
    plan: Plan,
    split: str,
    results: list[SeedResult],
    differences: list[dict[str, float]],
    lines: list[str],
) -> None:
    draw(output / "demo.png", results[0].pictures, plan.names, plan.background, f"{plan.title}; {split} images")
    write_json(
        output / "demo.json",
        run_details()
        | {
            "title": plan.title,
            "split": split,
            "settings": plan.settings,
            "summary": lines,
            "paired_differences": differences,
            "seeds": [
                {"seed": result.seed, "pretraining": result.pretraining, "rows": result.rows} for result in results
            ],
        },
    )
