"""eval_mode: the modes of a model are its own again afterwards, whatever happens inside."""

import pytest
from torch import nn

from acr_reg.capture.evaluation import eval_mode


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
