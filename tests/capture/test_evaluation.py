"""eval_mode and state_kept: what the modules had is theirs again afterwards, whatever happens inside."""

import contextlib

import pytest
import torch
from torch import nn

from acr_reg.capture.evaluation import eval_mode, state_kept


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_has_its_own_mode_again(fails):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()))
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, False, True]
    try:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [module.training for module in model.modules()] == before


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("shared", self.norm.running_mean)
        self.register_buffer("absent", None)
        self.count = 0

    def forward(self, x):
        self.count += 1
        self.last = x
        self.absent = torch.ones(1)
        self.register_buffer("new", x.mean(0))
        y = self.norm(x)
        assert self.shared is self.norm.running_mean
        return y


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_state_kept_gives_back_buffers_and_attributes(error):
    model = Remembers()
    mean, names = model.norm.running_mean, set(vars(model))
    with contextlib.suppress(KeyboardInterrupt), state_kept(model):
        model(torch.ones(2, 3))
        assert model.norm.running_mean.any()
        if error is not None:
            raise error
    assert model.norm.running_mean is model.shared is mean
    assert not mean.any()
    assert int(model.norm.num_batches_tracked) == 0
    assert set(vars(model)) == names
    assert (model.count, model.absent, hasattr(model, "new")) == (0, None, False)
