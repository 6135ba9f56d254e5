"""GradientCam and check run a model whose training capture is alive, and that capture does not hear them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from acr_reg import GradientCam, HorizontalFlip, capture_attention, check
from acr_reg.integrations.host import FeatureRecorder, HostCapture
from tests.support.capturing import hooks, images, modes, recorded
from tests.support.models.plain import BUILDERS, Calling, calling_vit, explicit_vit, multihead_vit

Tool = Callable[[nn.Module], object]


def by_cam(model: nn.Module) -> Tensor:
    with GradientCam(model, views=[HorizontalFlip()]) as cam:
        return cam(images(3))


def by_check(model: nn.Module) -> object:
    report = check(model, images(3))
    assert report.ok, report
    return report


every_tool = pytest.mark.parametrize("tool", [by_cam, by_check])
every_keep = pytest.mark.parametrize("keep", ["only", "first", "last", "all"])


@every_tool
@every_keep
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_training_capture_does_not_hear_them(tool: Tool, keep: str, build: Callable[[], nn.Module]) -> None:
    model = build()
    with capture_attention(model, keep=keep) as attention:
        for _ in range(2):
            tool(model)
            logits = model(images(2))
            tool(model)
            maps = attention.take()
            assert (maps.batch_size, len(maps)) == (2, 2), "the run before the tool"
            gradient = torch.autograd.grad(logits.sum(), recorded(maps, 1))[0]
            assert gradient.shape[0] == 2
        with pytest.raises(Exception, match="ran since the last take"):
            tool(model), attention.take()
    assert hooks(model) == 0


@every_tool
def test_their_graph_options_do_not_reach_the_training_run(tool: Tool) -> None:
    model = explicit_vit()
    model.requires_grad_(False)
    with capture_attention(model, graph_from=1) as attention, capture_attention(model) as plain:
        tool(model)
        model(images(2))
        assert [layer.recorded.map.requires_grad for layer in attention.take()] == [False, True]
        assert len(plain.take()) == 2


def test_two_captures_of_the_user_both_hear_and_neither_hears_the_cam() -> None:
    model = multihead_vit()
    with capture_attention(model) as one, capture_attention(model) as two, GradientCam(model) as cam:
        for _ in range(2):
            model(images(2))
            cam(images(3))
            assert one.take().batch_size == two.take().batch_size == 2


def test_one_cam_does_not_hear_another_nor_a_check() -> None:
    model = explicit_vit()
    with GradientCam(model) as one, GradientCam(model, steps=0) as two:
        expected = one(x := images(2)), two(x)
        check(model, images(3))
        assert torch.equal(one(x), expected[0])
        assert torch.equal(two(x), expected[1])


def test_a_capture_made_within_the_forward_of_a_cam_hears() -> None:
    model, seen = explicit_vit(), []

    def forward(x: Tensor) -> Tensor:
        with capture_attention(model) as inner:
            logits = model(x)
            seen.append(inner.take().batch_size)
        return logits

    with capture_attention(model) as outer, GradientCam(model, forward=forward) as cam:
        model(images(2))
        cam(images(3))
        assert set(seen[:-2]) == {1} and seen[-2:] == [3, 3]  # the first runs show the layers of one image
        assert outer.take().batch_size == 2


@every_tool
def test_an_error_in_their_forward_lets_the_training_capture_hear_again(tool: Tool) -> None:
    for error in (ValueError, KeyboardInterrupt):
        model, middle = calling_vit()

        def stop(error: type[BaseException] = error) -> None:
            raise error("stop")

        with capture_attention(model) as attention:
            for _ in range(2):
                middle.call = stop
                with pytest.raises(error):
                    tool(model)
                middle.call = None
                model(images(2))
                assert attention.take().batch_size == 2
        assert modes() == 0
        assert hooks(model) == 0


@every_tool
def test_a_part_that_is_watched_by_the_training_capture_is_run_by_them_in_the_middle_of_its_forward(tool: Tool) -> None:
    """A callback that scores an auxiliary model which shares a block with the model in training."""
    model, middle = calling_vit()
    other = explicit_vit()
    other.encoder[1] = model.encoder[0]
    with capture_attention(model) as attention:
        for _ in range(2):
            middle.call = lambda: tool(other)
            model(images(2))
            middle.call = None
            maps = attention.take()
            assert [(layer.name, layer.shape[0]) for layer in maps] == [("encoder.0", 2), ("encoder.2.attention", 2)]


def test_a_tensor_that_a_host_file_records_is_not_that_of_a_cam() -> None:
    model = explicit_vit()
    with HostCapture(model, capture_attention(model), FeatureRecorder(model.head)) as host:
        for _ in range(2):
            logits = model(images(2))
            by_cam(model)
            view = host.take()
            assert view.attention.batch_size == 2
            assert view.features is logits


def test_another_threads_training_is_heard_meanwhile() -> None:
    model, middle = calling_vit()
    entered, done = threading.Event(), threading.Event()
    main = threading.get_ident()

    def wait() -> None:
        if threading.get_ident() != main:
            entered.set()
            assert done.wait(20)

    middle.call = wait
    with capture_attention(model) as attention:
        worker = threading.Thread(target=by_check, args=(model,))
        worker.start()
        assert entered.wait(20)
        model(images(2))
        maps = attention.take()
        done.set()
        worker.join()
        assert (maps.batch_size, len(maps)) == (2, 2)
    assert isinstance(middle, Calling)
