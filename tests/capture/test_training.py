"""Capture in training as it is run: distributed, in half precision, checkpointed, in threads, partly frozen."""

from __future__ import annotations

import copy
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from acr_reg import AllPairsConsistencyLoss, CaptureError, HorizontalFlip, capture_attention
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder, explicit_vit, multihead_vit

BUILDS = {"explicit": explicit_vit, "fused": multihead_vit}
either_kind = pytest.mark.parametrize("kind", BUILDS)
half_precision = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs torch 2.3 on the CPU")
view = HorizontalFlip()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 48)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def query_and_key(gradient: dict[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """The gradients of the query and the key weights of every layer."""
    for name, tensor in gradient.items():
        if name.endswith(("qkv.weight", "in_proj_weight")):
            assert tensor is not None, name
            for part, rows in zip(("query", "key"), tensor.chunk(3)[:2], strict=True):
                yield f"{name}, {part}", rows


# ---- distributed


def step(model: nn.Module, captured: nn.Module, x: Tensor, labels: Tensor, forwards: int) -> dict[str, Tensor | None]:
    """One backward of a criterion and the consistency of both views, made by one forward or by two."""
    criterion, acr = nn.MultiLabelSoftMarginLoss(), AllPairsConsistencyLoss(view)
    model.zero_grad()
    with capture_attention(captured) as attention:
        for _ in range(2):  # the first run watches every module
            if forwards == 1:
                logits_a, logits_b = model(torch.cat([x, view(x)])).chunk(2)
                attn_a, attn_b = attention.take().chunk(2)
            else:
                logits_a, attn_a = model(x), attention.take()
                logits_b, attn_b = model(view(x)), attention.take()
            loss = criterion(logits_a, labels) + criterion(logits_b, labels) + acr(attn_a, attn_b)
            model.zero_grad()
            loss.backward()
    return {name.removeprefix("module."): gradient for name, gradient in gradients(model).items()}


def batch_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 32, 48, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (4, 5), generator=generator).double()


def built(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDS[kind](2).double()


DISTRIBUTED = [
    (kind, captured, forwards, unused)
    for kind in BUILDS
    for captured in ("wrapper", "module")
    for forwards, unused in ((1, False), (2, False), (1, True))
]


def run_rank(rank: int, folder: Path) -> None:
    """What each of the two processes does: every case on its half of the batch; its gradients go to a file."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    x, labels = (part.chunk(2)[rank] for part in batch_and_labels())
    found = {}
    for case in DISTRIBUTED:
        kind, captured, forwards, unused = case
        model = built(kind, seed=rank)  # the wrapper hands the first rank's weights to the second
        wrapper = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        found[case] = step(wrapper, {"wrapper": wrapper, "module": wrapper.module}[captured], x, labels, forwards)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_with_half_the_batch_each_get_the_gradient_of_one_with_all_of_it(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for case in DISTRIBUTED:
        kind, _, forwards, _ = case
        model = built(kind)
        expected = step(model, model, *batch_and_labels(), forwards)
        for name, gradient in expected.items():
            first, second = (rank[case][name] for rank in ranks)
            assert torch.equal(first, second), (case, name)
            assert (first - gradient).norm() <= 1e-9 * gradient.norm(), (case, name)
        for name, rows in query_and_key(expected):
            assert rows.abs().max() > 0, name
        for name, gradient in step(model, model, *batch_and_labels(), 3 - forwards).items():
            assert (gradient - expected[name]).norm() <= 1e-9 * gradient.norm(), "one forward and two"


# ---- half precision


@either_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=half_precision)], ids=str)
@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=half_precision)], ids=["plain", "scaled"])
def test_autocast_trains_the_attention_as_float32_does(kind: str, dtype: torch.dtype, scaled: bool) -> None:
    model, x = BUILDS[kind](3), images()

    def loss_of(model: nn.Module, forwards: int, enabled: bool) -> Tensor:
        with capture_attention(model) as attention, torch.autocast("cpu", dtype=dtype, enabled=enabled):
            if forwards == 1:
                model(torch.cat([x, view(x)]))
                attn_a, attn_b = attention.take().chunk(2)
            else:
                model(x)
                attn_a = attention.take()
                model(view(x))
                attn_b = attention.take()
            assert all(w.dtype == torch.float32 for maps in (attn_a, attn_b) for w in maps.weights())
            return AllPairsConsistencyLoss(view)(attn_a, attn_b)

    for forwards in (1, 2):
        full, half = copy.deepcopy(model), copy.deepcopy(model)
        expected = loss_of(full, forwards, enabled=False)
        expected.backward()
        loss = loss_of(half, forwards, enabled=True)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
        if scaled:
            optimizer = torch.optim.SGD(half.parameters(), lr=1.0)
            scaler = torch.amp.GradScaler(device="cpu")
            scaler.scale(loss).backward()
            assert scaler.get_scale() == 2.0**16
            scaler.step(optimizer)  # divides the gradients by the scale, and skips the step where one is not finite
            scaler.update()
            assert scaler.get_scale() == 2.0**16, "infinite gradients would have halved it"
            assert not all(torch.equal(a, b) for a, b in zip(half.parameters(), full.parameters(), strict=True))
        else:
            loss.backward()
        for (name, found), (_, wanted) in zip(
            query_and_key(gradients(half)), query_and_key(gradients(full)), strict=True
        ):
            assert found.abs().max() > 0, name
            assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99, name
            assert 0.9 < found.norm() / wanted.norm() < 1.1, name


# ---- checkpointing


class Checkpointed(nn.Sequential):
    """Blocks of which each is recomputed in backward, by the kind of checkpointing named for it, or kept for None."""

    reentrant: tuple[bool | None, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for block, reentrant in zip(self, self.reentrant, strict=True):
            x = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        return x


def checkpointed_vit(kind: str, dropout: float = 0.0) -> nn.Module:
    def block() -> nn.Module:
        attention = ExplicitBlock(dropout=dropout) if kind == "explicit" else MultiheadBlock(False, dropout=dropout)
        return nn.Sequential(attention, nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Dropout(dropout))

    return PlainEncoder(Checkpointed(*(block() for _ in range(3))))


@either_kind
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_get_the_gradient_of_kept_ones(kind: str, autocast: bool, dropout: float) -> None:
    model, x = checkpointed_vit(kind, dropout).train(), images()
    acr, found = AllPairsConsistencyLoss(view), []
    for reentrant in ((None, None, None), (False, False, False), (False, None, False)):
        model.encoder.reentrant = reentrant
        with capture_attention(model) as attention:
            for _ in range(2):
                torch.manual_seed(1)
                model.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
                    logits_a, attn_a = model(x), attention.take()
                    logits_b, attn_b = model(view(x)), attention.take()
                assert len(attn_a) == len(attn_b) == 3
                assert all(layer.dropout == dropout for layer in attn_a)
                loss = acr(attn_a, attn_b) + logits_a.float().square().mean() + logits_b.float().square().mean()
                loss.backward()
        found.append(gradients(model))
    kept, *recomputed = found
    assert all(rows.abs().max() > 0 for _, rows in query_and_key(kept))
    for gradient in recomputed:
        for name, expected in kept.items():
            torch.testing.assert_close(gradient[name], expected, msg=lambda m, n=name: f"{n}: {m}")


@either_kind
def test_reentrant_checkpointing_of_every_block_is_refused(kind: str) -> None:
    model = checkpointed_vit(kind)
    model.encoder.reentrant = (True, True, True)
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            with pytest.raises(CaptureError, match="use_reentrant=False"):
                attention.take()


@either_kind
def test_reentrant_checkpointing_of_some_blocks_is_not_silent(kind: str) -> None:
    """The layers that are left would be regularised under the wrong indices, and the others not at all."""
    model = checkpointed_vit(kind)
    model.encoder.reentrant = (None, True, None)
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            said = ""
            try:
                attention.take()
            except CaptureError as error:
                said = str(error)
            assert "use_reentrant=False" in said or any("encoder.1." in name for name, _ in attention.skipped)


class CheckpointsItself(ExplicitBlock):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)  # type: ignore[return-value]


class Other(ExplicitBlock):
    """Not alike to the blocks in which attention is seen."""


def another_checkpoints() -> nn.Sequential:
    blocks = Checkpointed(Other(), ExplicitBlock())
    blocks.reentrant = (True, None)
    return blocks


@pytest.mark.parametrize(
    ("encoder", "named"),
    [
        (nn.Sequential(CheckpointsItself(), ExplicitBlock()), r"encoder\.0"),
        (another_checkpoints(), r"encoder, encoder\.0"),
    ],
    ids=["itself", "another"],
)
def test_a_layer_unlike_the_others_that_is_checkpointed_reentrantly_is_refused(encoder: nn.Module, named: str) -> None:
    model = PlainEncoder(encoder)
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            with pytest.raises(CaptureError, match=rf"checkpointing runs {named}.*use_reentrant=False"):
                attention.take()


# ---- threads


class Meeting(nn.Module):
    """Hands its input on once as many threads as the barrier expects are here."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait(20)
        return x


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
    for model in models:
        model.encoder[0].drop = Meeting(barrier)  # both are then between a softmax and its values
        model.encoder[-1].drop = Meeting(barrier)
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


@either_kind
def test_two_threads_train_one_model_by_turns(kind: str) -> None:
    model, batches = BUILDS[kind](2), [images(2) for _ in range(6)]
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


# ---- frozen layers


class LowerHalfWithoutGradient(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self[1](self[0](x))
        return self[3](self[2](x))


@either_kind
@pytest.mark.parametrize("by", ["requires_grad", "no_grad"])
def test_a_frozen_lower_half_is_left_out_and_the_upper_half_is_trained(kind: str, by: str) -> None:
    model, x = BUILDS[kind](4), images()
    frozen = [model.proj, model.encoder[0], model.encoder[1]]
    for module in frozen:
        module.requires_grad_(False)
    model.cls_token.requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    if by == "no_grad":
        model.encoder = LowerHalfWithoutGradient(*model.encoder)
    names = [f"encoder.{i}" + (".attention" if kind == "fused" else "") for i in range(4)]
    with capture_attention(model) as attention:
        for _ in range(2):
            model.zero_grad()
            model(x)
            attn_a = attention.take()
            model(view(x))
            attn_b = attention.take()
            assert [layer.name for layer in attn_a] == names[-len(attn_a) :]
            assert [layer.name for layer in attn_a if layer.requires_grad] == names[2:]
            loss = AllPairsConsistencyLoss(view)(attn_a, attn_b)
            assert torch.equal(loss, AllPairsConsistencyLoss(view, layers=[-2, -1])(attn_a, attn_b))
            loss.backward()
    found = gradients(model)
    for name, p in model.named_parameters():
        assert p.requires_grad or found.pop(name) is None, name
    reached = [rows.abs().max() > 0 for _, rows in query_and_key(found)]
    assert reached == [True] * 4, "query and key of both upper layers"
