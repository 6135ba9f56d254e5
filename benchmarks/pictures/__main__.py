"""The pictures of the documentation: python -m benchmarks.pictures COMMAND [options]."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.commands import run_command

COMMANDS = {
    "attention": "draw the picture of docs/guides/attention",
    "sheet": "draw the contact sheets of docs/guides/pictures",
    "tutorial": "run docs/start/tutorial.md, draw its pictures and fill its table",
    "views": "draw the pictures of docs/guides/views.md",
}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.pictures", "Draw the pictures of a page.", COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
