"""docs/examples: each script trains, logs the terms, and gives the gradient of a loop written by hand."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  # this file is left out where the extras are not installed
import pytest
import timm
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention
from tests.support.paths import ROOT
from tests.support.processes import programs

EXAMPLES = ROOT / "docs" / "examples"
TERMS = {"classes", "activation", "affinity", "entropy"}
SMALL = ["--images", "4", "--size", "32", "--batch", "4", "--accumulate", "1"]


@pytest.fixture(scope="module", autouse=True)
def small_models() -> Iterator[None]:
    """timm's ViTs get 3 layers instead of 12: the examples name a model that readers know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", partial(timm.create_model, depth=3))
        yield


def run(name: str, *options: str) -> Any:
    """What main() of the example returns. Warnings of the frameworks are theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(EXAMPLES / f"{name}_loop.py"))["main"](list(options))


def first_gradient(name: str, *options: str) -> list[Tensor]:
    """The gradient that the first step of the example's optimizer sees, in the order of the parameters."""
    gradients: list[list[Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients.append([parameter.grad.clone() for parameter in groups if parameter.grad is not None])

    handle = register_optimizer_step_post_hook(keep)
    try:
        run(name, *options)
    finally:
        handle.remove()
    return gradients[0]


def gradient_by_hand(model: torch.nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Of the criterion on both views and of ACR, on all images at once."""
    acr, criterion = AllPairsConsistencyLoss(HorizontalFlip()), torch.nn.MultiLabelSoftMarginLoss()
    with capture_attention(model) as attention:
        outputs_a, attn_a = model(images), attention.take()
        outputs_b, attn_b = model(images.flip(-1)), attention.take()
        logits = [getattr(outputs, "logits", outputs) for outputs in (outputs_a, outputs_b)]
        consistency = acr(attn_a, attn_b)
        assert consistency > 0
        (sum(criterion(part, labels) for part in logits) + consistency).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def timm_vit() -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=20)
    return model, torch.rand(4, 3, 32, 32), torch.rand(4, 20).lt(0.1).float()


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return gradient_by_hand(*timm_vit())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", ["--epochs", "1", "--amp", "float32"]),
        ("plain", ["--epochs", "1", "--amp", "float32", "--batch", "2", "--accumulate", "2"]),
        ("lightning", ["--steps", "1"]),
        ("lightning", ["--steps", "1", "--batch", "2", "--accumulate", "2"]),
        ("accelerate", ["--epochs", "1"]),
        ("accelerate", ["--epochs", "1", "--batch", "2", "--accumulate", "2"]),
    ],
)
def test_each_loop_has_the_gradient_of_the_loop_by_hand(
    name: str, options: list[str], expected: list[Tensor], tmp_path: Path
) -> None:
    gradient = first_gradient(name, *SMALL, *options, "--folder", str(tmp_path / "run"))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [[], ["--batch", "2", "--accumulate", "2"]])
def test_the_trainer_has_the_gradient_of_the_loop_by_hand(options: list[str], tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    gradient = first_gradient("trainer", *SMALL, "--steps", "1", *options, "--folder", str(tmp_path))
    set_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    model = ViTForImageClassification(ViTConfig(image_size=32, num_labels=20, **sizes))
    data = [(torch.rand(3, 32, 32), (torch.rand(20) < 0.1).float()) for _ in range(4)]
    images, labels = (torch.stack(parts) for parts in zip(*data, strict=True))
    by_hand = gradient_by_hand(model, images, labels)  # the optimizer orders parameters by their decay
    assert len(gradient) == len(by_hand)
    by_norm = [sorted(part.norm().item() for part in parts) for parts in (gradient, by_hand)]
    assert by_norm[0] == pytest.approx(by_norm[1], rel=1e-3, abs=1e-6)


def test_the_plain_loop_resumes_as_if_it_had_not_stopped_and_moves_its_ema(tmp_path: Path) -> None:
    options = ["--images", "4", "--size", "32", "--batch", "2"]
    model, ema, history = run("plain", *options, "--epochs", "2", "--folder", str(tmp_path / "whole"))
    run("plain", *options, "--epochs", "1", "--folder", str(tmp_path / "parts"))
    resumed, resumed_ema, rest = run(
        "plain", *options, "--epochs", "2", "--resume", "--folder", str(tmp_path / "parts")
    )
    assert len(history) == 4 and history[2:] == rest
    assert all(set(row) == TERMS and min(row.values()) > 0 for row in history)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed_ema.state_dict(), ema.state_dict(), rtol=0, atol=0)
    assert ema.n_averaged == 2
    assert not torch.equal(ema.module.head.weight, model.head.weight)


def scalars(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_tensorboard_gets_the_terms_and_the_scaler_runs_in_float16(tmp_path: Path) -> None:
    run("plain", *SMALL, "--epochs", "1", "--amp", "float16", "--folder", str(tmp_path / "run"))
    assert {name.removeprefix("train/") for name in scalars(tmp_path / "run")} == TERMS
    scale = torch.load(tmp_path / "run.pt", weights_only=True)[1][3]["scale"]
    assert scale > 0


def test_lightning_and_the_trainer_log_the_terms_beside_a_validation(tmp_path: Path) -> None:
    _, lightning = run("lightning", *SMALL, "--steps", "2", "--folder", str(tmp_path))
    assert set(lightning.logged_metrics) >= TERMS | {"val_classes"}
    _, trainer = run("trainer", *SMALL, "--steps", "2", "--folder", str(tmp_path))
    rows = [row for row in trainer.state.log_history if "affinity" in row]
    assert len(rows) == 2 and all(row["affinity"] > 0 and row["activation"] > 0 for row in rows)
    assert "eval_loss" in trainer.state.log_history[-1]


def test_two_processes_of_the_plain_loop_have_one_history(tmp_path: Path) -> None:
    options = ["--images", "8", "--size", "32", "--batch", "2", "--epochs", "1", "--folder", tmp_path / "run"]
    processes = programs(2, EXAMPLES / "plain_loop.py", *options)
    try:
        (printed, error), (silence, other_error) = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], error[-2000:] + other_error[-2000:]
    assert printed.count("epoch 0: ") == 1 and "affinity" in printed and not silence
    epoch, states = torch.load(tmp_path / "run.pt", weights_only=True)
    assert epoch == 1 and all(torch.isfinite(value).all() for value in states[0].values())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_shorter_than_80_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
