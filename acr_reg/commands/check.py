"""The ``check`` command: what a capture sees of a model that is named on the command line."""

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

VIEWS = {
    "hflip": acr_reg.HorizontalFlip(),
    "vflip": acr_reg.VerticalFlip(),
    "rot90": acr_reg.Rotate90(),
    "half": acr_reg.Scale(0.5),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = (
        "MODEL is timm:NAME or torchvision:NAME, built with random weights, or MODULE:FUNCTION, a function or class of "
        "your own that returns the model (MODULE is imported from the current folder too). Exit code 1: problems."
    )
    parser.add_argument("model", metavar="MODEL", help="timm:vit_small_patch16_224, my_code.models:build, ...")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of the builder, e.g. img_size=384"
    )
    parser.add_argument("--size", type=int, nargs="+", default=[224], metavar="PX", help="height and width (224)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images (2)")
    parser.add_argument("--view", choices=VIEWS, default="hflip", help="the second view (hflip)")
    parser.add_argument("--method", metavar="NAME", help="call model.NAME(images), e.g. forward_features")
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="attention within these modules only")
    parser.add_argument("--layers", type=int, nargs="+", metavar="I", help="these layers only")
    parser.add_argument("--patch-size", type=int, metavar="PX", help="where the model does not say it")
    parser.add_argument("--prefix-tokens", type=int, metavar="N", help="where the model does not say it")
    parser.add_argument("--class-tokens", type=int, metavar="N", help="where the model does not say it")


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns 0 where all is well, 1 where the table lists problems."""
    if len(args.size) > 2 or min(args.size) < 1 or args.batch < 1:
        raise CommandError(
            f"found --size {' '.join(map(str, args.size))} and --batch {args.batch}; expected one or two sizes in "
            "pixels and at least one image; --size 224 or --size 224 320"
        )
    model = build(args.model, dict(map(_argument, args.set)))
    if args.method is not None and not callable(getattr(model, args.method, None)):
        raise CommandError(
            f"found no method {args.method} of {type(model).__name__}; expected one that takes images; leave --method "
            "out to call the model itself"
        )
    images = torch.randn(args.batch, 3, args.size[0], args.size[-1], generator=torch.Generator().manual_seed(0))
    report = acr_reg.check(
        model,
        images,
        VIEWS[args.view],
        forward=None if args.method is None else getattr(model, args.method),
        modules=args.modules,
        layers=args.layers,
        patch_size=args.patch_size,
        num_prefix_tokens=args.prefix_tokens,
        class_tokens=args.class_tokens,
    )
    print(report)
    return 0 if report.ok else 1


def build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The model of a name such as timm:NAME, torchvision:NAME or MODULE:FUNCTION."""
    source, colon, what = name.partition(":")
    if not colon or not source or not what:
        raise CommandError(f"found the model {name!r}; expected SOURCE:NAME; for instance timm:vit_small_patch16_224")
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
            f"found no module {error.name} for {name!r}; expected one that Python can import; run the command in the "
            "folder it lies in"
        ) from error
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(
            f"{name} could not be built: {type(error).__name__}: {error}; expected a builder that takes "
            f"{arguments or 'no arguments'}; pass others by --set NAME=VALUE"
        ) from error
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"found a {type(model).__name__} from {name}; expected a torch.nn.Module; name the function that returns it"
        )
    return model


def _argument(setting: str) -> tuple[str, Any]:
    name, equals, value = setting.partition("=")
    if not equals or not name.isidentifier():
        raise CommandError(f"found --set {setting}; expected NAME=VALUE; for instance --set img_size=384")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a word
        return name, value
