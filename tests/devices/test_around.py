"""Around the loss and class maps: capture, check, hosts, random numbers, scores and files, on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, CamMeanIoU, HorizontalFlip, capture_attention, check
from acr_reg.integrations import formats, mctformer
from acr_reg.integrations.host import inside
from acr_reg.random_numbers import own_random_numbers
from tests.integrations.hosts.test_families import MODELS as FAMILIES
from tests.support.devices import CPU, Traffic
from tests.support.mctformer import Block, Small
from tests.support.mctformer import images as host_images
from tests.support.models.cases import core_cases
from tests.support.models.windows import windows_and_global

FLIP = HorizontalFlip()


BUILDERS: dict[str, Callable[[], nn.Module]] = {case.name: case.build for case in core_cases() if case.grid == (4, 6)}
BUILDERS["windows"] = windows_and_global


def taken(model: nn.Module, images: Tensor) -> tuple[AttentionMaps, Traffic]:
    """The maps of a second forward, and what it and its take() moved."""
    with capture_attention(model, no_grad=True) as attention:
        model(images)
        attention.take()
        with Traffic() as traffic:
            model(images)
            return attention.take(), traffic


@pytest.mark.parametrize("name", BUILDERS)
def test_capture_neither_reads_a_device_nor_copies_to_it_after_the_first_forward(gpu: torch.device, name: str) -> None:
    torch.manual_seed(0)
    model, images = BUILDERS[name]().eval(), torch.randn(2, 3, 32, 48)
    here, _ = taken(model, images)
    there, traffic = taken(model.to(gpu), images.to(gpu))
    assert traffic.counts == (0, 0), traffic
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.device == gpu
        assert theirs.placed == ours.placed
        torch.testing.assert_close(theirs.weights().cpu(), ours.weights())


def test_maps_of_the_caller_stay_on_their_device(gpu: torch.device) -> None:
    rows = torch.rand(2, 3, 25, 25, device=gpu).softmax(-1)
    maps = AttentionMaps.from_tensors([rows, rows], 1, (4, 6), class_tokens=[0])
    halves = maps.chunk(2)
    loss = AllPairsConsistencyLoss(FLIP)
    with torch.no_grad():
        assert loss(*(half.select([-1]).detach() for half in halves)).device == gpu


@pytest.mark.parametrize("name", ["torch-encoder", "windows"])
def test_check_on_a_device_reports_what_it_reports_on_the_cpu(gpu: torch.device, name: str) -> None:
    torch.manual_seed(0)
    model, images = BUILDERS[name](), torch.randn(2, 3, 32, 48)
    here = check(model, images)
    there = check(model.to(gpu), images.to(gpu))
    assert (there.problems, there.warnings) == (here.problems, here.warnings)
    for ours, theirs in zip(here.layers, there.layers, strict=True):
        for what, value in vars(ours).items():
            among_numbers = isinstance(value, (float, tuple))
            assert getattr(theirs, what) == (pytest.approx(value, abs=1e-4) if among_numbers else value), what


# ---------------------------------------------------------------- hosts


@pytest.mark.parametrize("family", FAMILIES)
def test_second_view_of_a_host_on_a_device_equals_that_on_the_cpu(gpu: torch.device, family: str) -> None:
    host_file, build, forward = FAMILIES[family]
    torch.manual_seed(0)
    model, images = build().eval(), torch.randn(2, 3, 64, 64)
    model.forward = getattr(model, "forward_cls", model.forward)
    acr = AllPairsConsistencyLoss(FLIP, activation_weight=0 if family == "afa" else None)
    losses = []
    for device in (CPU, gpu):
        model, images = model.to(device), images.to(device)
        boxes = torch.tensor([[0, 64, 0, 64], [0, 64, 8, 56]], device=device)
        with host_file.capture(model) as host:
            forward(model, images)
            first, second = host.take(), host_file.second_view(host, acr.view(images))
            maps = host_file.cams(first), host_file.cams(second)
            losses.append(acr(first.attention, second.attention, *maps, valid=inside(boxes, images)))
        losses[-1].backward()
        assert losses[-1].device == device
    torch.testing.assert_close(losses[1].cpu(), losses[0])


def test_second_view_of_a_host_leaves_every_device_its_random_numbers(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "drop", 0.5)
    model, samples = Small().to(gpu), host_images().to(gpu)
    second = torch.device("cuda", 1)  # where an offloaded model may compute, though no parameter lies there

    def draws() -> list[list[float]]:
        return [torch.rand(2, device=device).tolist() for device in (CPU, gpu, second)]

    def forward() -> Any:
        draws()
        return model(samples)

    with mctformer.capture(model) as host:
        torch.manual_seed(1)
        model(samples)
        expected = draws()
        torch.manual_seed(1)
        model(samples)
        host.run(forward)
        assert draws() == expected


def test_random_numbers_of_a_block_begin_at_its_seed_on_every_device(gpu: torch.device) -> None:
    found = []
    for start in (3, 4):
        torch.manual_seed(start)
        with own_random_numbers(7):
            found.append([torch.rand(2, device=device).tolist() for device in (CPU, gpu)])
    assert found[0] == found[1]


def test_random_numbers_of_a_block_do_not_start_a_device_that_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> None:
        raise AssertionError("CUDA was asked for")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("get_rng_state", "set_rng_state", "manual_seed_all", "_lazy_call", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, started)
    state = torch.get_rng_state()
    with own_random_numbers(7):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- scores and files


def test_scores_and_files_take_maps_of_a_device(gpu: torch.device, tmp_path: Path) -> None:
    maps = torch.rand(1, 4, 6, device=gpu)
    meter = CamMeanIoU(2, [0.5])
    meter.update(maps, torch.ones(4, 6, dtype=torch.long, device=gpu))
    other = CamMeanIoU(2, [0.5])
    other.update(maps.cpu().numpy(), np.ones((4, 6), np.int64))
    assert np.array_equal(meter.compute().miou, other.compute().miou)
    for number, values in enumerate((maps[0], maps[0].bfloat16(), maps[0].cpu().requires_grad_())):
        formats.save_cams(tmp_path / "a.npy", {number: values})
        assert np.allclose(formats.load_cams(tmp_path / "a.npy")[number], maps[0].cpu(), atol=1e-2)
        assert formats.pseudo_labels({number: values}, 0.5).shape == (4, 6)
    formats.save_mask(tmp_path / "a.png", torch.ones(4, 6, dtype=torch.uint8, device=gpu))
    assert formats.read_mask(tmp_path / "a.png").tolist() == [[1] * 6] * 4
    assert formats.labels_of({"a": torch.ones(3, device=gpu, dtype=torch.bfloat16)}, "a").tolist() == [1, 1, 1]
