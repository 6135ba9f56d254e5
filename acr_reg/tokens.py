"""Where the tokens of an attention layer sit on the image, and which of them are class tokens.

A transformer's tokens are the patches of an image in row-major order and a few others (class, distillation, register,
prompt, text), mostly before the patches, but also behind or between them. A :class:`Lattice` places the patches in
pixels; a :class:`TokenLayout` joins the lattices of queries and keys with the other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from acr_reg.errors import LayoutError


@dataclass(frozen=True)
class Lattice:
    """A grid of tokens, row-major, laid over an image.

    It has ``height`` x ``width`` tokens. In pixels, ``stride`` (y, x) is the distance between neighbouring centres,
    ``offset`` (y, x) the distance of the first centre from half a stride, and ``extent`` (height, width) the size of
    the image. The centre of token (i, j) is at ``offset + (i + 1/2, j + 1/2) * stride``. By default a token is one unit
    and the grid covers the image. ``offset_known`` is False if windows overlap and the centres are unknown; the loss
    then warns. ``is_unit`` is True if all is measured in tokens, because the size in pixels is unknown.

    >>> Lattice(2, 3, stride=(16.0, 16.0)).extent
    (32.0, 48.0)
    """

    height: int
    width: int
    stride: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    extent: tuple[float, float] = (0.0, 0.0)
    offset_known: bool = field(default=True, compare=False, repr=False)
    is_unit: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise LayoutError(
                f"A token grid of {self.height} x {self.width} is empty. Pass (height, width) of at least 1 x 1."
            )
        if self.extent == (0.0, 0.0):
            object.__setattr__(self, "extent", (self.height * self.stride[0], self.width * self.stride[1]))
        if self.stride == (1.0, 1.0):  # a lattice made of this one, such as that of reduced keys, has other strides
            object.__setattr__(self, "is_unit", True)

    def __len__(self) -> int:
        return self.height * self.width

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


TokenSide = Literal["query", "key"]


@dataclass(frozen=True)
class TokenLayout:
    """The order of the queries (N) and the keys (M) of one attention layer.

    ``num_prefix_tokens`` stand before the first patch, then come the patches of the lattice in rows, then
    ``num_suffix_tokens``.

    ``between`` are the positions of other tokens that stand between patches, in ascending order; queries and keys are
    then equally many. Positions count from 0 over all queries; negative ``class_tokens`` count from the last.

    ``class_tokens`` are positions too. One class token serves all classes; with C > 1 of them, position c of the tuple
    is the token of class c. ``()`` means none; ``None`` means that the positions are unknown. Raises
    :class:`~acr_reg.LayoutError` for counts and positions that do not fit.

    >>> registers_behind = TokenLayout(Lattice(2, 3), Lattice(2, 3), 1, (0,), num_suffix_tokens=2)
    >>> print(registers_behind)
    1 prefix + 2 x 3 + 2 suffix
    >>> registers_behind.order("query")
    (0, 7, 8, 1, 2, 3, 4, 5, 6)
    """

    query: Lattice
    key: Lattice
    num_prefix_tokens: int = 0
    class_tokens: tuple[int, ...] | None = ()
    num_suffix_tokens: int = 0
    between: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_counts(num_prefix_tokens=self.num_prefix_tokens, num_suffix_tokens=self.num_suffix_tokens)
        object.__setattr__(self, "between", tuple(self.between))
        self._check_between()
        if self.class_tokens is not None:
            count, others = self.num_queries, set(self.other_tokens)
            positions = [c + count if c < 0 else c for c in self.class_tokens]
            outside = [c for c, at in zip(self.class_tokens, positions, strict=True) if at not in others]
            if outside:
                raise LayoutError(
                    f"Class tokens at {outside} are not among {self.other_names} of {self}. Correct class_tokens= or "
                    "the counts of tokens."
                )
            object.__setattr__(self, "class_tokens", tuple(positions))

    def _check_between(self) -> None:
        if not self.between:
            return
        if len(self.query) != len(self.key):
            raise LayoutError(
                f"The grids of queries, {self.query}, and of keys, {self.key}, differ, so no token can be at "
                f"between={self.between}. Leave between= out."
            )
        first, last = self.num_prefix_tokens, self.num_queries - self.num_suffix_tokens - 1
        if not all(low < high for low, high in zip((first, *self.between), (*self.between, last), strict=True)):
            raise LayoutError(
                f"between={self.between} does not ascend between the first patch, token {first}, and the last, token "
                f"{last}. Count tokens beyond as prefix or suffix."
            )

    @property
    def num_other_tokens(self) -> int:
        """The number of tokens that are not patches, on either side."""
        return self.num_prefix_tokens + len(self.between) + self.num_suffix_tokens

    @property
    def num_queries(self) -> int:
        return self.num_other_tokens + len(self.query)

    @property
    def num_keys(self) -> int:
        return self.num_other_tokens + len(self.key)

    @property
    def other_tokens(self) -> tuple[int, ...]:
        """The positions of the queries that are not patches: prefix, then between, then suffix."""
        return self._others(self.num_queries)

    def _others(self, count: int) -> tuple[int, ...]:
        return (*range(self.num_prefix_tokens), *self.between, *range(count - self.num_suffix_tokens, count))

    @property
    def other_names(self) -> str:
        """The tokens that are not patches in words, such as "1 prefix and 4 suffix tokens"."""
        counts = {"in-between": len(self.between), "suffix": self.num_suffix_tokens}
        named = [f"{self.num_prefix_tokens} prefix", *(f"{count} {name}" for name, count in counts.items() if count)]
        return " and ".join(named) + " tokens"

    def order(self, side: TokenSide) -> tuple[int, ...] | None:
        """The positions of a side's tokens, the other tokens first and then the patches in rows; None if they stand in
        this order, as they do with prefix tokens only."""
        if not self.num_suffix_tokens and not self.between:
            return None
        count = self.num_queries if side == "query" else self.num_keys
        others = self._others(count)
        return (*others, *sorted({*range(count)} - {*others}))

    def lattice(self, side: TokenSide) -> Lattice:
        return self.query if side == "query" else self.key

    def describe(self, side: TokenSide) -> str:
        """A side's tokens in order, such as "1 prefix + 4 x 6 + 4 suffix"."""
        between = f" with {len(self.between)} between" if self.between else ""
        suffix = f" + {self.num_suffix_tokens} suffix" if self.num_suffix_tokens else ""
        return f"{self.num_prefix_tokens} prefix + {self.lattice(side)}{between}{suffix}"

    def __str__(self) -> str:
        return self.describe("query")

    def known_class_tokens(self) -> tuple[int, ...]:
        """The class tokens. Raises :class:`~acr_reg.LayoutError` if it is unknown which tokens they are."""
        if self.class_tokens is None:
            raise LayoutError(
                f"It is unknown which of the {self.other_names} are class tokens. Capture or wrap "
                "them with class_tokens=, as 1 or 20."
            )
        return self.class_tokens


def check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 0:
            raise LayoutError(f"{name}={count} is negative. Pass 0 or more.")


def with_class_tokens(layout: TokenLayout, class_tokens: int | Sequence[int] | None) -> TokenLayout:
    """The layout with class tokens as users give them: an int counts the first of the tokens that are not patches,
    others are positions; None is clear if there are 0 or 1 such tokens, else unknown."""
    others = layout.other_tokens
    if class_tokens is None:
        return replace(layout, class_tokens=others if len(others) <= 1 else None)
    if not isinstance(class_tokens, int):
        return replace(layout, class_tokens=tuple(class_tokens))
    if not 0 <= class_tokens <= len(others):
        raise LayoutError(
            f"class_tokens={class_tokens} is not a count of {layout.other_names}. Pass 0 to {len(others)}, or a "
            "list of positions, such as [-1] for the last token."
        )
    return replace(layout, class_tokens=others[:class_tokens])


@lru_cache(maxsize=256)
def token_order(layout: TokenLayout, side: TokenSide, device: str) -> Tensor | None:
    """:meth:`TokenLayout.order` as an index on ``device``: tokens or None."""
    order = layout.order(side)
    with torch.inference_mode(False):  # training uses the index too, and cannot use tensors made in inference_mode
        return None if order is None else torch.tensor(order, device=device)


@lru_cache(maxsize=256)
def class_token_index(layout: TokenLayout, device: str) -> Tensor:
    """:meth:`TokenLayout.known_class_tokens` as an index on ``device``."""
    with torch.inference_mode(False):  # as above
        return torch.tensor(layout.known_class_tokens(), dtype=torch.long, device=device)


def patch_index(layout: TokenLayout, side: TokenSide, device: str) -> slice | Tensor:
    """Indexes the patches of a side's axis in rows: a slice, so without a copy, where they stand side by side."""
    if not layout.between:
        return slice(layout.num_prefix_tokens, layout.num_prefix_tokens + len(layout.lattice(side)))
    order = token_order(layout, side, device)
    assert order is not None
    return order[layout.num_other_tokens :]
