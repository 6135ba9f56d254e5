"""A KeyboardInterrupt at every line of the code that changes a model or a thread."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import acr_reg.capture
from acr_reg import AttentionCapture, capture_attention
from acr_reg.capture.handle import alone
from tests.support.capturing import hooks, modes
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder

ROOM = Path(acr_reg.capture.__file__).parent
FILES = {str(ROOM / f"{name}.py") for name in ("hooks", "stacks", "recorder", "runs", "handle")}
Line = tuple[str, int]


def is_final(frame: FrameType) -> bool:
    """Whether a finalizer that a lost reference started runs this frame."""
    above = frame.f_back
    if above is None or above.f_code is not weakref.finalize.__call__.__code__:
        return False
    return above.f_locals["_"] is not None  # the reference; None where code calls a finalizer itself


@contextmanager
def at_each_line(act: Callable[[Line], None]) -> Iterator[None]:
    """Calls ``act`` before each line of ``FILES`` that this thread reaches, but for those of finalizers: Python itself
    swallows what is raised in them."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            act((frame.f_code.co_filename, frame.f_lineno))
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename in FILES and not is_final(frame) else None)
    try:
        yield
    finally:
        sys.settrace(before)


def moments(scenario: Callable[[], object], last: bool = True) -> list[int]:
    """When to interrupt, in lines: where each line is reached for the first time, and for the ``last``."""
    reached: list[Line] = []
    with at_each_line(reached.append):
        scenario()
    first_times = {line: i for i, line in reversed(list(enumerate(reached)))}
    last_times = {line: i for i, line in enumerate(reached)} if last else {}
    return sorted({*first_times.values(), *last_times.values()})


def interrupted(moment: int, scenario: Callable[[], None]) -> str:
    """Runs the scenario with an interrupt at this moment, and returns the line."""
    count, where = 0, ""

    def stop(line: Line) -> None:
        nonlocal count, where
        count += 1
        if count == moment + 1:
            where = f"{Path(line[0]).name}:{line[1]}"
            raise KeyboardInterrupt

    with at_each_line(stop), pytest.raises(KeyboardInterrupt):
        scenario()
    return where


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    gc.freeze()  # the collections below then look at what these tests made, not at all that the suite has loaded
    yield
    gc.unfreeze()


def tiny() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return PlainEncoder(nn.Sequential(ExplicitBlock(8, 2), MultiheadBlock(False, 8, 2)), width=8), torch.randn(
        2, 3, 32, 48
    )


def assert_restored(model: nn.Module, x: Tensor, output: Tensor, where: str) -> None:
    gc.collect()
    assert modes() == 0, where
    assert hooks(model) == 0, where
    assert torch.equal(model(x), output), where


def assert_captures(attention: Any, model: nn.Module, x: Tensor, output: Tensor, where: str) -> None:
    for _ in range(2):
        assert torch.equal(model(x), output), where
        maps = attention.take()
        assert [layer.name for layer in maps] == ["encoder.0", "encoder.1.attention"], where
        assert all(layer.placed is not None for layer in maps), where
        assert modes() == 0, where


def test_a_capture_from_its_beginning_to_its_end() -> None:
    model, x = tiny()
    output = model(x)

    def scenario() -> None:
        with capture_attention(model) as attention:
            for _ in range(2):
                model(x)
                attention.take()

    every = moments(scenario, last=False)
    assert len(every) > 250
    for moment in every:
        where = interrupted(moment, scenario)
        assert_restored(model, x, output, where)
    with capture_attention(model) as attention:
        assert_captures(attention, model, x, output, "")


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("call", ["whole", "blocks"])
def test_a_forward_after_which_the_capture_goes_on_or_is_removed_or_dropped(call: str, warm: bool) -> None:
    model, x = tiny()
    output, tokens = model(x), torch.randn(2, 25, 8)

    def begun() -> AttentionCapture:
        attention = capture_attention(model)
        if warm:
            model(x), attention.take()
        return attention

    def forward() -> None:
        if call == "whole":
            model(x)
        else:
            model.encoder(tokens)

    attention = begun()
    every = moments(forward)
    assert len(every) > 100
    del attention
    for moment in every[::2]:
        attention = begun()
        where = interrupted(moment, forward)
        if moment % 3 == 0:
            if call == "blocks":  # an interrupt between two of them cannot be told from a pause
                attention.clear()
            assert_captures(attention, model, x, output, where)
        if moment % 3 < 2:
            attention.remove()
        del attention
        assert_restored(model, x, output, where)


@pytest.mark.parametrize("action", ["take", "clear", "remove"])
def test_a_take_a_clear_and_a_removal(action: str) -> None:
    model, x = tiny()
    output = model(x)

    def begun() -> Callable[[], object]:
        attention = capture_attention(model)
        model(x)
        return getattr(attention, action)

    every = moments(begun())
    assert len(every) > 10
    for moment in every:
        act = begun()
        attention = act.__self__
        where = interrupted(moment, act)
        if action != "remove":
            attention.clear()
            assert_captures(attention, model, x, output, where)
        attention.remove()
        del act, attention
        assert_restored(model, x, output, where)


def test_a_block_in_which_one_capture_alone_hears() -> None:
    model, x = tiny()
    output = model(x)
    with capture_attention(model) as other, capture_attention(model) as own:

        def scenario() -> None:
            with alone(own):
                model(x)

        scenario(), own.take()
        assert_captures(other, model, x, output, "")
        own.clear()
        every = moments(scenario, last=False)
        assert len(every) > 100
        for moment in every:
            where = interrupted(moment, scenario)
            own.clear()
            assert_captures(other, model, x, output, where)
            own.clear()
    assert_restored(model, x, output, "")


def test_two_captures_of_which_either_is_dropped() -> None:
    model, x = tiny()
    output = model(x)
    captures = [capture_attention(model), capture_attention(model)]
    every = moments(lambda: model(x), last=False)[::3]  # the last times are interrupted above
    captures.clear()
    for moment in every:
        captures = [capture_attention(model), capture_attention(model)]
        where = interrupted(moment, lambda: model(x))
        del captures[moment % 2]
        captures[0].clear()
        assert_captures(captures[0], model, x, output, where)
        captures.clear()
        assert_restored(model, x, output, where)
