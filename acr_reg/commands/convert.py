"""The ``convert`` command: converts a folder of class maps into another file format, or into pseudo labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from acr_reg.errors import CommandError
from acr_reg.integrations.convert import convert_cams, convert_to_labels, score_dev_list
from acr_reg.integrations.formats import FORMATS
from acr_reg.integrations.formats.save import ALPHAS

LABELS = "labels"
RULES = ("threshold", "ignore_between", "alphas", "best_on", "no_background")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = (
        "Formats: psa, {k: (H, W)} (ACR, MCTformer, SEAM, TransCAM, WeakTr, CTI); psa_crf, {0: background, k + 1: "
        "(H, W)} in two folders TARGET_LOW and TARGET_HIGH (to train PSA's AffinityNet; no CRF is run); irn, keys, cam "
        "and high_res (IRN, ToCo); clip_es, keys and attn_highres; puzzle, keys, cam and hr_cam (Puzzle-CAM); npz, "
        "without a pickle; labels, ID.png in VOC's colours, 0 for background, k + 1 for class k, 255 for ignored "
        "pixels. k is a 0-based class. Whole files are passed over. Exit code 1: files were skipped, and named on "
        "standard error."
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of .npy or .npz files")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write to")
    parser.add_argument("--to", choices=[*FORMATS, LABELS], required=True, help="the format to write")
    parser.add_argument(
        "--from", choices=FORMATS, dest="source_format", help="the format read (default: found from the file)"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="resize the maps to the sizes of the photos DIR/ID.jpg, ID.png, ..."
    )
    parser.add_argument(
        "--alphas",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"of psa_crf (default: {ALPHAS[0]:g} {ALPHAS[1]:g}); of labels: pixels are ignored where the background "
        "(1 - highest map)^A wins with A = LOW and loses with HIGH",
    )
    parser.add_argument("--overwrite", action="store_true", help="convert files again that exist")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read the maps (default: 0, this process)"
    )
    labels = parser.add_argument_group("labels", "With --to labels, exactly one of --alphas and:")
    labels.add_argument(
        "--threshold", type=float, metavar="T", help="background where no map exceeds T, else the highest map's class"
    )
    labels.add_argument(
        "--best-on",
        type=Path,
        metavar="LIST",
        help="the threshold that scores best on these images, one a line as for evaluate; needs --masks and --classes",
    )
    labels.add_argument(
        "--ignore-between",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="background up to LOW, classes above HIGH, ignored pixels between",
    )
    labels.add_argument("--no-background", action="store_true", help="class k is id k, and the highest map wins")
    labels.add_argument("--masks", type=Path, metavar="DIR", help="of --best-on: folder of palette or grey PNG masks")
    labels.add_argument(
        "--classes", type=int, metavar="N", help="of --best-on: number of ids, background included: VOC 21, COCO 81"
    )


def run(args: argparse.Namespace) -> int:
    """Convert the folder. Returns 1 if a file was skipped. Errors of the user are CommandErrors."""
    _check_options(args)
    common = {"images": args.images, "overwrite": args.overwrite, "workers": args.workers}
    try:
        if args.to == LABELS:
            rule = _label_rule(args)
            report = convert_to_labels(args.source, args.target, args.source_format, **rule, **common)
        else:
            alphas = ALPHAS if args.alphas is None else tuple(args.alphas)
            report = convert_cams(args.source, args.target, args.to, args.source_format, alphas=alphas, **common)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    return 1 if report.failed else 0


def _check_options(args: argparse.Namespace) -> None:
    if args.workers < 0:
        raise CommandError(f"--workers is {args.workers}. Pass 0 to read in this process, or more.")
    values = {name: getattr(args, name) for name in (*RULES, "masks", "classes")}
    given = [name for name, value in values.items() if value is not None and value is not False]  # 0 is a threshold
    options = [f"--{name.replace('_', '-')}" for name in given]
    if args.to != LABELS:
        foreign = [option for option in options if option != "--alphas" or args.to != "psa_crf"]
        if foreign:
            of = "--to labels or psa_crf" if foreign == ["--alphas"] else "--to labels"
            raise CommandError(
                f"{' and '.join(foreign)} with --to {args.to} means nothing. Leave it out, or pass {of}."
            )
        return
    rules = [option for name, option in zip(given, options, strict=True) if name in RULES]
    if len(rules) != 1:
        known = ", ".join(f"--{name.replace('_', '-')}" for name in RULES)
        raise CommandError(f"{' and '.join(rules) or 'No rule'} given for the labels. Give exactly one of {known}.")
    missing = [name for name in ("masks", "classes") if args.best_on is not None and name not in given]
    if missing:
        raise CommandError(f"--best-on scores maps against masks. Pass --{' and --'.join(missing)} too.")
    if args.best_on is None and len(given) > 1:
        raise CommandError(f"{' and '.join(options[1:])} is of --best-on alone. Leave it out, or pass --best-on LIST.")
    if args.classes is not None and args.classes < 2:
        raise CommandError(f"--classes is {args.classes}. It must be at least 2 (VOC 21, COCO 81, with background).")
    if args.masks is not None and args.masks.resolve() == args.target.resolve():
        raise CommandError(f"{args.masks} is both --masks and TARGET. Name another target folder.")


def _label_rule(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of convert_to_labels that say how a map becomes labels."""
    threshold = args.threshold
    if args.best_on is not None:
        scores = score_dev_list(
            args.source,
            args.best_on,
            args.masks,
            args.classes,
            args.source_format,
            images=args.images,
            workers=args.workers,
        )
        threshold = scores.best_threshold
    pairs = {
        name: None if value is None else tuple(value)
        for name, value in (("ignore_between", args.ignore_between), ("alphas", args.alphas))
    }
    return {"threshold": threshold, "background": not args.no_background, **pairs}
