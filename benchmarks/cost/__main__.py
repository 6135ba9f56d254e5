"""Runs one of the cost measurements: python -m benchmarks.cost COMMAND [options]; each file here is a command."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "step": "what the loss adds to a training step",
    "scaling": "how that grows with the tokens",
    "cam": "what class maps cost",
    "metrics": "what scoring class maps costs",
    "capture": "what the capture adds to a forward pass",
    "gpu": "steps and class maps on CUDA",
    "page": "put the results into README.md and docs/cost.md",
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print("usage: python -m benchmarks.cost COMMAND [options]\n", *COMMANDS.items(), sep="\n", file=sys.stderr)
        return 2
    return int(import_module(f"benchmarks.cost.{name}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
