"""Capture: every layer of every run, on the graph, and nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acr_reg import (
    AllPairsConsistencyLoss,
    CaptureError,
    HorizontalFlip,
    LayoutError,
    capture_attention,
)
from tests.support.models import (
    CASES,
    Case,
    ExplicitBlock,
    MultiheadBlock,
    PlainEncoder,
    every_model,
    explicit_vit,
    multihead_vit,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(batch: int = 2, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randn(batch, 3, *size)


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )


def modes() -> int:
    from torch.overrides import _len_torch_function_stack as depth  # the only way to see a mode left behind

    return depth()


# ---- what is captured


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


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_image_of_another_size_gives_another_grid(implementation: str) -> None:
    case = next(c for c in CASES if c.name == f"transformers-registers-{implementation}")
    with capture_attention(model := case.build()) as attention:
        model(images(size=(48, 80)))
        layout = attention.take()[0].layout
    assert (layout.query.height, layout.query.width, layout.num_prefix_tokens) == (3, 5, 5)


# ---- entry points, runs


def test_any_entry_point() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=5)
    with capture_attention(model) as attention:
        for _ in range(2):
            model.forward_features(images())
            assert len(attention.take()) == 12
            model(images())
            assert len(attention.take()) == 12
    wrapper = nn.Sequential(model)
    with capture_attention(wrapper) as attention:
        model(images())
        assert len(attention.take()) == 12


def test_a_forward_on_both_views_at_once_chunks() -> None:
    model, view, x = explicit_vit(), HorizontalFlip(), images()
    with capture_attention(model) as attention:
        model(torch.cat([x, view(x)]))
        both = attention.take()
        model(x)
        alone = attention.take()
    a, b = both.chunk(2)
    assert a.batch_size == b.batch_size == 2
    torch.testing.assert_close(a[1].weights(), alone[1].weights())
    quarters = [part.weights()[0] for half in (a, b) for part in half.chunk(2)]
    assert torch.equal(torch.cat(quarters), both.weights()[0])
    with pytest.raises(ValueError, match=r"batch of 4 .* multiple of 3"):
        both.chunk(3)


def test_only_one_untaken_run_is_allowed_and_its_tensors_are_released() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        model(images(2))
        first = weakref.ref(attention._recorder.log.runs[0].calls[0].recorded.map)
        model(images(3))
        gc.collect()
        assert first() is None
        with pytest.raises(CaptureError, match=r"2 encoder runs.*\(2, 4, 25, 25\).*\(3, 4, 25, 25\).*keep=\"first\""):
            attention.take()
        model(images(1))
        assert attention.take().batch_size == 1
        with pytest.raises(CaptureError, match=r"No token-to-token attention.*since the last take\(\)"):
            attention.take()
        model(images(2))
        attention.clear()
        model(images(1))
        assert attention.take().batch_size == 1


@pytest.mark.parametrize(("keep", "expected"), [("first", 1), ("last", 3)])
def test_first_and_last_run(keep: str, expected: int) -> None:
    model = multihead_vit()
    with capture_attention(model, keep=keep) as attention:
        for _ in range(2):
            for batch in (1, 2, 3):
                model(images(batch))
            kept = [run for run in attention._recorder.log.runs if run.calls]
            assert len(kept) == 1, "the other runs' tensors are released"
            assert attention.take().batch_size == expected


def test_all_runs() -> None:
    model = multihead_vit()
    with capture_attention(model, keep="all") as attention:
        for batch in (1, 2, 3):
            model(images(batch))
        assert [maps.batch_size for maps in attention.take_all()] == [1, 2, 3]
        for batch in (1, 2, 3):
            model(images(batch))
        with pytest.raises(CaptureError, match=r"3 encoder runs.*take\(0\) to take\(2\)"):
            attention.take()
        model(images(4)), model(images(5))
        assert attention.take(1).batch_size == 5
        model(images(4))
        assert attention.take().batch_size == 4


def test_several_encoder_passes_in_one_call_are_several_runs() -> None:
    class Crops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = explicit_vit()

        def forward(self, x: Tensor, crops: Tensor) -> Tensor:
            return self.encoder(x).sum() + self.encoder(crops).sum()

    model = Crops()
    with capture_attention(model, keep="first") as attention:
        for _ in range(2):
            model(images(1), images(6))
            assert attention.take().batch_size == 1


def test_layers_and_modules_choose() -> None:
    model = multihead_vit(depth=3)
    with capture_attention(model, layers=[-1, 0]) as attention:
        model(images())
        assert attention.take().layers == (2, 0)
    with capture_attention(model, modules=["encoder.1"]) as attention:
        model(images())
        (layer,) = attention.take()
        assert layer.name == "encoder.1.attention"
    with pytest.raises(ValueError, match=r"'encoder.9' is no module of .*modules=.*'encoder'"):
        capture_attention(model, modules=["encoder.9"])
    with capture_attention(model, layers=[7]) as attention:
        model(images())
        with pytest.raises(IndexError, match=r"\[7\].*layers= among \[0, 1, 2\]"):
            attention.take()


def test_a_block_registered_twice_runs_twice_in_one_run() -> None:
    shared = ExplicitBlock()
    model = PlainEncoder(nn.Sequential(shared, ExplicitBlock(), shared))
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            assert len(attention.take()) == 3


# ---- what is recorded


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


def test_other_attention_is_skipped_by_name_and_reason() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attention = MultiheadBlock(False)
            self.cross = nn.MultiheadAttention(32, 4, batch_first=True)
            self.pool = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.self_attention(x)
            x = self.cross(x, x.flip(1), x.flip(1), need_weights=False)[0]
            F.softmax(x, dim=1)
            return self.pool(x[:, :1], x, x, need_weights=False)[0].expand(-1, 25, -1)

    model = PlainEncoder(Decoder())
    with capture_attention(model) as attention:
        model(images())
        (layer,) = attention.take()
    assert layer.name == "encoder.self_attention.attention"
    reasons = dict(attention.skipped)
    assert "cross-attention" in reasons["encoder.cross"]
    assert "encoder.pool" in reasons


# ---- failures that must be loud


def test_nothing_captured_says_what_to_check() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with capture_attention(model) as attention:
        model(images())
        with pytest.raises(CaptureError, match=r"No token-to-token attention of Sequential.*Run this model"):
            attention.take()


def test_runs_under_no_grad_are_recorded_only_when_asked() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention, torch.no_grad():
        model(images())
        assert modes() == 0
        with pytest.raises(CaptureError, match=r"ran under torch.no_grad: capture with no_grad=True"):
            attention.take()
    with capture_attention(model, no_grad=True) as attention, torch.no_grad():
        model(images())
        assert not attention.take()[0].requires_grad


def test_no_grad_passes_between_steps_do_not_disturb() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        for _ in range(3):
            with torch.no_grad():
                model(images(3)), model(images(5))
            model(images(2))
            assert attention.take().batch_size == 2


def test_a_grid_that_cannot_be_known_is_an_error_where_it_is_needed() -> None:
    model = MultiheadBlock(False)
    with capture_attention(model) as attention:
        model(torch.randn(2, 25, 32))
        maps = attention.take()
        assert maps[0].weights().shape == (2, 4, 25, 25)
        with pytest.raises(LayoutError, match=r"25 tokens.*no module was given an image.*with_layout"):
            AllPairsConsistencyLoss(HorizontalFlip())(maps, maps)
        placed = maps.with_layout(grid=(4, 6), num_prefix_tokens=1)
        assert AllPairsConsistencyLoss(HorizontalFlip())(placed, placed) > 0
        with pytest.raises(LayoutError, match=r"25 queries and 25 keys.*for 24 "):
            maps.with_layout(grid=(4, 6), num_prefix_tokens=0)


def test_bad_arguments_leave_no_hook_behind() -> None:
    model = explicit_vit()
    with pytest.raises(ValueError, match=r"keep='some'.*.only., .first."):
        capture_attention(model, keep="some")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model is a str.*torch\.nn\.Module"):
        capture_attention("vit")  # type: ignore[arg-type]
    assert hooks(model) == 0


# ---- life cycle


def test_every_end_of_a_capture_restores_the_model() -> None:
    model = explicit_vit()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with capture_attention(model) as attention:
        assert hooks(model) > 0
    assert hooks(model) == 0
    attention.remove()
    with pytest.raises(CaptureError, match=r"removed.*capture_attention\(model\) again"):
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


def test_maps_are_freed_with_the_last_reference() -> None:
    model = multihead_vit()
    with capture_attention(model) as attention:
        model(images())
        maps = attention.take()
        probe = weakref.ref(maps[0].recorded.query)
        maps = None
        gc.collect()
        assert probe() is None


def test_worker_threads_are_captured() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        model(images())
        attention.take()
        worker = threading.Thread(target=model, args=(images(3),))
        worker.start()
        worker.join()
        assert attention.take().batch_size == 3


# ---- training reality


def test_autocast_maps_are_half_and_read_in_float32() -> None:
    for build in (explicit_vit, multihead_vit):
        model = build()
        with capture_attention(model) as attention, torch.autocast("cpu", dtype=torch.bfloat16):
            model(images())
            layer = attention.take()[0]
            assert layer.query is None or layer.query.dtype == torch.bfloat16
            assert layer.weights().dtype == torch.float32
            assert (layer.weights().sum(-1) - 1).abs().max() < 5e-3


def test_non_reentrant_checkpointing_gives_the_same_gradient() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module, reentrant: bool | None) -> None:
            super().__init__()
            self.block, self.reentrant = block, reentrant

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)

    for block in (ExplicitBlock, lambda: MultiheadBlock(False)):
        model, x = PlainEncoder(Checkpointed(block(), None)), images()
        gradients = []
        for reentrant in (None, False):
            model.encoder.reentrant = reentrant
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
        model.encoder.reentrant = True
        with capture_attention(model) as attention:
            model(x)
            with pytest.raises(CaptureError, match="use_reentrant=False"):
                attention.take()


def test_double_backward_runs_the_differentiable_kernel() -> None:
    model, x = multihead_vit(), images()
    with capture_attention(model, double_backward=True) as attention:
        out = model(x)
        layer = attention.take()[0]
        torch.testing.assert_close(out, model(x))
    (first,) = torch.autograd.grad(out[:, 0].sum(), layer.recorded.query, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), model.head.weight)[0].abs().max() > 0


# ---- what reviewers found


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


def test_runs_that_nobody_takes_do_not_pile_up() -> None:
    model = explicit_vit(1)
    for keep in ("only", "last", "first"):
        with capture_attention(model, keep=keep) as attention:
            for _ in range(20):
                model(images(1))
            assert len(attention._recorder.log.runs) <= 8
            if keep == "only":
                with pytest.raises(CaptureError, match="8 or more encoder runs"):
                    attention.take()
            else:
                assert len(attention.take()) == 1


def test_images_padded_by_the_model_are_warned_of_once() -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, num_classes=5, depth=1
    )
    with capture_attention(model) as attention:
        model(images(size=(32, 48)))
        attention.take()
    with capture_attention(model) as attention:
        model(images(size=(26, 42)))
        with pytest.warns(UserWarning, match=r"26 x 42 px to 32 x 48.*up to 6 px"):
            attention.take()
        model(images(size=(26, 42)))
        attention.take()


def test_no_image_outlives_its_run() -> None:
    model = explicit_vit(1)
    with capture_attention(model) as attention:
        batch = images()
        model.proj(batch)
        probe = weakref.ref(batch)
        del batch
        gc.collect()
        assert probe() is None
        model(images())
        assert len(attention.take()) == 1


@pytest.mark.parametrize("size", [(48, 48), (48, 80)])
def test_grids_of_models_that_take_any_size(size: tuple[int, int]) -> None:
    import timm
    import transformers as tf

    common = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = tf.ViTForImageClassification(tf.ViTConfig(image_size=32, patch_size=16, **common))
    clip = tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(image_size=32, patch_size=16, **common))
    flexible = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=5, depth=1)
    for model, options in (
        (flexible, {}),
        (vit, {"interpolate_pos_encoding": True}),
        (clip, {"interpolate_pos_encoding": True}),
    ):
        with capture_attention(model) as attention:
            model(images(size=size), **options)
            layout = attention.take()[0].layout
        assert (layout.query.height, layout.query.width) == (size[0] // 16, size[1] // 16)
        assert layout.query.extent == size
        assert layout.num_prefix_tokens == 1
