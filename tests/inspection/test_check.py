"""acr_reg.check: one table says what a capture sees of a model, and where its tokens stand under a view."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack as modes  # the only way to see a mode left behind

from acr_reg import (
    AttentionMaps,
    CaptureError,
    Compose,
    HorizontalFlip,
    Identity,
    Rotate90,
    Scale,
    VerticalFlip,
    capture_attention,
    check,
)
from acr_reg.demo.small_vit import SmallViT
from acr_reg.inspection.offsets import token_offsets
from tests.support.attention import says
from tests.support.models import ExplicitBlock, MultiheadBlock
from tests.support.models.spellings import MIXED, Heads
from tests.support.models.tokens import Attention, Tokens
from tests.support.orders import OrderedVit


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert modes() == 0, "a mode was left behind"


def images(size: tuple[int, int] = (32, 48), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size)


Stem = Callable[[], nn.Module]


def plain(width: int = 32) -> nn.Module:
    return nn.Conv2d(3, width, 8, 8)


def overlapping() -> nn.Module:
    """SegFormer's and PVT's: a token looks at 7 x 7 px around a corner of its 4 x 4 px, 1.5 px off their centre."""
    return nn.Conv2d(3, 32, 7, 4, 3)


class Unseen(nn.Module):
    """A convolution that no module tells of: nothing says where it puts the tokens."""

    def __init__(self, kernel: tuple[int, int] = (7, 7), padding: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.patch_size, self.padding = 4, padding
        self.weight = nn.Parameter(nn.Conv2d(3, 32, kernel).weight.detach())

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight, stride=4, padding=self.padding)


class Vit(nn.Module):
    """A stem, a class token or none, and blocks."""

    def __init__(self, stem: Stem, block: Callable[[], nn.Module], class_token: bool = True, depth: int = 2) -> None:
        super().__init__()
        self.patch_embed, self.head = stem(), nn.Linear(32, 5)
        if class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))

    def tokens(self, images: Tensor) -> Tensor:
        return self.patch_embed(images).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        if hasattr(self, "cls_token"):
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        return self.head(self.blocks(tokens)[:, 0])


class SeveralTokens(Vit):
    """Three tokens before the patches, whose name does not say whether they are class tokens."""

    def __init__(self) -> None:
        super().__init__(plain, ExplicitBlock, class_token=False)
        self.queries = nn.Parameter(torch.randn(1, 3, 32))

    def tokens(self, images: Tensor) -> Tensor:
        return torch.cat([self.queries.expand(len(images), -1, -1), super().tokens(images)], 1)


class ColumnsFirst(Vit):
    """Its tokens run down the columns of the image, where everybody expects them along the rows."""

    def tokens(self, images: Tensor) -> Tensor:
        return self.patch_embed(images).transpose(2, 3).flatten(2).transpose(1, 2)


class Mirrored(Vit):
    """Its rows of tokens run from right to left."""

    def tokens(self, images: Tensor) -> Tensor:
        return self.patch_embed(images).flip(-1).flatten(2).transpose(1, 2)


class Woven(Vit):
    """The even tokens of the image stand before the odd ones."""

    def tokens(self, images: Tensor) -> Tensor:
        tokens = super().tokens(images)
        return torch.cat([tokens[:, ::2], tokens[:, 1::2]], 1)


def fused() -> nn.Module:
    return MultiheadBlock(False)


def toy(stem: Stem = plain, block: Callable[[], nn.Module] = fused, **options: Any) -> nn.Module:
    return Vit(stem, block, **options)


every_block = pytest.mark.parametrize("block", [ExplicitBlock, fused], ids=["explicit", "fused"])


# ---- the table


@every_block
def test_a_plain_model_is_ok_and_every_column_says_so(block: Callable[[], nn.Module]) -> None:
    model = toy(block=block)
    report = check(model, images())
    assert report.ok, report.problems
    assert (report.model, report.view, report.skipped) == ("Vit", HorizontalFlip(), ())
    explicit = block is ExplicitBlock
    names = [f"blocks.{i}" + ("" if explicit else ".attention") for i in range(2)]
    assert [layer.name for layer in report.layers] == names
    for index, layer in enumerate(report.layers):
        assert (layer.index, layer.kind, layer.heads) == (index, "global", 4)
        assert layer.source == ("explicit" if explicit else "fused")
        assert (layer.queries, layer.keys, layer.prefix, layer.class_tokens) == ("4 x 6", "4 x 6", 1, (0,))
        assert layer.row_error < 1e-6
        assert layer.product_error < 1e-6
        assert layer.problem is None
    first, second = report.layers
    assert 0 <= first.query_offset < 1
    assert 0 <= first.key_offset < 2
    assert second.query_offset is None  # on the grid of the first
    assert second.key_offset is None
    assert sorted(report.terms) == ["activation", "affinity", "entropy"]
    assert all(0 < value < 1 for value in report.terms.values())
    elements = 2 * 2 * 2 * 4  # views, layers, images, heads
    assert report.dense_bytes == 4 * elements * 25 * 25
    if not explicit:
        assert report.factor_bytes == 4 * elements * 4 * 25 * 8


def test_a_timm_vit_is_ok() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), num_classes=5, depth=3)
    report = check(model, images((64, 96)))
    assert report.ok, report.problems
    assert [(layer.name, layer.source) for layer in report.layers] == [(f"blocks.{i}.attn", "fused") for i in range(3)]
    assert {(layer.queries, layer.keys, layer.prefix, layer.class_tokens) for layer in report.layers} == {
        ("4 x 6", "4 x 6", 1, (0,))
    }
    assert max(layer.product_error for layer in report.layers) < 1e-6
    assert report.layers[0].query_offset < 1
    by_features = check(model, images((64, 96)), forward=model.forward_features)
    assert [layer.name for layer in by_features.layers] == [layer.name for layer in report.layers]


def test_the_stages_of_a_pyramid_stand_each_on_its_own_grids_and_an_overlapping_stem_is_known() -> None:
    import timm

    model = timm.create_model("pvt_v2_b0", num_classes=5, depths=(1, 1, 1, 1))
    report = check(model, images((64, 96)))
    assert [layer.kind for layer in report.layers] == ["reduced keys"] * 3 + ["global"]
    assert [layer.queries for layer in report.layers] == ["16 x 24", "8 x 12", "4 x 6", "2 x 3"]
    assert {layer.keys for layer in report.layers} == {"2 x 3"}
    assert {(layer.prefix, layer.class_tokens) for layer in report.layers} == {(0, ())}
    assert max(layer.product_error for layer in report.layers) < 1e-6
    assert report.layers[0].query_offset < 1.2
    assert report.layers[0].key_offset < 2


def test_segformer_is_seen_as_what_it_is() -> None:
    import transformers as tf

    config = tf.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    report = check(tf.SegformerForImageClassification(config), images((64, 96)))
    assert [layer.kind for layer in report.layers] == ["reduced keys"] * 3 + ["global"]
    assert [(layer.queries, layer.keys) for layer in report.layers] == [
        ("16 x 24", "2 x 3"),
        ("8 x 12", "2 x 3"),
        ("4 x 6", "2 x 3"),
        ("2 x 3", "2 x 3"),
    ]
    assert [layer.heads for layer in report.layers] == [1, 1, 2, 2]
    assert max(layer.product_error for layer in report.layers) < 1e-6


def test_windows_are_reported_with_the_reason() -> None:
    import timm

    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2,), embed_dim=32, num_heads=(2,), num_classes=5
    )
    report = check(model, images((56, 56)))
    assert [layer.kind for layer in report.layers] == ["4 windows of 7 x 7", "4 windows of 7 x 7, shifted by 3 x 3"]
    assert {(layer.queries, layer.keys, layer.prefix, layer.query_offset) for layer in report.layers} == {
        ("49", "49", None, None)
    }
    assert not report.ok
    (problem,) = report.problems
    assert "Tokens attend within 4 windows of 7 x 7" in problem
    assert "not to the whole image" in problem


def test_what_is_skipped_is_listed() -> None:
    class Pooled(Vit):
        def __init__(self) -> None:
            super().__init__(plain, ExplicitBlock)
            self.pool = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.blocks(torch.cat([self.cls_token.expand(len(images), -1, -1), self.tokens(images)], 1))
            return self.head(self.pool(tokens[:, :1], tokens, tokens, need_weights=False)[0][:, 0])

    report = check(Pooled(), images())
    assert report.ok
    assert len(report.layers) == 2
    assert [name for name, _ in report.skipped] == ["pool"]
    assert "skipped pool: " in str(report)


@pytest.mark.parametrize(
    "build",
    [
        lambda: toy(),
        lambda: toy(overlapping, ExplicitBlock, class_token=False),
        lambda: nn.Sequential(plain(), nn.Flatten()),
    ],
)
def test_the_text_is_a_table_of_one_line_a_layer(build: Callable[[], nn.Module]) -> None:
    report = check(build(), images())
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{report.model}: {len(report.layers)} layers of token-to-token attention captured")
    assert lines[-1] == ("ok" if report.ok else f"problems: {len(report.problems)}")
    assert [line for line in lines if line.startswith("problem: ")] == [f"problem: {each}" for each in report.problems]
    rows = [[cell for cell in line.split("  ") if cell.strip()] for line in lines[1 : 2 + len(report.layers)]]
    if not report.layers:
        assert not any(line.startswith("layer ") for line in lines)
        return
    headings, cells = [cell.strip() for cell in rows[0]], [[cell.strip() for cell in row] for row in rows[1:]]
    assert headings[:4] == ["layer", "name", "kind", "source"]
    assert headings[-2:] == ["query off, px", "key off, px"]
    assert len(set(headings)) == len(headings)
    for layer, row in zip(report.layers, cells, strict=True):
        found = dict(zip(headings, row, strict=True))
        assert (found["layer"], found["name"], found["kind"]) == (str(layer.index), layer.name, layer.kind)
        assert (found["queries"], found["keys"], found["heads"]) == (layer.queries, layer.keys, str(layer.heads))
        assert found["class"] == ("0" if layer.class_tokens else "none")
        shown = found["query off, px"]
        if layer.query_offset is None:
            assert shown == "-"
        else:
            assert math.isclose(float(shown), layer.query_offset, abs_tol=0.005)
        assert math.isclose(float(found["A V off"]), layer.product_error, rel_tol=0.1, abs_tol=1e-12)


@every_block
@pytest.mark.parametrize("kind", ["behind", "around"])
def test_tokens_behind_the_patches_have_a_column_of_their_own(block: Callable[[], nn.Module], kind: str) -> None:
    """Their offsets are those of the same tokens in front of the patches."""
    front, model, x = OrderedVit(None, block), OrderedVit(kind, block), images().double()
    expected, report = (check(each, x, **each.hints) for each in (front, model))
    assert report.ok, report.problems
    for layer, with_prefix in zip(report.layers, expected.layers, strict=True):
        assert (layer.prefix, layer.suffix) == (model.layout.num_prefix_tokens, model.layout.num_suffix_tokens)
        assert (layer.between, layer.class_tokens) == (0, model.layout.class_tokens)
        for side in ("query_offset", "key_offset"):
            assert getattr(layer, side) == pytest.approx(getattr(with_prefix, side), abs=1e-6)
    assert report.terms == pytest.approx(expected.terms, abs=1e-9)
    assert "suffix" in str(report) and "between" not in str(report)
    assert "suffix" not in str(expected)


def test_an_order_that_is_stated_wrong_is_found_out() -> None:
    """Three tokens behind the patches that are read as if they stood in front would shift every patch."""
    model = OrderedVit("behind", ExplicitBlock)
    report = check(model, images().double(), num_prefix_tokens=3, class_tokens=1)
    assert not report.ok
    assert all(fact in report.problems[0] for fact in ("num_prefix_tokens=3", "0 tokens", "3 behind"))


# ---- where tokens stand


VIEWS = (
    HorizontalFlip(),
    VerticalFlip(),
    Rotate90(1),
    Rotate90(2),
    Scale(0.5),
    Compose([VerticalFlip(), Rotate90(3), Scale(0.5)]),
)


@every_block
@pytest.mark.parametrize("view", VIEWS, ids=repr)
def test_tokens_of_plain_patches_stay_where_they_are_under_every_view(
    block: Callable[[], nn.Module], view: Any
) -> None:
    report = check(toy(block=block), images(), view)
    assert report.ok, report.problems
    assert report.view == view
    assert report.layers[0].query_offset < 1.2
    assert report.layers[0].key_offset < 2


@every_block
@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (HorizontalFlip(), 3.0),  # 1.5 px to the left of the centre, and 1.5 px to the right of the same one
        (VerticalFlip(), 3.0),
        (Rotate90(2), 18**0.5),
        (Scale(0.5), 8**0.5),  # the corner of 8 x 8 px and that of 4 x 4 px, 2 px apart in either direction
        (Identity(), 0.0),
        (Compose([HorizontalFlip(), Rotate90(1)]), 0.0),  # changes rows for columns, and the corner stays
    ],
    ids=repr,
)
def test_an_overlapping_stem_puts_tokens_elsewhere(block: Callable[[], nn.Module], view: Any, expected: float) -> None:
    """Where a module tells of it, tokens are matched by where they are; else the distance is found out."""
    known = check(toy(overlapping, block, class_token=False), images(), view)
    assert known.ok, known.problems
    assert known.layers[0].query_offset < 1.3
    report = check(toy(Unseen, block, class_token=False), images(), view)
    first = report.layers[0]
    assert (first.queries, first.prefix, first.class_tokens) == ("8 x 12", 0, ())
    assert abs(first.query_offset - expected) < 1.3
    assert report.ok == (expected == 0)
    assert "activation" not in report.terms
    if not report.ok:
        (problem,) = report.problems
        assert problem.startswith(f"layer 0 ({first.name}): {view!r} matches query tokens of 4 px ")
        assert f"{first.query_offset:.1f} px apart" in problem
        assert "leave the layer out (layers=)" in problem
        assert first.problem in problem


@pytest.mark.parametrize(
    ("view", "expected"),
    [(HorizontalFlip(), 3.0), (VerticalFlip(), 0.0), (Compose([HorizontalFlip(), Rotate90(1)]), 4.5**0.5)],
    ids=repr,
)
def test_a_stem_that_overlaps_along_rows_alone_is_told_from_one_along_columns(view: Any, expected: float) -> None:
    report = check(toy(lambda: Unseen((4, 7), (0, 3)), class_token=False), images(), view)
    assert report.layers[0].queries == "8 x 12"
    assert abs(report.layers[0].query_offset - expected) < 1.2
    assert report.ok == (expected == 0)


SIZES = ((32, 48), (64, 64))  # as many columns as rows, or not


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("other", [ColumnsFirst, Mirrored, Woven])
def test_tokens_in_another_order_are_found_out(other: type[Vit], size: tuple[int, int]) -> None:
    report = check(other(plain, fused), images(size))
    assert not report.ok
    (problem,) = report.problems
    assert problem.startswith("layer 0 (blocks.0.attention), 1 (blocks.1.attention): ")
    assert "lie on no grid of the image" in problem
    assert (report.layers[0].prefix, report.layers[0].query_offset, report.terms) == (None, None, {})
    assert check(Vit(plain, fused), images(size)).ok


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("other", [ColumnsFirst, Mirrored, Woven])
def test_the_offsets_find_tokens_out_of_the_order_that_the_user_names(other: type[Vit], size: tuple[int, int]) -> None:
    for class_token in (True, False):
        report = check(other(plain, fused, class_token), images(size), num_prefix_tokens=int(class_token))
        assert not report.ok
        (problem,) = report.problems
        grid = f"{size[0] // 8} x {size[1] // 8}"
        assert problem.startswith("layer 0 (blocks.0.attention): The query tokens ")
        assert f"px from where the {grid} grid puts them" in problem
        assert "AttentionMaps.from_tensors" in problem


def test_a_model_that_pads_its_images_is_told_by_the_offset() -> None:
    class Padding(Vit):
        def tokens(self, images: Tensor) -> Tensor:
            return super().tokens(F.pad(images, (0, -images.shape[-1] % 8, 0, -images.shape[-2] % 8)))

    model = Padding(plain, fused)
    with pytest.warns(UserWarning, match=r"The model pads images of .* px to 32 x 48"):
        report = check(model, images((32, 43)))
    assert not report.ok
    assert "the model pads" in report.problems[0]
    assert f"{report.layers[0].query_offset:.1f} px apart" in report.problems[0]
    assert 4 < report.layers[0].query_offset < 7


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("stem", [plain, overlapping, Unseen])
def test_a_model_that_resizes_its_images_is_measured_on_what_it_reads(stem: Stem, factor: float) -> None:
    class Resizing(Vit):
        def tokens(self, images: Tensor) -> Tensor:
            return super().tokens(F.interpolate(images, scale_factor=factor, mode="bilinear"))

    report = check(Resizing(stem, fused, class_token=False), images((48, 64)))
    assert not any("from where a grid" in problem for problem in report.problems), report.problems
    assert report.ok == (stem is not Unseen), report.problems


# ---- problems that are no exceptions


def test_a_map_that_meets_something_else_than_values_is_a_problem() -> None:
    """A computed matrix that mixes heads, on the last axis, cannot be told from values."""

    class Mixing(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (q @ k.mT).softmax(-1).permute(0, 2, 3, 1)
            return (weights @ torch.eye(weights.shape[-1])).permute(0, 3, 1, 2) @ v

    report = check(Tokens(Mixing()), torch.randn(2, 3, 32, 48))
    assert not report.ok
    assert report.layers[0].product_error is None


def test_nothing_captured_is_a_problem() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True) + x

    report = check(toy(block=Mean), images())
    assert (report.layers, report.terms, report.dense_bytes) == ((), {}, 0)
    assert not report.ok
    (problem,) = report.problems
    assert "No token-to-token attention of Vit" in problem
    assert "must run in this model" in problem


@pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is (deprecated|not supported)", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("kind", ["compiled", "compiled in place", "one block compiled", "traced by torch.jit"])
def test_a_model_that_cannot_be_captured_is_a_problem_that_says_why(kind: str) -> None:
    model, x = toy(block=ExplicitBlock), images()
    if kind == "compiled":
        made = torch.compile(model, backend="eager")
    elif kind == "compiled in place":
        made = model
        made.compile(backend="eager")
    elif kind == "one block compiled":
        made = model
        made.blocks[1] = torch.compile(made.blocks[1], backend="eager")
    else:
        made = torch.jit.trace(model, x, check_trace=False)
    try:
        report = check(made, x)
    finally:
        torch._dynamo.reset()
    (problem,) = report.problems
    assert kind.split()[-1 if kind == "one block compiled" else 0] in problem.replace("torch.compile", "compiled")
    assert ("blocks.1 (OptimizedModule)" if kind == "one block compiled" else type(made).__name__) in problem
    assert "capture the original model" in problem.lower()
    assert "remove() the capture" not in problem, "the user has none to remove"


def test_a_grid_that_fits_no_image_is_a_problem() -> None:
    class Half(Vit):
        def tokens(self, images: Tensor) -> Tensor:
            return super().tokens(images)[:, ::2]

    report = check(Half(plain, fused), images((32, 40)))
    assert not report.ok
    assert "layer 0 (blocks.0.attention)" in report.problems[0]
    assert report.layers[0].prefix is None
    assert report.layers[0].query_offset is None


def test_maps_that_are_not_finite_are_a_problem() -> None:
    model = toy(block=ExplicitBlock)
    with torch.no_grad():
        model.blocks[1].qkv.weight.fill_(math.nan)
    report = check(model, images())
    assert not report.ok
    assert any("blocks.1" in problem for problem in report.problems)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_block
def test_a_model_of_another_precision_is_ok(dtype: torch.dtype, block: Callable[[], nn.Module]) -> None:
    report = check(toy(block=block).to(dtype), images().to(dtype))
    assert report.ok, report.problems


@every_block
def test_a_forward_under_autocast_is_ok(block: Callable[[], nn.Module]) -> None:
    model = toy(block=block)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    report = check(model, images(), forward=forward)
    assert report.ok, report.problems


# ---- rows, and what is not finite


ROWS = {
    "gated": "0.5",
    "gated by query": None,
    "summed": "4",
    "self-self": "2",
    "sparse": None,
    "subtracted": "0",
    "zero": "0",
}


@pytest.mark.parametrize("how", ROWS)
def test_rows_that_do_not_sum_to_one_are_shown_and_warned_of(how: str) -> None:
    report = check(Tokens(Attention(), Heads(how), Attention()), images())
    assert report.ok, report.problems
    low, high = report.layers[1].row_sums
    assert [layer.row_sums for layer in report.layers[::2]] == [pytest.approx((1, 1), abs=1e-5)] * 2
    (warning,) = report.warnings
    assert warning.startswith("layer 1 (blocks.1): ")
    lines = str(report).splitlines()
    assert f"warning: {warning}" in lines
    begin = lines[1].index("row sum")
    shown = [line[begin:].split("  ")[0].strip() for line in lines[2:5]]
    assert shown[::2] == ["1", "1"]
    assert f"sum to {shown[1]}, not 1" in warning
    if ROWS[how] is not None:
        assert low == pytest.approx(high, abs=1e-5)
        if ROWS[how] != "0":
            assert shown[1] == ROWS[how]
    else:
        assert low < high < 1
        assert shown[1] == f"{low:.3g} to {high:.3g}"
    assert report.layers[1].row_error is None
    plain = check(Tokens(Attention(), Attention()), images())
    assert math.isfinite(report.terms["entropy"])
    assert sorted(report.terms) == sorted(plain.terms) == ["affinity", "entropy"]


def test_maps_that_are_brought_back_to_one_are_not_warned_of() -> None:
    for block in (Heads("sparse, renormalised"), MIXED["gate"]()):
        report = check(Tokens(Attention(), block), images())
        assert report.ok
        assert report.warnings == ()
        assert report.layers[1].source == "mixed"
        assert report.layers[1].row_sums == pytest.approx((1, 1), abs=1e-4)


def test_where_no_layer_is_stochastic_there_is_no_entropy() -> None:
    report = check(Tokens(Heads("gated"), Heads("summed")), images())
    assert report.ok
    assert sorted(report.terms) == ["affinity"]
    assert "nan" not in str(report)
    assert len(report.warnings) == 2


class NotFinite(Attention):
    """One value of one of its tensors is none."""

    def __init__(self, where: str, value: float) -> None:
        super().__init__()
        self.where, self.value = where, value

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spot = torch.zeros_like(v)
        spot[0, 1, 2, 0] = self.value
        if self.where == "v":
            v = v + spot
        maps = (q @ k.mT).softmax(-1)
        if self.where == "map":
            maps = maps + spot[..., :1]
        return maps @ v


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["v", "map"])
def test_a_value_that_is_not_finite_is_never_ok(where: str, value: float) -> None:
    report = check(Tokens(Attention(), NotFinite(where, value), Attention()), images())
    assert not report.ok
    assert "layer 1 (blocks.1)" in report.problems[0]
    assert "NaN or infinite" in report.problems[0]
    chosen = check(Tokens(Attention(), NotFinite(where, value), Attention()), images(), layers=[0])
    assert chosen.ok  # the first layer has nothing of it


def test_fully_masked_rows_are_never_ok() -> None:
    class Masked(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = torch.ones(24, 24, dtype=torch.bool)
            mask[5] = False
            return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v

    report = check(Tokens(Masked(), Attention()), images())
    assert not report.ok
    assert "layer 0 (blocks.0)" in report.problems[0]
    assert "masked rows" in report.problems[0]


def test_only_the_views_maps_are_not_finite() -> None:
    class Dark(Tokens):
        def embed(self, x: Tensor) -> Tensor:
            return super().embed(x) / (x[0, 0, 0, 0] != dark)

    x = images()
    dark = x[0, 0, 0, -1]
    report = check(Dark(Attention()), x)
    assert not report.ok
    assert "NaN or infinite" in report.problems[0]
    assert "attn_b" in report.problems[0]


# ---- arguments


def test_every_hint_of_a_capture_is_one_of_check() -> None:
    """The others say what a capture does with its runs, not what it sees."""
    of_capture = set(inspect.signature(capture_attention).parameters)
    of_runs = {"keep", "double_backward", "graph_from", "record_products"}
    of_images = {"image_channels"}  # check sees the images
    assert of_capture - of_runs - of_images <= set(inspect.signature(check).parameters)


def test_images_of_any_number_of_bands_are_checked() -> None:
    for bands in (1, 2, 5, 13):
        model = toy()
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        conv.in_channels, conv.weight = bands, nn.Parameter(torch.randn(conv.out_channels, bands, *conv.kernel_size))
        report = check(model, torch.randn(2, bands, *images().shape[2:]))
        assert report.layers[0].queries == check(toy(), images()).layers[0].queries


def test_what_a_capture_takes_is_passed_on() -> None:
    model, x = toy(depth=3), images()
    assert [layer.index for layer in check(model, x, layers=[-1, 0]).layers] == [2, 0]
    for part in ("blocks.1", model.blocks[1]):
        assert [layer.name for layer in check(model, x, modules=[part]).layers] == ["blocks.1.attention"]
    report = check(model, x, num_prefix_tokens=1, class_tokens=0)
    assert (report.layers[0].prefix, report.layers[0].class_tokens) == (1, ())
    assert report.ok
    assert "activation" not in report.terms
    unknown = check(SeveralTokens(), x)
    assert not unknown.ok
    assert "class_tokens=" in unknown.problems[0]
    assert check(SeveralTokens(), x, class_tokens=3).terms["activation"] > 0
    wrong = check(model, x, patch_size=16)
    assert not wrong.ok
    assert "16 x 16" in wrong.problems[0]
    for right in (8, (8, 8), [8], 8.0, torch.tensor([8, 8]), torch.tensor(8).numpy()[()]):
        assert check(model, x, patch_size=right).ok  # type: ignore[arg-type]
    calls: list[Tensor] = []

    def forward(batch: Tensor) -> None:
        calls.append(batch)
        model(batch)

    assert check(model, x, forward=forward).ok
    assert len(calls) > 2


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (torch.zeros(3, 32, 48), "shape (3, 32, 48)"),
        ([torch.zeros(3, 32, 48)], "images are a list"),
        (None, "images are a NoneType"),
        (torch.zeros(2, 3, 32, 48, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(0, 3, 32, 48), "shape (0, 3, 32, 48)"),
    ],
)
def test_images_of_another_kind_are_refused_by_name(given: Any, found: str) -> None:
    model = toy()
    with pytest.raises((ValueError, TypeError)) as error:
        check(model, given)
    assert says(error, found)
    assert model.training


def test_a_model_or_a_module_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(TypeError) as error:
        check("vit", images())  # type: ignore[arg-type]
    assert says(error, "str", "torch.nn.Module")
    with pytest.raises(ValueError, match=r"blocks\.9") as error:
        check(toy(), images(), modules=["blocks.9"])
    assert says(error, "model.named_modules()")
    with pytest.raises(TypeError) as error:
        check(toy(), images(), "flip")  # type: ignore[arg-type]
    assert says(error, "str", "HorizontalFlip()")
    with pytest.raises(IndexError) as error:
        check(toy(), images(), layers=[7])
    assert says(error, "[7]")
    with pytest.raises(TypeError) as error:
        check(toy(), images(), layers=1)  # type: ignore[arg-type]
    assert says(error, "layers=", "1", "list")
    for wrong in (0, -8, (8, 0), (8, 8, 8), (), "8", 8.5):
        report = check(toy(), images(), patch_size=wrong)  # type: ignore[arg-type]
        assert not report.ok
        assert "patch_size=" in report.problems[0]


@pytest.mark.parametrize("value", [0.0, 1.0])
@every_block
def test_images_of_one_colour_still_work(value: float, block: Callable[[], nn.Module]) -> None:
    report = check(toy(block=block), torch.full((2, 3, 32, 48), value))
    assert report.ok, report.problems
    assert report.layers[0].query_offset < 1.2


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(without: Callable[[], Any]) -> None:
    model, x = toy(), images()
    with without():
        report = check(model, x)
        assert not torch.is_grad_enabled()
    assert report.ok, report.problems
    assert str(report) == str(check(model, x))


@every_block
def test_a_frozen_model_works(block: Callable[[], nn.Module]) -> None:
    model, x = toy(block=block).requires_grad_(False), images()
    report = check(model, x)
    assert report.ok, report.problems
    learning = check(model.requires_grad_(True), x)
    for frozen, layer in zip(report.layers, learning.layers, strict=True):
        assert (frozen.name, frozen.kind, frozen.queries) == (layer.name, layer.kind, layer.queries)
        assert (frozen.query_offset is None) == (layer.query_offset is None)
        if frozen.query_offset is not None:
            assert abs(frozen.query_offset - layer.query_offset) < 1e-3
    for name, value in report.terms.items():  # torch's own kernels round otherwise where nothing needs a gradient
        assert abs(value - learning.terms[name]) < 1e-5


# ---- the model is left as it was


class Everything(Vit):
    """BatchNorm in the stem, dropout between, parts frozen and in eval mode, a gradient, hooks of the user's own."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__(lambda: nn.Sequential(plain(), nn.BatchNorm2d(32)), block)
        self.blocks.insert(1, nn.Dropout(0.5))
        self.broken = 0  # the forward that fails, counted from now
        self.blocks[0].eval()
        self.head.requires_grad_(False)
        self.register_forward_hook(lambda *_: None)
        self.blocks[0].register_forward_pre_hook(lambda *_: None)

    def forward(self, images: Tensor) -> Tensor:
        self.broken -= 1
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), self.tokens(images)], 1)
        tokens = self.blocks[0](tokens + torch.rand(32))
        if self.broken == 0:
            raise ArithmeticError("the model's own")
        for block in self.blocks[1:]:
            tokens = block(tokens)
        return self.head(tokens[:, 0])


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        name: (
            sorted(vars(module)),
            module.training,
            [[id(hook) for hook in value.values()] for key, value in sorted(vars(module).items()) if "hooks" in key],
            [
                (key, id(p), p.requires_grad, p._version, None if p.grad is None else id(p.grad))
                for key, p in module.named_parameters(recurse=False)
            ],
            [(key, b._version, b.clone().tolist()) for key, b in module.named_buffers(recurse=False)],
        )
        for name, module in model.named_modules()
    }


@every_block
@pytest.mark.parametrize("broken", [0, 1, 2, 3, 4, 5])
def test_the_model_and_the_random_state_are_left_as_they_were(block: Callable[[], nn.Module], broken: int) -> None:
    model, x = Everything(block), images()
    x.requires_grad_()
    weights, before, given = copy.deepcopy(model.state_dict()), state_of(model), x.detach().clone()
    random = torch.get_rng_state()
    model.broken = broken
    if broken:
        with pytest.raises(ArithmeticError, match="the model's own"):
            check(model, x)
    else:
        assert check(model, x).ok
    assert torch.equal(torch.get_rng_state(), random)
    assert state_of(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None
    assert torch.equal(x, given)


def test_gradients_that_are_there_stay() -> None:
    model, x = toy(), images()
    model(x).sum().backward()
    before = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    assert check(model, x).ok
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.grad is before[name][0], name
            assert torch.equal(parameter.grad, before[name][1]), name


def test_it_says_the_same_whatever_the_random_state_and_mode() -> None:
    model, x = Everything(fused), images()
    expected = str(check(model, x))
    torch.manual_seed(123)
    assert str(check(model, x)) == expected
    assert str(check(model.eval(), x)) == expected


def test_a_capture_that_is_running_meanwhile_goes_on() -> None:
    model, x = toy(), images()
    with capture_attention(model) as attention:
        assert check(model, x).ok
        attention.clear()
        model(x)
        assert len(attention.take()) == 2
    with pytest.raises(CaptureError):
        attention.take()


@pytest.mark.parametrize("seed", range(4))
def test_kernels_that_lean_within_wide_centred_windows_are_no_problem(seed: int) -> None:
    """The demo's stem reads some 16 px for a token of 8 px, around its middle. Its kernels lean by 2 to 3 px."""
    torch.manual_seed(seed)
    report = check(SmallViT(3), torch.rand(1, 3, 64, 64), HorizontalFlip())
    assert report.ok, report.problems
    assert max(report.layers[0].query_offset, report.layers[0].key_offset) > 0.25 * 8


def test_a_token_reads_its_patch() -> None:
    def observe(images: torch.Tensor) -> AttentionMaps:
        with capture_attention(model) as attention:
            model(images)
            return attention.take()

    for stem, width in ((None, 8), (nn.Conv2d(3, 24, 16, 8, 4), 16)):
        torch.manual_seed(0)
        model = SmallViT(3, width=24, depth=1, stem=nn.Conv2d(3, 24, 8, 8) if stem is None else stem)
        offsets = token_offsets(observe, torch.rand(1, 3, 64, 64), HorizontalFlip())
        assert abs(offsets[0].sides["query"].width - width) < 0.15 * width
