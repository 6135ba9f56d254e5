"""A KeyboardInterrupt at any line of GradientCam leaves the model as it was, and the next call works."""

import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.overrides import _len_torch_function_stack

from acr_reg import GradientCam, Identity
from acr_reg.capture.evaluation import eval_mode, state_kept
from tests.support.interrupts import each_interrupt, files_of
from tests.support.models import explicit_vit

EVALUATION = files_of("capture/evaluation.py")
FILES = files_of("cam/inference.py", "cam/settings.py") | EVALUATION


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


def small_cam(model):
    return GradientCam(model, -1, views=[Identity()])


@pytest.mark.parametrize(("holds", "step"), [(True, 7), (False, 13)], ids=["held", "dropped"])
def test_the_model_is_as_it_was_after_an_interruption_at_any_line(holds, step):
    """Whether a traceback holds the interrupted call or not, and whether the GradientCam is then called again, removed
    or just dropped."""
    model, images, labels = small_vit(), torch.randn(1, 3, 32, 48), torch.eye(5)[:1]
    before = state_of(model)
    with small_cam(model) as cam:
        expected = cam(images, labels)
    with torch.no_grad():
        number = 0
        begin, act = partial(small_cam, model), lambda cam: cam(images, labels)
        for cam, where in each_interrupt(begin, act, FILES, step, holds):
            number += 1
            assert state_of(model) == before, where
            assert not torch.is_grad_enabled(), where
            if number % 3 == 0:
                torch.testing.assert_close(cam(images, labels), expected)
                assert state_of(model) == before, where
            if holds or number % 2:
                cam.remove()
            del cam
            assert _len_torch_function_stack() == 0, where
            assert hooks_of(model) == 0, where
    assert number * step > 100


def test_a_call_after_the_first_may_be_interrupted_too():
    model, images, labels = small_vit(), torch.randn(1, 3, 32, 48), torch.eye(5)[:1]
    before, cam = state_of(model), small_cam(model)
    expected = cam(images, labels)
    for _, where in each_interrupt(lambda: cam, lambda cam: cam(images, labels), files_of("cam"), step=9):
        assert state_of(model) == before, where
        torch.testing.assert_close(cam(images, labels), expected, msg=where)


def test_a_second_interruption_while_the_first_is_cleared_up_is_made_good_by_the_next_call():
    model, images, labels = small_vit(), torch.randn(1, 3, 32, 48), torch.eye(5)[:1]
    before = state_of(model)
    with small_cam(model) as cam:
        expected = cam(images, labels)

    def failing(cam):
        with pytest.raises(ValueError, match="labels"):
            cam(images, labels[0])

    for cam, where in each_interrupt(partial(small_cam, model), failing, EVALUATION, step=2):
        torch.testing.assert_close(cam(images, labels), expected, msg=where)
        cam.remove()
        assert state_of(model) == before, where


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

    def begin():
        cam = small_cam(model)
        cam(images)
        return cam

    for cam, where in each_interrupt(begin, GradientCam.remove, files_of("cam", "capture"), step=5):
        cam.remove()
        assert hooks_of(model) == 0, where


def partly_merged():
    model = nn.Sequential(nn.Dropout(), Merging(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()))
    model[2].eval()
    model[2][1].train()
    model[2][0].weight.requires_grad_(False)
    return model


def entered_and_left(block):
    def run(model):
        with block(model) as entered:
            if block is eval_mode:
                entered.freeze()
            model.seen = model[2][0].running_mean.add_(1)

    return run


@pytest.mark.parametrize("block", [eval_mode, state_kept])
@pytest.mark.parametrize("holds", [True, False])
def test_the_next_block_finds_the_model_as_it_was_before_an_interrupted_one(block, holds):
    """At once, if no traceback holds the interrupted block."""
    model = partly_merged()
    model.seen = None
    before, weight = state_of(model), model[1].weight.clone()
    if block is eval_mode:
        model[2][0].running_mean = torch.zeros(3)  # written to in the block, and not restored by it
    buffers = [buffer.clone() for buffer in model.buffers()] if block is state_kept else []
    for _, where in each_interrupt(lambda: model, entered_and_left(block), EVALUATION, holds=holds):
        if holds:
            with block(model):
                pass
        assert state_of(model) == before, where
        assert torch.allclose(model[1].weight, weight, atol=1e-6), where
        assert not model[1].merged, where
        assert all(map(torch.equal, model.buffers(), buffers)), where
        assert block is eval_mode or model.seen is None, where


def test_the_lines_are_not_counted_with_blocks_that_a_collection_would_remove():
    """A test that ran before may leave them in a cycle, and the garbage collector comes when it likes."""
    model, ended = partly_merged(), eval_mode(nn.Linear(1, 1))
    with ended:
        pass
    ended.itself = ended
    del ended
    for _ in each_interrupt(lambda: model, entered_and_left(eval_mode), EVALUATION):
        gc.collect()


def test_an_own_train_undoes_what_an_own_eval_did():
    model = nn.Sequential(Merging(3, 3))
    weight = model[0].weight.clone()
    with eval_mode(model):
        assert model[0].merged
    assert not model[0].merged
    torch.testing.assert_close(model[0].weight, weight)
