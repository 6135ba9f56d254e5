"""Models that are named on the command line: their options, building them, their weights."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import acr_reg
from acr_reg.errors import CommandError, some

VIEWS = {
    "hflip": acr_reg.HorizontalFlip(),
    "vflip": acr_reg.VerticalFlip(),
    "rot90": acr_reg.Rotate90(),
    "half": acr_reg.Scale(0.5),
}
WRAPPERS = ("model", "state_dict")  # under which training scripts save the weights


class Options(Protocol):
    """What both a parser and a group of its arguments offer."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action: ...


def add_model(parser: Options, optional: bool = False) -> None:
    """Declare MODEL and the arguments that build it."""
    parser.add_argument(
        "model",
        nargs="?" if optional else None,
        metavar="MODEL",
        help="timm:vit_small_patch16_224, my_code.models:build, ...",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of the builder, e.g. img_size=384"
    )


def add_hints(parser: Options) -> None:
    """Declare how to run a model, and what it may not say about its tokens."""
    parser.add_argument("--method", metavar="NAME", help="call model.NAME(images), e.g. forward_features")
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="capture attention within these modules only")
    parser.add_argument("--patch-size", type=numbers, metavar="PX", help="if the model does not say it: 16, or 16,8")
    parser.add_argument("--prefix-tokens", type=int, metavar="N", help="if the model does not say it")
    parser.add_argument("--suffix-tokens", type=int, metavar="N", help="tokens behind the patches (0)")
    parser.add_argument(
        "--class-tokens",
        type=numbers,
        metavar="N",
        help="if the model does not say it: how many, or positions as 0,2 or [-1]",
    )


def hints_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a capture."""
    return {
        "modules": args.modules,
        "patch_size": args.patch_size,
        "num_prefix_tokens": args.prefix_tokens,
        "num_suffix_tokens": args.suffix_tokens,
        "class_tokens": args.class_tokens,
    }


def forward_of(model: nn.Module, args: argparse.Namespace) -> Callable[[Tensor], Any] | None:
    """The method to call in place of the model, if --method names one."""
    if args.method is None:
        return None
    if not callable(method := getattr(model, args.method, None)):
        raise CommandError(
            f"{type(model).__name__} has no method {args.method}. Leave --method out to call the model itself."
        )
    return method


def build(name: str, settings: Sequence[str]) -> nn.Module:
    """The model named timm:NAME, torchvision:NAME or MODULE:FUNCTION, built with arguments NAME=VALUE."""
    arguments = dict(map(_argument, settings))
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


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill all weights of the model from a checkpoint: a state dict, or a dict that holds one as "model" or
    "state_dict". Nothing that a file might run is run."""
    state = _state_of(path)
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    other = [name for name, values in state.items() if name in own and values.shape != own[name].shape]
    if missing or unknown or other:
        said = [
            f"{len(names)} {what} ({some(names)})"
            for names, what in ((missing, "are missing"), (unknown, "are unknown"), (other, "differ in shape"))
            if names
        ]
        raise CommandError(
            f"--weights {path} does not fit {type(model).__name__}. Of {len(own)} weights, {', '.join(said)}. "
            "Build the model as it was saved, by --set NAME=VALUE."
        )
    model.load_state_dict(state)


def _state_of(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: Any = import_module("safetensors.torch").load_file(path)
        elif path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                content = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a damaged or hostile file may fail anywhere in the decoding
        reason = str(error).partition("\n")[0]
        raise CommandError(
            f"--weights {path} cannot be read. Give a .pt, .pth, .safetensors or .npz file of tensors alone. "
            f"{type(error).__name__}: {reason}"
        ) from error
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(values, Tensor) for values in content.values()):
        raise CommandError(
            f"--weights {path} holds no state dict. Save model.state_dict(), alone or under {' or '.join(WRAPPERS)}."
        )
    return {name.removeprefix("module."): values for name, values in content.items()}  # of DistributedDataParallel


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
