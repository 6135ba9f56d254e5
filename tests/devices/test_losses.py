"""The loss on a device: no operation mixes devices, its value is that of the CPU, and what crosses the bus is few."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionCapture,
    AttentionMaps,
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    Lattice,
    PerImage,
    RandomResizedCrop,
    Rotate90,
    Scale,
    View,
    capture_attention,
)
from acr_reg.views.samplers import Sampler
from tests.devices.inputs import SIZE
from tests.support.devices import CPU, Traffic, stand_in_devices
from tests.support.models.plain import BUILDERS

FLIP = HorizontalFlip()
CROPS = RandomResizedCrop(SIZE, scale=(0.4, 1))


class Step(NamedTuple):
    """A training step: options of the loss, and what its call gets besides the maps."""

    options: Mapping[str, Any] = MappingProxyType({})
    view: Any = FLIP
    view_a: Any = None
    labels: bool = False
    valid: bool = False
    cams: bool = False
    per_image: bool = False


STEPS = {
    "flip": Step(),
    "flip, dense": Step({"blockwise": False}),
    "flip, small blocks": Step({"blockwise": True, "block_rows": 5}),
    "flip, rows": Step({"rows": 0.25}),
    "flip, valid": Step({"heads": "each", "distance": "l2"}, valid=True),
    "flip, class maps, labels": Step(labels=True, cams=True),
    "half a turn, mean": Step({"normalize": "mean", "layers": [-1]}, Rotate90(2)),
    "whole tokens": Step(view=Crop(-8, 8, 32, 48, image_size=SIZE, pad=True), valid=True),
    "scale, rows, valid": Step({"rows": 0.25, "distance": "js"}, Scale(1.5, keep_size=True), valid=True),
    "scale, class maps": Step({"cam_normalize": "minmax"}, Scale(0.75, keep_size=True), cams=True, labels=True),
    "two crops": Step(view=CROPS, view_a=CROPS),
    "two crops, sharp": Step({"blur_alike": False}, CROPS, CROPS),
    "two crops, class maps, valid": Step(view=CROPS, view_a=CROPS, cams=True, valid=True),
    "flip for each image": Step(view=PerImage([FLIP, Identity()]), valid=True),
    "crops for each image": Step(view=CROPS, view_a=CROPS, per_image=True, cams=True),
}
# Copies where each step draws another view. Tables of attention are packed into one; a map for class maps or for
# ``valid`` has one of what is shown and two of weights.
COPIES = {
    **dict.fromkeys(("two crops", "two crops, sharp"), 1),
    "two crops, class maps, valid": 9,
    "crops for each image": 5,
}
CASES = [("fused", name) for name in STEPS] + [("explicit", name) for name in ("flip", "flip, valid", "two crops")]
every_case = pytest.mark.parametrize(("kind", "name"), CASES)


class Ran(NamedTuple):
    """What two steps gave: loss, terms and gradients of the last, on the CPU, and what its loss moved."""

    values: list[Tensor]
    traffic: Traffic


class Runs:
    """Each case once, on the CPU and on a device that is not there; one capture of each model serves all."""

    def __init__(self) -> None:
        self._captures: dict[Any, tuple[nn.Module, AttentionCapture]] = {}
        self._found: dict[Any, tuple[Ran, Ran]] = {}

    def __call__(self, kind: str, name: str) -> tuple[Ran, Ran]:
        key = kind, name
        if key not in self._found:
            here = run(STEPS[name], *self._captured(kind, CPU), CPU)
            with stand_in_devices() as gpu:
                self._found[key] = here, run(STEPS[name], *self._captured(kind, gpu), gpu)
        return self._found[key]

    def _captured(self, kind: str, device: torch.device) -> tuple[nn.Module, AttentionCapture]:
        if (kind, device) not in self._captures:
            torch.manual_seed(0)
            model = BUILDERS[kind]().to(device)
            self._captures[kind, device] = model, capture_attention(model)
        return self._captures[kind, device]


def run(step: Step, model: nn.Module, attention: AttentionCapture, device: torch.device) -> Ran:
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *SIZE, generator=generator)
    given: dict[str, Any] = {}
    if step.labels:
        given["labels"] = torch.tensor([[1.0, 0, 1], [0, 1, 0]]).to(device)  # floats, which may be NaN
    if step.valid:
        given["valid"] = (torch.arange(48) < 40).expand(2, 32, 48).to(device)
    if step.cams:
        both = torch.randn(2, 2, 3, 4, 6, generator=generator)
        given["cam_a"], given["cam_b"] = (each.to(device).requires_grad_() for each in both)
    acr = AllPairsConsistencyLoss(**step.options)
    images = images.to(device)
    for _ in range(2):
        torch.manual_seed(2)  # of rows=
        views = [drawn(each, images, step.per_image, generator) for each in (step.view, step.view_a)]
        maps = []
        for view in (views[1], views[0]):
            model(images if view is None else view(images))
            maps.append(attention.take())
        with Traffic() as traffic:
            loss, terms = acr(*maps, view=views[0], view_a=views[1], return_terms=True, **given)
    loss.backward()
    found = [loss, *terms.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    found += [given[name].grad for name in ("cam_a", "cam_b") if name in given]
    assert {each.device for each in found} == {device}
    return Ran([each.detach().cpu() for each in found], traffic)


def drawn(view: Any, images: Tensor, per_image: bool, generator: torch.Generator) -> Any:
    """A view as it is; of a sampler another one in each step."""
    return view.sample(images, per_image, generator) if isinstance(view, Sampler) else view


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs()


@every_case
def test_loss_on_a_device_equals_that_on_the_cpu(runs: Runs, kind: str, name: str) -> None:
    here, there = runs(kind, name)
    assert len(there.values) == len(here.values)
    if "rows" not in STEPS[name].options:  # which every device draws for itself
        for ours, theirs in zip(here.values, there.values, strict=True):
            torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("name", STEPS)
def test_loss_reads_its_device_once_and_copies_nothing_to_it_after_the_first_step(runs: Runs, name: str) -> None:
    _, there = runs("fused", name)
    assert there.traffic.counts == (1, COPIES.get(name, 0)), there.traffic


CROP = RandomResizedCrop((32, 32), (0.4, 0.6)).sample((32, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "view", [PerImage([Rotate90(), Identity()]), PerImage([Compose([Rotate90(), CROP]), CROP])], ids=["turn", "crop"]
)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("blockwise", [True, False])
def test_maps_of_the_caller_turned_for_each_image_stay_on_their_device(
    view: View, stochastic: bool, blockwise: bool
) -> None:
    """Several class tokens, for labels that lie on the CPU, and rows that are no probabilities."""
    rows = torch.randn(2, 2, 2, 3 + 16, 3 + 16, generator=torch.Generator().manual_seed(0)).softmax(-1)
    labels, valid = torch.tensor([[1, 0, 1], [0, 1, 0]]), (torch.arange(32) < 20).expand(2, 32, 32)
    acr = AllPairsConsistencyLoss(view, blockwise=blockwise, block_rows=5 if blockwise else None)

    def step(device: torch.device) -> tuple[list[Tensor], Traffic]:
        leaves = [(each if stochastic else 3 * each).to(device).requires_grad_() for each in rows]
        maps = [
            AttentionMaps.from_tensors([leaf, leaf], 3, Lattice(4, 4, (8, 8)), class_tokens=3, stochastic=stochastic)
            for leaf in leaves
        ]
        of_device = valid.to(device)
        loss = acr(*maps, labels=labels, valid=of_device)
        with Traffic() as traffic:
            loss = acr(*maps, labels=labels, valid=of_device)
            loss.backward()
        return [loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)], traffic

    here, _ = step(CPU)
    with stand_in_devices() as gpu:
        there, traffic = step(gpu)
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(theirs, ours)
    assert traffic.counts == (1, 1), traffic  # the labels are sent once
