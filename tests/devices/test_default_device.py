"""torch.set_default_device changes nothing: the library says where each tensor goes. And on MPS nothing is float64."""

from __future__ import annotations

import ast
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    GradientCam,
    HorizontalFlip,
    RandomApply,
    RandomChoice,
    RandomCompose,
    RandomResizedCrop,
    RandomScale,
    Rotate90,
    align_attention,
    capture_attention,
    check,
    class_token_gradient_cam,
)
from tests.devices.inputs import SIZE
from tests.support.devices import CPU, Traffic
from tests.support.models import explicit_vit, multihead_vit
from tests.support.paths import ROOT

SAMPLER = RandomCompose(
    [
        RandomApply(HorizontalFlip()),
        RandomChoice([Rotate90(0), Rotate90(2)]),
        RandomScale((0.8, 1.2), keep_size=True),
        RandomResizedCrop(SIZE, scale=(0.4, 1)),
    ]
)


# ---------------------------------------------------------------- what the code says

# They make a tensor of nothing, wherever the default device is.
MAKERS = {"tensor", "as_tensor", "arange", "zeros", "ones", "full", "empty", "eye", "linspace", "rand", "randn"}
MAKERS |= {"randint", "randperm", "scalar_tensor", "asarray"}
# Scripts with models of their own, whose parameters follow the default device as those of torch do.
SCRIPTS = {"demo", "commands"}
CORE = [file for file in (ROOT / "acr_reg").rglob("*.py") if not SCRIPTS & {*file.parts}]
CORE += (ROOT / "integrations").rglob("*.py")


def unplaced(code: str) -> list[int]:
    """The lines that make a tensor without saying where."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if not any(keyword.arg == "device" for keyword in node.keywords)
    ]


def test_every_tensor_is_made_on_a_device_that_the_code_names() -> None:
    found = {str(file.relative_to(ROOT)): lines for file in CORE if (lines := unplaced(file.read_text("utf-8")))}
    assert len(CORE) > 80
    assert not found, "say device=, else torch.set_default_device decides"
    assert unplaced("torch.zeros(2)\ntorch.zeros(2, device=d)\nx.new_zeros(2)") == [1]


# ---------------------------------------------------------------- what it does


def test_samplers_draw_the_same_on_any_default_device_without_reading_it(gpu: torch.device) -> None:
    def drawn() -> str:
        return repr(SAMPLER.sample(SIZE, generator=torch.Generator().manual_seed(3)))

    here = drawn()
    with gpu, Traffic() as traffic:
        assert drawn() == here
        SAMPLER.sample((2, 3, *SIZE)[-2:])
    assert traffic.counts == (0, 0), traffic


def step(device: torch.device) -> list[torch.Tensor]:
    """Losses, class maps and carried maps of a model on ``device``, on the CPU."""
    torch.manual_seed(0)
    with CPU:
        model, images = multihead_vit().eval(), torch.randn(2, 3, *SIZE)
        valid = (torch.arange(48) < 40).expand(2, 32, 48)
        rows = torch.rand(2, 2, 24, 24).softmax(-1)
    model, images, valid, rows = model.to(device), images.to(device), valid.to(device), rows.to(device)
    layout = AttentionMaps.from_tensors([rows], 0, (4, 6))[0].layout
    acr = AllPairsConsistencyLoss()
    found = []
    with capture_attention(model) as attention:
        for per_image in (False, True):
            view = SAMPLER.sample(images, per_image, torch.Generator().manual_seed(5))
            torch.manual_seed(1)
            model(images)
            first = attention.take()
            logits = model(view(images))
            found.append(acr(first, second := attention.take(), view=view, valid=valid))
            found.append(class_token_gradient_cam(logits, second))
            found.append(align_attention(rows, view, layout, layout))
    with GradientCam(model) as cam:
        found.append(cam(images))
    assert {each.device for each in found} == {device}
    return [each.detach().cpu() for each in found]


@cache
def on_the_cpu() -> list[torch.Tensor]:
    return step(CPU)


@pytest.mark.parametrize(("default", "where"), [("cuda:0", "cpu"), ("cuda:1", "mps:0")])
def test_results_are_the_same_on_any_default_device(gpu: torch.device, default: str, where: str) -> None:
    expected = on_the_cpu()
    with torch.device(default):
        for ours, theirs in zip(expected, step(torch.device(where)), strict=True):
            torch.testing.assert_close(theirs, ours)


def test_check_and_class_maps_of_a_folder_are_the_same_on_any_default_device(gpu: torch.device) -> None:
    from acr_reg.integrations.jobs.batches import BatchedCams, Photo  # needs Pillow, an extra

    torch.manual_seed(0)
    model, images = explicit_vit(), torch.randn(2, 3, *SIZE)
    here = check(model, images)
    photos = [("a", Photo(images[0], SIZE)), ("b", Photo(images[1], SIZE))]

    def class_maps() -> list[Any]:
        with GradientCam(model, start_layer=0) as cam:
            labels = {"a": np.ones(5), "b": np.eye(5)[0]}
            make = BatchedCams(cam, labels, [HorizontalFlip()], "sum", "max", 2, CPU, lambda: True)
            return [maps for _, (maps, _) in make(iter(photos))]

    expected = class_maps()
    with gpu:
        there, found = check(model, images), class_maps()
    assert (there.ok, there.terms) == (here.ok, pytest.approx(here.terms))
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.keys() == ours.keys()
        assert all(np.allclose(theirs[number], ours[number]) for number in ours)


def test_nothing_is_float64_on_mps(gpu: torch.device) -> None:
    mps = torch.device("mps", 0)
    with pytest.raises(TypeError, match="MPS has no"):
        torch.ones(2, device=mps).double()
    model, images = explicit_vit().to(mps), torch.randn(2, 3, *SIZE).to(mps)
    assert check(model, images).ok
    from acr_reg.integrations.jobs.batches import BatchedCams, Photo  # needs Pillow, an extra

    with GradientCam(model, start_layer=0) as cam:
        make = BatchedCams(cam, {"a": np.ones(5)}, [HorizontalFlip()], "sum", "max", 2, mps, lambda: True)
        ((_, (maps, _)),) = make(iter([("a", Photo(images[0].cpu(), SIZE))]))
    assert len(maps) == 5
