"""What a run shows of the tokens of one attention call: see :func:`acr_reg.placement.observation.observe`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObservedTokens:
    """What one axis of a map holds, the same for every image: ``others`` (class tokens, registers, prompts ...) at
    their positions among ``count`` tokens, ``class_tokens`` among them in the order of classes, and patches.

    ``rows`` and ``columns`` are the pixels (y, x) at which the grid's patches lie; None if there is no such grid, with
    the reason ``why_no_grid``. ``windows`` counts the parts of one image that attend apart, and ``groups`` these times
    the heads. ``padded``: padding around the patches takes part. ``are_channels``: each of them is spread over the tokens.
    """

    count: int = 0
    others: tuple[int, ...] = ()
    class_tokens: tuple[int, ...] = ()
    rows: tuple[float, ...] | None = None
    columns: tuple[float, ...] | None = None
    why_no_grid: str | None = None
    windows: int = 1
    groups: int = 1
    padded: bool = False
    are_channels: bool = False
    of_image: bool = True

    @property
    def grid(self) -> tuple[int, int] | None:
        return None if self.rows is None or self.columns is None else (len(self.rows), len(self.columns))


@dataclass(frozen=True)
class Observed:
    """What a first run shows of one attention call; ``is_cross``: the keys are other tokens than the queries."""

    queries: ObservedTokens | None
    keys: ObservedTokens | None
    is_cross: bool
    lost_in: str | None = None
    """The operation after which the places of queries or keys are unknown."""
