"""From the scores to the map that meets the values, however a model writes it; and what is recorded of it."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import CaptureError, capture_attention
from tests.support.attention import says
from tests.support.capturing import affinity_loss, captured, grids, images, kinds
from tests.support.models import CASES, Case, ExplicitBlock, PlainEncoder, every_model, explicit_vit, multihead_vit
from tests.support.models.spellings import (
    MIXED,
    WRITTEN,
    Differential,
    DroppedInPlace,
    OneHeadWithoutItsAxis,
    TalkingHeads,
)
from tests.support.models.tokens import GRID, Attention, Tokens

# ---- plain models


@every_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_layer_is_captured_as_the_model_computed_it(case: Case, training: bool) -> None:
    model, x = case.build().train(training), images(size=case.image)
    with capture_attention(model, record_products=True) as attention:  # keeps A V of unfused layers too
        for _ in range(2):  # the first run watches every module, the second only those of attention
            torch.manual_seed(1)
            case.logits(model(x))
            maps = attention.take()
            assert maps.layers == tuple(range(case.num_layers))
            assert attention.skipped == ()
            for layer in maps:
                assert layer.is_factored == case.factored
                assert layer.layout.num_prefix_tokens == case.prefix
                assert (layer.layout.query.height, layer.layout.query.width) == case.grid
                assert layer.layout.class_tokens == (0,)
                weights = layer.weights()
                assert (weights.sum(-1) - 1).abs().max() < 1e-5
                if layer.dropout == 0:
                    output = layer.output.reshape(weights.shape[0], weights.shape[1], weights.shape[2], -1)
                    error = (weights @ layer.value - output).norm() / output.norm()
                    assert error < 1e-5


@every_model
def test_outputs_do_not_change_by_a_bit(case: Case) -> None:
    model, x = case.build(), images(size=case.image)
    for training in (True, False):
        model.train(training)
        torch.manual_seed(1)
        expected = case.logits(model(x))
        expected_grads = torch.autograd.grad(
            expected.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        with capture_attention(model):
            for _ in range(2):
                torch.manual_seed(1)
                found = case.logits(model(x))
                assert torch.equal(found, expected)
            grads = torch.autograd.grad(
                found.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
            )
        assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True) if e is not None)


@every_model
def test_gradient_reaches_query_and_key_weights_of_every_layer(case: Case) -> None:
    model = case.build().train()
    with capture_attention(model) as attention:
        model(images(size=case.image))
        maps = attention.take()
        for layer in maps:
            module = model.get_submodule(layer.name)
            parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and "weight" in n}
            loss = layer.weights()[:, :, 0].square().sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            found = dict(zip(parameters, gradients, strict=True))
            joint = [g for n, g in found.items() if "qkv" in n or "in_proj" in n]
            apart = [g for n, g in found.items() if any(k in n for k in ("query", "key", "q_proj", "k_proj"))]
            reached = [part for g in joint for part in g.chunk(3)[:2]] if joint else apart
            assert len(reached) == 2, list(found)
            assert all(g is not None and g.abs().max() > 0 for g in reached)


@pytest.mark.parametrize("name", ["vit", "distilled", "registers"])
def test_fused_and_unfused_maps_agree(name: str) -> None:
    fused, unfused = (next(c for c in CASES if c.name == f"timm-{name}-{kind}") for kind in ("fused", "unfused"))
    model, x = fused.build().eval(), images(size=fused.image)
    other = unfused.build().eval()
    other.load_state_dict(model.state_dict())
    with capture_attention(model) as one, capture_attention(other) as two:
        model(x), other(x)
        for a, b in zip(one.take().weights(), two.take().weights(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ---- every way to write the two products


@pytest.mark.parametrize("build", WRITTEN)
@pytest.mark.parametrize("checks", [True, False], ids=["for checks", "as users do"])
def test_however_the_products_are_written_the_map_is_the_one_that_met_the_values(
    build: type[Attention], checks: bool
) -> None:
    model = Tokens(build())
    (layer,) = maps = captured(model, images(), checks)[0]
    heads = 1 if build is OneHeadWithoutItsAxis else 4
    assert layer.kind == "global"
    assert layer.shape == (2, heads, 24, 24)
    assert layer.stochastic
    assert grids(layer) == (GRID, GRID)
    seen = model.blocks[0].seen
    assert torch.equal(layer.weights().flatten(), seen.flatten())
    with capture_attention(model) as attention:  # and the logits depend on it
        logits = model(images())
        (gradient,) = torch.autograd.grad(logits.sum(), attention.take()[0].recorded.map)
    assert gradient.abs().max() > 0
    assert affinity_loss(distance="js")(maps, maps) > 0


def test_a_second_product_with_a_map_is_no_layer() -> None:
    class Refining(PlainEncoder):
        """As MCTformer does: class maps are refined by the attention of the blocks."""

        def forward(self, images: Tensor) -> Tensor:
            maps = []
            for block in self.encoder:
                block.drop.register_forward_hook(lambda _m, _i, out: maps.append(out))
            logits = super().forward(images)
            patches = sum(a.mean(1) for a in maps)[:, 1:, 1:]
            return logits + (patches @ patches.new_ones(len(images), 24, 5)).mean(1)

    model = Refining(nn.Sequential(ExplicitBlock(), ExplicitBlock()))
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            assert [layer.name for layer in attention.take()] == ["encoder.0", "encoder.1"]


# ---- maps that are mixed after the softmax


@pytest.mark.parametrize("name", MIXED)
def test_mixed_maps_are_the_operand_that_meets_the_values_and_no_probabilities(name: str) -> None:
    model, x = Tokens(Attention(), MIXED[name]()), images()
    maps, skipped = captured(model, x)
    assert skipped == {}
    assert [layer.name for layer in maps] == ["blocks.0", "blocks.1"]  # one layer each, whatever the softmaxes
    assert [layer.stochastic for layer in maps] == [True, False]
    assert kinds(maps) == ["global", "global"]
    assert torch.equal(maps[1].weights(), model.blocks[1].seen)
    with capture_attention(model) as attention:
        logits = model(x)
        (gradient,) = torch.autograd.grad(logits.sum(), attention.take()[1].recorded.map)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", MIXED)
def test_js_is_refused_for_mixed_maps(name: str) -> None:
    maps, _ = captured(Tokens(Attention(), MIXED[name]()), images())
    with pytest.raises(ValueError, match="mixed after softmax") as error:
        affinity_loss(distance="js")(maps, maps)
    assert says(error, "layer 1 (blocks.1)", 'distance="l1"')
    for distance in ("l1", "l2"):
        loss, terms = affinity_loss(distance=distance)(maps, maps, return_terms=True)
        assert loss > 0
        plain = affinity_loss(distance=distance, layers=[0])(maps, maps, return_terms=True)[1]
        assert terms["entropy"] == plain["entropy"]
    assert affinity_loss(distance="js", layers=[0])(maps, maps) > 0


@pytest.mark.parametrize(
    "by",
    [
        "einsum",
        "matmul",
        "einsum with a computed matrix",
        "einsum with a computed matrix first",
        "einsum with a matrix for each image",
    ],
)
def test_heads_mixed_by_a_product_are_one_mixed_layer(by: str) -> None:
    """DeepViT mixes heads by an einsum: the product with the mixing matrix is none with values."""
    model = Tokens(TalkingHeads(by))
    (layer,) = captured(model, images(), checks=False)[0]
    assert layer.kind == "global"
    assert layer.shape == (2, 4, 24, 24)
    assert not layer.stochastic
    assert torch.equal(layer.weights(), model.blocks[0].seen)


# ---- dropout


def test_dropout_in_place_leaves_no_probabilities_and_says_so() -> None:
    """What the softmax gave is overwritten: the map is what met the values, zeros and all."""
    model = Tokens(DroppedInPlace()).train()
    with capture_attention(model) as attention:
        for _ in range(2):
            logits = model(images())
            (layer,) = maps = attention.take()
            assert layer.dropout == 0.5
            assert not layer.stochastic
            assert torch.equal(layer.weights(), model.blocks[0].seen)
            assert (layer.weights() == 0).float().mean() > 0.3
        (gradient,) = torch.autograd.grad(logits.sum(), layer.recorded.map)
        assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match="mixed after softmax"):
        affinity_loss(distance="js")(maps, maps)


@pytest.mark.parametrize(("inplace", "training"), [(True, False), (False, True), (False, False)])
def test_dropout_that_overwrites_nothing_leaves_probabilities(inplace: bool, training: bool) -> None:
    model = Tokens(DroppedInPlace(inplace)).train(training)
    (layer,) = maps = captured(model, images())[0]
    assert layer.stochastic
    assert layer.dropout == (0.5 if training else 0.0)
    assert (layer.weights().sum(-1) - 1).abs().max() < 1e-5
    assert affinity_loss(distance="js")(maps, maps) > 0


def test_recorded_is_the_probability_before_dropout() -> None:
    for build in (explicit_vit, lambda **kw: multihead_vit(need_weights=True, **kw), multihead_vit):
        model = build(dropout=0.5).train()
        with capture_attention(model) as attention:
            model(images())
            for layer in attention.take():
                assert layer.dropout == 0.5
                assert (layer.weights().sum(-1) - 1).abs().max() < 1e-5
        model.eval()
        with capture_attention(model) as attention:
            model(images())
            assert all(layer.dropout == 0 for layer in attention.take())


# ---- kernels


def test_two_kernels_in_one_module_are_two_layers_of_one_run() -> None:
    model = Tokens(Differential(), Attention(), Differential())
    with capture_attention(model, keep="all") as attention:
        for _ in range(2):
            model(images())
            (maps,) = attention.take_all()
            assert [layer.name for layer in maps] == [f"blocks.{i}" for i in (0, 0, 1, 2, 2)]
            assert maps.layers == (0, 1, 2, 3, 4)
            assert not torch.equal(maps[0].weights(), maps[1].weights())
            assert all(layer.stochastic for layer in maps)
        model(images(1)), model(images(3))
        assert [maps.batch_size for maps in attention.take_all()] == [1, 3]
    assert affinity_loss()(maps, maps) > 0


def test_masks_biases_causality_scale_and_grouped_keys_are_part_of_the_map() -> None:
    class Masked(nn.Module):
        def __init__(self, **options: object) -> None:
            super().__init__()
            self.options = options

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **self.options)

    q, k, v = (torch.randn(2, 4, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 1, 7, 7, dtype=torch.float64)
    allowed = torch.rand(7, 7) > 0.3
    allowed.fill_diagonal_(True)
    for options in ({"attn_mask": bias}, {"attn_mask": allowed}, {"is_causal": True}, {"scale": 0.7}):
        model = Masked(**options)
        with capture_attention(model) as attention:
            out = model(q, k, v)
            layer = attention.take()[0]
            torch.testing.assert_close(layer.weights() @ v, out)
            order = torch.randperm(7)
            permuted = layer.weights(queries=order[:3], keys=order)
            torch.testing.assert_close(permuted, layer.weights()[:, :, order[:3]][..., order])
    with capture_attention(model := Masked(attn_mask=bias)) as attention:
        model(q, k, v)
        halves = attention.take().chunk(2)
        torch.testing.assert_close(
            torch.cat([h[0].weights() for h in halves]), ((q @ k.mT) * 8**-0.5 + bias).softmax(-1)
        )


def test_autocast_maps_are_half_and_read_in_float32() -> None:
    for build in (explicit_vit, multihead_vit):
        model = build()
        with capture_attention(model) as attention, torch.autocast("cpu", dtype=torch.bfloat16):
            model(images())
            layer = attention.take()[0]
            assert layer.query is None or layer.query.dtype == torch.bfloat16
            assert layer.weights().dtype == torch.float32
            assert (layer.weights().sum(-1) - 1).abs().max() < 5e-3


def test_double_backward_runs_the_differentiable_kernel() -> None:
    model, x = multihead_vit(), images()
    with capture_attention(model, double_backward=True) as attention:
        out = model(x)
        layer = attention.take()[0]
        torch.testing.assert_close(out, model(x))
    (first,) = torch.autograd.grad(out[:, 0].sum(), layer.recorded.query, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), model.head.weight)[0].abs().max() > 0


# ---- multi-head attention


def test_two_captures_see_the_same_heads_and_refusals_of_multihead_attention() -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    tokens, others = torch.randn(2, 25, 32), torch.randn(2, 25, 32)
    with capture_attention(module) as one, capture_attention(module) as two:
        module(tokens, tokens, tokens)
        assert one.take()[0].shape == two.take()[0].shape == (2, 4, 25, 25)
        module(tokens, others, others)
        for attention in (one, two):
            with pytest.raises(CaptureError, match="cross-attention"):
                attention.take()


def copy_in_the_manner_of_clip() -> types.FunctionType:
    """torch's function as repositories around CLIP have it in a file of their own: it dispatches to modes itself."""
    public = F.multi_head_attention_forward
    names = {**public.__globals__, "__name__": "clip.attention"}
    names[public.__name__] = types.FunctionType(public.__code__, names, public.__name__, public.__defaults__)
    return names[public.__name__]


@pytest.mark.parametrize("need_weights", [False, True])
def test_copies_of_torchs_multi_head_attention_are_seen_as_it_is(
    need_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.MultiheadAttention(32, 4)
    tokens, others = torch.randn(25, 2, 32, requires_grad=True), torch.randn(25, 2, 32)
    with capture_attention(module) as attention:
        output, _ = module(tokens, tokens, tokens, need_weights=need_weights)
        expected = attention.take()[0].weights()
        monkeypatch.setattr(F, "multi_head_attention_forward", copy_in_the_manner_of_clip())
        again, _ = module(tokens, tokens, tokens, need_weights=need_weights)
        found = attention.take()[0].weights()
        assert torch.equal(again, output) and torch.equal(found, expected)
        assert found.square().sum().grad_fn is not None
        module(tokens, others, others)
        with pytest.raises(CaptureError, match="cross-attention"):
            attention.take()
