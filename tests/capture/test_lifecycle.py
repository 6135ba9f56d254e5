"""A capture from its beginning to its end: nesting, interruption, copies, files, threads and a thousand steps."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, CaptureError, HorizontalFlip, capture_attention
from tests.support.capturing import cold_and_warm, hooks, images, modes, recorded
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder, explicit_vit, multihead_vit
from tests.support.models.plain import Calling, calling_vit
from tests.support.processes import Program


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model's modules that a capture could leave changed: attributes, hooks, modes, flags."""
    return {
        name: (
            sorted(vars(module)),
            [[id(hook) for hook in value.values()] for key, value in sorted(vars(module).items()) if "hooks" in key],
            module.training,
            [(key, id(p), p.requires_grad) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def loss_of(model: nn.Module, attention: Any, x: Tensor) -> Tensor:
    logits = model(torch.cat([x, x.flip(-1)]))
    return logits.square().mean() + AllPairsConsistencyLoss(HorizontalFlip())(*attention.take().chunk(2))


def interrupt() -> None:
    raise KeyboardInterrupt


# ---- nesting


@pytest.mark.parametrize("part", ["", "encoder.1"], ids=["same model", "submodule"])
@pytest.mark.parametrize("outer_first", [False, True], ids=["inner ends first", "outer ends first"])
@cold_and_warm
def test_nested_captures_see_the_same_and_end_in_either_order(part: str, outer_first: bool, warm: bool) -> None:
    model = explicit_vit(3)
    before = state_of(model)
    with capture_attention(model) as outer:
        if warm:
            model(images())
            outer.take()
        with capture_attention(model.get_submodule(part)) as inner:
            for _ in range(2):
                model(images())
                whole, nested = outer.take(), inner.take()
                shared = whole.select([1]) if part else whole
                assert [recorded(shared, i) is recorded(nested, i) for i in range(len(nested))] == [True] * len(shared)
                assert modes() == 0
            ended, running = (outer, inner) if outer_first else (inner, outer)
            ended.remove()
            for _ in range(2):
                model(images())
                assert len(running.take()) == (1 if part and outer_first else 3)
                assert modes() == 0
        with pytest.raises(CaptureError, match="removed"):
            inner.take()
    assert state_of(model) == before


def test_one_handle_entered_twice_ends_with_the_inner_block() -> None:
    model = explicit_vit()
    before = state_of(model)
    with capture_attention(model) as attention:
        with attention:
            model(images())
            assert len(attention.take()) == 2
        assert state_of(model) == before
    assert state_of(model) == before


def test_two_captures_on_one_model() -> None:
    model = multihead_vit(need_weights=True)
    with capture_attention(model) as one, capture_attention(model) as two:
        for _ in range(2):
            model(images())
            a, b = one.take(), two.take()
            assert all(x.recorded.map is y.recorded.map for x, y in zip(a, b, strict=True))
        one.remove()
        model(images())
        assert len(two.take()) == 2
    assert hooks(model) == 0 and modes() == 0


def test_two_models_at_once_do_not_mix() -> None:
    one, two = explicit_vit(1), multihead_vit(2)
    with capture_attention(one) as first, capture_attention(two) as second:
        one(images()), two(images())
        assert (len(first.take()), len(second.take())) == (1, 2)


def test_two_models_run_block_by_block_in_turn_keep_their_own_layers_and_gradients() -> None:
    one, two = explicit_vit(3), multihead_vit(3)
    tokens = torch.randn(2, 25, 32)

    def loss(maps: AttentionMaps) -> Tensor:
        placed = maps.with_layout(grid=(4, 6), num_prefix_tokens=1)
        return AllPairsConsistencyLoss(HorizontalFlip())(placed, placed)

    expected = []
    for model in (one, two):
        with capture_attention(model) as attention:
            model.encoder(tokens)
            loss(attention.take()).backward()
        expected.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    with capture_attention(one) as first, capture_attention(two) as second:
        for _ in range(2):
            a = b = tokens
            for block_a, block_b in zip(one.encoder, two.encoder, strict=True):
                a, b = block_a(a), block_b(b)
            maps_b, maps_a = second.take(), first.take()
            assert [layer.name for layer in maps_a] == [f"encoder.{i}" for i in range(3)]
            assert [layer.name for layer in maps_b] == [f"encoder.{i}.attention" for i in range(3)]
        loss(maps_b).backward()
        loss(maps_a).backward()
    for model, gradients in zip((one, two), expected, strict=True):
        assert any(g is not None for g in gradients)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(parameter.grad, gradient)


# ---- ends


def test_every_end_of_a_capture_restores_the_model() -> None:
    model = explicit_vit()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with capture_attention(model) as attention:
        assert hooks(model) > 0
    assert hooks(model) == 0
    attention.remove()
    with pytest.raises(CaptureError, match="removed"):
        attention.take()
    with contextlib.suppress(ZeroDivisionError), capture_attention(model):
        model(images())
        _ = 1 / 0
    assert hooks(model) == 0
    handle = capture_attention(model)
    model(images())
    del handle
    gc.collect()
    assert hooks(model) == 0
    assert modes() == 0
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_breaks_leaves_no_mode_and_no_half_run(error: type[BaseException]) -> None:
    class Breaking(nn.Module):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            x = F.softmax(x @ x.mT, -1) @ x
            if self.broken:
                raise error("stop")
            return x

    breaking = Breaking()
    model = PlainEncoder(nn.Sequential(ExplicitBlock(), breaking, ExplicitBlock()))
    with capture_attention(model) as attention:
        for warm in (False, True):
            if warm:
                model(images())
                attention.take()
            breaking.broken = True
            with pytest.raises(error):
                model(images())
            breaking.broken = False
            if error is RuntimeError:
                assert modes() == 0
            model(images())
            assert len(attention.take()) == 3
            assert modes() == 0
        breaking.broken = True
        with pytest.raises(error):
            model(images())
    assert modes() == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "between", "backward"])
@cold_and_warm
def test_an_error_leaves_the_with_block_as_it_is_and_the_model_as_it_was(
    error: type[BaseException], place: str, warm: bool
) -> None:
    model, middle = calling_vit()
    before, raised, taken = state_of(model), error("stop"), None

    def stop(*_: object) -> None:
        raise raised

    with pytest.raises(error) as found, capture_attention(model) as attention:  # noqa: PT012
        if warm:
            model(images())
            taken = attention.take()
        middle.call = stop if place == "forward" else None
        logits = model(images())
        if place == "between":
            stop()
        logits.register_hook(stop)
        logits.sum().backward()
    middle.call = None
    assert found.value is raised
    assert modes() == 0
    assert state_of(model) == before
    if taken is not None:  # what was taken before the error is still good
        gradient = torch.autograd.grad(recorded(taken).square().sum(), model.encoder[0].qkv.weight)[0]
        assert gradient.abs().max() > 0
    model(images()).sum().backward()


@pytest.mark.usefixtures("no_collector")
def test_a_dropped_handle_takes_its_hooks_along_while_its_maps_live() -> None:
    model = explicit_vit()
    before = state_of(model)
    attention = capture_attention(model)
    model(images())
    maps = attention.take()
    del attention
    assert state_of(model) == before
    assert torch.autograd.grad(maps[0].weights().square().sum(), model.encoder[0].qkv.weight)[0].abs().max() > 0


def test_a_handle_dropped_after_an_interruption_is_gone_with_the_next_forward() -> None:
    model, middle = calling_vit()
    before, attention = state_of(model), capture_attention(model)
    middle.call = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(images())
    middle.call = None
    del attention
    model(images())
    gc.collect()
    assert modes() == 0
    assert state_of(model) == before


@cold_and_warm
def test_a_capture_removed_in_the_middle_of_a_forward_leaves_no_mode_behind(warm: bool) -> None:
    model, middle = calling_vit()
    x, before = images(), state_of(model)
    expected = model(x)
    attention = capture_attention(model)
    if warm:
        model(x)
        attention.take()
    middle.call = attention.remove
    assert torch.equal(model(x), expected)
    middle.call = None
    assert modes() == 0
    assert state_of(model) == before
    assert torch.equal(model(x), expected)


def test_hooks_flags_and_modes_of_the_users_own_are_left_as_they_are() -> None:
    model, middle = calling_vit()
    model.encoder[0].eval()
    model.proj.requires_grad_(False)
    model.encoder[2].attention.in_proj_bias.requires_grad_(False)
    seen: list[str] = []
    for module in (model, middle, model.encoder[0], model.encoder[2].attention):
        module.register_forward_pre_hook(lambda m, _args: seen.append(f"before {type(m).__name__}"))
        module.register_forward_hook(lambda m, _args, _out: seen.append(f"after {type(m).__name__}"))
    model(images())
    expected, before = list(seen), state_of(model)
    with capture_attention(model) as attention:
        for _ in range(2):
            seen.clear()
            model(images())
            attention.take()
            assert seen == expected
            flags = {name: (*state[2:],) for name, state in state_of(model).items()}
            assert flags == {name: (*state[2:],) for name, state in before.items()}
    assert state_of(model) == before


# ---- copies and files


def test_the_state_dict_is_the_same_tensors_under_the_same_names_during_a_capture() -> None:
    model = explicit_vit()

    def described() -> list[tuple[str, int, int]]:
        return [(key, value.data_ptr(), value._version) for key, value in model.state_dict().items()]

    expected, metadata = described(), model.state_dict()._metadata
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            attention.take()
            assert described() == expected
            assert model.state_dict()._metadata == metadata
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        assert b"acr_reg" not in buffer.getvalue()
        other = explicit_vit()
        model.load_state_dict(other.state_dict(), strict=True)
        x = images()
        assert torch.equal(model(x), other(x))
    assert [entry[:2] for entry in described()] == [entry[:2] for entry in expected]


def _saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("copied", [_saved_and_loaded, lambda m, _: copy.deepcopy(m)], ids=["saved", "deepcopy"])
@pytest.mark.parametrize("when", ["cold", "warm", "after"])
def test_copies_made_during_or_after_a_capture_carry_none(
    copied: Callable[[nn.Module, Path], nn.Module], when: str, tmp_path: Path
) -> None:
    model, x = calling_vit()[0], images()
    expected, before = model(x), state_of(model)
    with capture_attention(model) as attention:
        if when == "warm":
            model(x)
            attention.take()
        other = copied(model, tmp_path)
        if when != "after":
            depths: list[int] = []
            other.encoder[1].call = lambda: depths.append(modes())
            assert torch.equal(other(x), expected)
            assert depths == [0], "a copy must not be watched"
            other.encoder[1].call = None
            with pytest.raises(CaptureError, match="not of a copy" if when == "warm" else "not a copy"):
                attention.take()
        model(x)
        expected_maps = attention.take()
    assert state_of(model) == before
    if when == "after":
        other = copied(model, tmp_path)
        assert not any(hook for state in state_of(other).values() for hook in state[1])
        for file in tmp_path.iterdir():
            assert b"acr_reg" not in file.read_bytes()
    before = state_of(other)
    with capture_attention(other) as attention:  # the copy can be captured itself
        for _ in range(2):
            assert torch.equal(other(x), expected)
            for found, layer in zip(attention.take().weights(), expected_maps, strict=True):
                assert torch.equal(found, layer.weights())
    assert state_of(other) == before


def test_copies_and_pickles_of_a_captured_model_are_not_captured() -> None:
    model, x = explicit_vit(), images()
    with capture_attention(model) as attention:
        model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))
            attention.clear()
            other(x)
            with pytest.raises(CaptureError):
                attention.take()
        model(x)
        assert len(attention.take()) == 2


def test_a_deep_copy_has_the_users_hooks_and_no_others_whatever_holds_the_model() -> None:
    model, x, heard = explicit_vit(), images(), []
    model.encoder[0].register_forward_hook(lambda *_: heard.append("own"))
    before = state_of(model)

    class Holder:
        def __init__(self) -> None:
            self.modules = [model, {"again": model, "part": model.encoder}]

    with capture_attention(model) as first, capture_attention(model) as second:
        model(x), first.take(), second.take()
        memo: dict[int, Any] = {}
        copies = {
            "itself": copy.deepcopy(model),
            "in an object": copy.deepcopy(Holder()).modules[0],
            "of a copy": copy.deepcopy(copy.deepcopy(model)),
            "in a wrapper": copy.deepcopy(nn.Sequential(model))[0],
            "average": torch.optim.swa_utils.AveragedModel(model).module,
            "by a memo": copy.deepcopy(model, memo),
        }
        part = copy.deepcopy(model.encoder[0])
        memo.clear()
        for name, other in copies.items():
            assert {key: entry[1] for key, entry in state_of(other).items()} == {
                key: entry[1] for key, entry in before.items()
            }, name
        assert hooks(part) == 1
        heard.clear()
        assert torch.equal(copies["of a copy"](x), model(x))
        assert heard == ["own", "own"]
        assert len(first.take()) == len(second.take()) == 2


_LOADED_ALONE = """
import sys
sys.modules["acr_reg"] = None  # import acr_reg now fails
import torch
for path in sys.argv[1:]:
    model = torch.load(path, weights_only=False).eval()
    print(float(model(torch.ones(1, 4, 8)).detach().double().sum()))
"""


def test_a_model_or_average_saved_during_a_capture_loads_and_runs_without_this_package(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with capture_attention(model) as attention:
        model(torch.ones(1, 4, 8))
        attention.take()
        copies = {
            "itself": model,
            "deep copy": copy.deepcopy(model),
            "average": torch.optim.swa_utils.AveragedModel(model),
            "pickle of a pickle": pickle.loads(pickle.dumps(model)),
        }
        for name, other in copies.items():
            torch.save(other, tmp_path / name)
        expected = float(model(torch.ones(1, 4, 8)).detach().double().sum())
    alone = Program("-c", _LOADED_ALONE, *(tmp_path / name for name in copies))
    out, err = alone.communicate()
    assert alone.returncode == 0, err
    assert [float(line) for line in out.split()] == pytest.approx([expected] * len(copies), rel=1e-5)


def test_an_average_of_timm_follows_a_captured_model_and_holds_nothing_of_this_package() -> None:
    from timm import utils

    model = explicit_vit()
    with capture_attention(model) as attention:
        averages = [utils.ModelEmaV2(model, decay=0.5), utils.ModelEmaV3(model, decay=0.5)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        for average in averages:
            average.update(model)
            for parameter, mean in zip(model.parameters(), average.module.parameters(), strict=True):
                assert torch.allclose(mean, parameter - 0.5)
            average.module(images(1))
            assert b"acr_reg" not in pickle.dumps(average)
        model(images(2))
        assert attention.take().batch_size == 2, "a run of the average is none of the model"


# ---- many steps


def test_a_thousand_training_steps_hold_no_more_than_the_first() -> None:
    layers = [ExplicitBlock(8, 2), MultiheadBlock(False, 8, 2)]
    models = [PlainEncoder(nn.Sequential(layer), width=8) for layer in layers]
    captures = [capture_attention(model) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    acr, x, kept = AllPairsConsistencyLoss(HorizontalFlip(), affinity_weight=0), images(1), []

    def counted() -> tuple[int, int, int]:
        """Live tensors, live objects and allocated blocks of memory."""
        gc.collect()
        objects = gc.get_objects()
        tensors, count = sum(issubclass(type(o), Tensor) for o in objects), len(objects)
        del objects
        return tensors, count, sys.getallocatedblocks()

    def grown(steps: int, keep: bool = False) -> list[int]:
        before = counted()
        for step in range(steps):
            model, attention, optimizer = models[step % 2], captures[step % 2], optimizers[step % 2]
            logits = model(torch.cat([x, x.flip(-1)]))
            maps = attention.take()
            loss = logits.square().mean() + acr(*maps.chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if keep:
                kept.append(recorded(maps))
            del logits, maps, loss
        return [b - a for a, b in zip(before, counted(), strict=True)]

    grown(2)  # the first step of each model makes gradients, and tables of the view that later steps read
    assert grown(100)[0] == 0
    # The smaller of two: pools of torch and Python fill in one of them (406 blocks were seen), a leak grows in both.
    tensors, objects, blocks = (min(pair) for pair in zip(grown(500), grown(500), strict=True))
    assert tensors == 0
    assert objects < 10
    assert blocks < 400, "less than one a step"
    assert min(grown(20, keep=True)[:2]) >= 20, "the counts see one tensor kept a step"


# ---- interruptions


def training(model: nn.Module, batches: list[Tensor], interrupted: set[int], arm: Callable[[bool], None]) -> None:
    """A training loop that goes on after a KeyboardInterrupt in the forward of some of its steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with capture_attention(model) as attention:
        for step, batch in enumerate(batches):
            arm(step in interrupted)
            try:
                loss = loss_of(model, attention, batch)
            except KeyboardInterrupt:
                assert step in interrupted
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert modes() == 0


@pytest.mark.parametrize("place", ["between blocks", "between softmax and values"])
@pytest.mark.parametrize("worker", [False, True], ids=["main thread", "worker thread"])
@pytest.mark.parametrize("interrupted", [{0}, {2}, {2, 3}], ids=str)
def test_a_training_loop_goes_on_after_an_interruption_as_if_that_step_had_not_been(
    place: str, worker: bool, interrupted: set[int]
) -> None:
    model, middle = calling_vit()
    batches = [images() for _ in range(6)]
    expected = copy.deepcopy(model)
    training(expected, [batch for i, batch in enumerate(batches) if i not in interrupted], set(), lambda _: None)

    def arm(armed: bool) -> None:
        middle.call = interrupt if armed and place == "between blocks" else None
        inside.call = interrupt if armed and place != "between blocks" else None

    inside = Calling()
    model.encoder[0].drop = inside
    errors: list[BaseException] = []

    def run() -> None:
        try:
            training(model, batches, interrupted, arm)
        except BaseException as error:
            errors.append(error)

    if worker:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert not errors, errors
    assert modes() == 0
    assert not any(hook for state in state_of(model).values() for hook in state[1])
    for (name, found), parameter in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, parameter), name


def test_the_main_thread_goes_on_after_an_interruption_in_a_worker() -> None:
    model, middle = calling_vit()
    with capture_attention(model) as attention:
        for _ in range(2):
            middle.call = interrupt
            errors: list[BaseException] = []

            def run() -> None:
                try:
                    model(images(3))
                except KeyboardInterrupt as error:
                    errors.append(error)  # noqa: B023  # this iteration's thread

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            assert len(errors) == 1
            middle.call = None
            model(images(2))
            maps = attention.take()
            assert (maps.batch_size, len(maps)) == (2, 2)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@cold_and_warm
def test_a_forward_that_breaks_before_its_attention_does_not_spoil_the_one_before(
    error: type[BaseException], warm: bool
) -> None:
    model, stem = explicit_vit(), Calling()
    model.proj = nn.Sequential(model.proj, stem)

    def stop() -> None:
        raise error("stop")

    with capture_attention(model, keep="all") as attention:
        if warm:
            model(images(3))
            assert len(attention.take_all()) == 1
        model(images(1))
        stem.call = stop
        with pytest.raises(error):
            model(images(3))
        stem.call = None
        model(images(2))
        assert [(maps.batch_size, len(maps)) for maps in attention.take_all()] == [(1, 2), (2, 2)]


def test_what_another_model_computes_after_an_interruption_is_not_this_models() -> None:
    model, middle = calling_vit()
    other, factor = multihead_vit(3), torch.randn(2, 4, 25, 8, requires_grad=True)
    with capture_attention(model) as attention:
        for _ in range(2):
            middle.call = interrupt
            with pytest.raises(KeyboardInterrupt):
                model(images(3))
            middle.call = None
            other(images(3))
            F.scaled_dot_product_attention(factor, factor, factor)
            model(images(2))
            maps = attention.take()
            assert (maps.batch_size, [layer.name for layer in maps]) == (2, ["encoder.0", "encoder.2.attention"])


@pytest.mark.parametrize("first", [0, 1], ids=["outer removed", "inner removed"])
def test_of_two_interrupted_captures_one_can_be_removed(first: int) -> None:
    model, middle = calling_vit()
    factor = torch.randn(2, 4, 25, 8, requires_grad=True)
    captures = [capture_attention(model) for _ in range(2)]
    middle.call = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(images(3))
    middle.call = None
    captures[first].remove()
    F.scaled_dot_product_attention(factor, factor, factor)
    model(images(2))
    assert captures[1 - first].take().batch_size == 2
    captures[1 - first].remove()
    assert modes() == 0
