"""The ``demo`` command: trains without and with ACR from one checkpoint, and shows the difference."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from acr_reg.demo.comparison import Plan, Report, SeedResult, run_seed
from acr_reg.demo.picture import draw
from acr_reg.demo.record import run_details, write_json
from acr_reg.demo.report import paired_differences, paired_table, remarks, table, verdict
from acr_reg.demo.scene_task import QUICK, SceneSettings, plan_scenes
from acr_reg.errors import CommandError
from acr_reg.integrations.jobs.progress import Progress, show_progress

PHOTO_OPTIONS = ("weights", "classes", "size", "epochs", "train_images", "frozen")

TEXT_WIDTH = 100  # columns, if the output is not a terminal

_Settings = TypeVar("_Settings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--output", type=Path, default=Path("acr_demo"), metavar="DIR", help="for PNG and JSON (default: acr_demo)")
    add("--seeds", type=int, default=1, metavar="K", help="repeat with K seeds, show mean and deviation (default: 1)")
    add("--first-seed", type=int, default=0, metavar="N", help="the first of the K seeds (default: 0)")
    add("--split", choices=("dev", "test"), help="the images to score (default: test; with --voc dev)")
    add("--controls", action="store_true", help="also train with ACR but without undoing the flip: mere smoothing")
    add("--quick", action="store_true", help="about 20 s, to see that it runs: its figures mean nothing")
    add("--threads", type=int, metavar="N", help="threads of torch (default: 1; with --voc torch's own choice)")
    add("--activation-weight", type=float, metavar="W", help="weight of the class tokens' rows, per query row")
    add("--affinity-weight", type=float, metavar="W", help="weight of the patches' rows, per query row")
    add("--cam-weight", type=float, metavar="W", help="weight of the head's class maps, per pixel (not with --voc)")
    add = parser.add_argument_group("photos instead of the synthetic scenes").add_argument
    add(
        "--voc", type=Path, metavar="DIR", help="JPEGImages, SegmentationClass[Aug], ImageSets/*.txt, image_labels.json"
    )
    add("--weights", type=Path, metavar="FILE", help="weights of vit_small_patch14_dinov2 (default: download)")
    add("--classes", metavar="NAMES", help="keep these, e.g. cat,dog (default: all); other classes' pixels are ignored")
    add("--size", type=int, metavar="PX", help="photos are stretched to this square; 14, 28, ... (default: 112)")
    add("--epochs", type=int, metavar="N", help="epochs over the training photos")
    add("--train-images", type=int, metavar="N", help="use only N of the training photos (default: all)")
    add("--frozen", type=int, metavar="N", help="lower blocks that are not trained (default: 6 of 12)")


def run(args: argparse.Namespace) -> int:
    """Run every seed, print the tables and the verdict, write demo.png and demo.json. Errors of the user are
    CommandErrors."""
    check(args)
    if (threads := threads_of(args)) is not None:
        torch.set_num_threads(threads)
    split = args.split or ("test" if args.voc is None else "dev")
    plan = make_plan(args)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else TEXT_WIDTH)
    results = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with show_progress() as progress:
            results.append(run_seed(plan, seed, split, announced(progress)))
        console.print(table(f"{plan.title}; {split} images, seed {seed}", results[-1].rows))
        for line in remarks(results[-1].rows):
            console.print(line, soft_wrap=True)
    differences = paired_differences([result.rows for result in results])
    if len(results) > 1:
        console.print(paired_table(differences))
    lines = [*plan.notes, *verdict([result.rows for result in results], plan)]
    console.print("\n".join(lines), soft_wrap=True)
    with show_progress() as progress:
        progress.begin("drawing", None)
        save(args.output, plan, split, results, differences, lines)
    console.print(f"Written: {args.output / 'demo.png'}, {args.output / 'demo.json'}", soft_wrap=True)
    return 0


def threads_of(args: argparse.Namespace) -> int | None:
    """The threads to set. On the scenes one: on busy cores two would wait for each other in every small operation."""
    return 1 if args.threads is None and args.voc is None else args.threads


def announced(progress: Progress) -> Report:
    """Progress that also writes a line when a part begins, where there are no bars to see."""

    def begin(what: str, total: int | None) -> Callable[[], None]:
        if sys.stderr is not None and not sys.stderr.isatty():
            progress.note(what)
        return progress.begin(what, total)

    return begin


def check(args: argparse.Namespace) -> None:
    for name in ("seeds", "threads", "epochs", "train_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} is {value}. It must be at least 1.")
    for name in ("activation_weight", "affinity_weight", "cam_weight"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise CommandError(f"--{name.replace('_', '-')} is {value}. It must be a number of 0 or more.")
    given = [name for name in PHOTO_OPTIONS if getattr(args, name) is not None]
    if args.voc is None and given:
        raise CommandError(f"--{given[0].replace('_', '-')} is for photos. Give their folder by --voc DIR.")
    if args.voc is not None and args.quick:
        raise CommandError("--quick is for the synthetic scenes. For photos, use --train-images 64 --epochs 1.")
    if args.voc is not None and args.cam_weight is not None:
        raise CommandError("--cam-weight is for the synthetic scenes: the model for photos has no convolutional head.")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"The folder --output {args.output} cannot be made: {error}") from error


def make_plan(args: argparse.Namespace) -> Plan:
    if args.voc is None:
        return plan_scenes(override(QUICK if args.quick else SceneSettings(), args), args.controls, args.quick)
    from acr_reg.demo.photos.folder import open_folder
    from acr_reg.demo.photos.task import PhotoSettings, plan_photos

    folder = open_folder(args.voc, args.classes.split(",") if args.classes else None)
    return plan_photos(folder, args.weights, override(PhotoSettings(), args), args.controls)


def override(settings: _Settings, args: argparse.Namespace) -> _Settings:
    """The settings, with the values that options give."""
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return dataclasses.replace(settings, **given)  # type: ignore[type-var]


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
