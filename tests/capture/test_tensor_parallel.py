"""Tensor parallelism: attention that it splits over ranks is refused by name; the rest of a model may be split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, CaptureError, GradientCam, HorizontalFlip, capture_attention, check
from tests.support.capturing import hooks, modes
from tests.support.models.split import InlineBlock, OutsideBlock, SplitBlock, split_vit
from tests.support.ranks import difference, needs_gloo, on_two_ranks, whole, whole_gradients

try:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
except ImportError as error:  # torch < 2.6
    pytest.skip(f"this torch lacks what splits a model here: {error}", allow_module_level=True)

Plan = dict[str, Any]
view = HorizontalFlip()


def images() -> Tensor:
    return torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- how a model is split


def projections(at: str = "attn.") -> Plan:
    return {**{f"{at}{name}": ColwiseParallel() for name in "qkv"}, f"{at}proj": RowwiseParallel()}


def mlp() -> Plan:
    return {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}


def dtensors(placement: Any) -> Plan:
    """Attention on DTensors. Row-wise projections take whole inputs and give a sum, which is then made whole."""
    style = ColwiseParallel(input_layouts=Replicate(), output_layouts=placement, use_local_output=False)
    return {**{f"attn.{name}": style for name in "qkv"}, "attn.proj": RowwiseParallel(input_layouts=placement)}


def split(model: nn.Module, plan: Callable[[], Plan], mesh: Any = None) -> nn.Module:
    for block in model.encoder:
        parallelize_module(block, mesh or init_device_mesh("cpu", (2,)), plan())
    return model


def split_tokens_too(model: nn.Module) -> nn.Module:
    """Norms and residuals see each rank's tokens, the attention each rank's heads of all tokens."""
    by_token: Plan = {"output_layouts": Shard(1), "use_local_output": False}

    def plan() -> Plan:
        return {
            "norm1": SequenceParallel(),
            "attn": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            **{f"attn.{name}": ColwiseParallel() for name in "qkv"},
            "attn.proj": RowwiseParallel(**by_token),
            "norm2": SequenceParallel(),
            "fc1": ColwiseParallel(input_layouts=Shard(1)),
            "fc2": RowwiseParallel(**by_token),
        }

    mesh = init_device_mesh("cpu", (2,))
    sides = {"desired_input_layouts": (Shard(1),), "use_local_output": False}
    split(model, plan, mesh)
    parallelize_module(model.encoder, mesh, PrepareModuleInput(input_layouts=(Replicate(),), **sides))
    output = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    parallelize_module(model.encoder, mesh, output)
    return model


def in_two_dimensions(model: nn.Module, sizes: tuple[int, int]) -> nn.Module:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
    split(model, projections, mesh["tensor"])
    for part in (*model.encoder, model):
        fully_shard(part, mesh=mesh["data"])
    return model


def split_head(model: nn.Module) -> nn.Module:
    whole_output = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, init_device_mesh("cpu", (2,)), {"head": whole_output})


def split_over_one(model: nn.Module) -> nn.Module:
    return split(model, projections, init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))["tensor"])


STYLES: dict[str, tuple[type[nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "heads": (SplitBlock, lambda model: split(model, projections)),
    "heads and tokens": (SplitBlock, split_tokens_too),
    "heads on DTensors": (SplitBlock, lambda model: split(model, lambda: dtensors(Shard(-1)))),
    "heads by projections outside": (OutsideBlock, lambda model: split(model, lambda: projections(""))),
    "heads and MLP in one module": (InlineBlock, lambda model: split(model, lambda: {**projections(""), **mlp()})),
    "heads under fully_shard": (SplitBlock, lambda model: in_two_dimensions(model, (1, 2))),
    "whole on DTensors": (SplitBlock, lambda model: split(model, lambda: dtensors(Replicate()))),
    "MLP": (SplitBlock, lambda model: split(model, mlp)),
    "MLP in one module with attention": (InlineBlock, lambda model: split(model, mlp)),
    "classifier": (SplitBlock, split_head),
    "heads over one rank": (SplitBlock, split_over_one),
}


# ---- what is done with it


def train(model: nn.Module, change: Callable[[nn.Module], Any] = lambda model: None) -> dict[str, Tensor]:
    """The gradients of the second of two steps; ``change`` is made after the first, which watches all modules."""
    x, acr = images(), AllPairsConsistencyLoss(view)
    # The hooks of parallelize_module hide where tokens come from, so the user says where the class token stands.
    with capture_attention(model, num_prefix_tokens=1) as attention:
        for _ in range(2):
            model.zero_grad()
            logits_a, attn_a = model(x), attention.take()
            logits_b, attn_b = model(view(x)), attention.take()
            (logits_a.square().mean() + logits_b.square().mean() + acr(attn_a, attn_b)).backward()
            change(model)
            change = lambda model: None  # noqa: E731
    return whole_gradients(model)


def run_without_graph(model: nn.Module) -> dict[str, Tensor]:
    with capture_attention(model, num_prefix_tokens=1, no_grad=True) as attention, torch.no_grad():
        model(images())
        return {layer.name: layer.weights() for layer in attention.take()}


def make_class_maps(model: nn.Module) -> dict[str, Tensor]:
    with GradientCam(model) as cam:
        return {"cam": cam(images())}


def run_check(model: nn.Module) -> dict[str, Tensor]:
    report = check(model, images()[:1])
    if report.problems:
        raise CaptureError("; ".join(report.problems))
    return {layer.name: torch.tensor(float(layer.heads)) for layer in report.layers}


TASKS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "training": train,
    "no_grad": run_without_graph,
    "GradientCam": make_class_maps,
    "check": run_check,
}
KERNELS = {"explicit": False, "fused": True}


def built(style: str, kernel: str) -> nn.Module:
    torch.manual_seed(0)
    return split_vit(KERNELS[kernel], STYLES[style][0])


def says_all(message: str, *parts: str) -> bool:
    return all(part in message for part in parts)


def outcome(work: Callable[[nn.Module], dict[str, Tensor]], model: nn.Module) -> dict[str, Any]:
    try:
        return {"found": {name: whole(tensor.detach()) for name, tensor in work(model).items()}}
    except CaptureError as error:
        return {"error": str(error)}


def cases() -> list[tuple[str, str, str]]:
    """Every style in training, and two of them in all that may run without a graph."""
    in_training = [(style, "explicit", "training") for style in STYLES]
    return [
        *in_training,
        *((style, "fused", task) for style in ("heads", "MLP") for task in TASKS),
        *((style, "explicit", "no_grad") for style in ("heads on DTensors", "whole on DTensors")),
    ]


def work(rank: int) -> dict[Any, Any]:
    outcomes: dict[Any, Any] = {}
    models: dict[tuple[str, str], nn.Module] = {}
    for style, kernel, task in cases():
        if (style, kernel) not in models:
            models[style, kernel] = STYLES[style][1](built(style, kernel))
        model = models[style, kernel]
        before = hooks(model)
        outcomes[style, kernel, task] = outcome(TASKS[task], model)
        assert hooks(model) == before
        assert modes() == 0
    outcomes["late"] = outcome(lambda model: train(model, STYLES["heads"][1]), built("heads", "fused"))
    return outcomes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


WHOLE = ("MLP", "MLP in one module with attention", "classifier", "heads over one rank")


@needs_gloo
def test_attention_that_is_split_over_ranks_is_refused_by_name(ranks: list[dict[Any, Any]]) -> None:
    for outcomes in ranks:
        refused = {case: found for case, found in outcomes.items() if case == "late" or case[0] not in WHOLE}
        assert len(refused) > 10
        for case, found in refused.items():
            assert "error" in found, case
            layer = "encoder.0" if "in one module" in case[0] else "encoder.0.attn"
            assert layer in found["error"], case
            if case[0] == "whole on DTensors" and case[2] == "training":
                assert says_all(found["error"], "DTensor", "to_local()"), case
            else:
                assert says_all(found["error"], "Tensor parallelism", "over ranks", "parallelize_module"), case


@needs_gloo
def test_a_model_whose_attention_is_whole_gets_what_one_process_gets(ranks: list[dict[Any, Any]]) -> None:
    served = [case for case in cases() if case[0] in WHOLE]
    assert len(served) > 5
    for style, kernel, task in served:
        expected = TASKS[task](built(style, kernel))
        for outcomes in ranks:
            found = outcomes[style, kernel, task]
            assert "error" not in found, (style, kernel, task, found)
            assert difference(found["found"], expected) < 1e-9, (style, kernel, task)
