"""The command line of a package whose files are its commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from acr_reg.integrations.jobs.progress import show_progress


def run_command(package: str, about: str, commands: Mapping[str, str], arguments: Sequence[str] | None = None) -> int:
    """Run main() of the file that the first argument names. `commands`: what each of them does."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        usage=f"python -m {package} COMMAND [options]",
        description=about,
        epilog="\n".join(["commands:", *(f"  {name:10}{what}" for name, what in commands.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    command = parser.parse_args(given[:1]).command
    if command in commands:
        with show_progress("--child" not in given, bars=False) as progress:  # bars take CPU time, which is measured
            progress.begin(f"{package} {command}", None)
            return int(import_module(f"{package}.{command}").main(given[1:]))
    if command is not None:
        print(f"There is no command {command}.\n", file=sys.stderr)
    parser.print_help(sys.stderr)
    return 2
