"""FullyShardedDataParallel and fully_shard on two ranks: each half of a batch gives the update of one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionCapture,
    CaptureError,
    GradientCam,
    HorizontalFlip,
    capture_attention,
    check,
    class_token_gradient_cam,
)
from acr_reg.attention.call import AttentionCall
from acr_reg.attention.layer import RecordedTensors
from acr_reg.capture.refusals import insist_on_output
from acr_reg.capture.runs import Run
from tests.support.attention import says
from tests.support.capturing import modes, query_and_key
from tests.support.models.plain import BUILDERS, ExplicitBlock, MultiheadBlock
from tests.support.ranks import difference, needs_gloo, on_two_ranks, whole

try:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        FullyShardedDataParallel,
        MixedPrecision,
        MixedPrecisionPolicy,
        fully_shard,
    )
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
except ImportError as error:  # torch < 2.6
    pytest.skip(f"this torch has no fully_shard, and its FSDP needs a GPU: {error}", allow_module_level=True)

Spoil = Callable[[Tensor, Tensor], None]
view, BLOCKS = HorizontalFlip(), (ExplicitBlock, MultiheadBlock)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 32, 48, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (4, 5), generator=generator).double()


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[kind](2).double()


def fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), auto_wrap_policy=ModuleWrapPolicy(set(BLOCKS)), **options
    )


def fsdp2(model: nn.Module, parts: Callable[[nn.Module], list[nn.Module]], **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for part in (*parts(model), model):
        fully_shard(part, mesh=mesh, **options)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def linears_of(model: nn.Module) -> list[nn.Module]:
    return [module for block in blocks_of(model) for module in block.modules() if type(module) is nn.Linear]


def checkpointed(model: nn.Module) -> nn.Module:
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    apply_activation_checkpointing(model, wrapper, lambda module: isinstance(module, BLOCKS))
    return model


HALF = torch.bfloat16
WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "FSDP": partial(fsdp1, use_orig_params=True),
    "FSDP, flat parameters": partial(fsdp1, use_orig_params=False),
    "FSDP, checkpointed": lambda model: checkpointed(fsdp1(model, use_orig_params=True)),
    "FSDP, bfloat16": partial(fsdp1, use_orig_params=True, mixed_precision=MixedPrecision(HALF, torch.float32)),
    "fully_shard": partial(fsdp2, parts=blocks_of),
    "fully_shard, of the whole": partial(fsdp2, parts=lambda model: []),
    "fully_shard, of each linear map": partial(fsdp2, parts=linears_of),
    "fully_shard, checkpointed": lambda model: fsdp2(checkpointed(model), blocks_of),
    "fully_shard, bfloat16": partial(fsdp2, parts=blocks_of, mp_policy=MixedPrecisionPolicy(HALF, torch.float32)),
}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, gathered, by the names of the model that was wrapped."""

    def named(parameters: Any) -> dict[str, Tensor]:
        wrappers = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
        for wrapper in wrappers:
            parameters = {name.replace(wrapper, ""): tensor for name, tensor in dict(parameters).items()}
        return {name: whole(tensor.detach()).clone() for name, tensor in parameters.items()}

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return named(model.named_parameters())
    return named(model.named_parameters())


def both_losses(model: nn.Module, attention: AttentionCapture, part: slice) -> tuple[Tensor, Tensor]:
    """The criterion and the consistency of both views."""
    x, labels = (each[part] for each in batch())
    logits_a, attn_a = model(x), attention.take()
    logits_b, attn_b = model(view(x)), attention.take()
    criterion = nn.MultiLabelSoftMarginLoss()
    return criterion(logits_a, labels) + criterion(logits_b, labels), AllPairsConsistencyLoss(view)(attn_a, attn_b)


def step(model: nn.Module, attention: AttentionCapture, optimizer: torch.optim.Optimizer, part: slice) -> None:
    optimizer.zero_grad()
    criterion, consistency = both_losses(model, attention, part)
    (criterion + consistency).backward()
    optimizer.step()


def train(
    model: nn.Module, part: slice, wrap: Callable[[nn.Module], nn.Module] | None = None, spoil: Spoil | None = None
) -> dict[str, Tensor]:
    """How two steps of SGD change the weights; the first step watches every module.

    ``wrap`` wraps the model that is captured already. ``spoil`` makes a wrong backward between the steps.
    """
    before = weights_of(model)
    with capture_attention(model) as attention:
        model = model if wrap is None else wrap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, attention, optimizer, part)
        if spoil is not None:
            with pytest.raises(CaptureError) as error:
                spoil(*both_losses(model, attention, part))
            assert says(error, "FSDP", "output", "criterion", "once")
            attention.clear()
        step(model, attention, optimizer, part)
    assert modes() == 0
    return {name: tensor - before[name] for name, tensor in weights_of(model).items()}


def one_after_the_other(criterion: Tensor, consistency: Tensor) -> None:
    criterion.backward(retain_graph=True)
    consistency.backward()


def alone(criterion: Tensor, consistency: Tensor) -> None:
    consistency.backward()


class Holding(nn.Module):
    """Runs the model that it holds, by ``model(x)`` or a method of the model."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = getattr(self.model, self.method)(x)
        return logits


def refusals_within(model: nn.Module, part: slice, flat: bool, method: str) -> dict[str, Tensor]:
    """Refused: class maps of a model that is not wrapped itself, but within what is. The whole trains right afterwards:
    it used to crash with an access to freed parameters."""
    x, labels = (each[part] for each in batch())
    whole = FullyShardedDataParallel(Holding(model, method), device_id=torch.device("cpu"), use_orig_params=not flat)
    with GradientCam(model, forward=whole) as cam, pytest.raises(CaptureError, match="FSDP"):
        cam(x)
    with capture_attention(model) as attention:
        logits = whole(x)
        with pytest.raises(CaptureError, match="FSDP"):
            class_token_gradient_cam(logits, attention.take(), labels)
    whole.module.method = "__call__"
    changes = train(whole, part)
    return {name.removeprefix("model."): change for name, change in changes.items()}


def refusals(model: nn.Module, part: slice) -> dict[str, Tensor]:
    """Refused: what takes several backwards. The model trains right afterwards."""
    x, labels = (each[part] for each in batch())
    with capture_attention(model) as attention:
        logits = model(x)
        with pytest.raises(CaptureError) as error:
            class_token_gradient_cam(logits, attention.take(), labels)
    with GradientCam(model) as cam, pytest.raises(CaptureError) as other:
        cam(x)
    for message in (str(error.value), str(other.value), *check(model, x).problems):
        assert all(fact in message for fact in ("FSDP", "Class maps", "checks", "DistributedDataParallel")), message
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward without a backward leaves the root gathered, for an optimizer to take by mistake
    return train(model, part)


Work = Callable[[nn.Module, slice], dict[str, Tensor]]


def cases() -> dict[tuple[str, str, str], Work]:
    """By wrapping, kernel, and what is done."""
    found: dict[tuple[str, str, str], Work] = {}
    for name, wrap in WRAPPINGS.items():
        kinds = ("explicit",) if "linear" in name else ("fused",) if "bfloat16" in name else tuple(BUILDERS)
        for kind in kinds:
            found[name, kind, "trained"] = lambda model, part, wrap=wrap: train(wrap(model), part)
    for name in ("FSDP", "fully_shard", "fully_shard, of the whole"):
        wrap = WRAPPINGS[name]
        found[name, "fused", "alone"] = partial(spoiled, wrap=wrap, spoil=alone)
        found[name, "fused", "refused"] = lambda model, part, wrap=wrap: refusals(wrap(model), part)
    for flat, method in ((False, "forward"), (True, "__call__")):
        kind = "FSDP, flat parameters" if flat else "FSDP"
        found[kind, "fused", "refused within"] = partial(refusals_within, flat=flat, method=method)
    for name in ("FSDP", "fully_shard"):
        found[name, "fused", "captured before"] = partial(train, wrap=WRAPPINGS[name])
        found[name, "fused", "apart"] = partial(spoiled, wrap=WRAPPINGS[name], spoil=one_after_the_other)
    return found


def spoiled(model: nn.Module, part: slice, wrap: Callable[[nn.Module], nn.Module], spoil: Spoil) -> dict[str, Tensor]:
    return train(wrap(model), part, spoil=spoil)


def work(rank: int) -> dict[tuple[str, str, str], dict[str, Tensor]]:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # of nn.Linear itself
    return {case: do(built(case[1]), slice(2 * rank, 2 * rank + 2)) for case, do in cases().items()}


@needs_gloo
def test_each_half_of_a_batch_under_fsdp_gives_the_update_of_one_process(tmp_path: Path) -> None:
    ranks = on_two_ranks(work, tmp_path)
    expected = {kind: train(built(kind), slice(0, 4)) for kind in BUILDERS}
    for name, rows in query_and_key(expected["fused"]):
        assert rows.abs().max() > 0, name
    for case in cases():
        allowed = 0.03 if "bfloat16" in case[0] else 1e-9
        for rank in ranks:
            assert difference(rank[case], expected[case[1]]) < allowed, case


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:.*NO_SHARD.* deprecated")
def test_class_maps_of_a_part_are_refused_where_another_part_is_sharded() -> None:
    """FullyShardedDataParallel gave such a part no gradient from then on."""
    model: Any = BUILDERS["fused"](2)
    model.head = FullyShardedDataParallel(model.head, device_id=torch.device("cpu"), use_orig_params=True)
    x = torch.randn(2, 3, 32, 48)

    def gradient() -> Tensor:
        model.zero_grad()
        (model(x) + model(x.flip(-1))).sum().backward()  # two views
        return torch.cat([whole(parameter.grad).flatten() for parameter in model.head.parameters()])

    before = gradient()
    cam = GradientCam(model.encoder, forward=model, grid=(4, 6), num_prefix_tokens=1, class_tokens=[0])
    with pytest.raises(CaptureError, match="FSDP"):
        cam(x)
    assert torch.allclose(gradient(), before)
    with capture_attention(model.encoder) as attention:
        logits, maps = model(x), attention.take().with_layout((4, 6), 1, class_tokens=1)
        with pytest.raises(CaptureError, match="FSDP"):
            class_token_gradient_cam(logits, maps)
    assert torch.allclose(gradient(), before)


@dataclass
class Output:
    logits: Tensor
    name: str = "logits"


@pytest.mark.parametrize(
    "pack",
    [lambda t: t, lambda t: (None, t), lambda t: {"x": [t]}, Output, lambda t: {"out": Output(t)}],
    ids=["tensor", "tuple", "dict", "dataclass", "nested"],
)
def test_a_backward_through_any_tensor_of_the_output_is_enough(pack: Callable[[Tensor], Any]) -> None:
    weights = torch.randn(1, 1, 3, 3, requires_grad=True).softmax(-1)
    logits, run = weights @ torch.randn(3, 2), Run(calls=[AttentionCall(RecordedTensors(map=weights))])
    insist_on_output(pack(logits), run)
    assert run.calls[0].recorded.sharded
    (logits.sum() + weights.square().sum()).backward(retain_graph=True)
    with pytest.raises(CaptureError, match="output"):
        weights.square().sum().backward(retain_graph=True)
    torch.autograd.grad(logits.sum(), weights, retain_graph=True)


def test_an_output_without_a_tensor_asks_for_nothing() -> None:
    weights = torch.randn(1, 1, 3, 3, requires_grad=True).softmax(-1)
    insist_on_output(None, Run(calls=[AttentionCall(RecordedTensors(map=weights))]))
    weights.square().sum().backward()
