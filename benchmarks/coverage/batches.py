"""Does the number of images decide anything? Kinds, layers, grids and maps of every model of the coverage table, at
batches of 1 to 64 and at the numbers of its own channels and tokens, each in a capture of its own.

    python -m benchmarks.coverage.batches                      # the whole table: half an hour on one core
    python -m benchmarks.coverage.batches --only davit xcit    # rows whose name or library contains one of these
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acr_reg import CaptureError, capture_attention
from benchmarks.coverage.candidate import Candidate
from benchmarks.coverage.measure import settle_batch_norms
from benchmarks.coverage.models import CANDIDATES

BATCHES = (1, 2, 3, 31, 32, 64)
LARGEST = 128
ALLOWED = 1e-4  # of a map: kernels, such as the convolution of one image, add up in another order for another batch

Description = tuple[Any, list[Tensor]]


def differing(candidate: Candidate) -> dict[int, str]:
    """The batches at which a model is read otherwise than at 2 images, with what differs first."""
    torch.manual_seed(0)
    model, inputs = candidate.build().eval(), candidate.inputs()
    with torch.no_grad():
        settle_batch_norms(model, inputs)
    expected, maps = _describe(model, inputs)
    found: dict[int, str] = {}
    for batch in (*BATCHES, *_own_numbers(maps)):
        others, other_maps = _describe(model, _widened(inputs, batch))
        if others != expected:
            found[batch] = next(
                (str(b)[:160] for a, b in zip(expected, others, strict=False) if a != b), "their number"
            )
        elif any((a - b).abs().max() > ALLOWED for a, b in zip(maps, other_maps, strict=True)):
            found[batch] = "the map of the first image"
    return found


def _own_numbers(maps: Sequence[Tensor]) -> list[int]:
    """Numbers of heads and of tokens, which shapes could be mistaken for."""
    numbers = {n for each in maps for n in each.shape[1:3]}
    return sorted(n for n in numbers - set(BATCHES) if n <= LARGEST)


def _widened(inputs: Any, batch: int) -> Any:
    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.repeat(-(-batch // len(value)), *[1] * (value.ndim - 1))[:batch]

    if isinstance(inputs, dict):
        return {key: widen(value) for key, value in inputs.items()}
    return tuple(widen(value) for value in inputs)


def _describe(model: nn.Module, inputs: Any) -> Description:
    """What a capture says of every layer, and the maps of the first image."""
    with capture_attention(model, keep="all", no_grad=True) as attention, torch.no_grad():
        if isinstance(inputs, dict):
            model(**inputs)
        else:
            model(*inputs)
        try:
            layers = [layer for maps in attention.take_all() for layer in maps]
        except CaptureError:
            return tuple(attention.skipped), []
        described = tuple((m.index, m.name, m.kind, m.window, m.placed, m.shape[1:]) for m in layers)
        return described + attention.skipped, [m.weights()[:1] for m in layers if m.window is None]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.coverage.batches", description="Are batches read alike?")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose library or name contains one of these")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [c for c in CANDIDATES if not args.only or any(p in f"{c.library} {c.name}" for p in args.only)]
    wrong = 0
    for candidate in chosen:
        found = differing(candidate)
        wrong += bool(found)
        said = "; ".join(f"{batch} images: {what}" for batch, what in found.items()) or "alike at every batch"
        print(f"{candidate.library:13} {candidate.name:44} {said}", flush=True)
        gc.collect()
    print(f"{len(chosen)} models, {wrong} of them read otherwise at some batch.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
