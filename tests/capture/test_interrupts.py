"""A KeyboardInterrupt at every line of the code that changes a model or a thread."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from acr_reg import AttentionCapture, capture_attention
from acr_reg._torch_private import function_modes
from acr_reg.capture.handle import alone
from acr_reg.capture.mode import AttentionMode
from acr_reg.capture.scores import inside_multi_head
from tests.support.capturing import hooks, modes
from tests.support.interrupts import each_interrupt, files_of
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder
from tests.support.models.plain import Calling

FILES = files_of("capture", "_torch_private.py")


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    gc.freeze()  # the collections below then look at what these tests made, not at all that the suite has loaded
    yield
    gc.unfreeze()


def tiny() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    blocks = nn.Sequential(ExplicitBlock(8, 2), MultiheadBlock(False, 8, 2))
    return PlainEncoder(blocks, width=8), torch.randn(2, 3, 32, 48)


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

    def scenario(_: object) -> None:
        with capture_attention(model) as attention:
            for _ in range(2):
                model(x)
                attention.take()

    for _, where in each_interrupt(lambda: None, scenario, FILES, step=23, holds=False):
        assert_restored(model, x, output, where)


CALLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "whole": lambda model, x: model(x),
    "blocks": lambda model, _: model.encoder(torch.randn(2, 25, 8)),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_a_forward_after_which_the_capture_goes_on(call: Callable[[nn.Module, Tensor], object]) -> None:
    model, x = tiny()
    output = model(x)
    with capture_attention(model) as attention:
        assert_captures(attention, model, x, output, "")
        for _, where in each_interrupt(attention.clear, lambda _: call(model, x), FILES, step=3):
            # An interrupt between two blocks, or after the last, cannot be told from a pause: the run waits for take().
            attention.clear()
            assert_captures(attention, model, x, output, where)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@every_call
def test_a_forward_after_which_the_capture_is_removed_or_dropped(
    call: Callable[[nn.Module, Tensor], object], warm: bool
) -> None:
    model, x = tiny()
    output = model(x)

    def begun() -> list[AttentionCapture]:
        attention = capture_attention(model)
        if warm:
            model(x), attention.take()
        return [attention]

    interrupts = each_interrupt(begun, lambda _: call(model, x), FILES, step=11, holds=False)
    for number, (held, where) in enumerate(interrupts):
        if number % 2:
            held[0].remove()
        held.clear()
        assert_restored(model, x, output, where)


@pytest.mark.parametrize("action", ["take", "clear", "remove"])
def test_a_take_a_clear_and_a_removal(action: str) -> None:
    model, x = tiny()
    output = model(x)

    def begun() -> AttentionCapture:
        attention = capture_attention(model)
        model(x)
        return attention

    interrupts = each_interrupt(begun, lambda held: getattr(held, action)(), FILES, step=7)
    for attention, where in interrupts:
        if action != "remove":
            attention.clear()
            assert_captures(attention, model, x, output, where)
        attention.remove()
        assert_restored(model, x, output, where)


def test_a_block_in_which_one_capture_alone_hears() -> None:
    model, x = tiny()
    output = model(x)
    with capture_attention(model) as other, capture_attention(model) as own:

        def scenario(_: object) -> None:
            with alone(own):
                model(x)

        scenario(None), own.take()
        assert_captures(other, model, x, output, "")
        own.clear()
        for _, where in each_interrupt(own.clear, scenario, FILES, step=7):
            own.clear()
            assert_captures(other, model, x, output, where)
    assert_restored(model, x, output, "")


def test_two_captures_of_which_either_is_dropped() -> None:
    model, x = tiny()
    output = model(x)

    def begun() -> list[AttentionCapture]:
        return [capture_attention(model), capture_attention(model)]

    for number, (held, where) in enumerate(each_interrupt(begun, lambda _: model(x), FILES, step=101, holds=False)):
        del held[number % 2]
        held[0].clear()
        assert_captures(held[0], model, x, output, where)
        held.clear()
        assert_restored(model, x, output, where)


# ---- what an interruption may leave behind, wherever it hit


class Other(TorchFunctionMode):
    """A mode of the user's own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def left_behind(model: nn.Module, x: Tensor, attention: AttentionCapture, copies: int = 1) -> AttentionMode:
    """The mode of an interrupted forward, as it is where an interruption skipped all that takes it off."""
    found: list[AttentionMode] = []

    def stop() -> None:
        state = attention._recorder.states.here()  # type: ignore[union-attr]
        found.append(state.mode)
        raise KeyboardInterrupt

    model.encoder[0].drop.call = stop
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.encoder[0].drop.call = None
    for _ in range(copies):
        found[0].__enter__()
    return found[0]


@pytest.mark.parametrize("above", [0, 2], ids=["alone", "below other modes"])
@pytest.mark.parametrize("copies", [1, 3])
def test_an_old_mode_reports_to_nobody_and_is_off_with_the_next_forward(copies: int, above: int) -> None:
    model, x = tiny()
    model.encoder[0].drop = Calling()
    output = model(x)
    with capture_attention(model) as attention:
        model(x), attention.take()
        left_behind(model, x, attention, copies)
        others = [Other() for _ in range(above)]
        for mode in others:
            mode.__enter__()
        assert modes() >= copies + above
        for _ in range(2):
            assert torch.equal(model(x), output)
            assert [layer.name for layer in attention.take()] == ["encoder.0", "encoder.1.attention"]
            assert modes() == above
        for mode in reversed(others):
            mode.__exit__(None, None, None)
    assert modes() == 0


def test_a_mode_on_another_threads_stack_follows_nothing_once_the_capture_is_removed() -> None:
    model, x = tiny()
    model.encoder[0].drop = middle = Calling()
    found: list[AttentionMode] = []
    reached, removed = threading.Event(), threading.Event()

    def wait() -> None:
        found.extend(mode for mode in function_modes() if isinstance(mode, AttentionMode))
        reached.set()
        assert removed.wait(20)

    attention = capture_attention(model)
    middle.call = wait
    worker = threading.Thread(target=model, args=(x,))
    worker.start()
    assert reached.wait(20)
    attention.remove()
    removed.set()
    worker.join()
    assert len(found) == 1
    assert not found[0]._scores.followed


def test_an_interruption_within_multi_head_attention_is_forgotten_with_the_next_forward() -> None:
    model, x = tiny()
    with capture_attention(model) as attention:
        model(x), attention.take()
        inside_multi_head.heads, inside_multi_head.cross = 7, True  # as where its finally block was interrupted
        model(x)
        maps = attention.take()
        assert [layer.shape[1] for layer in maps] == [2, 2]
        assert (inside_multi_head.heads, inside_multi_head.cross) == (None, False)


@pytest.mark.parametrize("worker", [False, True], ids=["here", "on another thread"])
def test_a_capture_dropped_after_an_interruption_is_freed_though_frames_hold_it(worker: bool) -> None:
    model, x = tiny()
    model.encoder[0].drop = Calling()
    freed: list[Callable[[], object]] = []

    def step() -> None:
        attention = capture_attention(model)  # a local of a frame below the interrupted forward
        freed.append(weakref.ref(attention._recorder))
        left_behind(model, x, attention)

    if worker:
        thread = threading.Thread(target=step)
        thread.start(), thread.join()
    else:
        step()
    gc.collect()
    assert freed[0]() is None
    assert hooks(model) == 0
    assert modes() == 0
