"""What cannot be captured ends as an error that names it; the model itself is captured right afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, CaptureError, HorizontalFlip, capture_attention
from tests.support.attention import says
from tests.support.capturing import cold_and_warm, images, modes, plain_pass
from tests.support.models import PlainEncoder, explicit_vit, multihead_vit
from tests.support.models.plain import (
    BLOCKS,
    Builder,
    Checkpointed,
    Crops,
    ExplicitBlock,
    FunctionAttention,
    every_block,
    every_kind,
    explicit_attention,
    fused_attention,
)
from tests.support.models.replicas import Parallel, replica_of
from tests.support.models.spellings import ByKernel
from tests.support.models.tokens import Attention, Tokens

# ---- modules that the capture does not know


@every_kind
@cold_and_warm
@pytest.mark.parametrize("captured", ["inside", "outside"])
def test_replicas_of_data_parallel_are_refused(build: Builder, warm: bool, captured: str) -> None:
    model, x = build(), images()
    output, maps = plain_pass(model, x)
    parallel = Parallel(model)
    assert torch.equal(parallel(x), output)
    with capture_attention(model if captured == "inside" else parallel) as attention:
        if warm:
            model(x)
            attention.take()
        with pytest.raises(CaptureError) as error:
            parallel(x)
        assert says(error, "nn.DataParallel", "replicas", "DistributedDataParallel")
        assert modes() == 0
        for _ in range(2):
            assert torch.equal(model(x), output)
            assert all(torch.equal(a, b) for a, b in zip(attention.take().weights(), maps.weights(), strict=True))
    for found, name in ((replica_of(model), "The model ("), (nn.Sequential(replica_of(model)), "0 (")):
        with pytest.raises(CaptureError) as error:
            capture_attention(found)
        assert says(error, name, "replica", "nn.DataParallel")


@every_block
@pytest.mark.parametrize("change", ["added", "exchanged"])
@cold_and_warm
def test_an_attention_module_that_joins_a_captured_model_is_refused(
    block: Callable[[], nn.Module], change: str, warm: bool
) -> None:
    """Unwatched, its layer would be missing, or stand under the name of whatever it lies in."""
    model, x = PlainEncoder(nn.Sequential(block(), block(), block())), images()
    with capture_attention(model) as attention:
        if warm:
            model(x)
            attention.take()
        if change == "added":
            model.encoder.append(block())
        else:
            model.encoder[1] = block()
        with pytest.raises(CaptureError) as error:  # noqa: PT012  # either may be the one to notice
            model(x)
            attention.take()
        assert says(error, "encoder.3" if change == "added" else "encoder.1", "Capture again after the change")
        assert modes() == 0
    with capture_attention(model) as attention:
        model(x)
        assert len(attention.take()) == (4 if change == "added" else 3)


@cold_and_warm
def test_another_module_that_joins_or_leaves_a_captured_model_does_not_matter(warm: bool) -> None:
    model, x = explicit_vit(3), images()
    with capture_attention(model) as attention:
        if warm:
            model(x)
            attention.take()
        model.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 7))
        for _ in range(2):
            model(x)
            assert [layer.name for layer in attention.take()] == [f"encoder.{i}" for i in range(3)]
        del model.encoder[1]
        for _ in range(2):
            model(x)
            assert len(attention.take()) == 2


# ---- kernels that leave nothing to record


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")  # torch 2.1: last
    kernel = next(getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name))
    return kernel(q, k, v)[0]


class Opaque(torch.autograd.Function):
    """Attention whose forward and backward are written by hand, as in flash_attn and xformers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        by_weights = gradient @ v.transpose(-2, -1)
        scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return scores @ k, scores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ gradient


@pytest.mark.parametrize("kernel", [_cpu_flash, Opaque.apply], ids=["operator", "autograd.Function"])
@pytest.mark.parametrize("others", [fused_attention, explicit_attention], ids=["fused", "explicit"])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_block_whose_kernel_leaves_nothing_to_record_is_named(kernel: Any, others: Any, where: int) -> None:
    functions = [others] * 3
    functions[where] = kernel
    model, x = PlainEncoder(nn.Sequential(*map(FunctionAttention, functions))), images()
    with capture_attention(model) as attention:
        for _ in range(2):
            model(x)
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(
                error, "2 modules were captured", f"encoder.{where}", "Turn off xformers, flash_attn", "modules="
            )
            if kernel is _cpu_flash:
                assert "_scaled_dot_product_flash_attention" in str(error.value)
            assert modes() == 0
        model.encoder[where].function = others
        model(x)
        assert len(attention.take()) == 3
    seen = [f"encoder.{i}" for i in range(3) if i != where]
    model.encoder[where].function = kernel
    with capture_attention(model, modules=seen) as attention:  # the advice of the message
        for _ in range(2):
            model(x)
            assert [layer.name for layer in attention.take()] == seen


class Mixer(FunctionAttention):
    """Of another class than the other blocks, by a name that says nothing."""


@every_block
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_kernel_that_leaves_nothing_to_record_is_named_in_a_block_unlike_the_others(block: Any, where: int) -> None:
    blocks = [block() for _ in range(3)]
    blocks[where] = Mixer(_cpu_flash)
    model, x = PlainEncoder(nn.Sequential(*blocks)), images()
    with capture_attention(model) as attention:
        for _ in range(3):  # from the second pass on only attention modules are watched: this must be one of them
            model(x)
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(error, f"encoder.{where} (_scaled_dot_product_flash_attention", "Turn off xformers, flash_attn")


@pytest.mark.parametrize("kernel", [_cpu_flash, Opaque.apply], ids=["operator", "autograd.Function"])
def test_a_model_of_such_kernels_alone_is_refused_by_name(kernel: Any) -> None:
    model, x = PlainEncoder(nn.Sequential(FunctionAttention(kernel), FunctionAttention(kernel))), images()
    with capture_attention(model) as attention:
        for _ in range(2):
            model(x)
            with pytest.raises(CaptureError) as error:
                attention.take()
            said = ": _scaled_dot_product_flash_attention" if kernel is _cpu_flash else " (FunctionAttention)"
            assert says(error, f"encoder.0{said}", f"encoder.1{said}")


@pytest.mark.parametrize("kernel", ["written out", "aten"])
def test_modules_of_the_same_class_that_run_another_kernel_are_named(kernel: str) -> None:
    model = Tokens(ByKernel(), ByKernel(kernel), ByKernel(), ByKernel(kernel))
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            with pytest.raises(CaptureError, match="their kernel is hidden") as error:
                attention.take()
            assert says(error, "2 modules were captured", "blocks.1", "blocks.3", "modules=")
            assert "blocks.0" not in str(error.value)
    with capture_attention(model, modules=["blocks.0", "blocks.2"]) as attention:
        model(images())
        assert [layer.name for layer in attention.take()] == ["blocks.0", "blocks.2"]


def test_a_kernel_under_another_class_in_the_same_place_of_another_block_is_named() -> None:
    class FlashAttention(ByKernel):
        pass

    def block(attention: nn.Module) -> nn.Module:
        return nn.ModuleDict({"attn": attention})

    class Blocks(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for each in self.blocks:
                x = each["attn"](x)
            return self.head(x.mean(1))

    model = Blocks(block(Attention()), block(FlashAttention("written out")))
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            with pytest.raises(CaptureError, match=r"blocks\.1\.attn"):
                attention.take()


# ---- checkpointing that runs layers without a graph


def block_of(kind: str) -> nn.Module:
    return nn.Sequential(BLOCKS[kind](), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.0))


def reentrantly(blocks: list[nn.Module], *reentrant: bool | None) -> nn.Sequential:
    encoder = Checkpointed(*blocks)
    encoder.reentrant = reentrant
    return encoder


class CheckpointsItself(ExplicitBlock):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)  # type: ignore[return-value]


class Other(ExplicitBlock):
    """Not alike to the blocks in which attention is seen."""


@pytest.mark.parametrize(
    ("encoder", "named"),
    [
        *((reentrantly([block()], True), "no_grad") for block in BLOCKS.values()),
        *((reentrantly([block_of(kind) for _ in range(3)], True, True, True), "no_grad") for kind in BLOCKS),
        *(
            (reentrantly([block_of(kind) for _ in range(3)], None, True, None), r"checkpointing runs .*encoder\.1\b")
            for kind in BLOCKS
        ),
        (nn.Sequential(CheckpointsItself(), ExplicitBlock()), r"checkpointing runs encoder\.0"),
        (reentrantly([Other(), ExplicitBlock()], True, None), r"checkpointing runs encoder, encoder\.0"),
    ],
    ids=[*(f"{which} {kind}" for which in ("the only", "every", "one") for kind in BLOCKS), "itself", "unlike"],
)
def test_reentrant_checkpointing_is_refused(encoder: nn.Module, named: str) -> None:
    """Where some layers are left, they would be regularised under the wrong indices, and the others not at all."""
    model = PlainEncoder(encoder)
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            with pytest.raises(CaptureError, match=rf"{named}.*use_reentrant=False"):
                attention.take()


# ---- passes and layers that do not correspond


def test_passes_that_do_not_correspond_are_refused() -> None:
    model, acr, x = Crops(multihead_vit()), AllPairsConsistencyLoss(HorizontalFlip()), images()

    def both(keep: Any, crops_a: int, crops_b: int) -> tuple[AttentionMaps, AttentionMaps]:
        maps = []
        with capture_attention(model, keep=keep) as attention:
            for side, crops in ((x, crops_a), (x.flip(-1), crops_b)):
                model(side, *(images() for _ in range(crops)))
                maps.append(attention.take())
        return maps[0], maps[1]

    expected = acr(*both("only", 0, 0)).item()
    for crops_a, crops_b in ((3, 0), (0, 3)):
        with pytest.raises(ValueError, match=rf'encoder run {crops_a}\b.*run {crops_b}\b.*keep="first"'):
            acr(*both("last", crops_a, crops_b))
        assert acr(*both("first", crops_a, crops_b)).item() == expected
    assert acr(*both("last", 0, 0)).item() == expected
    assert acr(*both("last", 3, 3)) > 0
    with pytest.raises(CaptureError) as error:
        both("only", 3, 0)
    assert says(error, "4 encoder runs", 'keep="first"')


class LayerDrop(nn.Sequential):
    """Leaves out some of its blocks, as the test says and not at random."""

    dropped: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self):
            x = x if index in self.dropped else block(x)
        return x


@every_block
@cold_and_warm
def test_layers_that_do_not_correspond_are_refused(block: Callable[[], nn.Module], warm: bool) -> None:
    acr, x = AllPairsConsistencyLoss(HorizontalFlip()), images()
    model = PlainEncoder(LayerDrop(*(block() for _ in range(4))))
    with capture_attention(model) as attention:

        def take(side: Tensor, *dropped: int) -> AttentionMaps:
            model.encoder.dropped = dropped
            model(side)
            return attention.take()

        if warm:
            take(x)
        maps = take(x, 1)
        with pytest.raises(ValueError, match=r"encoder\.2\b.*encoder\.1\b.*LayerDrop"):
            acr(maps, take(x.flip(-1), 2))
        with pytest.raises(ValueError, match=r"layers \(0, 1, 2\).*\(0, 1, 2, 3\)"):
            acr(maps, take(x.flip(-1)))
        assert acr(maps, take(x.flip(-1), 1)) > 0


# ---- batches without an image


@pytest.mark.parametrize("need_weights", [False, True])
@cold_and_warm
def test_a_batch_of_no_images_is_refused_and_the_next_one_captured(need_weights: bool, warm: bool) -> None:
    model, x = multihead_vit(need_weights=need_weights), images()
    output, maps = plain_pass(model, x)
    with capture_attention(model) as attention:
        if warm:
            model(x)
            attention.take()
        assert model(x[:0]).shape[0] == 0
        with pytest.raises(CaptureError) as error:
            attention.take()
        assert says(error, "0 images", "clear()")
        assert torch.equal(model(x), output)
        assert all(torch.equal(a, b) for a, b in zip(attention.take().weights(), maps.weights(), strict=True))
