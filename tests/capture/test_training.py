"""Capture in training as it is run: in half precision, checkpointed, partly frozen."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, CaptureError, HorizontalFlip, capture_attention
from tests.support.capturing import gradients, query_and_key
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder
from tests.support.models.plain import BLOCKS, BUILDERS, Checkpointed, checkpointed

either_kind = pytest.mark.parametrize("kind", BUILDERS)
half_precision = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs torch 2.3 on the CPU")
view = HorizontalFlip()


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 48)


# ---- half precision


@either_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=half_precision)], ids=str)
@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=half_precision)], ids=["plain", "scaled"])
def test_autocast_trains_the_attention_as_float32_does(kind: str, dtype: torch.dtype, scaled: bool) -> None:
    model, x = BUILDERS[kind](3), images()

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


def test_non_reentrant_checkpointing_gives_the_same_gradient() -> None:
    for block in BLOCKS.values():
        model, x = checkpointed(block, depth=1)(), images()
        gradients = []
        for reentrant in (None, False):
            model.encoder.reentrant = (reentrant,)
            model.zero_grad()
            with capture_attention(model) as attention:
                a, b = model(x), None
                attn_a = attention.take()
                b = model(x.flip(-1))
                loss = AllPairsConsistencyLoss(HorizontalFlip())(attn_a, attention.take()) + a.sum() + b.sum()
                loss.backward()
                with pytest.raises(CaptureError):  # what backward recomputed is not a run
                    attention.take()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, recomputed)


# ---- frozen layers


class LowerHalfWithoutGradient(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self[1](self[0](x))
        return self[3](self[2](x))


@either_kind
@pytest.mark.parametrize("by", ["requires_grad", "no_grad"])
def test_a_frozen_lower_half_is_left_out_and_the_upper_half_is_trained(kind: str, by: str) -> None:
    model, x = BUILDERS[kind](4), images()
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
