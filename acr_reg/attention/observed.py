"""What a run shows of the tokens of one attention call: see :func:`acr_reg.placement.observation.observe`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ObservedTokens:
    """What one axis of a map holds, the same for every image: patches, and ``others`` (class tokens, registers ...) at
    these positions among ``count`` tokens; ``class_tokens`` are some of them, in the order of classes.

    ``rows`` and ``columns`` are the pixels y and x of the grid's patches on images of ``image_size``; None if there is
    no such grid, with the reason ``why_no_grid``. ``windows`` counts the parts of an image that attend apart,
    ``groups`` these times the heads; ``images`` were in the batch. ``is_padded``: padding around the patches takes
    part. ``are_channels``: each of them is spread over the tokens. ``of_image``: some come from an image.
    """

    count: int = 0
    others: tuple[int, ...] = ()
    class_tokens: tuple[int, ...] = ()
    rows: tuple[float, ...] | None = None
    columns: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None
    why_no_grid: str | None = None
    windows: int = 1
    groups: int = 1
    images: int = field(default=1, compare=False)
    is_padded: bool = False
    are_channels: bool = False
    of_image: bool = True

    @property
    def grid(self) -> tuple[int, int] | None:
        return None if self.rows is None or self.columns is None else (len(self.rows), len(self.columns))

    @property
    def num_prefix_tokens(self) -> int:
        return sum(position == number for number, position in enumerate(self.others))

    @property
    def num_suffix_tokens(self) -> int:
        behind = range(self.count - 1, -1, -1)
        return sum(position == number for number, position in zip(behind, reversed(self.others), strict=False))

    @property
    def between(self) -> tuple[int, ...]:
        return self.others[self.num_prefix_tokens : len(self.others) - self.num_suffix_tokens]


@dataclass(frozen=True)
class Observed:
    """What a run shows of one attention call. ``queries`` or ``keys`` are None if an operation hid where they are.

    ``same_source``: both were made of the same tensors. ``same_places``: as many queries as keys are the same patches
    of the same images; if their numbers differ, they are of the same images. None if unknown. ``hidden_by`` names the
    operation.
    """

    queries: ObservedTokens | None
    keys: ObservedTokens | None
    same_source: bool
    same_places: bool | None = None
    hidden_by: str | None = None

    @property
    def is_known(self) -> bool:
        return self.queries is not None and self.keys is not None

    @property
    def is_of_image(self) -> bool:
        """Whether any of its tokens may come from an image."""
        return self.queries is None or self.keys is None or self.queries.of_image or self.keys.of_image

    def is_cross(self, given_apart: bool) -> bool:
        """Whether the keys are other tokens than the queries. ``given_apart``: the module was given two tensors."""
        if self.queries is None or self.keys is None:
            return given_apart and not self.same_source
        if self.queries.of_image != self.keys.of_image:
            return True
        if not self.queries.of_image:
            return given_apart and not self.same_source
        return self.same_places is False or (given_apart and not self.same_source)
