"""Threads that compute class maps of one model wait for each other."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from acr_reg import CaptureError, GradientCam, Identity
from acr_reg.capture.evaluation import eval_mode
from tests.support.models import explicit_vit


@pytest.fixture(autouse=True)
def _switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def flags(model):
    return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("shared", ["GradientCam", "model", "module"])
def test_each_thread_gets_the_maps_of_its_own_images(shared):
    """Whether they share a GradientCam, or each has its own of the model or of a module that holds the model."""
    model, count = explicit_vit(2).train(), 4
    images = [torch.randn(1, 3, 32, 48) for _ in range(count)]
    cams = [GradientCam(model, views=[Identity()])] * count
    expected = [cam(image) for cam, image in zip(cams, images, strict=True)]
    if shared == "model":
        cams = [GradientCam(model, views=[Identity()]) for _ in range(count)]
    elif shared == "module":
        cams = [GradientCam(nn.Sequential(model), views=[Identity()]) for _ in range(count)]
    before, begin = flags(model), threading.Barrier(count)

    def maps(i):
        begin.wait()
        return [cams[i](images[i]) for _ in range(4)]

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(maps, range(count)))
    for of_thread, right in zip(found, expected, strict=True):
        for each in of_thread:
            torch.testing.assert_close(each, right)
    assert flags(model) == before


def test_models_that_share_nothing_do_not_wait_for_each_other():
    entered, leave = threading.Event(), threading.Event()

    def long():
        with eval_mode(nn.Dropout()):
            entered.set()
            assert leave.wait(10)

    thread = threading.Thread(target=long)
    thread.start()
    assert entered.wait(10)
    with eval_mode(nn.Dropout()):
        leave.set()
    thread.join()


def test_a_block_within_a_block_of_the_same_thread_does_not_wait():
    """Not for the outer block, nor for another thread that waits for it."""
    model, waits = nn.Sequential(nn.Dropout(), nn.Dropout()), threading.Event()

    def other():
        waits.set()
        with eval_mode(model):
            pass

    with eval_mode(model[0]):
        thread = threading.Thread(target=other)
        thread.start()
        assert waits.wait(10)
        with eval_mode(model):
            assert not model[1].training
        assert model[1].training
        assert not model[0].training
    thread.join()
    assert model[0].training


def test_a_thread_that_ended_within_its_block_is_not_waited_for():
    model, left = nn.Dropout(), []

    def ends():
        block = eval_mode(model)
        block.__enter__()
        left.append(block)

    thread = threading.Thread(target=ends)
    thread.start()
    thread.join()
    assert not model.training
    with eval_mode(model):
        pass
    assert model.training


def test_a_cam_removed_by_another_thread_says_so():
    model, images = explicit_vit(2), torch.randn(1, 3, 32, 48)
    cam = GradientCam(model)
    cam(images)
    hook = model.encoder[0].register_forward_hook(lambda *_: cam.remove())
    with pytest.raises(CaptureError, match="removed"):
        cam(images)
    hook.remove()
