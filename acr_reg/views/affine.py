"""One axis-aligned affine map from a view back to its image, in exact fractions: inverting twice gives the same map to
the bit, and two chains that make the same map compare equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_ZERO, _ONE = Fraction(0), Fraction(1)


@dataclass(frozen=True)
class Axis:
    """Where one output axis reads its source: source = slope * output + start, both coordinates in [0, 1].

    The view shows the source from ``low`` to ``high``; anything read beyond is padding. An axis that shows nothing has
    ``low`` above ``high``.
    """

    slope: Fraction = _ONE
    start: Fraction = _ZERO
    low: Fraction = _ZERO
    high: Fraction = _ONE

    @staticmethod
    def reading(slope: float | Fraction, start: float | Fraction) -> Axis:
        """The axis that shows every part of the source within the output's frame."""
        slope, start = Fraction(slope), Fraction(start)
        low, high = sorted((start, slope + start))
        return _shown(slope, start, max(low, _ZERO), min(high, _ONE))

    def __call__(self, output: Fraction) -> Fraction:
        return self.slope * output + self.start

    def inverse(self) -> Axis:
        slope, start = 1 / self.slope, -self.start / self.slope
        if self.low > self.high:
            return _shown(slope, start, self.low, self.high)
        low, high = sorted((slope * self.low + start, slope * self.high + start))
        return _shown(slope, start, low, high)

    def after(self, earlier: Axis) -> Axis:
        """The composition earlier(self(output)), as one axis."""
        low, high = sorted((earlier(self.low), earlier(self.high)))
        if self.low > self.high or earlier.low > earlier.high:
            low, high = _ONE, _ZERO
        return _shown(earlier.slope * self.slope, earlier(self.start), max(low, earlier.low), min(high, earlier.high))


def _shown(slope: Fraction, start: Fraction, low: Fraction, high: Fraction) -> Axis:
    return Axis(slope, start, low, high) if low < high else Axis(slope, start, _ONE, _ZERO)


@dataclass(frozen=True)
class Affine:
    """Where one image's view reads its source: ``y`` the rows, ``x`` the columns. If ``transposed``, the source's y
    runs along the output's x. ``zoom`` is the output's (height, width) over the source's, oriented like the output."""

    y: Axis = Axis()
    x: Axis = Axis()
    transposed: bool = False
    zoom: tuple[Fraction, Fraction] = (_ONE, _ONE)

    def inverse(self) -> Affine:
        (y, x), zoom = (self.y.inverse(), self.x.inverse()), (1 / self.zoom[0], 1 / self.zoom[1])
        return Affine(x, y, True, (zoom[1], zoom[0])) if self.transposed else Affine(y, x, False, zoom)

    def then(self, second: Affine) -> Affine:
        """This map followed by ``second`` on its output, as one map."""
        along_y, along_x = (second.x, second.y) if self.transposed else (second.y, second.x)
        zoom = (self.zoom[1], self.zoom[0]) if second.transposed else self.zoom
        return Affine(
            along_y.after(self.y),
            along_x.after(self.x),
            self.transposed != second.transposed,
            (zoom[0] * second.zoom[0], zoom[1] * second.zoom[1]),
        )

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        height, width = (size[1], size[0]) if self.transposed else (size[0], size[1])
        return round(height * float(self.zoom[0])), round(width * float(self.zoom[1]))
