"""Which models does the capture serve? One row for each model, built from configuration with random weights.

    python -m benchmarks.coverage                      # the whole table, a few minutes on one core
    python -m benchmarks.coverage --only swin vit_     # rows whose name or library contains one of these
    python -m benchmarks.coverage --write              # also docs/reference/coverage.md and results.json
    python -m benchmarks.coverage --page               # coverage.md from results.json, without measuring

A row is green if every layer of token-to-token attention is captured, its map times V is the layer's own result, its
rows sum to 1, the outputs do not change by a bit, gradients reach query and key, and a logit has a gradient for the
map; or if the model has no such layer and is refused by name. Layers are counted twice without the capture: by hand in
models.py, and as kernels that ATen runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from acr_reg.demo.record import write_json
from acr_reg.integrations.jobs.progress import show_progress
from benchmarks.coverage.measure import Row, measure
from benchmarks.coverage.models import CANDIDATES
from benchmarks.coverage.page import LIBRARIES, document, summary
from benchmarks.marked_page import write_page

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "reference" / "coverage.md"
RESULTS = HERE / "results.json"


def recorded_page() -> str:
    """The page of the recorded results."""
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    return document([Row(**row) for row in recorded["rows"]], recorded["measured"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.coverage", description="Which models the capture serves.")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose library or name contains one of these")
    write = "write docs/reference/coverage.md and benchmarks/coverage/results.json"
    parser.add_argument("--write", action="store_true", help=write)
    parser.add_argument("--page", action="store_true", help="write the page from results.json, and measure nothing")
    args = parser.parse_args(arguments)
    if args.page:
        write_page(PAGE, recorded_page())
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [
        candidate
        for candidate in CANDIDATES
        if not args.only or any(part in f"{candidate.library} {candidate.name}" for part in args.only)
    ]
    rows = []
    with show_progress(bars=False) as progress:  # the CPU time of each model is measured
        step = progress.begin("models", len(chosen))
        for candidate in chosen:
            try:
                row = measure(candidate)
            except Exception as error:
                raise RuntimeError(f"{candidate.library} {candidate.name} could not be measured.") from error
            rows.append(row)
            gc.collect()
            step()
            said = f"{row.verdict:9} {row.library:13} {row.name:44} {row.captured}/{row.expected} {row.reason}"
            print(said, flush=True)
    print(summary(rows))
    if args.write:
        versions = {name: version(name).partition("+")[0] for name in LIBRARIES}
        write_json(RESULTS, {"measured": {"date": str(date.today()), **versions}, "rows": rows})
        write_page(PAGE, recorded_page())
    return 0 if all(row.green for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
