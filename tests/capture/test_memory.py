"""What capture costs in memory, to the byte: torch's profiler counts every allocation and release on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from acr_reg import AllPairsConsistencyLoss, AttentionCapture, HorizontalFlip, capture_attention
from tests.support.capturing import images
from tests.support.models import CASES, Case, ExplicitBlock, MultiheadBlock, every_model, explicit_vit, multihead_vit
from tests.support.models.plain import Checkpointed, checkpointed

pytestmark = pytest.mark.usefixtures("no_collector")
FLOAT = 4  # bytes


def used(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that are held once ``run`` has returned, with what it returned, and the most there were at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns() if hasattr(event, "start_ns") else event.start_us())
    assert events, "the profiler saw no memory"
    del held
    total = peak = 0
    for event in events:
        total += event.nbytes()
        peak = max(peak, total)
    return total, peak


def with_gradients(model: nn.Module, x: Tensor) -> nn.Module:
    """Its gradients exist before anything is counted."""
    model(x).sum().backward()
    return model


def timm_fused() -> nn.Module:
    return next(case for case in CASES if case.name == "timm-vit-fused").build()


def units(attention: AttentionCapture, model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes of one (B, N, D) tensor of every layer, and of one (B, H, N, N) map of every layer."""
    model(x)
    maps = attention.take()
    tokens = maps[0].shape[2]
    width = next(m.weight.shape[1] for m in model.modules() if isinstance(m, nn.Linear))
    return len(maps) * 2 * tokens * width * FLOAT, sum(torch.Size(layer.shape).numel() for layer in maps) * FLOAT


def test_the_count_is_exact() -> None:
    kept: list[Tensor] = []

    def run() -> Tensor:
        kept.append(torch.empty(1000))
        torch.empty(5000)
        return torch.empty(10, 30)

    assert used(run) == (1300 * FLOAT, 6000 * FLOAT)


@every_model
def test_while_the_graph_lives_capture_holds_nothing_of_its_own(case: Case) -> None:
    model, x = case.build().eval(), images(size=case.image)

    def plain() -> object:
        return model(x)

    def captured() -> object:
        return model(x), attention.take()

    plain()
    expected = used(plain)
    with capture_attention(model) as attention:
        assert used(captured)[0] == expected[0], "every module is watched"
        assert used(captured) == expected, "only those of attention are, and the peak is no higher either"


@pytest.mark.parametrize(("build", "outputs"), [(explicit_vit, 0), (multihead_vit, 1)])
def test_with_dropout_a_fused_layer_holds_its_output_that_the_cpu_kernel_does_not(
    build: Callable[..., nn.Module], outputs: int
) -> None:
    model, x = build(dropout=0.3).train(), images()
    expected, _ = used(lambda: model(x))
    with capture_attention(model) as attention:
        unit, _ = units(attention, model, x)
        assert used(lambda: (model(x), attention.take()))[0] - expected <= outputs * unit


@pytest.mark.parametrize("build", [timm_fused, multihead_vit])
def test_maps_that_outlive_the_loss_hold_no_more_than_its_graph_does(build: Callable[[], nn.Module]) -> None:
    model, x, acr = build(), images(), AllPairsConsistencyLoss(HorizontalFlip())

    def loss(keep: bool) -> object:
        logits = model(x), model(x.flip(-1))
        attn_a, attn_b = attention.take_all()
        total = acr(attn_a, attn_b) + sum(part.sum() for part in logits)
        return (total, attn_a, attn_b) if keep else total

    with capture_attention(model, keep="all") as attention:
        loss(keep=False)
        assert used(lambda: loss(keep=True))[0] == used(lambda: loss(keep=False))[0]


@pytest.mark.parametrize("build", [timm_fused, multihead_vit])
def test_maps_that_outlive_the_graph_hold_four_units_a_fused_layer(build: Callable[[], nn.Module]) -> None:
    x = images()
    model = with_gradients(build(), x)

    def step(keep: bool) -> object:
        logits = model(x)
        maps = attention.take()
        (logits.sum() + sum(weights.square().sum() for weights in maps.weights())).backward()
        return maps if keep else None

    with capture_attention(model) as attention:
        unit, _ = units(attention, model, x)
        step(keep=False)
        held, _ = used(lambda: step(keep=True))
        assert 2 * unit <= held <= 4 * unit, "at least query and key"
        assert used(lambda: step(keep=False))[0] == 0


def timm_checkpointed() -> nn.Module:
    model = timm_fused()
    model.blocks = Checkpointed(*model.blocks)
    return model


@pytest.mark.parametrize(
    ("build", "factored"),
    [
        pytest.param(checkpointed(ExplicitBlock, 3), False, id="explicit"),
        pytest.param(checkpointed(lambda: MultiheadBlock(False), 3), True, id="multihead"),
        pytest.param(timm_checkpointed, True, id="timm"),
    ],
)
def test_of_checkpointed_blocks_four_units_are_kept_or_the_map(build: Callable[[], nn.Module], factored: bool) -> None:
    x = images()
    model = with_gradients(build(), x)

    def captured() -> object:
        return model(x), attention.take()

    def step() -> None:
        logits = model(x)
        loss = logits.sum() + sum(weights.square().sum() for weights in attention.take().weights())
        loss.backward()

    expected, _ = used(lambda: model(x))
    with capture_attention(model) as attention:
        unit, map_bytes = units(attention, model, x)
        added = used(captured)[0] - expected
        assert 0 < added <= (4 * unit if factored else map_bytes)
        step()
        assert used(step)[0] == 0, "what backward recomputes is released"


@pytest.mark.parametrize("build", [timm_fused, explicit_vit, multihead_vit])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradient_costs_nothing(build: Callable[[], nn.Module], without: Callable[[], object]) -> None:
    model, x = build(), images()

    def evaluate() -> Tensor:
        with without():
            return model(x)

    evaluate()
    expected = used(evaluate)
    with capture_attention(model) as attention:
        assert used(evaluate) == expected, "cold"
        model(x), attention.take()
        assert used(evaluate) == expected, "warm"
    with capture_attention(model, no_grad=True) as attention:
        assert used(lambda: (evaluate(), attention.take()))[0] > expected[0], "the count sees what is recorded"


@pytest.mark.parametrize("build", [timm_fused, explicit_vit, multihead_vit])
def test_a_running_capture_holds_nothing_between_steps(build: Callable[[], nn.Module]) -> None:
    x = images()
    model, acr = with_gradients(build(), x), AllPairsConsistencyLoss(HorizontalFlip())

    def train() -> None:
        for _ in range(3):
            logits_a, attn_a = model(x), attention.take()
            logits_b, attn_b = model(x.flip(-1)), attention.take()
            (acr(attn_a, attn_b) + logits_a.sum() + logits_b.sum()).backward()

    def start_and_train() -> AttentionCapture:
        nonlocal attention
        attention = capture_attention(model)
        train()
        return attention

    attention = capture_attention(model)
    train()
    assert used(train)[0] == 0
    attention.remove()
    assert used(start_and_train)[0] == 0
    attention.remove()


@pytest.mark.parametrize("build", [timm_fused, explicit_vit, multihead_vit])
@pytest.mark.parametrize("keep", ["only", "last", "first"])
def test_passes_that_nobody_takes_hold_as_much_as_one(build: Callable[[], nn.Module], keep: str) -> None:
    model, x = build(), images()

    def passes(count: int) -> Callable[[], object]:
        def run() -> None:
            attention.clear()
            for _ in range(count):
                model(x)

        return run

    with capture_attention(model, keep=keep) as attention:
        passes(2)()
        attention.clear()
        one, _ = used(passes(1))
        attention.clear()
        assert one > 0
        assert used(passes(5))[0] == one
        attention.clear()
