"""A graph that starts inside checkpointed layers starts at the same tensors when they are recomputed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acr_reg import CaptureError, capture_attention, class_token_gradient_cam
from tests.support.attention import says
from tests.support.capturing import images
from tests.support.models.plain import BLOCKS, Checkpointed, PlainEncoder

every_block = pytest.mark.parametrize("kind", BLOCKS)
DEPTH = 4


class Stages(nn.Sequential):
    """Several blocks in one checkpoint, as timm's ``checkpoint_seq`` and whole stages of a pyramid."""

    every = 2

    def forward(self, x: Tensor) -> Tensor:
        blocks = [self[i] for i in range(len(self))]
        for begin in range(0, len(blocks), self.every):
            x = checkpoint(run_all, blocks[begin : begin + self.every], x, use_reentrant=False)
        return x


class WholeStage(Stages):
    every = DEPTH


class Nested(nn.Sequential):
    """A checkpoint of all blocks around one of each."""

    def each(self, x: Tensor) -> Tensor:
        for i in range(len(self)):
            x = checkpoint(self[i], x, use_reentrant=False)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.each, x, use_reentrant=False)


def run_all(blocks: list[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def own_blocks(kind: str) -> list[nn.Module]:
    return [BLOCKS[kind]() for _ in range(DEPTH)]


def one_block(kind: str) -> list[nn.Module]:
    return [BLOCKS[kind]()] * DEPTH


def cams(model: nn.Module, graph_from: int, x: Tensor) -> list[Tensor]:
    """The class maps of two images, of their flips, and of two images whose forward ran before the others' backward."""
    found = []
    with capture_attention(model, graph_from=graph_from) as attention:
        for view in (x, x.flip(-1)):
            found.append(class_token_gradient_cam(model(view), attention.take(), start_layer=graph_from))
        runs = [(model(view), attention.take()) for view in (x + 1, x - 1)]
        found += [class_token_gradient_cam(logits, maps, start_layer=graph_from) for logits, maps in runs]
    return found


@every_block
@pytest.mark.parametrize("blocks", [own_blocks, one_block], ids=["own weights", "shared weights"])
@pytest.mark.parametrize("graph_from", [0, 2])
def test_the_class_maps_are_those_of_kept_layers(
    kind: str, blocks: Callable[[str], list[nn.Module]], graph_from: int
) -> None:
    model = PlainEncoder(nn.Sequential(*blocks(kind))).train().requires_grad_(False)
    x = images()
    expected = cams(model, graph_from, x)
    assert all(each.amax() > 0 for each in expected)
    for how in (Checkpointed, Stages, WholeStage, Nested):
        model.encoder = how(*model.encoder)
        for each, right in zip(cams(model, graph_from, x), expected, strict=True):
            torch.testing.assert_close(each, right, rtol=0, atol=1e-6)


@every_block
def test_layers_of_equal_maps_are_told_apart_by_their_module(kind: str) -> None:
    blocks, x = own_blocks(kind), images()
    for block in blocks:
        for name, parameter in block.named_parameters():
            if "qkv" in name or "in_proj" in name:
                nn.init.zeros_(parameter[: 2 * len(parameter) // 3])  # no query, no key: uniform attention
    model = PlainEncoder(nn.Sequential(*blocks)).train().requires_grad_(False)
    expected = cams(model, 2, x)[0]
    assert expected.amax() > 0
    model.encoder = WholeStage(*blocks)
    torch.testing.assert_close(cams(model, 2, x)[0], expected, rtol=0, atol=1e-6)


@every_block
def test_nan_does_not_hide_the_start(kind: str) -> None:
    model = PlainEncoder(WholeStage(*own_blocks(kind))).train().requires_grad_(False)
    with capture_attention(model, graph_from=1) as attention, pytest.raises(ValueError, match="NaN"):
        class_token_gradient_cam(model(images() * torch.nan), attention.take(), start_layer=1)


@every_block
def test_the_graph_outlives_the_maps(kind: str) -> None:
    model = PlainEncoder(WholeStage(*own_blocks(kind))).train().requires_grad_(False)
    with capture_attention(model, graph_from=1) as attention:
        logits = model(images())
        attention.take()
        gc.collect()
        logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@every_block
def test_dropout_is_repeated(kind: str) -> None:
    """Dropout after the layers, whose random state checkpointing restores."""
    blocks = [nn.Sequential(block, nn.Dropout(0.2)) for block in own_blocks(kind)]
    model = PlainEncoder(nn.Sequential(*blocks)).train().requires_grad_(False)
    x, found = images(), []
    for how in (nn.Sequential, WholeStage):
        model.encoder = how(*blocks)
        torch.manual_seed(0)
        found.append(cams(model, 1, x)[0])
    assert found[0].amax() > 0
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@every_block
def test_reentrant_checkpointing_is_refused_by_name(kind: str) -> None:
    encoder = Checkpointed(*own_blocks(kind))
    encoder.reentrant = (None, None, True, None)
    model = PlainEncoder(encoder).train().requires_grad_(False)
    with capture_attention(model, graph_from=1) as attention:
        model(images())
        with pytest.raises(CaptureError, match=r"checkpointing runs .*encoder\.2\b") as error:
            attention.take()
        assert says(error, "use_reentrant=False")
