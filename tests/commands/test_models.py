"""Models of the command line get their weights from checkpoints of every usual form, or an error that counts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from acr_reg.commands.models import load_weights
from acr_reg.errors import CommandError


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))


@pytest.mark.parametrize(
    "form", ["plain.pth", "model.pt", "state_dict.pth", "both.pth", "module.pth", "plain.safetensors", "plain.npz"]
)
def test_weights_are_read_from_checkpoints_of_each_form(tmp_path: Path, form: str) -> None:
    state, file = small_model().state_dict(), tmp_path / form
    if file.suffix == ".npz":
        np.savez(file, **{name: values.numpy() for name, values in state.items()})
    elif file.suffix == ".safetensors":
        save_file(state, file)
    else:
        forms = {
            "plain.pth": state,
            "model.pt": {"model": state, "epoch": 3},
            "state_dict.pth": {"state_dict": state, "optimizer": {"lr": 0.1}},
            "both.pth": {"model": {"state_dict": state}},
            "module.pth": {"epoch": 3, "model": {f"module.{name}": values for name, values in state.items()}},
        }
        torch.save(forms[form], file)
    model = small_model()
    load_weights(model, file)
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values, state[name])


def test_weights_of_half_precision_become_those_of_the_model(tmp_path: Path) -> None:
    state = {
        name: values.half() if values.is_floating_point() else values
        for name, values in small_model().state_dict().items()
    }
    np.savez(tmp_path / "w.npz", **{name: values.numpy() for name, values in state.items()})
    model = small_model()
    load_weights(model, tmp_path / "w.npz")
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model[0].weight.half(), state["0.weight"])


def test_weights_that_do_not_fit_are_counted_and_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    model, file = small_model(), tmp_path / "w.pth"
    state = {name: torch.full_like(values, 7) for name, values in model.state_dict().items()}
    del state["0.bias"], state["1.weight"]
    state |= {"extra": torch.zeros(1), "2.weight": torch.zeros(9, 3)}
    torch.save(state, file)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with pytest.raises(CommandError) as raised:
        load_weights(model, file)
    for said in (
        "--weights .*w.pth does not fit Sequential",
        r"Of 9 weights, 2 are missing \(0\.bias, 1\.weight\), 1 are unknown \(extra\), 1 differ in shape \(2\.weight\)",
        "--set NAME=VALUE",
    ):
        assert re.search(said, str(raised.value))
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values, before[name])


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("was run",)


@pytest.mark.parametrize(
    "content", [Hostile(), {"model": Hostile()}, [torch.zeros(1)], {"model": {"a": 3}}, torch.zeros(2), {}]
)
def test_files_of_other_things_are_refused_and_run_nothing(
    tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "w.pth"
    torch.save(content, file)
    with pytest.raises(CommandError, match=r"--weights .*w\.pth (cannot be read|holds no state dict|does not fit)"):
        load_weights(small_model(), file)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.npz", "w.safetensors", "w.txt"])
def test_damaged_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    for make in (lambda path: None, lambda path: path.write_text("no weights"), lambda path: path.mkdir()):
        file = tmp_path / name
        file.unlink(missing_ok=True)
        make(file)
        with pytest.raises(CommandError, match=rf"--weights .*{name} cannot be read"):
            load_weights(small_model(), file)
