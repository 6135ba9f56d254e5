"""The ``check`` command: shows what a capture sees of a model that is named on the command line."""

from __future__ import annotations

import argparse

import torch

import acr_reg
from acr_reg.commands.models import LARGEST, VIEWS, add_hints, add_model, build, forward_of, hints_of, in_options
from acr_reg.errors import CaptureError, CommandError, LayoutError, SizeError
from acr_reg.integrations.jobs.progress import show_progress

DEFAULT_SIZE = 224


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = (
        "MODEL is timm:NAME or torchvision:NAME, built with random weights, or MODULE:FUNCTION, your own function or "
        "class that returns the model (MODULE may lie in the current folder). Exit code 1: the table lists problems."
    )
    add_model(parser)
    parser.add_argument("--size", type=int, nargs="+", metavar="PX", help="height and width (224)")
    parser.add_argument("--channels", type=int, default=3, metavar="N", help="bands of the images (3)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images (2)")
    parser.add_argument("--view", choices=VIEWS, default="hflip", help="the second view (hflip)")
    parser.add_argument("--layers", type=int, nargs="+", metavar="I", help="check these layers only")
    add_hints(parser)
    parser.add_argument("--no-grad", action="store_true", help="also see what the model runs under torch.no_grad")


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns 1 if it lists problems, else 0."""
    size = args.size or [DEFAULT_SIZE]
    if len(size) > 2 or not 1 <= min(size) <= max(size) <= LARGEST:
        raise CommandError(
            f"--size {' '.join(map(str, size))} is not one or two numbers of pixels from 1 to {LARGEST}. Try "
            "--size 224 or --size 224 320."
        )
    if min(args.batch, args.channels) < 1:
        raise CommandError(f"--batch {args.batch} and --channels {args.channels} must both be at least 1.")
    model = build(args.model, args.set)
    forward = forward_of(model, args)
    images = torch.randn(args.batch, args.channels, size[0], size[-1], generator=torch.Generator().manual_seed(0))
    try:
        with show_progress() as progress:
            progress.begin(f"checking {type(model).__name__}", None)
            report = acr_reg.check(
                model,
                images,
                VIEWS[args.view],
                forward=forward,
                layers=args.layers,
                no_grad=args.no_grad,
                **hints_of(args),
            )
    except Exception as error:  # of an option, or of the model on these images
        own = isinstance(error, (CaptureError, LayoutError, SizeError))
        advice = "" if args.size or own else " If the model takes images of another size, pass --size."
        raise CommandError(
            f"{type(model).__name__} could not be checked on images {tuple(images.shape)}. {in_options(error)}{advice}"
        ) from error
    print(report)
    return 0 if report.ok else 1
