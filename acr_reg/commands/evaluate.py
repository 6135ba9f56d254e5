"""The ``evaluate`` command: scores saved class maps against masks, at every background threshold."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Table

from acr_reg.demo.record import write_json
from acr_reg.errors import CommandError, some
from acr_reg.integrations.convert import CAM_SUFFIXES, IMAGE_SUFFIXES
from acr_reg.integrations.formats import FORMATS, Format, load_cams
from acr_reg.integrations.jobs.progress import show_progress
from acr_reg.metrics import CamMeanIoU, CamScores

MASK_MODES = ("1", "L", "P", "I", "I;16")


class Sample(NamedTuple):
    """The files of one line of the list."""

    id: str
    cam: Path
    mask: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = (
        "Maps are .npy files of a PSA dict {0-based class: (H, W) map in [0, 1]}, an IRN dict or a CLIP-ES dict, or "
        ".npz files with 0-based classes as keys. Class k is mask id k + 1, or k with --no-background. Mask id 255 is "
        "ignored."
    )
    parser.add_argument("--cams", type=Path, required=True, metavar="DIR", help="folder of ID.npy or ID.npz")
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
    parser.add_argument("--no-background", action="store_true", help="mask id 0 is a class: argmax, no threshold")
    parser.add_argument("--thresholds", type=int, default=100, metavar="N", help="try 0, 1/N, ... (default: 100)")
    parser.add_argument("--format", choices=FORMATS, help="of the maps (default: found from each file)")
    parser.add_argument("--resize", action="store_true", help="resize maps (bilinear) to the size of their mask")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores, with the threshold curve")


def run(args: argparse.Namespace) -> int:
    """Score the listed images, print a table, write the JSON. Errors of the user are CommandErrors."""
    if args.classes < 2:
        raise CommandError(f"--classes is {args.classes}. It must be at least 2 (VOC 21, COCO 81, with background).")
    if args.thresholds < 1:
        raise CommandError(f"--thresholds is {args.thresholds}. It must be at least 1.")
    if args.json is not None and not args.json.parent.is_dir():
        raise CommandError(f"--json {args.json}: The folder {args.json.parent} does not exist. Make it first.")
    samples = find_samples(read_list(args.list), args.cams, args.masks)

    background = not args.no_background
    metric = CamMeanIoU(args.classes, np.arange(args.thresholds) / args.thresholds, background=background)
    with show_progress() as progress:
        step = progress.begin("Scoring", len(samples))
        for sample in samples:
            score_sample(metric, sample, args.resize, args.format)
            step()
    try:
        scores = metric.compute()
    except ValueError as error:
        raise CommandError(f"--masks {args.masks}: {error}") from error

    print_scores(scores, len(samples), background)
    if not np.nansum(scores.per_class_iou[int(background) :]):
        print(
            "warning: No class has a correct pixel. Maps may be of other images or have other keys: "
            f"class k (0-based) is mask id k{' + 1' if background else ''}.",
            file=sys.stderr,
        )
    if args.json is not None:
        write_scores(args.json, scores, args, len(samples))
    return 0


def read_list(path: Path) -> list[tuple[str, str]]:
    """Ids and mask file names. A line is an id or a pair of paths (VOC, SEAM, COCO lists). Skips blank lines."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--list {path} cannot be read: {error}") from error
    entries = []
    for number, fields in enumerate(lines, start=1):
        if not fields:
            continue
        if len(fields) > 2 or (len(fields) == 2 and _stem(fields[1]) == fields[1]):
            raise CommandError(
                f"--list {path}, line {number} is {' '.join(fields)!r}. Give an id, or a pair of paths such as "
                "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png."
            )
        mask = Path(fields[1]).name if len(fields) == 2 else f"{_stem(fields[0])}.png"
        entries.append((_stem(fields[0]), mask))
    if not entries:
        raise CommandError(f"--list {path} is empty. Write one image a line.")
    repeated = [name for name, count in Counter(name for name, _ in entries).items() if count > 1]
    if repeated:
        raise CommandError(f"--list {path} names {some(repeated)} more than once. Remove the repetitions.")
    return entries


def find_samples(entries: Sequence[tuple[str, str]], cams: Path, masks: Path) -> list[Sample]:
    """The files of every entry. Reports all missing files together, before any work is done."""
    for option, folder in (("--cams", cams), ("--masks", masks)):
        if not folder.is_dir():
            raise CommandError(f"{option} {folder} is not a folder. Give the folder of the files.")
    samples = []
    for name, mask in entries:
        candidates = [cams / f"{name}{suffix}" for suffix in CAM_SUFFIXES]
        cam = next((path for path in candidates if path.is_file()), candidates[0])
        samples.append(Sample(name, cam, masks / mask))
    for option, paths in (("--cams", [s.cam for s in samples]), ("--masks", [s.mask for s in samples])):
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            folder = cams if option == "--cams" else masks
            raise CommandError(
                f"{option} {folder}: {len(missing)} of {len(samples)} files are missing: {some(missing)}. "
                "Give the folder that holds these files, and the list they were made from."
            )
    return samples


def score_sample(metric: CamMeanIoU, sample: Sample, resize: bool, format: Format | None) -> None:
    """Count one image."""
    first = 1 if metric.background else 0
    try:
        maps = load_cams(sample.cam, format)
        mask = read_mask(sample.mask)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    beyond = [number for number in maps if number + first >= metric.num_classes]
    if beyond:
        raise CommandError(
            f"{sample.cam} holds classes {beyond}, and --classes {metric.num_classes} allows 0 to "
            f"{metric.num_classes - 1 - first}. Check --classes, and that the keys of the maps are 0-based."
        )
    if resize:
        maps = {number: resized(values, mask.shape) for number, values in maps.items()}
    sizes = {values.shape for values in maps.values()} - {mask.shape}
    for height, width in sizes:
        raise CommandError(
            f"{sample.cam} has maps of size {height}x{width} and {sample.mask} is {mask.shape[0]}x{mask.shape[1]} "
            "(HxW). Save the maps at the size of the mask, or pass --resize."
        )
    cam = np.stack(list(maps.values())) if maps else np.zeros((0, *mask.shape), dtype=np.float32)
    try:
        metric.update(cam, mask, [number + first for number in maps])
    except ValueError as error:
        raise CommandError(f"{sample.cam} with {sample.mask}: {error}") from error


def read_mask(path: Path) -> npt.NDArray[np.integer]:
    """The ids (H, W) of a palette or grey image. Raises ValueError for images in colour."""
    with Image.open(path) as image:
        if image.mode not in MASK_MODES:
            raise ValueError(f"{path} is an image of mode {image.mode}. Save the ids as a palette (P) or grey (L) PNG.")
        return np.asarray(image).astype(np.int64)


def resized(values: npt.NDArray[np.float32], size: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """One (H, W) map at another (H, W) size: bilinear, pixel centres at half, antialiased when shrinking."""
    if values.shape == size:
        return values
    height, width = size
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def print_scores(scores: CamScores, images: int, background: bool) -> None:
    """The table and the figures, on standard output."""
    console = Console()
    table = Table("id", "IoU", "wrong", "missed", title="per class, share of its union")
    columns = (scores.per_class_iou, scores.false_positive_rate, scores.false_negative_rate)
    for number, rates in enumerate(zip(*columns, strict=True)):
        label = "0 background" if background and number == 0 else str(number)
        table.add_row(label, *("-" if math.isnan(rate) else f"{rate:.4f}" for rate in rates))
    console.print(table)
    found = int(np.isfinite(scores.per_class_iou).sum())
    console.print(f"images          {images}", highlight=False)
    if scores.best_threshold is not None:
        console.print(f"best threshold  {scores.best_threshold:.4g}", highlight=False)
    of = f"{found} of {len(scores.per_class_iou)} ids"
    console.print(f"mIoU            {scores.best_miou:.4f} over {of}", highlight=False)


def write_scores(path: Path, scores: CamScores, args: argparse.Namespace, images: int) -> None:
    """All scores as JSON, with null for a class that the data does not have."""
    content = {
        "classes": args.classes,
        "background": not args.no_background,
        "images": images,
        "best_threshold": scores.best_threshold,
        "best_miou": scores.best_miou,
        "thresholds": _numbers(scores.thresholds),
        "miou": _numbers(scores.miou),
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


def _stem(path: str) -> str:
    """The id in a path: its file name without an image's ending. Other dots belong to the id."""
    name = Path(path).name
    return Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name
