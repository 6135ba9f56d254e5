"""The command line ``python -m acr_reg COMMAND``. Each command is a module with add_arguments(parser) and run(args)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from acr_reg.errors import CommandError
from acr_reg.integrations.jobs.progress import show_progress


class Command(NamedTuple):
    module: str
    summary: str


# Only the module of the given command is imported: the others may need packages that are not installed.
COMMANDS = {
    "check": Command("acr_reg.commands.check", "show what a capture sees of a model; run this first on a new model"),
    "convert": Command(
        "acr_reg.commands.convert", "convert saved class maps into another codebase's file format, or pseudo labels"
    ),
    "demo": Command("acr_reg.commands.demo", "train without and with ACR on the same images and compare"),
    "evaluate": Command(
        "acr_reg.commands.evaluate", "score class maps, at every background threshold, or label maps against masks"
    ),
    "show": Command("acr_reg.commands.show", "draw class maps over photos, or what a model attends to in a photo"),
}


SOURCES = ("timm", "torchvision")  # of models: large packages that no extra for users brings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 2 for an error of the user, as in argparse."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else ""
    parser = argparse.ArgumentParser(prog="python -m acr_reg", description="Commands of attention consistency.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    try:
        for known, command in COMMANDS.items():
            subparser = subparsers.add_parser(known, help=command.summary, description=command.summary)
            if known == name:
                with show_progress(bars=False) as progress:
                    progress.begin("loading packages", None)  # from the disks of a cluster this takes minutes
                    module = import_module(command.module)
                module.add_arguments(subparser)
        args = parser.parse_args(arguments)
        return int(module.run(args))
    except CommandError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "acr_reg"):
            raise
        wanted = package if package in SOURCES else '-e ".[demo]" in a checkout of acr_reg'
        message = f"The package {package} is not installed. Run pip install {wanted}."
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{parser.prog} {name}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
