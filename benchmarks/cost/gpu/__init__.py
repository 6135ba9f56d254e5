"""Training steps and class maps on a GPU, checked against the published procedure while they are timed."""

from benchmarks.cost.gpu.command import main

__all__ = ["main"]
