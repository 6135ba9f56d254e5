"""Runs of an encoder: what makes one, which are kept, and when they are freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from acr_reg import CaptureError, HorizontalFlip, capture_attention
from tests.support.capturing import images, modes, recorded
from tests.support.models import ExplicitBlock, PlainEncoder, explicit_vit, multihead_vit
from tests.support.models.plain import Calling, Crops, every_block


def test_any_entry_point() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=5, depth=3)
    with capture_attention(model) as attention:
        for _ in range(2):
            model.forward_features(images())
            assert len(attention.take()) == 3
            model(images())
            assert len(attention.take()) == 3
    wrapper = nn.Sequential(model)
    with capture_attention(wrapper) as attention:
        model(images())
        assert len(attention.take()) == 3


def test_a_forward_on_both_views_at_once_chunks() -> None:
    model, view, x = explicit_vit(), HorizontalFlip(), images()
    with capture_attention(model) as attention:
        model(torch.cat([x, view(x)]))
        both = attention.take()
        model(x)
        alone = attention.take()
    a, b = both.chunk(2)
    assert a.batch_size == b.batch_size == 2
    torch.testing.assert_close(a[1].weights(), alone[1].weights())
    quarters = [part.weights()[0] for half in (a, b) for part in half.chunk(2)]
    assert torch.equal(torch.cat(quarters), both.weights()[0])
    with pytest.raises(ValueError, match=r"batch of 4\b.*\b3\b"):
        both.chunk(3)


def test_several_encoder_passes_in_one_call_are_several_runs() -> None:
    model = Crops(explicit_vit())
    with capture_attention(model, keep="first") as attention:
        for _ in range(2):
            model(images(1), images(6))
            assert attention.take().batch_size == 1


def test_a_block_registered_twice_runs_twice_in_one_run() -> None:
    shared = ExplicitBlock()
    model = PlainEncoder(nn.Sequential(shared, ExplicitBlock(), shared))
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            assert len(attention.take()) == 3


# ---- which runs are kept


def test_only_one_untaken_run_is_allowed_and_its_tensors_are_released() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        with capture_attention(model) as spy:
            model(images(2))
            first = weakref.ref(recorded(spy.take()))
        model(images(3))
        gc.collect()
        assert first() is None
        with pytest.raises(CaptureError, match=r"\b2 encoder runs.*\(2, 4, 25, 25\).*\(3, 4, 25, 25\)"):
            attention.take()
        model(images(1))
        assert attention.take().batch_size == 1
        with pytest.raises(CaptureError, match="ran since the last take"):
            attention.take()
        model(images(2))
        attention.clear()
        model(images(1))
        assert attention.take().batch_size == 1


@pytest.mark.parametrize(("keep", "expected"), [("first", 1), ("last", 3)])
def test_first_and_last_run(keep: str, expected: int) -> None:
    model = multihead_vit()
    with capture_attention(model, keep=keep) as attention:
        for _ in range(2):
            maps = []
            with capture_attention(model) as spy:
                for batch in (1, 2, 3):
                    model(images(batch))
                    maps.append(weakref.ref(recorded(spy.take())))
            kept = [batch for batch, each in enumerate(maps, 1) if each() is not None]
            assert kept == [expected], "the other runs' tensors are released"
            assert attention.take().batch_size == expected


def test_all_runs() -> None:
    model = multihead_vit()
    with capture_attention(model, keep="all") as attention:
        for batch in (1, 2, 3):
            model(images(batch))
        assert [maps.batch_size for maps in attention.take_all()] == [1, 2, 3]
        for batch in (1, 2, 3):
            model(images(batch))
        with pytest.raises(CaptureError, match=r"\b3 encoder runs.*take\(0\).*take\(2\)"):
            attention.take()
        model(images(4)), model(images(5))
        assert attention.take(1).batch_size == 5
        model(images(4))
        assert attention.take().batch_size == 4


def test_runs_that_nobody_takes_do_not_pile_up() -> None:
    model = explicit_vit(1)
    for keep in ("only", "last", "first"):
        with capture_attention(model, keep=keep) as attention:
            for _ in range(20):
                model(images(1))
            assert len(attention._recorder.log.runs) <= 8
            if keep == "only":
                with pytest.raises(CaptureError, match=r"8 or more encoder runs.*clear\(\) those of validation"):
                    attention.take()
            else:
                assert len(attention.take()) == 1


@pytest.mark.usefixtures("no_collector")
@every_block
@pytest.mark.parametrize("keep", ["only", "last"])
def test_a_pass_nobody_takes_is_freed_once_the_next_reaches_its_attention(
    block: Callable[[], nn.Module], keep: Any
) -> None:
    middle = Calling()
    model = PlainEncoder(nn.Sequential(block(), middle, block()))
    alive: list[bool] = []
    with capture_attention(model, keep=keep), capture_attention(model) as spy:
        model(images())
        probe = weakref.ref(recorded(spy.take(), 1))
        for _ in range(3):
            assert probe() is not None, "until then it can be taken"
            middle.call = lambda: alive.append(probe() is not None)  # noqa: B023  # called within this iteration
            model(images())
            probe = weakref.ref(recorded(spy.take(), 1))
    assert alive == [False] * 3
    assert probe() is None, "and the last one with the capture"


@pytest.mark.usefixtures("no_collector")
def test_with_keep_first_later_passes_are_freed_at_once() -> None:
    model = multihead_vit()
    with capture_attention(model, keep="first") as attention, capture_attention(model) as spy:
        model(images(1))
        first = weakref.ref(recorded(spy.take()))
        for _ in range(2):
            model(images(3))
            later = weakref.ref(recorded(spy.take()))
            assert later() is None
            assert first() is not None
        assert attention.take().batch_size == 1
        assert first() is None


def test_maps_are_freed_with_the_last_reference() -> None:
    model = multihead_vit()
    with capture_attention(model) as attention:
        model(images())
        maps = attention.take()
        probe = weakref.ref(maps[0].recorded.query)
        maps = None
        gc.collect()
        assert probe() is None


# ---- runs without gradient


def test_runs_under_no_grad_are_recorded_only_when_asked() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention, torch.no_grad():
        model(images())
        assert modes() == 0
        with pytest.raises(CaptureError, match=r"ran under torch.no_grad: capture with no_grad=True"):
            attention.take()
    with capture_attention(model, no_grad=True) as attention, torch.no_grad():
        model(images())
        assert not attention.take()[0].requires_grad


def test_no_grad_passes_between_steps_do_not_disturb() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        for _ in range(3):
            with torch.no_grad():
                model(images(3)), model(images(5))
            model(images(2))
            assert attention.take().batch_size == 2


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradient_is_neither_recorded_nor_paid_for(without: Callable[[], Any]) -> None:
    model, depths = explicit_vit(1), []
    model.encoder[0].drop = inside = Calling()
    inside.call = lambda: depths.append(modes())
    with capture_attention(model, keep="all") as attention:
        for _ in range(2):
            with without():
                before = len(gc.get_objects())
                model(images(3))
                assert len(gc.get_objects()) <= before + 3, "it left something behind"
            model(images(2))
            assert [maps.batch_size for maps in attention.take_all()] == [2]
    with capture_attention(model, no_grad=True) as attention, without():
        model(images())
        assert len(attention.take()) == 1
    assert depths == [0, 1, 0, 1, 1], "the mode is entered only where something is recorded"
