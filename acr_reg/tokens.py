"""Where the tokens of an attention layer sit on the image, and which of them are class tokens.

A transformer's tokens are a few prefix tokens (class, distillation, register) followed by the patches of an image in
row-major order. A :class:`Lattice` places the patches in pixels; a :class:`TokenLayout` joins the lattices of queries
and keys with the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from acr_reg.errors import LayoutError


@dataclass(frozen=True)
class Lattice:
    """A grid of tokens, row-major, laid over an image.

    It has ``height`` x ``width`` tokens. In pixels, ``stride`` (y, x) is the distance between neighbouring centres,
    ``offset`` (y, x) the distance of the first centre from half a stride, and ``extent`` (height, width) the size of
    the image. The centre of token (i, j) is at ``offset + (i + 1/2, j + 1/2) * stride``. By default a token is one unit
    and the grid covers the image. ``offset_known`` is False if windows overlap and the centres are unknown; the loss
    then warns.

    >>> Lattice(2, 3, stride=(16.0, 16.0)).extent
    (32.0, 48.0)
    """

    height: int
    width: int
    stride: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    extent: tuple[float, float] = (0.0, 0.0)
    offset_known: bool = field(default=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise LayoutError(
                f"A token grid of {self.height} x {self.width} is empty. Pass (height, width) of at least 1 x 1."
            )
        if self.extent == (0.0, 0.0):
            object.__setattr__(self, "extent", (self.height * self.stride[0], self.width * self.stride[1]))

    def __len__(self) -> int:
        return self.height * self.width

    @property
    def is_unit(self) -> bool:
        """Whether it is measured in tokens, because the size in pixels is unknown."""
        return self.stride == (1.0, 1.0)

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


@dataclass(frozen=True)
class Window:
    """The windows that a layer's attention is confined to: ``size`` and ``shift`` (height, width) in tokens.

    ``size`` is None if the model does not say it; ``per_image`` counts the windows of one image.
    """

    size: tuple[int, int] | None
    shift: tuple[int, int]
    per_image: int

    def __str__(self) -> str:
        size = "" if self.size is None else f" of {self.size[0]} x {self.size[1]}"
        shift = f", shifted by {self.shift[0]} x {self.shift[1]}" if any(self.shift) else ""
        return f"{self.per_image} windows{size}{shift}"


@dataclass(frozen=True)
class TokenLayout:
    """Queries (N = prefix + query lattice) and keys (M = prefix + key lattice) of one attention layer.

    ``class_tokens`` are positions within the prefix. One class token serves all classes; with C > 1 of them, position c
    of the tuple is the token of class c. ``()`` means none; ``None`` means that the positions are unknown.
    """

    query: Lattice
    key: Lattice
    num_prefix_tokens: int = 0
    class_tokens: tuple[int, ...] | None = ()

    def __post_init__(self) -> None:
        if self.num_prefix_tokens < 0:
            raise LayoutError(f"num_prefix_tokens={self.num_prefix_tokens} is negative. Pass 0 or more.")
        outside = [c for c in self.class_tokens or () if not 0 <= c < self.num_prefix_tokens]
        if outside:
            raise LayoutError(
                f"Class tokens at {outside} are not within {self.num_prefix_tokens} prefix "
                "tokens, counted from 0. Correct num_prefix_tokens= or class_tokens=."
            )

    @property
    def num_queries(self) -> int:
        return self.num_prefix_tokens + len(self.query)

    @property
    def num_keys(self) -> int:
        return self.num_prefix_tokens + len(self.key)

    def lattice(self, side: Literal["query", "key"]) -> Lattice:
        return self.query if side == "query" else self.key

    def known_class_tokens(self) -> tuple[int, ...]:
        """The class tokens. Raises :class:`~acr_reg.LayoutError` if it is unknown which prefix tokens they are."""
        if self.class_tokens is None:
            raise LayoutError(
                f"It is unknown which of the {self.num_prefix_tokens} prefix tokens are class tokens. Capture or wrap "
                "them with class_tokens=, as 1 or 20."
            )
        return self.class_tokens


def class_token_positions(class_tokens: int | Sequence[int] | None, num_prefix_tokens: int) -> tuple[int, ...] | None:
    """Converts ``class_tokens`` to positions: an int counts from the first; None is clear for 0 or 1 prefix tokens."""
    if class_tokens is None:
        return tuple(range(num_prefix_tokens)) if num_prefix_tokens <= 1 else None
    return tuple(range(class_tokens)) if isinstance(class_tokens, int) else tuple(class_tokens)
