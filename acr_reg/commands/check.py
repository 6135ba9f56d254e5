"""The ``check`` command: shows what a capture sees of a model that is named on the command line."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from importlib import import_module
from typing import Any

import torch
from torch import nn

import acr_reg
from acr_reg.errors import CommandError
from acr_reg.integrations.jobs.progress import show_progress

VIEWS = {
    "hflip": acr_reg.HorizontalFlip(),
    "vflip": acr_reg.VerticalFlip(),
    "rot90": acr_reg.Rotate90(),
    "half": acr_reg.Scale(0.5),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = (
        "MODEL is timm:NAME or torchvision:NAME, built with random weights, or MODULE:FUNCTION, your own function or "
        "class that returns the model (MODULE may lie in the current folder). Exit code 1: the table lists problems."
    )
    parser.add_argument("model", metavar="MODEL", help="timm:vit_small_patch16_224, my_code.models:build, ...")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of the builder, e.g. img_size=384"
    )
    parser.add_argument("--size", type=int, nargs="+", default=[224], metavar="PX", help="height and width (224)")
    parser.add_argument("--channels", type=int, default=3, metavar="N", help="bands of the images (3)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images (2)")
    parser.add_argument("--view", choices=VIEWS, default="hflip", help="the second view (hflip)")
    parser.add_argument("--method", metavar="NAME", help="call model.NAME(images), e.g. forward_features")
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="capture attention within these modules only")
    parser.add_argument("--layers", type=int, nargs="+", metavar="I", help="check these layers only")
    parser.add_argument("--patch-size", type=numbers, metavar="PX", help="if the model does not say it: 16, or 16,8")
    parser.add_argument("--prefix-tokens", type=int, metavar="N", help="if the model does not say it")
    parser.add_argument("--suffix-tokens", type=int, metavar="N", help="tokens behind the patches (0)")
    parser.add_argument(
        "--class-tokens",
        type=numbers,
        metavar="N",
        help="if the model does not say it: how many, or positions as 0,2 or [-1]",
    )
    parser.add_argument("--no-grad", action="store_true", help="also see what the model runs under torch.no_grad")


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns 1 if it lists problems, else 0."""
    if len(args.size) > 2 or min(args.size) < 1 or min(args.batch, args.channels) < 1:
        raise CommandError(
            f"--size {' '.join(map(str, args.size))} must be one or two numbers of pixels, --batch {args.batch} and "
            f"--channels {args.channels} at least 1. Try --size 224 or --size 224 320."
        )
    model = build(args.model, dict(map(_argument, args.set)))
    if args.method is not None and not callable(getattr(model, args.method, None)):
        raise CommandError(
            f"{type(model).__name__} has no method {args.method}. Leave --method out to call the model itself."
        )
    images = torch.randn(
        args.batch, args.channels, args.size[0], args.size[-1], generator=torch.Generator().manual_seed(0)
    )
    try:
        with show_progress() as progress:
            progress.begin(f"checking {type(model).__name__}", None)
            report = acr_reg.check(
                model,
                images,
                VIEWS[args.view],
                forward=None if args.method is None else getattr(model, args.method),
                modules=args.modules,
                layers=args.layers,
                patch_size=args.patch_size,
                num_prefix_tokens=args.prefix_tokens,
                num_suffix_tokens=args.suffix_tokens,
                class_tokens=args.class_tokens,
                no_grad=args.no_grad,
            )
    except Exception as error:  # of an option, or of the model on these images
        raise CommandError(
            f"{type(model).__name__} could not be checked on images {tuple(images.shape)}. "
            f"{type(error).__name__}: {error}"
        ) from error
    print(report)
    return 0 if report.ok else 1


def build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The model named timm:NAME, torchvision:NAME or MODULE:FUNCTION."""
    source, colon, what = name.partition(":")
    if not colon or not source or not what:
        raise CommandError(f"The model {name!r} is not SOURCE:NAME. Try timm:vit_small_patch16_224.")
    try:
        if source == "timm":
            model = import_module("timm").create_model(what, pretrained=False, **arguments)
        elif source == "torchvision":
            model = import_module("torchvision").models.get_model(what, weights=None, **arguments)
        else:
            folder = os.getcwd()
            sys.path.insert(0, folder)
            try:
                model = getattr(import_module(source), what)(**arguments)
            finally:
                sys.path.remove(folder)
    except ModuleNotFoundError as error:
        if error.name in ("timm", "torchvision"):
            raise
        raise CommandError(
            f"Python finds no module {error.name} for {name!r}. Run the command in the folder that holds the module."
        ) from error
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(
            f"{name} could not be built with {arguments or 'no arguments'}. Pass arguments by --set NAME=VALUE. "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"{name} returned a {type(model).__name__}, not a torch.nn.Module. Name the function that returns one."
        )
    return model


def numbers(text: str) -> int | tuple[int, ...]:
    """One number, or several between commas; "2," and "[2]" are a single one of several."""
    try:
        found = tuple(map(int, text.removeprefix("[").removesuffix("]").removesuffix(",").split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number, such as 16, or several, such as 0,2 or [0,-1]."
        ) from None
    return found if "," in text or text.startswith("[") else found[0]


def _argument(setting: str) -> tuple[str, Any]:
    name, equals, value = setting.partition("=")
    if not equals or not name.isidentifier():
        raise CommandError(f"--set {setting} is not NAME=VALUE. Try --set img_size=384.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a word
        return name, value
