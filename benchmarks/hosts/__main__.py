"""The pages of docs/hosts: for each host codebase what is known of it, and the lines to add.

    python -m benchmarks.hosts            # prints what would change
    python -m benchmarks.hosts --write    # writes docs/hosts

Everything comes from the docstrings of integrations/ and, for hosts that need no file there, of their tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.hosts.page import pages
from benchmarks.marked_page import write_page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.hosts", description="The pages of docs/hosts.")
    parser.add_argument("--write", action="store_true", help="write them")
    args = parser.parse_args(arguments)
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path} {'written' if args.write else 'is out of date'}")
            if args.write:
                write_page(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
