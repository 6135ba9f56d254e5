"""What capture, loss, class maps and scores cost: python -m benchmarks.cost COMMAND [options]."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.commands import run_command

COMMANDS = {
    "step": "time and memory that the loss adds to a training step",
    "scaling": "the same, by the number of tokens",
    "cam": "time and memory of class maps",
    "metrics": "time and memory of scoring class maps",
    "folders": "time of class maps and scores of a whole folder",
    "views": "time of views of images, compared with torchvision",
    "capture": "time that the capture adds to a forward pass",
    "gpu": "steps and class maps on CUDA",
    "page": "put the results into README.md and docs/explanation/cost.md",
}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.cost", "Measure what the library costs.", COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
