"""Captures at odd moments: begun, taken, cleared or removed inside a forward, or while other code is in the middle of
one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acr_reg import AttentionCapture, AttentionMaps, CaptureError, GradientCam, capture_attention, check
from tests.support.attention import says
from tests.support.capturing import cold_and_warm, hooks, images, is_captured_right, modes, plain_pass
from tests.support.models import ExplicitBlock, PlainEncoder, explicit_vit, multihead_vit
from tests.support.models.plain import Calling, Crops, calling_vit

# ---- inside a forward of the same thread


def refusing(action: Callable[[], object], found: list[pytest.ExceptionInfo[CaptureError]]) -> Callable[[], None]:
    def act() -> None:
        with pytest.raises(CaptureError, match="inside the forward of PlainEncoder") as error:
            action()
        found.append(error)

    return act


def checked(model: nn.Module) -> None:
    raise CaptureError(check(model, images()).problems[0])


@pytest.mark.parametrize("begin", [capture_attention, checked, lambda m: GradientCam(m)(images())])
def test_a_capture_begun_inside_a_forward_is_refused(begin: Callable[[nn.Module], object]) -> None:
    model, middle = calling_vit()
    found: list[Any] = []
    middle.call = refusing(lambda: begin(model), found)
    for run in (lambda: model(images()), lambda: nn.Sequential(model)(images())):
        run()
        assert hooks(model) == 0
        assert modes() == 0
    assert len(found) == 2
    assert says(found[0], "begun", "would miss layers", "modules=")


def test_a_second_capture_begun_inside_a_forward_leaves_the_first_as_it_is() -> None:
    model, middle = calling_vit()
    output, maps = plain_pass(model, x := images())
    found: list[Any] = []
    with capture_attention(model) as attention:
        middle.call = refusing(lambda: capture_attention(model), found)
        is_captured_right(model, attention, x, output, maps)
    assert len(found) == 2


def test_parts_that_are_not_running_can_be_captured_inside_a_forward() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.sizes = explicit_vit(), []

        def forward(self, x: Tensor) -> Tensor:
            for part in ({"model": self.vit}, {"model": self, "modules": ["vit"]}, {"model": self.vit.encoder}):
                with capture_attention(**part) as attention:
                    logits = self.vit(x)
                    self.sizes.append(attention.take().batch_size)
            return logits

    model = Wrapped()
    model(images(2))
    assert model.sizes == [2, 2, 2]


@pytest.mark.parametrize("action", ["take", "clear", "take_all"])
@cold_and_warm
def test_what_is_asked_for_inside_a_forward_is_refused_and_nothing_is_lost(action: str, warm: bool) -> None:
    model, middle = calling_vit()
    output, maps = plain_pass(model, x := images())
    found: list[Any] = []
    with capture_attention(model, keep="all" if action == "take_all" else "only") as attention:
        if warm:
            model(x)
            attention.take()
        middle.call = refusing(getattr(attention, action), found)
        is_captured_right(model, attention, x, output, maps)
        assert len(found) == 2
        assert says(found[0], f"{action}()", "modules=")
        middle.call = None
        is_captured_right(model, attention, x, output, maps)


@cold_and_warm
@pytest.mark.parametrize("call", ["whole", "encoder"])
def test_a_hook_of_the_last_block_comes_too_early_and_one_of_the_captured_module_does_not(
    call: str, warm: bool
) -> None:
    model, x = multihead_vit(), images()
    run = (lambda: model(x)) if call == "whole" else lambda: model.encoder(torch.randn(2, 25, 32))
    outer = model if call == "whole" else model.encoder
    taken: list[AttentionMaps] = []
    refused: list[str] = []
    with capture_attention(outer) as attention:
        if warm:
            run()
            attention.take()

        def early(*_: object) -> None:
            with pytest.raises(CaptureError, match="inside the forward") as error:
                attention.take()
            refused.append(str(error.value))

        model.encoder[-1].register_forward_hook(early)
        outer.register_forward_hook(lambda *_: taken.append(attention.take()))
        run(), run()
    assert [len(maps) for maps in taken] == [2, 2]
    assert all(type(outer).__name__ in message for message in refused)
    assert len(refused) == 2


def test_a_part_that_ended_is_taken_inside_the_forward_of_the_whole() -> None:
    class Losing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.attention, self.taken = explicit_vit(), [], []

        def forward(self, x: Tensor) -> Tensor:
            logits = self.vit(x)
            self.taken += [attention.take() for attention in self.attention]
            return logits.sum()

    model = Losing()
    with capture_attention(model.vit) as one, capture_attention(model, modules=["vit"]) as two:
        model.attention = [one, two]
        model(images()), model(images(3))
        assert [(maps.batch_size, len(maps)) for maps in model.taken] == [(2, 2), (2, 2), (3, 2), (3, 2)]


@cold_and_warm
@pytest.mark.parametrize("depth", [0, 1], ids=["middle", "inside attention"])
def test_remove_inside_a_forward_leaves_nothing_and_others_hear_on(depth: int, warm: bool) -> None:
    model, middle = calling_vit()
    if depth:
        model.encoder[0].drop = middle = Calling()
    output, maps = plain_pass(model, x := images())
    with capture_attention(model) as other:
        attention = capture_attention(model)
        if warm:
            model(x), attention.take(), other.take()
        middle.call = attention.remove
        is_captured_right(model, other, x, output, maps)
    assert hooks(model) == 0


# ---- inside a forward of another thread


@contextlib.contextmanager
def in_the_middle_of(model: nn.Module, middle: Calling, x: Tensor) -> Iterator[list[Tensor]]:
    """Another thread is in the middle of the model's forward; it goes on at the end of the block."""
    entered, resumed = threading.Event(), threading.Event()
    results: list[Tensor] = []

    def run() -> None:
        results.append(model(x))

    worker = threading.Thread(target=run)

    def wait() -> None:
        if threading.current_thread() is worker:
            entered.set()
            assert resumed.wait(20)

    middle.call = wait
    worker.start()
    assert entered.wait(20)
    try:
        yield results
    finally:
        resumed.set()
        worker.join()
        middle.call = None


@cold_and_warm
def test_a_capture_begun_while_another_thread_is_in_a_forward_does_not_record_the_rest_of_it(warm: bool) -> None:
    model, middle = calling_vit()
    output, maps = plain_pass(model, x := images())
    with in_the_middle_of(model, middle, images(3)):
        attention = capture_attention(model, keep="all")
        if warm:
            is_captured_right(model, attention, x, output, maps)
    with pytest.raises(CaptureError, match="since the last take" if warm else "No token-to-token attention"):
        attention.take()
    is_captured_right(model, attention, x, output, maps)
    worker = threading.Thread(target=model, args=(images(3),))
    worker.start(), worker.join()
    assert attention.take().batch_size == 3
    attention.remove()


@pytest.mark.parametrize("keep", ["only", "first", "last", "all"])
@cold_and_warm
def test_a_take_or_clear_while_another_thread_is_in_a_forward_does_not_cut_it(keep: Any, warm: bool) -> None:
    model, middle = calling_vit()
    with capture_attention(model, keep=keep) as attention:
        if warm:
            model(images()), attention.take()
        with in_the_middle_of(model, middle, images(3)):
            attention.clear()
            if keep == "all":
                model(images(2))
                assert attention.take().batch_size == 2
            else:
                with pytest.raises(CaptureError, match="Another thread is inside the forward of PlainEncoder"):
                    attention.take()
        maps = attention.take()
        assert (maps.batch_size, len(maps)) == (3, 2)
        model(images(2))
        assert attention.take().batch_size == 2


@pytest.mark.parametrize("end", ["remove", "drop"])
def test_an_end_while_another_thread_is_in_a_forward_keeps_nothing_of_it(end: str) -> None:
    model, middle = calling_vit()
    expected, maps = plain_pass(model, x := images(3))
    attention = capture_attention(model)
    freed = []

    class Then(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = model(x)
            later = (expected @ expected.mT).softmax(-1)[None] @ expected
            freed.append(weakref.ref(later))
            return logits

    with in_the_middle_of(Then(), middle, x) as results:
        recorder = weakref.ref(attention)
        if end == "remove":
            attention.remove()
        del attention
        assert recorder() is None
    assert torch.equal(results[0], expected)
    assert freed[0]() is None
    assert hooks(model) == 0
    with capture_attention(model) as attention:
        is_captured_right(model, attention, x, expected, maps)


# ---- by turns on one thread


def by_pieces(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """A forward in pieces, suspended after each module that it runs."""
    tokens = model.proj(x).flatten(2).transpose(1, 2)
    yield tokens
    tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], 1) + model.pos_embed
    for block in model.encoder:
        tokens = block(tokens)
        yield tokens
    yield model.head(tokens[:, 0])


def nested_pieces(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The same, by a generator for each stage."""

    def stage(tokens: Tensor, blocks: Any) -> Iterator[Tensor]:
        for block in blocks:
            tokens = block(tokens)
            yield tokens
        return tokens

    tokens = model.proj(x).flatten(2).transpose(1, 2)
    yield tokens
    tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], 1) + model.pos_embed
    tokens = yield from stage(tokens, model.encoder[:1])
    tokens = yield from stage(tokens, model.encoder[1:])
    yield model.head(tokens[:, 0])


async def in_a_task(pieces: Iterator[Tensor]) -> None:
    for _ in pieces:
        await asyncio.sleep(0)


async def awaited(model: nn.Module, x: Tensor) -> None:
    async def stem() -> Tensor:
        patches = model.proj(x).flatten(2).transpose(1, 2)
        await asyncio.sleep(0)
        return torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], 1) + model.pos_embed

    async def run(block: nn.Module, tokens: Tensor) -> Tensor:
        tokens = block(tokens)
        await asyncio.sleep(0)
        return tokens

    tokens = await stem()
    for block in model.encoder:
        tokens = await run(block, tokens)
    model.head(tokens[:, 0])


def generators_by_turns(model: nn.Module, batches: list[Tensor], pieces: Any = by_pieces) -> None:
    running = [pieces(model, x) for x in batches]
    for _ in zip(*running, strict=True):
        pass


def generators_from_a_generator(model: nn.Module, batches: list[Tensor]) -> None:
    """As in a notebook, whose cells run in a coroutine."""

    def cell() -> Iterator[None]:
        yield generators_by_turns(model, batches)

    list(cell())


def tasks_by_turns(model: nn.Module, batches: list[Tensor], make: Any = None) -> None:
    async def main() -> None:
        make_one = make or (lambda model, x: in_a_task(by_pieces(model, x)))
        await asyncio.gather(*(make_one(model, x) for x in batches))

    asyncio.run(main())


TURNS: dict[str, Callable[[nn.Module, list[Tensor]], None]] = {
    "generators": generators_by_turns,
    "nested generators": lambda model, batches: generators_by_turns(model, batches, nested_pieces),
    "generators in a generator": generators_from_a_generator,
    "tasks": tasks_by_turns,
    "nested coroutines": lambda model, batches: tasks_by_turns(model, batches, awaited),
}
every_turn = pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)


def assert_same_maps(found: AttentionMaps, expected: AttentionMaps) -> None:
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    for layer, other in zip(found, expected, strict=True):
        assert torch.equal(layer.weights(), other.weights())
        assert layer.placed == other.placed


@every_turn
@cold_and_warm
@pytest.mark.parametrize("size", [(32, 48), (24, 64)], ids=["one size", "two sizes"])
def test_forwards_by_turns_are_runs_of_their_own(turns: Any, warm: bool, size: tuple[int, int]) -> None:
    model = PlainEncoder(nn.Sequential(ExplicitBlock(), nn.Identity(), *multihead_vit(2).encoder))
    batches = [images(2), images(3, size), images(1)]
    expected = [plain_pass(model, x)[1] for x in batches]
    # Nobody sees what happens between the parts that are run one by one, so the user says where the class token stands.
    with capture_attention(model, keep="all", num_prefix_tokens=1) as attention:
        if warm:
            model(images()), attention.take()
        for _ in range(2):
            turns(model, batches)
            runs = attention.take_all()
            assert len(runs) == 3
            for found, maps in zip(runs, expected, strict=True):
                assert_same_maps(found, maps)
        model(batches[0])
        assert_same_maps(attention.take(), expected[0])


@every_turn
def test_forwards_by_turns_are_too_many_for_one_take(turns: Any) -> None:
    model = explicit_vit(3)
    with capture_attention(model) as attention:
        turns(model, [images(2), images(3)])
        with pytest.raises(CaptureError, match="2 encoder runs") as error:
            attention.take()
        assert says(error, "3 attention calls, the first on (2,", "3 attention calls, the first on (3,")
        turns(model, [images(2)])
        assert attention.take().batch_size == 2


@pytest.mark.parametrize(("keep", "batch"), [("first", 2), ("last", 3)])
@every_turn
def test_first_and_last_of_forwards_by_turns_are_whole(turns: Any, keep: Any, batch: int) -> None:
    model = explicit_vit(3)
    with capture_attention(model, keep=keep) as attention:
        for _ in range(2):
            turns(model, [images(2), images(3)])
            maps = attention.take()
            assert (maps.batch_size, len(maps)) == (batch, 3)


def test_tasks_that_await_between_steps_of_two_models_do_not_mix() -> None:
    async def train(model: nn.Module, batches: list[Tensor]) -> list[int]:
        found = []
        with capture_attention(model) as attention:
            for x in batches:
                model(x)
                await asyncio.sleep(0)
                maps = attention.take()
                await asyncio.sleep(0)
                found.append(maps.batch_size)
        return found

    async def main() -> list[list[int]]:
        sizes = [[images(1), images(2), images(3)], [images(3), images(2), images(1)]]
        return await asyncio.gather(*(train(explicit_vit(), each) for each in sizes))

    assert asyncio.run(main()) == [[1, 2, 3], [3, 2, 1]]


def test_blocks_that_a_generator_ran_and_the_rest_are_one_run() -> None:
    """Features come from a generator, and its caller runs the last block; or the second half is another generator."""
    model, tokens = explicit_vit(3), torch.randn(2, 25, 32)

    def part(tokens: Tensor, blocks: Any) -> Iterator[Tensor]:
        for block in blocks:
            tokens = block(tokens)
        yield tokens

    with capture_attention(model) as attention:
        for _ in range(2):
            for features in part(tokens, model.encoder[:2]):
                model.encoder[2](features)
            assert len(attention.take()) == 3
            first = part(tokens, model.encoder[:2])
            second = part(next(first), model.encoder[2:])
            next(second)
            assert len(attention.take()) == 3


def test_a_task_that_is_cancelled_in_a_forward_leaves_no_run_of_the_next() -> None:
    model, middle = calling_vit()
    output, maps = plain_pass(model, x := images())

    def stop() -> None:
        raise asyncio.CancelledError

    async def step() -> None:
        model(images(3))

    async def main(attention: AttentionCapture) -> None:
        middle.call = stop
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.create_task(step())
        middle.call = None
        is_captured_right(model, attention, x, output, maps)

    with capture_attention(model) as attention:
        asyncio.run(main(attention))


@pytest.mark.usefixtures("no_collector")
def test_frames_of_generators_are_not_held_after_a_take() -> None:
    class Held:
        pass

    model, alive = explicit_vit(), []

    def piecewise(x: Tensor) -> Iterator[None]:
        held = Held()
        alive.append(weakref.ref(held))
        for _ in by_pieces(model, x):
            yield

    with capture_attention(model, keep="all") as attention:
        for _ in range(2):
            list(zip(piecewise(images(2)), piecewise(images(3)), strict=True))
            attention.take_all()
            assert [each() for each in alive] == [None] * len(alive)


# ---- an inner forward that is interrupted


@cold_and_warm
def test_a_model_that_catches_an_interruption_within_itself_leaves_no_mode(warm: bool) -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.call = calling_vit()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inside(x)
            except KeyboardInterrupt:
                return x.mean((2, 3))

    def stop() -> None:
        raise KeyboardInterrupt

    model = Catching()
    with capture_attention(model) as attention:
        if warm:
            model(images()), attention.take()
        model.call.call = stop
        model(images(3))
        assert modes() == 0
        model.call.call = None
        attention.clear()
        model(images(2))
        assert attention.take().batch_size == 2


def test_crops_within_one_forward_stay_runs_of_their_own() -> None:
    model = Crops(explicit_vit())
    with capture_attention(model, keep="all") as attention:
        for _ in range(2):
            model(images(1), images(6))
            assert [maps.batch_size for maps in attention.take_all()] == [1, 6]
