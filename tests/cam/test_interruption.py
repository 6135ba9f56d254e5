"""A KeyboardInterrupt at any line of GradientCam leaves the model as it was, and the next call works."""

import sys
from collections import Counter
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.overrides import _len_torch_function_stack

from acr_reg import GradientCam, Identity
from acr_reg.cam import inference, settings
from acr_reg.capture import evaluation
from tests.support.models import explicit_vit

FILES = {module.__file__ for module in (inference, settings, evaluation)}
MOST = 2000  # lines that one call runs


class InterruptAt:
    """Raises KeyboardInterrupt at one line of these files that runs, counted from 0; of a loop, two rounds count."""

    def __init__(self, line):
        self.left, self.rounds = line, Counter()

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    @property
    def happened(self):
        return self.left < 0

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in FILES:
            return None
        self.rounds[frame.f_code, frame.f_lineno] += event == "line"
        if event == "line" and self.rounds[frame.f_code, frame.f_lineno] <= 2:
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self.trace


def state_of(model):
    return [(p.requires_grad, p.grad) for p in model.parameters()] + [m.training for m in model.modules()]


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Merging(nn.Linear):
    """Merges a second weight in eval mode, and takes it out again in training mode, as LoRA does."""

    merged = False

    def train(self, mode=True):
        if self.merged == mode:
            self.merged = not mode
            self.weight.data += 1 if self.merged else -1
        return super().train(mode)


def small_vit():
    model = explicit_vit(1).train()
    model.encoder[0].drop.eval()
    model.encoder[0].proj.bias.requires_grad_(False)
    return model


def interrupts(run):
    """Runs with an interruption at each line in turn, and yields after each."""
    for line in range(MOST):
        with InterruptAt(line) as interruption, suppress(KeyboardInterrupt):
            run()
        if not interruption.happened:
            return
        yield line
    pytest.fail("more lines than expected")


def test_the_model_is_as_it_was_after_an_interruption_at_any_line(monkeypatch):
    """Whether the GradientCam is then removed, every other time, or just dropped."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # a line of __del__ is interrupted, too
    model, images, labels = small_vit(), torch.randn(1, 3, 32, 48), torch.eye(5)[:1]
    before, cams = state_of(model), []
    with GradientCam(model, -1, views=[Identity()]) as cam:
        expected = cam(images, labels)

    def run():
        cams[:] = [GradientCam(model, -1, views=[Identity()])]
        cams[0](images, labels)

    lines = []
    with torch.no_grad():
        for line in interrupts(run):
            lines.append(line)
            assert state_of(model) == before, line
            assert not torch.is_grad_enabled(), line
            for each in cams if line % 2 else ():
                if line % 5 == 0:
                    torch.testing.assert_close(each(images, labels), expected)
                    assert state_of(model) == before, line
                each.remove()
            cams.clear()
            assert _len_torch_function_stack() == 0, line
            assert hooks_of(model) == 0, line
    assert len(lines) > 50


def test_an_interruption_in_the_forward_leaves_no_mode_behind():
    model, images = explicit_vit(2), torch.randn(1, 3, 32, 48)
    cam = GradientCam(model)
    expected = cam(images)

    def interrupted(module, args):
        raise KeyboardInterrupt

    hook = model.encoder[1].drop.register_forward_pre_hook(interrupted)  # within attention
    with pytest.raises(KeyboardInterrupt):
        cam(images)
    assert _len_torch_function_stack() == 0
    hook.remove()
    torch.testing.assert_close(cam(images), expected)
    cam.remove()
    assert hooks_of(model) == 0


def test_remove_that_was_interrupted_may_be_called_again():
    model, images = small_vit(), torch.randn(1, 3, 32, 48)
    cams = []

    def run():
        cams[0].remove()

    cams = [GradientCam(model, -1, views=[Identity()])]
    cams[0](images)
    for _ in interrupts(run):
        cams[0].remove()
        assert hooks_of(model) == 0
        cams = [GradientCam(model, -1, views=[Identity()])]
        cams[0](images)


@pytest.mark.parametrize("change", [evaluation.eval_mode, evaluation.frozen])
def test_each_change_is_undone_after_an_interruption_at_any_line(change, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    model = nn.Sequential(nn.Dropout(), Merging(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()))
    model[2].eval()
    model[2][1].train()
    model[2][0].weight.requires_grad_(False)
    before, weight = state_of(model), model[1].weight.clone()

    def run():
        with change(model):
            pass

    for line in interrupts(run):
        assert state_of(model) == before, line
        assert torch.allclose(model[1].weight, weight, atol=1e-6), line
        assert not model[1].merged


def test_an_own_train_undoes_what_an_own_eval_did():
    model = nn.Sequential(Merging(3, 3))
    weight = model[0].weight.clone()
    with evaluation.eval_mode(model):
        assert model[0].merged
    assert not model[0].merged
    torch.testing.assert_close(model[0].weight, weight)
