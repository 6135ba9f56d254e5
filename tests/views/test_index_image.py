"""Random compositions of views against a brute-force index image: step by step, in exact pixels, one place at a time.

The places of all tokens, and what is shown of them, are computed here by fractions from what each step means in pixels,
and share nothing with the package.
"""

import random
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from acr_reg import Compose, Crop, HorizontalFlip, Lattice, PerImage, Rotate90, Scale, VerticalFlip
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
    counts = [
        max(1, min(9, round(side / stride) + rng.randint(-1, 1))) for side, stride in zip(size, strides, strict=True)
    ]
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
    # The image's pixels between neighbouring target tokens along both axes.
    corner, along_y, along_x = case.place(0, 0), case.place(target.stride[0], 0), case.place(0, target.stride[1])
    steps = [float(abs(y - at) + abs(x - at)) for at, y, x in zip(corner, along_y, along_x, strict=True)]
    places = 0
    for token, (row, column) in enumerate((y, x) for y in centres(target, 0) for x in centres(target, 1)):
        place = case.place(row, column)
        expected, positions = shown is not None, []
        for axis, (at, side) in enumerate(zip(place, (height, width), strict=True)):
            count, stride = (source.height, source.width)[axis], Fraction(source.stride[axis])
            position = (at - Fraction(source.offset[axis])) / stride - Fraction(1, 2)
            expected = expected and Fraction(-1, 2) <= position <= count - Fraction(1, 2)
            if shown is not None:  # at the image's own edges the lattice decides
                low, high = shown[axis]
                expected = expected and (low == 0 or at >= low) and (high == side or at <= high)
            positions.append((position, count))
        assert valid[token] == expected, (case, source, target, token)
        if not expected:
            assert read[token] == [0, 0]
            continue
        places += 1
        for axis, (position, count) in enumerate(positions):
            nearest = float(min(max(position, 0), count - 1))
            # A filter of the width of the coarser token, of which the edge of a crop may cut off one half.
            most = 0 if mapping.is_exact else max(1.0, steps[axis] / source.stride[axis]) + 1e-9
            assert abs(read[token][axis] - nearest) <= most, (case, source, target, token)
    return len(valid), places


def check_sizes(case):
    first, last = case.sizes[0], case.sizes[-1]
    assert case.view.output_size(first) == last
    assert case.view.inverse.output_size(last) == first


@pytest.mark.parametrize("seed", range(3))
def test_a_random_composition_reads_what_the_steps_read(seed):
    rng, tokens, places = random.Random(seed), 0, 0
    for _ in range(100):
        case = random_case(rng)
        check_sizes(case)
        found = check(case, random_lattice(rng, case.sizes[0]), random_lattice(rng, case.sizes[-1]))
        tokens, places = tokens + found[0], places + found[1]
    assert tokens > 1000
    assert tokens / 10 < places < tokens


# What such draws found.
FOUND = {
    "an edge of the image inside a pixel of a pixel": (
        (5, 4),
        lambda size: crop(size, 1, 2, 1, 3, (7, 8)),
        lambda size: crop(size, 1, 5, 1, 1, (1, 8)),
        lambda size: crop(size, 0, 2, 1, 1, (6, 2)),
        lambda size: crop(size, 5, 1, 1, 1, (6, 8)),
        lambda size: crop(size, 1, 2, 1, 1, (1, 8)),
    ),
    "an edge of the image further inside": (
        (1, 2),
        lambda size: crop(size, 0, -2, 1, 5, (8, 8)),
        lambda size: crop(size, 3, 3, 1, 1, (3, 2)),
        lambda size: crop(size, 0, 0, 1, 1, (9, 6)),
        lambda size: crop(size, 8, 2, 1, 1, (5, 8)),
        lambda size: crop(size, 2, 3, 1, 1, (8, 6)),
        lambda size: crop(size, 7, 1, 1, 1, (2, 3)),
    ),
    "one pixel, scaled and cropped again": (
        (3, 8),
        lambda size: crop(size, 0, 3, 1, 1),
        flip,
        lambda size: scale(size, 1.5),
        lambda size: crop(size, 0, 0, 2, 1),
        upend,
    ),
    "one pixel, resized and scaled": (
        (8, 6),
        lambda size: crop(size, 0, 1, 7, 1),
        lambda size: crop(size, 3, 0, 1, 1, (1, 2)),
        lambda size: scale(size, 1.5),
    ),
    "one pixel, turned and scaled": (
        (6, 9),
        lambda size: crop(size, 0, 7, 1, 2),
        turn,
        lambda size: scale(size, 1.5),
        lambda size: crop(size, 0, 0, 1, 2, (9, 4)),
    ),
    "a scale, then a crop that is scaled down": (
        (2, 5),
        lambda size: scale(size, 3),
        lambda size: crop(size, 0, 0, 6, 15, (4, 9)),
        lambda size: scale(size, 0.3),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_compositions_that_were_wrong(name):
    size, *steps = FOUND[name]
    case = of_steps(size, *steps)
    check_sizes(case)
    check(case, Lattice(*size), Lattice(*case.sizes[-1]))
    images = torch.rand(1, 1, *size)
    assert case.view.inverse(case.view(images)).shape == images.shape
    stepwise = images
    for view in case.views:
        stepwise = view(stepwise)
    assert stepwise.shape == case.view(images).shape


def test_the_views_of_a_batch_keep_exact_sizes_too():
    crops = PerImage([Crop(top, 0, 3, 3, image_size=(5, 5)) for top in (0, 2)])
    steps = [crops, PerImage([Rotate90(), HorizontalFlip()]), Scale(1.5)]
    view = Compose(steps)
    assert view.output_size((5, 5)) == (4, 4)
    assert view.inverse.output_size((4, 4)) == (5, 5)
    for image in range(2):
        assert view.of_image(image).affines == Compose([step.of_image(image) for step in steps]).affines


def zoom_to_edge(size):
    return crop(size, 0, 4, 1, 2, (1, 10))


def test_zooming_into_the_edge_of_an_image_keeps_it():
    """The last pixels are 6e-5 pixels of the image wide, and the edge lies between two of them."""
    case = of_steps((1, 2), lambda size: crop(size, 0, -1, 1, 2, (1, 10)), *[zoom_to_edge] * 5)
    check(case, Lattice(1, 2), Lattice(*case.sizes[-1]))
    assert case.view.valid((1, 2)).sum() == 5
