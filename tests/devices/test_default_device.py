"""torch.set_default_device changes nothing: the library says where each tensor goes. And on MPS nothing is float64."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest
import torch

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Crop,
    GradientCam,
    HorizontalFlip,
    RandomApply,
    RandomChoice,
    RandomCompose,
    RandomResizedCrop,
    RandomScale,
    Rotate90,
    align_attention,
    check,
    token_validity,
)
from acr_reg.integrations.jobs.batches import BatchedCams
from tests.support.devices import CPU, Traffic, stand_in_devices
from tests.support.models import explicit_vit, multihead_vit
from tests.support.paths import ROOT

SIZE = (32, 48)
SAMPLER = RandomCompose(
    [
        RandomApply(HorizontalFlip()),
        RandomChoice([Rotate90(0), Rotate90(2)]),
        RandomScale((0.8, 1.2), keep_size=True),
        RandomResizedCrop(SIZE, scale=(0.4, 1)),
    ]
)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with stand_in_devices() as device:
        yield device


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
    """Loss, a class map, a carried map and what a view shows, of a model on ``device``."""
    torch.manual_seed(0)
    with CPU:
        model, images = multihead_vit().eval(), torch.randn(2, 3, *SIZE)
        valid = torch.arange(48).expand(2, 32, 48) < 40
    model, images, valid = model.to(device), images.to(device), valid.to(device)
    acr = AllPairsConsistencyLoss(rows=0.5)
    found = []
    from acr_reg import capture_attention

    with capture_attention(model) as attention:
        for per_image in (False, True):
            view = SAMPLER.sample(images, per_image, torch.Generator().manual_seed(5))
            torch.manual_seed(1)
            model(images)
            first = attention.take()
            model(view(images))
            found.append(acr(first, attention.take(), view=view, valid=valid))
    with GradientCam(model) as cam:
        found.append(cam(images))
    rows = torch.rand(1, 2, 24, 24, device=CPU).to(device)
    layout = AttentionMaps.from_tensors([rows / rows.sum(-1, keepdim=True)], 0, (4, 6))[0].layout
    found.append(align_attention(rows, view if view.num_images == 1 else HorizontalFlip(), layout, layout))
    assert {each.device for each in found} == {device}
    crop = Crop(0, 8, 32, 32, image_size=SIZE)
    found.append(token_validity(crop, Crop(0, 8, 32, 32, image_size=SIZE) and layout.key, layout.key))
    return [each.detach().cpu() for each in found]
