"""Maps without a graph, with one that is gone, and on one that begins above frozen layers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionCapture,
    AttentionMaps,
    HorizontalFlip,
    capture_attention,
    class_token_gradient_cam,
)
from tests.support.attention import says
from tests.support.capturing import images
from tests.support.models import ExplicitBlock, MultiheadBlock, explicit_vit, multihead_vit
from tests.support.models.plain import Builder, checkpointed, every_kind

# ---- maps without a graph, or with one that is gone


def views_of(model: nn.Module, attention: AttentionCapture, x: Tensor) -> tuple[Tensor, AttentionMaps, AttentionMaps]:
    logits_a, maps_a = model(x), attention.take()
    logits_b, maps_b = model(x.flip(-1)), attention.take()
    return logits_a.sum() + logits_b.sum(), maps_a, maps_b


@every_kind
def test_maps_without_a_graph_are_refused_where_the_loss_needs_one(build: Builder) -> None:
    model, acr, x = build(), AllPairsConsistencyLoss(HorizontalFlip()), images()
    with capture_attention(model, no_grad=True) as attention:
        with torch.no_grad():
            _, maps_a, maps_b = views_of(model, attention, x)
            value = acr(maps_a, maps_b)
        with pytest.raises(ValueError, match="no gradient") as error:
            acr(maps_a, maps_b)
        assert says(error, "layers (0, 1)", "torch.no_grad")
        _, learning, other = views_of(model, attention, x)
        torch.testing.assert_close(acr(learning, maps_b).detach(), value)  # a teacher's side needs none
        with pytest.raises(ValueError, match="no gradient"):
            acr(learning.detach(), other.detach())
    model.requires_grad_(False)
    with capture_attention(model) as attention:
        _, maps_a, maps_b = views_of(model, attention, x)
        with pytest.raises(ValueError, match=r"no gradient.*quer(y|ies) and key"):
            acr(maps_a, maps_b)


GRAPHS = {
    "explicit": (explicit_vit, False),
    "fused": (multihead_vit, False),
    "weights asked for": (lambda: multihead_vit(need_weights=True), False),
    "math kernel": (multihead_vit, True),
    "checkpointed explicit": (checkpointed(ExplicitBlock), False),
    "checkpointed fused": (checkpointed(lambda: MultiheadBlock(False)), False),
    "checkpointed math kernel": (checkpointed(lambda: MultiheadBlock(False)), True),
}


every_graph = pytest.mark.parametrize(("build", "double_backward"), GRAPHS.values(), ids=GRAPHS)


@every_graph
@pytest.mark.parametrize("offloaded", [False, True], ids=["kept", "save_on_cpu"])
@pytest.mark.parametrize("freed_by", ["the loss", "the logits"])
def test_maps_whose_graph_backward_has_freed_are_refused(
    build: Builder, double_backward: bool, offloaded: bool, freed_by: str
) -> None:
    model, acr, x = build(), AllPairsConsistencyLoss(HorizontalFlip()), images()
    with capture_attention(model, double_backward=double_backward) as attention:
        with torch.autograd.graph.save_on_cpu() if offloaded else nullcontext():
            logits, maps_a, maps_b = views_of(model, attention, x)
        loss = acr(maps_a, maps_b)
        expected = loss.item()
        (loss + logits if freed_by == "the loss" else logits).backward()
        for pair, side in (((maps_a, maps_b), "a"), ((maps_a.detach(), maps_b), "b"), ((maps_a, maps_b.detach()), "a")):
            with pytest.raises(ValueError, match=rf"already freed .* attn_{side}\b.*anew"):
                acr(*pair)
        with torch.no_grad():
            torch.testing.assert_close(acr(maps_a, maps_b).item(), expected)  # the values can still be looked at
        _, fresh_a, fresh_b = views_of(model, attention, x)
        with pytest.raises(ValueError, match=r"already freed .* attn_b\b"):
            acr(fresh_a, maps_b)  # the maps of the step before
        acr(fresh_a, fresh_b).backward()


@every_graph
@pytest.mark.parametrize("offloaded", [False, True], ids=["kept", "save_on_cpu"])
def test_a_graph_that_is_kept_serves_as_often_as_one_likes(
    build: Builder, double_backward: bool, offloaded: bool
) -> None:
    model, acr, x = build(), AllPairsConsistencyLoss(HorizontalFlip()), images()
    with capture_attention(model, double_backward=double_backward) as attention:
        with torch.autograd.graph.save_on_cpu() if offloaded else nullcontext():
            logits, maps_a, maps_b = views_of(model, attention, x)
        gradients = []
        for _ in range(2):
            model.zero_grad()
            logits.backward(retain_graph=True)
            acr(maps_a, maps_b).backward(retain_graph=True)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) > 4
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_graph
def test_a_step_within_save_on_cpu_gives_the_gradient_of_one_without(build: Builder, double_backward: bool) -> None:
    """Looking whether the graph is alive must neither need the hooks off nor set them off."""
    model, acr, x, gradients = build(), AllPairsConsistencyLoss(HorizontalFlip()), images(), []
    with capture_attention(model, double_backward=double_backward) as attention:
        for saving in (nullcontext(), torch.autograd.graph.save_on_cpu()):
            model.zero_grad()
            with saving:
                logits, maps_a, maps_b = views_of(model, attention, x)
                (logits + acr(maps_a, maps_b)).backward()
                gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
                with pytest.raises((ValueError, RuntimeError), match=r"already freed|second time"):
                    acr(maps_a, maps_b).backward()
    for plain, offloaded in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, offloaded)


@every_kind
def test_a_cam_on_a_graph_that_backward_has_freed_is_refused(build: Builder) -> None:
    model = build().eval()
    with capture_attention(model) as attention:
        logits = model(images())
        maps = attention.take()
        logits.sum().backward()
        with pytest.raises(RuntimeError, match="already freed") as error:
            class_token_gradient_cam(logits, maps)
        assert says(error, "before loss.backward()", "retain_graph=True")
        other = model(images())
        with pytest.raises(ValueError, match="do not depend on these maps") as error:
            class_token_gradient_cam(other, maps)
        assert says(error, "same forward")


@pytest.mark.parametrize("build", [lambda **k: multihead_vit(**k), explicit_vit], ids=["fused", "explicit"])
def test_attention_dropout_is_refused_where_it_breaks_the_identity_of_the_cam(build: Any) -> None:
    model, x = build(dropout=0.3).train(), images()
    with capture_attention(model) as attention:
        for training in (True, False):
            model.train(training)
            logits, maps = model(x), attention.take()
            assert [layer.dropout for layer in maps] == [0.3 * training] * 2
            if training and maps[0].is_factored:
                with pytest.raises(ValueError, match=r"dropout 0\.3") as error:
                    class_token_gradient_cam(logits, maps)
                assert says(error, "layer 0 (encoder.0.attention)", "eval mode")
            else:
                assert class_token_gradient_cam(logits, maps).amax((2, 3)).min() > 0


# ---- a frozen backbone


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: explicit_vit(4), id="explicit"),
        pytest.param(lambda: multihead_vit(4), id="fused"),
        pytest.param(lambda: multihead_vit(4, need_weights=True), id="weights asked for"),
    ],
)
@pytest.mark.parametrize("graph_from", [0, 1, 2, -2])
def test_graph_from_gives_the_cam_of_a_wholly_frozen_model(build: Builder, graph_from: int) -> None:
    # In training mode, because nn.MultiheadAttention without any gradient otherwise takes torch's inference path.
    model, x = build().train(), images()
    with capture_attention(model) as attention:
        expected = class_token_gradient_cam(model(x), attention.take(), start_layer=graph_from)
    assert expected.amax() > 0
    model.requires_grad_(False)
    output = model(x)
    with capture_attention(model) as attention:
        logits = model(x)
        with pytest.raises(ValueError, match="no graph") as error:
            class_token_gradient_cam(logits, attention.take(), start_layer=graph_from)
        assert says(error, f"layer {graph_from % 4} (", "capture_attention(model, graph_from=)")
    with capture_attention(model, graph_from=graph_from) as attention:
        if graph_from < 0:  # counts from the last layer of a run that was taken
            assert torch.equal(model(x), output)
            attention.take()
        for _ in range(2):
            logits, maps = model(x), attention.take()
            assert torch.equal(logits, output)
            found = class_token_gradient_cam(logits, maps, start_layer=graph_from)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            first = graph_from % 4
            for layer in maps:
                recorded = layer.recorded
                below = [recorded.query, recorded.key, recorded.value]  # those of the first layer lie below the graph
                tensors = [t for t in (*below, recorded.output, recorded.map) if t is not None]
                if layer.index < first:
                    assert not any(t.requires_grad for t in tensors), f"layer {layer.index} has a graph"
                if layer.index == first:
                    assert not any(t.requires_grad for t in below if t is not None)
                    assert [t.is_leaf for t in tensors if t.requires_grad] == [True]
                if layer.index > first:
                    assert all(t.grad_fn is not None for t in tensors)
            if first:
                with pytest.raises(ValueError, match="no graph") as error:
                    class_token_gradient_cam(logits, maps, start_layer=0)
                assert says(error, f"layer {first - 1} (", "graph_from=")
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        with torch.no_grad():
            assert not model(x).requires_grad


@every_kind
def test_graph_from_leaves_a_model_that_learns_as_it_is(build: Builder) -> None:
    model, x = build().eval(), images()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    with capture_attention(model, graph_from=0) as attention:
        logits, maps = model(x), attention.take()
        tensors = [t for layer in maps for t in (layer.recorded.output, layer.recorded.map) if t is not None]
        assert not any(t.is_leaf for t in tensors)
        found = torch.autograd.grad(logits.square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
