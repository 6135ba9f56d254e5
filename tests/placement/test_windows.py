"""Where overlapping windows put tokens: the chain's formula against the pixels that an output is made from, and the
lattices of real pyramids against numbers by hand and against the same pixels."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import AttentionMaps, HorizontalFlip, capture_attention
from acr_reg.capture.handle import AttentionCapture
from acr_reg.inspection.offsets import token_offsets
from acr_reg.placement.windows import Spot, WindowedOp, WindowTrace, spots, windowed_op
from acr_reg.tokens import Lattice
from tests.support.models import ExplicitBlock, explicit_vit
from tests.support.models.plain import Calling, every_block
from tests.support.models.published import mvitv2, timm_model, transformers_model
from tests.support.models.published import segformer as published_segformer

START = {"stride": (1.0, 1.0), "centre": (0.5, 0.5)}


# ---------------------------------------------------------------- one window, and chains of them


class ConvSame(nn.Conv2d):
    """TensorFlow's "same", as timm's Conv2dSame: how much is padded depends on the size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, same_padding(x, self.kernel_size, self.stride, self.dilation)))


class MaxPoolSame(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, same_padding(x, pair(self.kernel_size), pair(self.stride), (1, 1))))


def pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def same_padding(x: Tensor, kernel: Any, stride: Any, dilation: Any) -> list[int]:
    padding: list[int] = []
    for axis in (1, 0):
        size = x.shape[2 + axis]
        span = (-(-size // stride[axis]) - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        total = max(span - size, 0)
        padding += [total // 2, total - total // 2]
    return padding


def random_module(draw: random.Random) -> nn.Module:
    """Kernels 1-8, strides 1-4, paddings 0-3, dilations 1-2, each axis its own."""

    def two(low: int, high: int) -> tuple[int, int]:
        return draw.randint(low, high), draw.randint(low, high)

    kernel, stride, padding = two(1, 8), two(1, 4), two(0, 3)
    half = min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2)
    ceil_mode = draw.random() < 0.3
    kind = draw.choice(["conv", "conv", "same", "dynamic", "max", "max dynamic", "average", "adaptive", "pad"])
    if kind == "conv":
        return nn.Conv2d(1, 1, kernel, stride, padding, two(1, 2), bias=False)
    if kind == "same":
        return nn.Conv2d(1, 1, kernel, 1, "same", two(1, 2), bias=False)
    if kind == "dynamic":
        return ConvSame(1, 1, kernel, stride, 0, two(1, 2), bias=False)
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, half, two(1, 2), ceil_mode=ceil_mode)
    if kind == "max dynamic":
        return MaxPoolSame(kernel, stride)
    if kind == "average":
        return nn.AvgPool2d(kernel, stride, half, ceil_mode=ceil_mode)
    if kind == "adaptive":
        return nn.AdaptiveAvgPool2d((None, None))  # the size is filled in below
    return nn.ZeroPad2d((*two(0, 3), *two(0, 3)))


def reading_all(module: nn.Module) -> nn.Module:
    """The same windows, in which every input counts: a maximum would show one of them."""
    if isinstance(module, nn.MaxPool2d):
        like = ConvSame if isinstance(module, MaxPoolSame) else nn.Conv2d
        window = [pair(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation)]
        module = _with_ceil(like)(1, 1, *window, bias=False) if module.ceil_mode else like(1, 1, *window, bias=False)
    if isinstance(module, nn.Conv2d):
        nn.init.ones_(module.weight)
    return module.double()


def _with_ceil(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    class Ceiled(kind):  # type: ignore[valid-type,misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, self.stride[1] - 1, 0, self.stride[0] - 1)))

    return Ceiled


def support(outputs: Tensor, pixels: Tensor) -> tuple[tuple[float, float], bool]:
    """(y, x) of the middle of the pixels (..., H, W) that ``outputs`` depend on; whether all of them are inside."""
    (gradient,) = torch.autograd.grad(outputs.sum(), pixels, retain_graph=True)
    read = gradient.abs().flatten(0, -3).amax(0) > 0
    middle, inside = [], True
    for axis in (0, 1):
        found = read.any(1 - axis).nonzero()
        first, last = int(found[0]), int(found[-1])
        middle.append((first + last + 1) / 2)
        inside = inside and first > 0 and last < read.shape[axis] - 1
    return (middle[0], middle[1]), inside


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_centres_are_those_of_the_pixels_that_an_output_reads() -> None:
    draw, measured = random.Random(0), 0
    for _ in range(150):
        size = draw.randint(90, 130), draw.randint(90, 130)
        pixels = torch.rand(1, 1, *size, dtype=torch.float64).requires_grad_()
        x, seen, spot = pixels, torch.zeros(1, 1, *size), Spot(size=size, **START)
        for number in range(draw.randint(1, 4)):
            module = random_module(draw)
            if isinstance(module, nn.AdaptiveAvgPool2d):  # of whole pieces
                rows, columns = x.shape[2:]
                module = nn.AdaptiveAvgPool2d(
                    (rows // 2 if rows % 2 == 0 else None, columns // 3 * (columns % 3 == 0) or None)
                )
            if min(x.shape[2:]) < 20:
                break
            op = windowed_op(str(number), module, seen.shape, module(seen).shape)
            seen = module(seen)
            x = reading_all(module)(x)[..., : seen.shape[2], : seen.shape[3]]
            if op is not None:  # else tokens stay where they are
                assert op.explained
                spot = spot.through(op, False)
            assert spot.size == tuple(seen.shape[2:]), module
        row, column = spot.size[0] // 2, spot.size[1] // 2
        middle, inside = support(x[..., row, column], pixels)
        if inside:
            measured += 1
            expected = [spot.offset[i] + ((row, column)[i] + 0.5) * spot.stride[i] for i in (0, 1)]
            assert middle == tuple(expected)
    assert measured > 80


def test_what_leaves_tokens_in_place_is_not_remembered() -> None:
    for module in (
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Conv2d(3, 3, 1),
        nn.MaxPool2d(3, 1, 1),
        nn.AdaptiveAvgPool2d((None, None)),
    ):
        assert windowed_op("", module, (2, 3, 8, 9), module(torch.rand(2, 3, 8, 9)).shape) is None
    assert windowed_op("", nn.AdaptiveAvgPool2d(1), (2, 3, 8, 9), (2, 3, 1, 1)) is None  # a mean is no grid
    assert windowed_op("", nn.Linear(3, 4), (2, 3, 3), (2, 3, 4)) is None


def test_unfold_is_a_window_too() -> None:
    module = nn.Unfold(7, padding=2, stride=4)
    op = windowed_op("", module, (2, 3, 32, 48), module(torch.zeros(2, 3, 32, 48)).shape)
    assert op.target == (147, 8, 12)
    assert Spot(size=(32, 48), **START).through(op, False).offset == (-0.5, -0.5)


def test_a_size_that_the_attributes_do_not_explain_leads_nowhere() -> None:
    op = windowed_op("", nn.Conv2d(3, 8, 4, 4), (2, 3, 32, 48), (2, 8, 9, 12))
    assert not op.explained
    assert op.displaces()
    assert spots([(op, False, False)], (2, 32, 48), (32, 48))[8, 9, 12] == {None}


def conv(name: str, source: tuple[int, int, int], target: tuple[int, int, int], k: int, s: int, p: int) -> WindowedOp:
    return WindowedOp(name, source, target, 2, (k, k), (s, s), (1, 1), ((p, p), (p, p)))


STEM = conv("stem", (3, 32, 48), (16, 8, 12), 7, 4, 3)


@pytest.mark.parametrize(
    ("ops", "offset"),
    [
        ([STEM], -1.5),
        ([STEM, conv("main", (16, 8, 12), (16, 8, 12), 1, 1, 0)], -1.5),
        # two ways to the same place, and to two places
        ([STEM, conv("a", (3, 32, 48), (16, 8, 12), 5, 4, 2), conv("b", (3, 32, 48), (16, 8, 12), 3, 4, 1)], -1.5),
        ([STEM, conv("short", (3, 32, 48), (16, 8, 12), 4, 4, 0)], None),
        # over other channels only where nothing fits the width
        ([STEM, conv("other", (3, 32, 48), (24, 8, 12), 4, 4, 0)], -1.5),
        ([conv("stem", (3, 32, 48), (24, 8, 12), 7, 4, 3)], -1.5),
        ([conv("stem", (3, 32, 48), (24, 16, 24), 3, 2, 1), conv("next", (16, 16, 24), (16, 8, 12), 3, 2, 1)], -1.5),
        # something unseen made what this one read: on the way to the layer, or not
        ([STEM, conv("padded", (16, 9, 13), (16, 8, 12), 2, 1, 0)], None),
        ([STEM, conv("part", (16, 5, 5), (16, 2, 2), 2, 2, 0)], -1.5),
        # keys of a block before are no way to here; what attention leaves behind is
        ([STEM, conv("block.0.attn.sr", (16, 32, 48), (16, 8, 12), 4, 4, 0)], -1.5),
        ([], None),
    ],
)
def test_a_chain_is_found_or_nothing_is_said(ops: list[WindowedOp], offset: float | None) -> None:
    trace = WindowTrace(tuple(ops), (2, 32, 48), {"block.0.attn": (9, 9), "block.1.attn": (9, 9)})
    for size, grid in (((32, 48), (8, 12)), ((64, 100), (16, 25))):
        spot = trace.find("block.1.attn", size, grid, (2, 96, 16))
        if offset is None:
            assert spot is None
        else:
            assert (spot.stride, spot.offset, spot.size) == ((4.0, 4.0), (offset, offset), grid)
    assert trace.find("block.1.attn", (32, 48), (9, 12), (16,)) is None


# ---------------------------------------------------------------- models


def lattices(maps: AttentionMaps) -> list[tuple[Lattice, Lattice]]:
    """Of every layer on a grid, queries and keys."""
    return [(m.layout.query, m.layout.key) for m in maps if m.placed is not None]


def summary(lattice: Lattice) -> tuple[Any, ...]:
    """(grid, stride, offset) where both axes are alike; "?" for an offset that is not known."""
    assert lattice.stride[0] == lattice.stride[1]
    assert lattice.offset[0] == lattice.offset[1]
    return str(lattice), lattice.stride[0], lattice.offset[0] if lattice.offset_known else "?"


def captured(model: nn.Module, *sizes: tuple[int, int]) -> list[list[tuple[Any, Any]]]:
    """What one capture says of images of these sizes, one after the other: after the first few modules are hooked."""
    with capture_attention(model.eval()) as attention:
        found = []
        for size in sizes:
            model(torch.randn(2, 3, *size))
            found.append(list(dict.fromkeys((summary(q), summary(k)) for q, k in lattices(attention.take()))))
            assert all(lattice.extent == size for pair in lattices_of(attention, model, size) for lattice in pair)
    return found


def lattices_of(attention: AttentionCapture, model: nn.Module, size: tuple[int, int]) -> list[tuple[Lattice, Lattice]]:
    model(torch.randn(2, 3, *size))
    return lattices(attention.take())


segformer = published_segformer([16] * 4, [1, 1, 2, 2])
pvt_v2 = timm_model("pvt_v2_b0", depths=(2, 1, 1, 2))
cvt = transformers_model("CvtForImageClassification", embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3])


def mit(*grids: str) -> list[tuple[Any, Any]]:
    """A 7 x 7 window of stride 4, then 3 x 3 of stride 2; keys by windows side by side, of 8, 4 and 2 tokens."""
    queries = [(grid, 4.0 * 2**i, 0.5 - 2.0 * 2**i) for i, grid in enumerate(grids[:4])]
    keys = [(grids[4], 32.0, offset) for _, _, offset in queries[:3]]
    return list(zip(queries, [*keys, queries[3]], strict=True))


MIT = [
    mit("32 x 32", "16 x 16", "8 x 8", "4 x 4", "4 x 4"),
    mit("16 x 24", "8 x 12", "4 x 6", "2 x 3", "2 x 3"),
    mit("18 x 27", "9 x 14", "5 x 7", "3 x 4", "2 x 3"),
]
SIZES = ((128, 128), (64, 96), (70, 106))


@pytest.mark.parametrize("build", [segformer, pvt_v2], ids=["segformer", "pvt_v2"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["128 first", "70 first"])
def test_mit_at_any_size_whatever_was_seen_first(build: Callable[[], nn.Module], order: tuple[int, ...]) -> None:
    """All hidden sizes alike in one of them, so that channels tell nothing; after the first run few modules are
    hooked, and the chain of that run is replayed."""
    assert captured(build(), *(SIZES[i] for i in order)) == [MIT[i] for i in order]


def both(grid: str, stride: float, offset: Any) -> tuple[Any, Any]:
    return (grid, stride, offset), (grid, stride, offset)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[tuple[int, int], list[tuple[Any, Any]]]]] = {
    "plain": (timm_model("vit_tiny_patch16_224", img_size=(64, 96), depth=2), {(64, 96): [both("4 x 6", 16.0, 0.0)]}),
    "convit": (timm_model("convit_tiny", img_size=64, depth=2), {(64, 64): [both("4 x 4", 16.0, 0.0)]}),
    # side by side all the way: 4, then 2, with keys of 8, 4, 2
    "pvt": (
        timm_model("twins_pcpvt_small", img_size=(64, 96), depths=(1, 1, 1, 1)),
        {
            (64, 96): [
                (("16 x 24", 4.0, 0.0), ("2 x 3", 32.0, 0.0)),
                (("8 x 12", 8.0, 0.0), ("2 x 3", 32.0, 0.0)),
                (("4 x 6", 16.0, 0.0), ("2 x 3", 32.0, 0.0)),
                both("2 x 3", 32.0, 0.0),
            ]
        },
    ),
    # 7 x 7 of stride 4 padded by 2, 3 x 3 of 2; keys by 3 x 3 of 2 padded by 1
    "cvt": (
        cvt,
        {
            (64, 96): [
                (("16 x 24", 4.0, -0.5), ("8 x 12", 8.0, -2.5)),
                (("8 x 12", 8.0, -2.5), ("4 x 6", 16.0, -6.5)),
                (("4 x 6", 16.0, -6.5), ("2 x 3", 32.0, -14.5)),
            ],
        },
    ),
    # 16 x 16 of stride 8 without padding, then 3 x 3 of 2
    "pit": (
        timm_model("pit_ti_224", img_size=(64, 96), depth=[1, 1, 1]),
        {(64, 96): [both("7 x 11", 8.0, 4.0), both("4 x 6", 16.0, 0.0), both("2 x 3", 32.0, -8.0)]},
    ),
    # keys and queries pooled by 3 x 3, over the channels of one head
    "mvitv2": (
        mvitv2(64),
        {
            (64, 64): [
                (("16 x 16", 4.0, -1.5), ("4 x 4", 16.0, -7.5)),
                both("8 x 8", 8.0, -3.5),
                (("8 x 8", 8.0, -3.5), ("4 x 4", 16.0, -7.5)),
                (("4 x 4", 16.0, -7.5), ("8 x 8", 8.0, -3.5)),
                both("4 x 4", 16.0, -7.5),
                (("2 x 2", 32.0, -15.5), ("4 x 4", 16.0, -7.5)),
                both("2 x 2", 32.0, -15.5),
            ]
        },
    ),
    # four 3 x 3 of stride 2; then 1 x 1 of stride 2, which is a window of a pooling module here
    "levit with convolutions": (
        timm_model("levit_conv_128s", img_size=128),
        {
            (128, 128): [
                both("8 x 8", 16.0, -7.5),
                (("4 x 4", 32.0, -15.5), ("8 x 8", 16.0, -7.5)),
                both("4 x 4", 32.0, -15.5),
                (("2 x 2", 64.0, -31.5), ("4 x 4", 32.0, -15.5)),
                both("2 x 2", 64.0, -31.5),
            ]
        },
    ),
    # a slice of every second token, which no module with windows makes
    "levit": (
        timm_model("levit_128s", img_size=128),
        {
            (128, 128): [
                both("8 x 8", 16.0, -7.5),
                (("4 x 4", 32.0, "?"), ("8 x 8", 16.0, -7.5)),
                both("4 x 4", 32.0, "?"),
                (("2 x 2", 64.0, "?"), ("4 x 4", 32.0, "?")),
                both("2 x 2", 64.0, "?"),
            ]
        },
    ),
    # a ResNet whose padding, 2 before and 3 behind, depends on the size
    "hybrid": (timm_model("vit_tiny_r_s16_p8_224", img_size=(64, 96), depth=1), {(64, 96): [both("2 x 3", 32.0, 1.5)]}),
    # shortcuts by 1 x 1 of stride 2, and main branches of 3 x 3 padded behind alone: two places, a token's half apart
    "hybrid with two ways": (
        timm_model("vit_small_r26_s32_224", img_size=(64, 96), depth=1),
        {(64, 96): [both("2 x 3", 32.0, "?")]},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_lattices_are_those_by_hand(name: str) -> None:
    build, expected = MODELS[name]
    assert captured(build(), *expected) == list(expected.values())


def silent(result: Any) -> Any:
    return (
        result * 0
        if isinstance(result, Tensor)
        else tuple(map(silent, result))
        if isinstance(result, tuple)
        else result
    )


def measured(
    model: nn.Module, size: tuple[int, int]
) -> Iterator[tuple[Lattice, tuple[float, float], tuple[float, float]]]:
    """Every lattice, with where it puts an inner token, and the middle of the pixels that this token is made from when
    attention, by which it looks at all of them, is silenced."""
    modules = dict(model.eval().named_modules())
    with capture_attention(model, record_products=True) as attention:  # which keeps query and key of every kernel
        model(torch.randn(2, 3, *size))
        for name in {layer.name for layer in attention.take()}:
            modules[name].register_forward_hook(lambda module, args, result: silent(result))
        images = torch.randn(2, 3, *size).requires_grad_()
        model(images)
        for layer in {layer.layout: layer for layer in attention.take()}.values():
            for lattice, of_tokens in ((layer.layout.query, layer.query), (layer.layout.key, layer.key)):
                row, column = lattice.height // 2, lattice.width // 2
                token = of_tokens[:, :, layer.layout.num_prefix_tokens + row * lattice.width + column]
                middle, inside = support(token * torch.randn(token.shape), images)
                assert inside
                y, x = ((at + 0.5) * lattice.stride[i] + lattice.offset[i] for i, at in enumerate((row, column)))
                yield lattice, (y, x), middle


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (segformer, (192, 256)),
        (segformer, (198, 250)),
        (timm_model("pvt_v2_b0", depths=(1, 1, 1, 1)), (256, 256)),
        (timm_model("pit_ti_224", img_size=(224, 224), depth=[1, 1, 1]), (224, 224)),
        (mvitv2(192), (192, 192)),
        (timm_model("vit_tiny_patch16_224", img_size=(64, 96), depth=2), (64, 96)),
    ],
    ids=["segformer", "segformer 198", "pvt_v2", "pit", "mvitv2", "plain"],
)
def test_lattices_are_where_the_tokens_come_from(build: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    found = list(measured(build(), size))
    assert len(found) >= 2
    for lattice, expected, middle in found:
        assert lattice.offset_known
        assert middle == expected, f"{lattice} of {lattice.stride} px"


def test_a_flip_matches_tokens_at_the_same_place() -> None:
    """Less than a quarter of a token; were they placed side by side, queries would be 3 px apart of 4, then 7 of 8."""
    model = pvt_v2().eval()
    with capture_attention(model) as attention:

        def observe(images: Tensor) -> AttentionMaps:
            model(images)
            return attention.take()

        apart = token_offsets(observe, torch.randn(1, 3, 128, 192), HorizontalFlip())
    first, second, *_ = apart.values()
    assert first.sides["query"].under_view < 1
    assert second.sides["query"].under_view < 2
    assert max(first.sides["key"].under_view, second.sides["key"].under_view) < 8


# ---------------------------------------------------------------- small models


class Reduced(nn.Module):
    """A stem, and attention with keys that something reduces."""

    def __init__(self, stem: nn.Module, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.attn = stem, ReducedAttention(reduce)

    def forward(self, images: Tensor) -> Tensor:
        return self.attn(self.stem(images))


class ReducedAttention(nn.Module):
    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce, self.q, self.k = reduce, nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.k(self.reduce(x).flatten(2).mT)[:, None]
        queries = self.q(x.flatten(2).mT)[:, None]
        return (queries + F.scaled_dot_product_attention(queries, keys, keys)).mean((1, 2))


def overlapping() -> nn.Module:
    return nn.Conv2d(3, 32, 7, 4, 3)


QUERY = ("8 x 12", 4.0, -1.5)


@pytest.mark.parametrize(
    ("stem", "reduce", "expected"),
    [
        (overlapping, lambda: nn.Conv2d(32, 32, 2, 2), (QUERY, ("4 x 6", 8.0, -1.5))),
        (overlapping, lambda: nn.Conv2d(32, 32, 3, 2, 1), (QUERY, ("4 x 6", 8.0, -3.5))),
        (overlapping, lambda: nn.AdaptiveAvgPool2d((4, 6)), (QUERY, ("4 x 6", 8.0, -1.5))),
        (overlapping, lambda: lambda x: F.avg_pool2d(x, 2), (QUERY, ("4 x 6", 8.0, "?"))),
        (overlapping, lambda: lambda x: x[..., ::2, ::2], (QUERY, ("4 x 6", 8.0, "?"))),
        (
            lambda: nn.Conv2d(3, 32, 4, 4),
            lambda: lambda x: F.avg_pool2d(x, 2),
            (("8 x 12", 4.0, 0.0), ("4 x 6", 8.0, 0.0)),
        ),
    ],
    ids=["side by side", "overlapping", "adaptive", "functional", "sliced", "plain stem"],
)
def test_reduced_keys_stand_where_their_windows_put_them(
    stem: Callable[[], nn.Module], reduce: Callable[[], Any], expected: tuple[Any, Any]
) -> None:
    model = Reduced(stem(), reduce())
    assert captured(model, (32, 48)) == [[expected]]
    with capture_attention(model) as attention:
        ((query, key),) = lattices_of(attention, model, (32, 48))
    assert key.offset == query.offset or key.offset_known  # side by side is the guess


class Vit(nn.Module):
    def __init__(self, stem: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.after = stem, block, nn.Conv2d(3, 32, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.block(self.stem(images).flatten(2).mT)
        return tokens.mean(1) + self.after(images).mean((2, 3))  # another way to the same grid, later


def padded() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(16, 32, 3, 2))


@every_block
def test_what_runs_after_attention_is_no_way_to_it(block: Callable[[], nn.Module]) -> None:
    assert captured(Vit(overlapping(), block()), (32, 48), (64, 96)) == [
        [both("8 x 12", 4.0, -1.5)],
        [both("16 x 24", 4.0, -1.5)],
    ]


@every_block
@pytest.mark.parametrize("stem", [overlapping, padded])
def test_padding_may_be_a_module_of_its_own(stem: Callable[[], nn.Module], block: Callable[[], nn.Module]) -> None:
    assert captured(Vit(stem(), block()), (32, 48)) == [[both("8 x 12", 4.0, -1.5)]]


class Padding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 0, 1, 0))


def test_padding_that_nobody_sees_makes_offsets_unknown_and_no_plain_model_is_touched() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), Padding(), nn.Conv2d(16, 32, 3, 2))
    assert captured(Vit(stem, ExplicitBlock()), (32, 48)) == [[both("8 x 12", 4.0, "?")]]
    assert captured(explicit_vit(), (32, 48)) == [[both("4 x 6", 8.0, 0.0)]]


def test_a_patch_size_that_the_user_gives_is_taken_at_its_word() -> None:
    model = Vit(overlapping(), ExplicitBlock())
    with capture_attention(model, patch_size=4, num_prefix_tokens=0) as attention:
        ((query, key),) = lattices_of(attention, model, (32, 48))
    assert summary(query) == summary(key) == ("8 x 12", 4.0, 0.0)


def test_maps_of_ones_own_and_layouts_by_name_have_known_offsets() -> None:
    model = Vit(overlapping(), ExplicitBlock())
    with capture_attention(model) as attention:
        model(torch.randn(2, 3, 32, 48))
        renamed = attention.take().with_layout(grid=(8, 12), num_prefix_tokens=0)
    assert renamed[0].layout.query.offset_known
    assert renamed[0].layout.query.offset == (0.0, 0.0)


def test_a_run_that_fails_leaves_no_half_chain() -> None:
    def fail() -> None:
        raise MemoryError("too large")

    failing = Calling()
    failing.call = fail
    model = Vit(nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), failing, nn.Conv2d(16, 32, 3, 2, 1)), ExplicitBlock())
    with capture_attention(model) as attention:
        with pytest.raises(MemoryError):
            model(torch.randn(2, 3, 64, 64))
        failing.call = None
        ((query, _),) = lattices_of(attention, model, (32, 48))
        assert summary(query) == ("8 x 12", 4.0, -1.5)


def test_nothing_is_kept_but_numbers_and_nothing_is_noted_once_few_modules_are_hooked() -> None:
    model = segformer().eval()
    with capture_attention(model) as attention:
        model(torch.randn(2, 3, 64, 96))
        attention.take()
        trace = attention._recorder.placer._trace
        assert len(trace.ops) == 7
        model(torch.randn(2, 3, 64, 64))
        assert not attention._recorder.states.here().run.windows.ops
        attention.take()
        assert attention._recorder.placer._trace is trace

    def numbers(value: Any) -> bool:
        return all(map(numbers, value)) if isinstance(value, tuple) else value is None or isinstance(value, (int, str))

    assert all(numbers(dataclasses.astuple(op)) for op in trace.ops)
