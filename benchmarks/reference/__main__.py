"""Writes the generated blocks of docs/reference/api.md and docs/reference/commands.md, from Python 3.11.

python -m benchmarks.reference --write
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.marked_page import write_page
from benchmarks.reference.commands import with_help
from benchmarks.reference.names import with_tables

PAGES = Path(__file__).resolve().parents[2] / "docs" / "reference"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.reference", description="Tables of the reference pages.")
    parser.add_argument("--write", action="store_true", required=True, help="write docs/reference/{api,commands}.md")
    parser.parse_args()
    for name, fill in (("api.md", with_tables), ("commands.md", with_help)):
        write_page(PAGES / name, fill((PAGES / name).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
