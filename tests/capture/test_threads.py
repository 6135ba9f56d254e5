"""Capture in several threads at once: models that learn side by side, runs within runs."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from acr_reg import AllPairsConsistencyLoss, CaptureError, HorizontalFlip, capture_attention
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
