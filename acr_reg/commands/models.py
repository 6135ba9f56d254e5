"""Models that are named on the command line: their options, building them, their weights."""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
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
LARGEST = 4096  # pixels along a side of what a model is run on: more would take hours, or all memory
_LIBRARIES = ("timm", "torchvision")
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


# The options that stand for arguments of the library, which its messages name.
_OPTIONS = {
    "modules=": "--modules",
    "patch_size=": "--patch-size",
    "num_prefix_tokens=": "--prefix-tokens",
    "num_suffix_tokens=": "--suffix-tokens",
    "class_tokens=": "--class-tokens",
    "class_token=": "--class-token",
    "layers=": "--layers",
    "forward=": "--method",
    "no_grad=True": "--no-grad",
    "dynamic_img_size=": "--set dynamic_img_size=",
    "dynamic_img_pad=": "--set dynamic_img_pad=",
}
# A call that a message advises stays as it is. A value behind an option stands apart from it.
_ARGUMENT = re.compile(rf"with_layout\([^)]*\)+|\b({'|'.join(_OPTIONS)})(?=(\w?))")


def in_options(error: Exception, **others: str) -> str:
    """The message of an error of the library, with options in place of its arguments. ``others``: options by argument,
    where a command has its own."""
    own = _OPTIONS | {f"{name}=": option for name, option in others.items()}

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        return found[0] if name is None else own[name] + " " * (bool(value) and own[name][-1] != "=")

    return f"{type(error).__name__}: {_ARGUMENT.sub(option, str(error))}"


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
    source, _, what = name.partition(":")
    if not source or not what:
        raise CommandError(_not_a_name(name))
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        model = _builder(name, source, what)(**arguments)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(
            f"{name} could not be built with {arguments or 'no arguments'}. Pass arguments by --set NAME=VALUE. "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(folder)
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"{name} returned a {type(model).__name__}, not a torch.nn.Module. Name the function that returns one."
        )
    return model


def _not_a_name(name: str) -> str:
    """What is wrong with a name that is not SOURCE:NAME."""
    if name.rstrip(":") in _LIBRARIES:
        return f"The model {name!r} names a library and no model of it. Add one, as timm:vit_small_patch16_224."
    if Path(name).suffix in (".pt", ".pth", ".bin", ".npz", ".safetensors", ".ckpt"):
        return f"The model {name!r} is a file of weights. Name the function that builds it, as my_code.models:build."
    if Path(name).suffix == ".py":
        return f"The model {name!r} is a file. Name the function in it that builds the model: {_dotted(name)}:FUNCTION."
    return f"The model {name!r} is not SOURCE:NAME. Try timm:vit_small_patch16_224, or MODULE:FUNCTION for your own."


def _builder(name: str, source: str, what: str) -> Callable[..., Any]:
    """What builds the model. Raises CommandError, with names that are close, if there is no such thing."""
    if source in _LIBRARIES:
        library = import_module(source)
        known = library.list_models() if source == "timm" else library.models.list_models()
        if what.partition(".")[0] not in known and ":" not in what:  # after a dot stands a tag of weights
            more = _close(what, known) or f" It has {len(known)} models: see {source}'s list_models()."
            raise CommandError(f"{source} has no model {what!r}.{more}")
        if source == "timm":
            return partial(library.create_model, what, pretrained=False)
        return partial(library.models.get_model, what, weights=None)
    if "/" in source or source.endswith(".py"):
        raise CommandError(f"{source!r} is a path and not a module. Write {_dotted(source)}:{what}.")
    try:
        module = import_module(source)
    except ModuleNotFoundError as error:
        if error.name in _LIBRARIES:
            raise
        near = _close(source, [*_LIBRARIES, *(path.stem for path in Path().glob("*.py"))])
        raise CommandError(
            f"Python finds no module {error.name} for {name!r}.{near} Run the command in the folder that holds it."
        ) from error
    make = getattr(module, what, None)
    if not callable(make):
        functions = [each for each, found in vars(module).items() if callable(found) and not each.startswith("_")]
        raise CommandError(f"The module {source} has no function or class {what!r}.{_close(what, functions)}")
    return make


def _dotted(path: str) -> str:
    """The module's name of a file."""
    return ".".join(part for part in Path(path).with_suffix("").parts if part not in (".", "/"))


def _close(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests names close to this one: longer ones first."""
    names = list(known)
    longer = [each for each in names if each.startswith(name)]
    close = list(dict.fromkeys([*longer, *get_close_matches(name, names)]))[:3]
    return f" Did you mean {' or '.join(close)}?" if close else ""


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
