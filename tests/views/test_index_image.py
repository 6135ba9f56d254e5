"""Random compositions of views against a brute-force index image: step by step, in exact pixels, one place at a time.

The places of all tokens, and what is shown of them, are computed here by fractions from what each step means in pixels,
and share nothing with the package.
"""

import random
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from acr_reg import Compose, Crop, HorizontalFlip, Lattice, Rotate90, Scale, VerticalFlip
from acr_reg.views.view import map_between

# Steps: each gives a view, the size of its output, and the place (y, x) in pixels that an output place reads.


def flip(size):
    return HorizontalFlip(), size, lambda y, x: (y, size[1] - x)


def upend(size):
    return VerticalFlip(), size, lambda y, x: (size[0] - y, x)


def turn(size, quarters=1):
    height, width = size
    read = {
        0: lambda y, x: (y, x),
        1: lambda y, x: (x, width - y),
        2: lambda y, x: (height - y, width - x),
        3: lambda y, x: (height - x, y),
    }[quarters]
    return Rotate90(quarters), size if quarters % 2 == 0 else size[::-1], read


def crop(size, top, left, height, width, out=None):
    out = out or (height, width)
    inside = top >= 0 and left >= 0 and top + height <= size[0] and left + width <= size[1]
    view = Crop(top, left, height, width, size=out, image_size=size, pad=not inside)
    return view, out, lambda y, x: (top + y * Fraction(height, out[0]), left + x * Fraction(width, out[1]))


def scale(size, factor):
    out = tuple(max(1, round(side * factor)) for side in size)
    return Scale(factor), out, lambda y, x: (y * Fraction(size[0], out[0]), x * Fraction(size[1], out[1]))


def scale_in_place(size, factor):
    factor = Fraction(factor)
    middle = [Fraction(side, 2) for side in size]
    view = Scale(float(factor), keep_size=True)
    return view, size, lambda y, x: tuple(m + (p - m) / factor for m, p in zip(middle, (y, x), strict=True))


def random_box(rng, size, pad):
    lengths = [rng.choice([1, rng.randint(1, side + 3 * pad)]) for side in size]
    starts = [
        rng.randint(1 - length, side - 1) if pad else rng.randint(0, side - length)
        for side, length in zip(size, lengths, strict=True)
    ]
    return *starts, *lengths


def random_step(rng, size, bound):
    """A scale that rounds comes only behind a view that is ``bound`` to its size: elsewhere sizes are known up to
    rounding only."""
    kind = rng.choice(["flip", "turn", "crop", "pad", "resize", "pad and resize", "scale", "scale in place"])
    if kind == "flip":
        return rng.choice([flip, upend])(size)
    if kind == "turn":
        return turn(size, rng.randint(0, 3))
    if kind == "scale":
        factors = [1.5, 2, 3] + [0.5, 0.3] * (min(size) > 2) if bound else [2, 3]
        return scale(size, rng.choice(factors if max(size) < 12 else factors[3:] or [1]))
    if kind == "scale in place":
        return scale_in_place(size, rng.choice([0.5, 0.75, 1.25, 2]))
    out = (rng.randint(1, 9), rng.randint(1, 9)) if "resize" in kind else None
    return crop(size, *random_box(rng, size, "pad" in kind), out)


@dataclass(frozen=True)
class Case:
    sizes: list
    views: list
    reads: list

    @property
    def view(self):
        return Compose(self.views)

    def place(self, y, x, steps=None):
        """Where a place on the output of the first ``steps`` reads the image."""
        for read in reversed(self.reads[:steps]):
            y, x = read(y, x)
        return y, x

    def shown(self):
        """The part of the image within the frames of all steps, ((top, bottom), (left, right)); None if empty."""
        frames = []
        for steps, (height, width) in enumerate(self.sizes):
            corners = self.place(0, 0, steps), self.place(height, width, steps)
            frames.append([sorted(pair) for pair in zip(*corners, strict=True)])
        parts = [(max(f[axis][0] for f in frames), min(f[axis][1] for f in frames)) for axis in (0, 1)]
        return None if any(low >= high for low, high in parts) else parts


def of_steps(size, *steps):
    """Each step is a function of the size that the one before leaves."""
    case = Case([size], [], [])
    for step in steps:
        view, out, read = step(case.sizes[-1])
        case.views.append(view)
        case.sizes.append(out)
        case.reads.append(read)
    return case


def random_case(rng):
    bound, steps = False, []
    case = of_steps((rng.randint(1, 9), rng.randint(1, 9)))
    for _ in range(rng.randint(1, 6)):
        step = random_step(rng, case.sizes[-1], bound)
        bound = bound or step[0].fixed_size is not None
        steps.append(lambda size, step=step: step)
        case = of_steps(case.sizes[0], *steps)
    return case


def random_lattice(rng, size):
    """Of pixels, or of tokens that may leave a margin or reach beyond the image."""
    if rng.random() < 0.4:
        return Lattice(*size)
    strides = [rng.choice([0.5, 1, 2, 3]) for _ in size]
    offsets = [rng.choice([-0.5, 0, 0, 0.25, 1]) for _ in size]
    counts = [max(1, min(9, round(side / stride) + rng.randint(-1, 1))) for side, stride in zip(size, strides, strict=True)]
    return Lattice(*counts, tuple(map(float, strides)), tuple(map(float, offsets)), tuple(map(float, size)))


def centres(lattice, axis):
    count, stride, offset = (lattice.height, lattice.width)[axis], lattice.stride[axis], lattice.offset[axis]
    return [Fraction(offset) + (i + Fraction(1, 2)) * Fraction(stride) for i in range(count)]


def check(case, source, target):
    """The map onto every token of ``target`` on the output: what is shown, and what is read. Returns both counts."""
    view, (height, width), shown = case.view, case.sizes[0], case.shown()
    mapping = map_between(view, source, target, "cpu")
    # Two images whose values are the coordinates, in tokens of the source.
    ramps = torch.stack(
        [
            torch.arange(source.height, dtype=torch.float64)[:, None].expand(-1, source.width),
            torch.arange(source.width, dtype=torch.float64).expand(source.height, -1),
        ]
    )
    read = mapping.tokens(ramps.flatten(1)[None])[0].T.tolist()
    valid = mapping.valid[0].tolist()
    places = 0
    for token, (row, column) in enumerate((y, x) for y in centres(target, 0) for x in centres(target, 1)):
        place = case.place(row, column)
        expected, reach = shown is not None, []
        for axis, (at, side) in enumerate(zip(place, (height, width), strict=True)):
            count, stride = (source.height, source.width)[axis], Fraction(source.stride[axis])
            position = (at - Fraction(source.offset[axis])) / stride - Fraction(1, 2)
            expected = expected and Fraction(-1, 2) <= position <= count - Fraction(1, 2)
            if shown is not None:  # at the image's own edges the lattice decides
                low, high = shown[axis]
                expected = expected and (low == 0 or at >= low) and (high == side or at <= high)
            reach.append((position, count))
        assert valid[token] == expected, (case, source, target, token)
        if not expected:
            assert read[token] == [0, 0]
            continue
        places += 1
        for axis, (position, count) in enumerate(reach):
            nearest = float(min(max(position, 0), count - 1))
            if mapping.is_exact:
                assert read[token][axis] == nearest, (case, source, target, token)
            else:  # not antialiased by more than a cell of the output, nor cut further than the cell that an edge cuts
                step = abs(case.place(row, column)[axis] - case.place(row + 1, column + 1)[axis]) * Fraction(
                    [target.stride[0], target.stride[1]][axis if not turned(case) else 1 - axis]
                )
                most = max(1.0, float(step / Fraction(source.stride[axis])))
                assert abs(read[token][axis] - nearest) <= most + 1e-9, (case, source, target, token)
    return len(valid), places


def turned(case):
    return case.view.affines[0].transposed


@pytest.mark.parametrize("seed", range(4))
def test_a_random_composition_reads_what_the_steps_read(seed):
    rng, tokens, places = random.Random(seed), 0, 0
    for _ in range(100):
        case = random_case(rng)
        assert case.view.output_size(case.sizes[0]) == case.sizes[-1]
        assert case.view.inverse.output_size(case.sizes[-1]) == case.sizes[0]
        source, target = random_lattice(rng, case.sizes[0]), random_lattice(rng, case.sizes[-1])
        found = check(case, source, target)
        tokens, places = tokens + found[0], places + found[1]
    assert tokens > 1000
    assert tokens / 10 < places < tokens
