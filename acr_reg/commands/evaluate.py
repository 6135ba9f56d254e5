"""The ``evaluate`` command: scores saved class maps, at every background threshold, or label maps against masks."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from acr_reg.commands.listed_images import check_kind, holds_label_maps
from acr_reg.demo.record import write_json
from acr_reg.errors import CommandError
from acr_reg.integrations.formats import FORMATS
from acr_reg.integrations.formats.class_names import class_names
from acr_reg.integrations.jobs.shares import Share, share_of_run
from acr_reg.integrations.scoring import Sample, find_samples, read_list, score_cams, score_labels
from acr_reg.metrics import CamMeanIoU, CamScores, LabelMeanIoU, LabelScores

T = TypeVar("T")

THRESHOLDS = 100
WIDEST = 10_000  # columns of a table in a pipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = (
        "Class maps are .npy files of a PSA dict {0-based class: (H, W) map in [0, 1]}, an IRN dict or a CLIP-ES dict, "
        "or .npz files with 0-based classes as keys. Class k is mask id k + 1, or k with --no-background. Label maps "
        "hold the ids of the masks; a pixel labelled with the ignored id counts as missed. Under torchrun each process "
        "scores its share of the list."
    )
    predictions = parser.add_mutually_exclusive_group(required=True)
    predictions.add_argument("--cams", type=Path, metavar="DIR", help="class maps: folder of ID.npy or ID.npz")
    predictions.add_argument("--labels", type=Path, metavar="DIR", help="label maps: folder of ID.png, no threshold")
    parser.add_argument("--masks", type=Path, required=True, metavar="DIR", help="folder of palette or grey PNG masks")
    parser.add_argument(
        "--list",
        type=Path,
        required=True,
        metavar="FILE",
        help="one image a line: an id, or the paths of image and mask (only their file names are used)",
    )
    parser.add_argument(
        "--classes", type=int, required=True, metavar="N", help="number of ids, background included: VOC 21, COCO 81"
    )
    parser.add_argument(
        "--names", metavar="FILE", help="class names: voc, coco, a file of one a line, or an image_labels.json"
    )
    parser.add_argument("--no-background", action="store_true", help="mask id 0 is a class: argmax, no threshold")
    parser.add_argument(
        "--ignore-index",
        type=id_or_none,
        default=255,
        metavar="ID",
        help="mask id not counted, or none (default: 255)",
    )
    parser.add_argument("--thresholds", type=int, metavar="N", help=f"try 0, 1/N, ... (default: {THRESHOLDS})")
    parser.add_argument("--format", choices=FORMATS, help="of the class maps (default: found from each file)")
    parser.add_argument(
        "--resize", action="store_true", help="resize to the size of the mask: maps bilinear, labels nearest"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read and count (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores, with the threshold curve")


class _Job(NamedTuple):
    samples: list[Sample]
    names: list[str] | None


def run(args: argparse.Namespace) -> int:
    """Score the listed images, print a table, write the JSON. Errors of the user are CommandErrors."""
    are_labels = args.cams is not None and holds_label_maps(args.cams)
    if are_labels:
        args.cams, args.labels = None, args.cams
    error = None
    try:
        with share_of_run() as share:
            _check_share(share)
            try:
                job = _in_all(share, lambda: _prepare(args))
                metric = _score(job.samples, args, share)
            except CommandError as raised:  # in every process: they part in peace, and one of them tells
                error = raised
    except (RuntimeError, ValueError) as raised:  # the processes do not come together, or one died
        raise CommandError(str(raised)) from raised
    if not share.speaks:
        return 0 if error is None else 2
    if error is not None:
        raise error
    if are_labels:
        print(
            f"note: --cams {args.labels} holds label maps (.png). They are scored without a threshold, as by --labels.",
            file=sys.stderr,
        )
    return _report(metric, job, args)


def _check_share(share: Share) -> None:
    if share.is_apart:
        raise CommandError(
            f"RANK={os.environ['RANK']} without MASTER_ADDR would score a share that nobody adds up. Unset RANK and "
            "WORLD_SIZE, or use torchrun."
        )


def _in_all(share: Share, make: Callable[[], T]) -> T:
    """What ``make`` returns. An error in one process, whose disk may lack a folder, ends them all."""
    error = None
    try:
        made = make()
    except CommandError as raised:
        error = str(raised)
    for message in filter(None, share.gather(error)):
        raise CommandError(message)
    return made


def _prepare(args: argparse.Namespace) -> _Job:
    """Checks the options and finds the files, before any work is done."""
    if args.classes < 2:
        raise CommandError(f"--classes is {args.classes}. It must be at least 2 (VOC 21, COCO 81, with background).")
    if args.thresholds is not None and args.thresholds < 1:
        raise CommandError(f"--thresholds is {args.thresholds}. It must be at least 1.")
    if args.workers is not None and args.workers < 0:
        raise CommandError(f"--workers is {args.workers}. Pass 0 to read in this process, or more.")
    for option in ("thresholds", "format"):
        if args.labels is not None and getattr(args, option) is not None:
            raise CommandError(f"--{option} is for class maps (--cams). Leave it out with --labels.")
    if args.json is not None and not args.json.parent.is_dir():
        raise CommandError(f"--json {args.json}: The folder {args.json.parent} does not exist. Make it first.")
    if args.json is not None and args.json.is_dir():
        raise CommandError(f"--json {args.json} is a folder. Give the name of a file.")
    try:
        names = None if args.names is None else class_names(args.names, args.classes, not args.no_background)
    except ValueError as error:
        raise CommandError(f"--names {error}") from error
    check_kind(args.cams, args.labels)
    try:
        entries = read_list(args.list)
        if args.labels is not None:
            return _Job(find_samples(entries, args.labels, args.masks, "labels"), names)
        return _Job(find_samples(entries, args.cams, args.masks), names)
    except ValueError as error:
        raise CommandError(f"--{error}") from error  # the functions name their arguments as these options


def _score(samples: Sequence[Sample], args: argparse.Namespace, share: Share) -> CamMeanIoU | LabelMeanIoU:
    background = not args.no_background
    workers = _cores() if args.workers is None else args.workers
    try:
        if args.labels is not None:
            labels = LabelMeanIoU(args.classes, args.ignore_index)
            return score_labels(samples, labels, args.resize, background, workers, share=share)
        number = THRESHOLDS if args.thresholds is None else args.thresholds
        cams = CamMeanIoU(args.classes, np.arange(number) / number, background, args.ignore_index)
        return score_cams(samples, cams, args.format, args.resize, workers, share=share)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except MemoryError as error:
        raise CommandError(f"--classes {args.classes} needs too much memory. Give the number of ids.") from error


def _cores() -> int:
    """The cores for the workers of this process: those it may use, divided among the processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return cores if cores > 1 else 0


def _report(metric: CamMeanIoU | LabelMeanIoU, job: _Job, args: argparse.Namespace) -> int:
    background = not args.no_background
    scores = metric.compute()
    labels = job.names or ["background" if background and number == 0 else "" for number in range(args.classes)]
    console = Console()
    table = _table(scores, labels)
    if not console.is_terminal:  # rich takes a pipe for 80 columns, and would fold long names
        wide = console.options.update(width=WIDEST)
        console = Console(width=max(console.width, console.measure(table, options=wide).maximum))
    console.print(table)
    figures = {"images": str(len(job.samples)), **_figures(scores, metric)}
    for name, figure in figures.items():
        console.print(f"{name:<{max(map(len, figures)) + 2}}{figure}", highlight=False, markup=False, soft_wrap=True)
    if not np.nansum(scores.per_class_iou[int(background) :]):
        print(f"warning: No class has a correct pixel. {_likely_reason(args)}", file=sys.stderr)
    if args.json is not None:
        _write_scores(args.json, scores, metric, job, args)
    return 0


def _table(scores: CamScores | LabelScores, names: Sequence[str]) -> Table:
    table = Table("id", "IoU", "wrong", "missed", title="per class, share of its union")
    columns = (scores.per_class_iou, scores.false_positive_rate, scores.false_negative_rate)
    digits = len(str(len(names) - 1))
    for number, (name, rates) in enumerate(zip(names, zip(*columns, strict=True), strict=True)):
        label = f"{number:>{digits}} {name}".rstrip()
        # As Text, a name is no markup.
        table.add_row(Text(label), *("-" if math.isnan(rate) else f"{rate:.4f}" for rate in rates))
    return table


def _figures(scores: CamScores | LabelScores, metric: CamMeanIoU | LabelMeanIoU) -> dict[str, str]:
    """What stands below the table."""
    of = f"over {np.isfinite(scores.per_class_iou).sum()} of {len(scores.per_class_iou)} ids"
    if isinstance(scores, CamScores):
        best = {} if scores.best_threshold is None else {"best threshold": f"{scores.best_threshold:.4g}"}
        return best | {"mIoU": f"{scores.best_miou:.4f} {of}"}
    counted = np.isfinite(scores.per_class_accuracy).sum()
    figures = {
        "pixel accuracy": f"{scores.pixel_accuracy:.4f}",
        "class accuracy": f"{scores.class_accuracy:.4f}, mean over {counted} ids",
    }
    assert isinstance(metric, LabelMeanIoU)
    unlabelled = int(metric.confusion()[:, -1].sum())
    if unlabelled:
        share = 100 * unlabelled / metric.confusion().sum()
        figures["unlabelled"] = f"{unlabelled} pixels ({share:.3g} %) predicted as {metric.ignore_index}, missed"
    return figures | {"mIoU": f"{scores.miou:.4f} {of}"}


def _likely_reason(args: argparse.Namespace) -> str:
    if args.labels is not None:
        return "The label maps may be of other images or count ids in another way than the masks."
    return (
        "Maps may be of other images or have other keys: class k (0-based) is mask id "
        f"k{'' if args.no_background else ' + 1'}."
    )


def _write_scores(
    path: Path, scores: CamScores | LabelScores, metric: CamMeanIoU | LabelMeanIoU, job: _Job, args: argparse.Namespace
) -> None:
    """All scores as JSON, with null for a class that the data does not have."""
    content: dict[str, Any] = {
        "classes": args.classes,
        "background": not args.no_background,
        "ignore_index": args.ignore_index,
        "names": job.names,
        "images": len(job.samples),
    }
    if isinstance(scores, CamScores):
        content |= {
            "best_threshold": scores.best_threshold,
            "best_miou": scores.best_miou,
            "thresholds": _numbers(scores.thresholds),
            "miou": _numbers(scores.miou),
        }
    else:
        assert isinstance(metric, LabelMeanIoU)
        content |= {
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "class_accuracy": scores.class_accuracy,
            "per_class_accuracy": _numbers(scores.per_class_accuracy),
            "confusion": metric.confusion().tolist(),
        }
    content |= {
        "per_class_iou": _numbers(scores.per_class_iou),
        "false_positive_rate": _numbers(scores.false_positive_rate),
        "false_negative_rate": _numbers(scores.false_negative_rate),
    }
    try:
        write_json(path, content)
    except OSError as error:
        raise CommandError(f"--json {path} cannot be written: {error}") from error


def _numbers(values: Iterable[np.floating]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]


def id_or_none(text: str) -> int | None:
    """The value of --ignore-index."""
    try:
        return None if text == "none" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no id. Give a whole number, or none.") from error
