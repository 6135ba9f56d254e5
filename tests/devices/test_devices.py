"""The stand-in device itself: it refuses what CUDA refuses, and counts what CUDA would wait for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tests.support.devices import CPU, DeviceTensor, Traffic, stand_in_devices

MIXES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": torch.add,
    "product": lambda a, b: a @ b.mT,
    "in place": lambda a, b: a.add_(b),
    "cat": lambda a, b: torch.cat([a, b]),
    "stack of numbers": lambda a, b: torch.stack([a.sum(), b.sum()]),
    "where": lambda a, b: a.where(a > 0, b),
    "function in Python": lambda a, b: nn.functional.mse_loss(a, b),
    "index_select": lambda a, b: a.index_select(0, b.flatten()[:1].long()),
    "value of an index": lambda a, b: a.index_put_((torch.arange(2, device=a.device),), b),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_operation_on_two_devices_is_refused(gpu: torch.device, mix: Callable[[Tensor, Tensor], object]) -> None:
    for other in (CPU, torch.device("cuda", 1)):
        with pytest.raises(RuntimeError, match="got tensors on"):
            mix(torch.ones(2, 3, device=gpu), torch.ones(2, 3, device=other))


def test_what_is_made_on_the_cpu_like_a_tensor_of_the_device_lies_on_the_cpu(gpu: torch.device) -> None:
    ones = torch.ones(2, 3, device=gpu)
    for made in (torch.zeros_like(ones, device="cpu"), ones.new_zeros(2, 3, device=CPU)):
        assert made.device == CPU
        with pytest.raises(RuntimeError, match="got tensors on"):
            made @ ones.mT


def test_number_of_the_cpu_and_index_of_the_cpu_are_taken_as_cuda_takes_them(gpu: torch.device) -> None:
    ones = torch.ones(2, 3, device=gpu)
    for found in (ones * torch.tensor(2.0), ones.where(ones > 0, torch.tensor(1.0)), ones[torch.tensor([1, 0])]):
        assert found.device == gpu
    ones[0] = 3.0
    ones[:, 1] = torch.tensor(5.0)
    assert ones.tolist() == [[3, 5, 3], [1, 5, 1]]


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda a: a.sum().item(),
    "float": lambda a: float(a.sum()),
    "bool": lambda a: bool((a > 0).all()),
    "equal": lambda a: torch.equal(a, a + 0),
    "allclose": lambda a: torch.allclose(a, a + 0),
    "nonzero": lambda a: a.nonzero(),
    "mask": lambda a: a[a > 0],
    "masked_select": lambda a: a.masked_select(a > 0),
    "unique": lambda a: a.unique(),
    "cpu": lambda a: a.cpu(),
    "to": lambda a: a.to("cpu", torch.float64),
    "tolist": lambda a: a.tolist(),
}
COPIES: dict[str, Callable[[torch.device], object]] = {
    "tensor": lambda gpu: torch.tensor([1, 2], device=gpu),
    "as_tensor": lambda gpu: torch.as_tensor([1, 2], device="cuda"),
    "new_tensor": lambda gpu: torch.zeros(1, device=gpu).new_tensor([1, 2]),
    "to": lambda gpu: torch.ones(2).to(gpu),
    "to like": lambda gpu: torch.ones(2).to(torch.zeros(1, device=gpu)),
    "cuda": lambda gpu: torch.ones(2).cuda(),
    "copy_": lambda gpu: torch.zeros(2, device=gpu).copy_(torch.ones(2)),
    "list as index": lambda gpu: torch.zeros(2, device=gpu)[[0, 1]],
    "index": lambda gpu: torch.zeros(2, device=gpu)[torch.tensor([0, 1])],
}
NEITHER: dict[str, Callable[[torch.device], object]] = {
    "made there": lambda gpu: (torch.zeros(2, device=gpu), torch.arange(3, device=gpu), torch.randn(2, device="cuda")),
    "made alike": lambda gpu: torch.zeros_like(torch.ones(2, device=gpu)).new_ones(3),
    "converted": lambda gpu: torch.ones(2, device=gpu).to(gpu).double().to(torch.float16),
    "index there": lambda gpu: torch.zeros(2, device=gpu)[torch.arange(2, device=gpu)],
    "masked_fill": lambda gpu: torch.ones(2, device=gpu).masked_fill(torch.ones(2, device=gpu) > 0, 0),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_read_is_counted_with_its_line(gpu: torch.device, read: Callable[[Tensor], object]) -> None:
    with Traffic() as traffic:
        read(torch.ones(2, 3, device=gpu))
    assert traffic.counts == (1, 0)
    assert "devices/test_devices.py:" in str(traffic)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copy_to_the_device_is_counted(gpu: torch.device, copy: Callable[[torch.device], object]) -> None:
    with Traffic() as traffic:
        copy(gpu)
    assert traffic.counts == (0, 1)


@pytest.mark.parametrize("work", NEITHER.values(), ids=NEITHER)
def test_work_on_the_device_is_not_counted(gpu: torch.device, work: Callable[[torch.device], object]) -> None:
    with Traffic() as traffic:
        work(gpu)
    assert traffic.counts == (0, 0), traffic


def test_model_trains_on_the_device_as_on_the_cpu(gpu: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3))
    images = torch.randn(2, 3, 4, 4)
    model(images).square().mean().backward()
    there = deepcopy(model).to(gpu)
    there.zero_grad()
    first, *_ = there(images.to(gpu)).square().mean(2).unbind(1)  # the engine makes zeros for the others
    first.mean().backward()
    there.zero_grad()
    there(images.to(gpu)).square().mean().backward()
    for ours, theirs in zip(model.parameters(), there.parameters(), strict=True):
        assert theirs.grad.device == gpu
        torch.testing.assert_close(theirs.grad.cpu(), ours.grad)


def test_gradient_goes_back_to_the_device_that_it_came_from(gpu: torch.device) -> None:
    for start, end in ((CPU, gpu), (gpu, CPU), (gpu, torch.device("cuda", 1))):
        given = torch.ones(2, device=start, requires_grad=True)
        (given.to(end) * 3).sum().backward()
        assert given.grad.device == start
        assert given.grad.tolist() == [3, 3]


half_precision = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs torch 2.3 on the CPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=half_precision)], ids=str)
def test_autocast_casts_on_the_device(gpu: torch.device, dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2).to(gpu)
    with torch.autocast("cuda", dtype):
        found = layer(torch.ones(1, 3, device=gpu))
    assert found.dtype == dtype
    assert isinstance(found, DeviceTensor)


def test_nothing_stays_behind() -> None:
    with stand_in_devices():
        pass
    assert type(nn.Linear(2, 2).to(torch.float64).weight) is nn.Parameter
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.ones(2).to("cuda:0")
