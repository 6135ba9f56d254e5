"""Capture in several threads at once: models that learn side by side, runs within runs."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from acr_reg import AllPairsConsistencyLoss, CaptureError, HorizontalFlip, capture_attention
from acr_reg.capture.stacks import stack_of
from tests.support.capturing import images
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder, explicit_vit
from tests.support.models.plain import BUILDERS, Calling

view = HorizontalFlip()


def train(model: nn.Module, attention: Any, batches: list[Tensor]) -> None:
    optimizer, acr = torch.optim.SGD(model.parameters(), lr=0.1), AllPairsConsistencyLoss(view)
    for x in batches:
        logits = model(torch.cat([x, view(x)]))
        loss = logits.square().mean() + acr(*attention.take().chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run_together(*targets: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def assert_same_parameters(model: nn.Module, expected: nn.Module) -> None:
    for (name, found), parameter in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, parameter), name


def test_two_threads_train_two_models_at_once() -> None:
    barrier = threading.Barrier(2)
    models = [explicit_vit(2), PlainEncoder(nn.Sequential(ExplicitBlock(), MultiheadBlock(False), ExplicitBlock()))]
    expected = copy.deepcopy(models)
    batches = [images(2) for _ in range(4)]
    for model, place in itertools.product(models, (0, -1)):
        model.encoder[place].drop = meeting = Calling()  # both are then between a softmax and its values
        meeting.call = lambda: barrier.wait(20)
    with capture_attention(models[0]) as first, capture_attention(models[1]) as second:
        run_together(
            lambda: train(models[0], first, batches),
            lambda: train(models[1], second, batches[::-1]),
        )
    for model, parts in zip(expected, (batches, batches[::-1]), strict=True):
        with capture_attention(model) as attention:
            train(model, attention, parts)
    for model, reference in zip(models, expected, strict=True):
        assert_same_parameters(model, reference)


@pytest.mark.parametrize("kind", BUILDERS)
def test_two_threads_train_one_model_by_turns(kind: str) -> None:
    model, batches = BUILDERS[kind](2), [images(2) for _ in range(6)]
    expected = copy.deepcopy(model)
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def every_other(number: int) -> None:
        for batch in batches[number::2]:
            assert turns[number].acquire(timeout=20)
            try:
                train(model, attention, [batch])
            finally:
                turns[1 - number].release()

    with capture_attention(model) as attention:
        run_together(lambda: every_other(0), lambda: every_other(1))
    with capture_attention(expected) as attention:
        train(expected, attention, batches)
    assert_same_parameters(model, expected)


def test_a_forward_within_another_threads_forward_of_the_same_model_is_a_run_of_its_own() -> None:
    model, x = explicit_vit(2), images(1)
    reached, resumed = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            if len(tokens) == 1:
                reached.set()
                assert resumed.wait(20)
            return tokens

    model.encoder[1].drop = Waiting()
    with capture_attention(model, keep="all") as attention:
        worker = threading.Thread(target=model, args=(x,))
        worker.start()
        assert reached.wait(20)
        model(images(3))
        resumed.set()
        worker.join()
        runs = attention.take_all()
        assert [[layer.shape[0] for layer in maps] for maps in runs] == [[1, 1], [3, 3]]
        model(x)
        for found, expected in zip(runs[0], attention.take(), strict=True):
            assert torch.equal(found.weights(), expected.weights())


def test_two_threads_within_multihead_attention_do_not_mistake_each_others_calls() -> None:
    class Met(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                barrier.wait(20)
            return func(*args, **(kwargs or {}))

    def run(module: nn.Module, context: Tensor) -> None:
        with Met():
            module(tokens, context, context, need_weights=False)

    barrier = threading.Barrier(2)
    tokens, others = torch.randn(2, 2, 25, 32)
    own, cross = (nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))
    with capture_attention(own) as first, capture_attention(cross) as second:
        for _ in range(2):
            run_together(lambda: run(own, tokens), lambda: run(cross, others))
            assert first.take()[0].shape == (2, 4, 25, 25)
            with pytest.raises(CaptureError, match="cross-attention"):
                second.take()


def test_worker_threads_are_captured() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        model(images())
        attention.take()
        worker = threading.Thread(target=model, args=(images(3),))
        worker.start()
        worker.join()
        assert attention.take().batch_size == 3


# ---- one capture, several threads: whose run is it?


def parts(model: nn.Module, x: Tensor) -> None:
    """A forward of the model's parts one by one, which is no call of the model."""
    patches = model.proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], 1) + model.pos_embed
    for block in model.encoder:
        tokens = block(tokens)


def small_vit() -> nn.Module:
    return PlainEncoder(nn.Sequential(ExplicitBlock(8, 2), MultiheadBlock(False, 8, 2)), width=8)


@contextlib.contextmanager
def living(*targets: Callable[[], None]) -> Iterator[None]:
    """Threads that have done this live on until the end of the block."""
    done, over = threading.Barrier(len(targets) + 1), threading.Event()

    def act(target: Callable[[], None]) -> None:
        target()
        done.wait(20)
        assert over.wait(20)

    threads = [threading.Thread(target=act, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    done.wait(20)
    yield
    over.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("keep", ["only", "first", "last", "all"])
@pytest.mark.parametrize("forward", [nn.Module.__call__, parts], ids=["whole", "parts"])
def test_each_thread_takes_the_maps_of_its_own_images(forward: Callable[..., Any], keep: Any) -> None:
    model, batches = small_vit(), [images(size) for size in (1, 2, 3, 4)]
    expected = []
    for x in batches:
        with capture_attention(model) as attention:
            model(x)
            expected.append(attention.take())
    before_take, after_take = threading.Barrier(4), threading.Barrier(4)

    def work(number: int) -> None:
        for step in range(3):
            forward(model, batches[number])
            if step != 1:  # once by turns, and once however the threads run
                before_take.wait(20)
            maps = attention.take()
            if step != 1:
                after_take.wait(20)
            assert [layer.name for layer in maps] == [layer.name for layer in expected[number]]
            assert maps.run in (0, None)
            for found, wanted in zip(maps, expected[number], strict=True):
                assert torch.equal(found.weights(), wanted.weights())

    with capture_attention(model, num_prefix_tokens=1, keep=keep) as attention:
        run_together(*(lambda number=number: work(number) for number in range(4)))
        assert attention._recorder.log.runs == []


def test_a_run_of_a_living_thread_that_never_takes_is_for_one_that_ran_nothing() -> None:
    model = small_vit()
    with capture_attention(model) as attention:
        for size in (2, 3):
            with living(lambda: model(images(size))):  # noqa: B023  # it has run by the end of the block
                assert attention.take().batch_size == size
        with living(lambda: model(images(3))):
            model(images(2))
            assert attention.take().batch_size == 2
            assert attention.take().batch_size == 3
        with living(lambda: model(images(3))):
            model(images(2))
            attention.clear()
            assert attention.take().batch_size == 3


def test_a_run_of_a_thread_that_takes_is_for_no_other() -> None:
    model = small_vit()

    def runs_again() -> None:
        model(images(4))
        assert attention.take().batch_size == 4
        model(images(3))

    with capture_attention(model) as attention:
        with living(runs_again):
            with pytest.raises(CaptureError, match="Only other threads ran PlainEncoder"):
                attention.take()
            attention.clear()
            assert len(attention._recorder.log.runs) == 1
            model(images(2))
            assert attention.take().batch_size == 2
        model(images(2))  # the thread has ended and left its run
        assert attention.take().batch_size == 2
        assert attention._recorder.log.runs == []


def test_runs_of_ended_threads_and_of_this_one_are_too_many_for_one_take() -> None:
    model = small_vit()
    with capture_attention(model) as attention:
        for last in (2, 3):
            run_together(lambda: model(images(3)))
            model(images(2))
            with pytest.raises(CaptureError, match="2 encoder runs wait"):
                attention.take()
            model(images(last))
            assert attention.take().batch_size == last


def test_a_living_thread_between_two_blocks_has_not_finished_its_run() -> None:
    model, first, resumed = explicit_vit(2), threading.Event(), threading.Event()

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = model

        def features(self, tokens: Tensor) -> None:
            tokens = self.vit.encoder[0](tokens)
            first.set()
            assert resumed.wait(20)
            self.vit.encoder[1](tokens)

    backbone = Backbone()
    with capture_attention(backbone, num_prefix_tokens=1) as attention:
        worker = threading.Thread(target=backbone.features, args=(torch.randn(2, 25, 32),))
        worker.start()
        assert first.wait(20)
        with pytest.raises(CaptureError, match="Another thread is inside the forward of Backbone"):
            attention.take()
        resumed.set()
        worker.join()
        assert len(attention.take()) == 2


def test_a_first_take_while_another_thread_begins_a_forward_cuts_no_layer_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, middle, entered, resumed = explicit_vit(2), Calling(), threading.Event(), threading.Event()
    model.encoder[0].drop = nn.Sequential(middle)

    def wait() -> None:
        if threading.current_thread() is worker:
            entered.set()
            assert resumed.wait(20)

    def run_and_take() -> None:
        model(images(3))
        taken.append(attention.take())

    taken: list[Any] = []
    worker = threading.Thread(target=run_and_take)
    middle.call = wait
    with capture_attention(model) as attention:
        # As if the other thread had begun just after the look: then this thread removes hooks that it is within.
        monkeypatch.setattr("acr_reg.capture.stacks.RunningForwards.is_elsewhere", lambda _: False)
        model(images(2))
        worker.start()
        assert entered.wait(20)
        assert attention.take().batch_size == 2
        assert not middle._forward_hooks
        resumed.set()
        worker.join()
        assert [(maps.batch_size, len(maps)) for maps in taken] == [(3, 2)]


def test_hooks_that_another_thread_is_removing_are_passed_over() -> None:
    model = small_vit()
    with capture_attention(model) as attention:
        model._forward_pre_hooks_with_kwargs.clear()  # torch then passes no kwargs
        model(images(2))
        assert len(attention.take()) == 2


def test_a_thread_with_the_number_of_an_interrupted_one_is_captured() -> None:
    model, numbers = small_vit(), []

    def interrupted() -> None:
        numbers.append(threading.get_ident())
        model.encoder[0].drop.call = stop
        with pytest.raises(KeyboardInterrupt):
            model(images(3))
        model.encoder[0].drop.call = None

    def stop() -> None:
        raise KeyboardInterrupt

    def takes() -> None:
        numbers.append(threading.get_ident())
        model(images(2))
        assert attention.take().batch_size == 2

    model.encoder[0].drop = Calling()
    with capture_attention(model) as attention:
        model(images(2)), attention.take()
        run_together(interrupted)
        for _ in range(20):
            run_together(takes)
            if numbers[-1] == numbers[0]:
                break
        else:
            pytest.skip("the system gave no number twice")


def test_what_was_skipped_is_told_to_the_thread_that_took_it() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)])
    tokens, others = torch.randn(2, 2, 12, 8)

    def crosses() -> None:
        model[0](tokens, tokens, tokens)
        model[1](tokens, others[:, :5], others[:, :5])
        assert len(attention.take()) == 1
        taken.wait(20)
        resumed.wait(20)
        assert [name for name, _ in attention.skipped] == ["1"]

    def attends() -> None:
        taken.wait(20)
        model[0](tokens, tokens, tokens)
        attention.take()
        assert attention.skipped == ()
        resumed.wait(20)

    taken, resumed = threading.Barrier(2), threading.Barrier(2)
    with capture_attention(model, num_prefix_tokens=0) as attention:
        run_together(crosses, attends)


def test_no_garbage_collection_begins_while_the_frames_of_threads_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for a lock that sys._current_frames holds, for ever: a test of the suite once did."""
    seen: list[bool] = []
    monkeypatch.setattr(sys, "_current_frames", lambda: seen.append(gc.isenabled()) or {})
    assert list(stack_of(-1)) == []
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        assert list(stack_of(-1)) == []
        assert not gc.isenabled()  # as the caller left it
    finally:
        gc.enable()
