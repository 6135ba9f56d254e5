"""Draws the pictures of one page: python -m benchmarks.pictures COMMAND [options]; each file here is a command."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "tutorial": "the pictures and the table of docs/tutorial.md",
    "views": "the pictures of docs/views.md",
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print("usage: python -m benchmarks.pictures COMMAND [options]\n", *COMMANDS.items(), sep="\n", file=sys.stderr)
        return 2
    return int(import_module(f"benchmarks.pictures.{name}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
