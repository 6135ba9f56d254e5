"""Several encoders in one forward: the one that reads the images is checked, and modules= is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acr_reg import capture_attention, check
from tests.support.models.tokens import SIZE, Attention, Tokens


class Text(nn.Module):
    """A text tower: prompts of its own, through attention. ``length`` tokens, no square unless asked for."""

    def __init__(self, prompts: int = 7, length: int = 19) -> None:
        super().__init__()
        self.block = Attention()
        self.register_buffer("prompts", torch.randn(prompts, length, 32))

    def forward(self) -> Tensor:
        return self.block(self.prompts).mean()


class Pair(nn.Module):
    """Calls its towers in the order in which they are named; a text tower reads no images."""

    def __init__(self, **towers: nn.Module) -> None:
        super().__init__()
        for name, tower in towers.items():
            self.add_module(name, tower)

    def forward(self, images: Tensor) -> Tensor:
        return sum(tower() if isinstance(tower, Text) else tower(images) for tower in self.children())  # type: ignore


def vit(depth: int = 2) -> Tokens:
    return Tokens(*(Attention() for _ in range(depth)))


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, *SIZE)


@pytest.mark.parametrize("prompts", [1, 2, 7])
def test_of_a_text_tower_that_runs_first_and_an_image_tower_the_latter_is_checked(prompts: int) -> None:
    model = Pair(text=Text(prompts), visual=vit())
    report = check(model, images())
    assert report.ok, report.problems
    assert [layer.name for layer in report.layers] == ["visual.blocks.0", "visual.blocks.1"]
    for attempt in (["visual"], ["visual.blocks"], [model.visual]):
        alone = check(model, images(), modules=attempt)
        assert [layer.queries for layer in alone.layers] == [layer.queries for layer in report.layers]
        assert alone.warnings == ()


class Words(nn.Module):
    """Is given words before images, so that nothing shows where its text tower's tokens come from."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.visual = Attention(), vit()

    def forward(self, words: Tensor, images: Tensor) -> Tensor:
        return self.text(words).mean() + self.visual(images)


@pytest.mark.parametrize("words", [1, 2, 5, 7])
def test_of_a_model_that_is_given_words_before_images_the_image_tower_is_checked(words: int) -> None:
    model, given = Words(), torch.randn(words, 19, 32)
    report = check(model, images(), forward=lambda batch: model(given, batch))
    assert report.ok, report.problems
    assert [layer.name for layer in report.layers] == ["visual.blocks.0", "visual.blocks.1"]
    (warning,) = report.warnings
    assert "visual, which is checked, and text" in warning
    text = check(model, images(), forward=lambda batch: model(given, batch), modules=["text"])
    assert not text.ok
    assert all(layer.query_offset is None for layer in text.layers)


def test_of_two_image_encoders_the_first_is_checked_and_each_is_named() -> None:
    model = Pair(first=vit(), second=vit(3))
    report = check(model, images())
    assert report.ok
    assert [layer.name for layer in report.layers] == ["first.blocks.0", "first.blocks.1"]
    (warning,) = report.warnings
    assert "2 encoders ran: first, " in warning
    assert "second" in warning
    assert "modules=['first']" in warning
    assert f"warning: {warning}" in str(report).splitlines()
    other = check(model, images(), modules=["second"])
    assert [layer.index for layer in other.layers] == [0, 1, 2]
    assert other.warnings == ()
    assert [layer.index for layer in check(model, images(), layers=[-1]).layers] == [1]


def test_encoders_within_a_wrapper_are_named_by_their_whole_path() -> None:
    report = check(nn.Sequential(Pair(clip=Pair(student=vit(), teacher=vit()))), images())
    assert "modules=['0.clip.student']" in report.warnings[0]
    assert "0.clip.teacher" in report.warnings[0]


def test_an_encoder_that_runs_twice_is_no_other_encoder() -> None:
    class Twice(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x.flip(-1))

    report = check(Twice(Attention(), Attention()), images())
    assert report.ok
    assert len(report.layers) == 2
    (warning,) = report.warnings
    assert "ran 2 times" in warning
    assert 'keep="first"' in warning
    assert "modules=" not in warning


def test_runs_that_share_modules_are_told_without_a_path() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = vit(), vit()
            self.two.blocks[0] = self.one.blocks[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    report = check(Shared(), images())
    assert any("2 encoder runs" in warning and "modules=" in warning for warning in report.warnings), report.warnings


def test_a_text_tower_that_runs_after_the_images_is_named() -> None:
    report = check(Pair(visual=vit(), text=Text(7)), images())
    visual = [layer for layer in report.layers if layer.name.startswith("visual")]
    assert [layer.problem for layer in visual] == [None, None]
    if len(report.layers) > 2:  # captured with the images' run
        assert any("text" in problem and "modules=['visual']" in problem for problem in report.problems)
    alone = check(Pair(visual=vit(), text=Text(7)), images(), modules=["visual"])
    assert alone.ok
    assert alone.warnings == ()


def test_one_encoder_of_several_stages_is_one() -> None:
    import timm

    model = timm.create_model("pvt_v2_b0", num_classes=5, depths=(1, 1, 1, 1))
    assert check(model, torch.randn(2, 3, 64, 96)).warnings == ()
    half = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=32, num_heads=(2, 2), num_classes=5
    )
    report = check(half, torch.randn(2, 3, 56, 56))
    assert len(report.layers) == 2
    assert not any("modules=[" in text for text in report.warnings + report.problems)


class Channels(nn.Module):
    """Attention between channels: it ran, but no token attends to another."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + ((q.mT @ k).softmax(-1) @ v.mT).mT


def test_a_run_without_attention_between_tokens_does_not_hide_another() -> None:
    for towers in ({"first": Tokens(Channels()), "second": vit()}, {"first": vit(), "second": Tokens(Channels())}):
        model: Any = Pair(**towers)
        report = check(model, images())
        assert report.ok, report.problems
        assert len(report.layers) == 2
        assert any(name.startswith(("first", "second")) for name, _ in report.skipped)
        with capture_attention(model, keep="all") as attention:
            for _ in range(2):
                model(images())
                (maps,) = attention.take_all()
                assert len(maps) == 2
                assert [name.split(".")[-2:] for name, _ in attention.skipped if "blocks" in name] == [["blocks", "0"]]
    only = check(Pair(first=Tokens(Channels()), second=Tokens(Channels())), images())
    assert not only.ok
    assert only.layers == ()
