"""Where no gradient reaches the pixels: the offsets stay unknown with the reason, and no error of torch gets out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acr_reg import Rotate90, check
from tests.support.models.tokens import SIZE, Attention, Tokens


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, *SIZE)


class Before(Tokens):
    """A model that first does something to its images."""

    def __init__(self, step: Callable[[Tensor], Tensor], fused: bool = False) -> None:
        super().__init__(Attention(fused=fused), Attention(fused=fused))
        self.step = step

    def embed(self, x: Tensor) -> Tensor:
        return super().embed(self.step(x))


class Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise NotImplementedError("no formula\nfor this kernel")


def overwritten(x: Tensor) -> Tensor:
    y = x.exp()
    y += 1  # of which backward needs the value before
    return y


NO_GRADIENT = {
    "uint8": (lambda x: (50 * x + 128).clamp(0, 255).to(torch.uint8).float() / 50, "integers"),
    "integers": (lambda x: (50 * x).long().float() / 50, "integers"),
    "detached": (lambda x: x.detach(), "detach()"),
    "numpy": (lambda x: torch.from_numpy(2 * x.numpy()), "images that need a gradient: Can't call numpy()"),
    "rounded": (lambda x: (50 * x).round() / 50, "is 0"),
    "no formula": (Undifferentiable.apply, "torch cannot differentiate it: no formula."),
    "overwritten": (overwritten, "inplace operation"),
    "square root of 0": (lambda x: x + (0 * x).sqrt(), "NaN or infinite"),
}


@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "fused"])
@pytest.mark.parametrize("step", NO_GRADIENT)
def test_offsets_are_unknown_where_no_gradient_reaches_the_pixels(step: str, fused: bool, images: Tensor) -> None:
    before, reason = NO_GRADIENT[step]
    report = check(Before(before, fused), images)
    assert report.ok, report.problems
    assert [(layer.query_offset, layer.key_offset) for layer in report.layers] == [(None, None)] * 2
    (warning,) = report.warnings
    assert "layer 0 (blocks.0)" in warning
    assert reason in warning
    assert "\n" not in warning
    lines = str(report).splitlines()
    assert f"warning: {warning}" in lines
    assert [line.split()[-2:] for line in lines[2:4]] == [["-", "-"]] * 2
    assert lines[-1] == "ok"


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_patch_embedding_without_a_graph_leaves_the_offsets_unknown(
    without: Callable[[], Any], images: Tensor
) -> None:
    class Frozen(Tokens):
        def embed(self, x: Tensor) -> Tensor:
            with without():
                tokens = super().embed(x)
            return tokens.clone()  # which makes a usual tensor of one made in inference mode

    report = check(Frozen(Attention(), Attention()), images, Rotate90())
    assert report.ok, report.problems
    assert [layer.query_offset for layer in report.layers] == [None, None]
    assert len(report.terms) == 2
    assert "no_grad" in report.warnings[0]


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "fused"])
def test_a_whole_model_without_a_graph_is_seen_if_asked_for(
    without: Callable[[], Any], fused: bool, images: Tensor
) -> None:
    class NoGraph(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            with without():
                return super().forward(x)

    model = NoGraph(Attention(fused=fused), Attention(fused=fused))
    report = check(model, images)
    assert not report.ok
    assert "no_grad=True" in report.problems[0]
    report = check(model, images, no_grad=True)
    assert report.ok, report.problems
    assert [layer.queries for layer in report.layers] == ["4 x 6", "4 x 6"]
    assert report.terms["affinity"] > 0
    assert any("No map carries a gradient" in warning for warning in report.warnings)
    assert any("layer 0 (blocks.0)" in warning and "no_grad" in warning for warning in report.warnings)


def test_a_layer_that_no_gradient_leaves_does_not_hide_the_next() -> None:
    class Detached(Attention):
        def split(self, x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = super().split(x)
            return q.detach(), k.detach(), v

    torch.manual_seed(0)
    report = check(Tokens(Detached(), Attention(), Attention()), torch.randn(2, 3, *SIZE))
    assert report.ok
    assert [layer.query_offset is None for layer in report.layers] == [True, False, True]
    (warning,) = report.warnings
    assert warning.startswith("layer 0 (blocks.0): ")


@pytest.mark.parametrize("fewer", ["the view", "the image"])
def test_a_model_that_runs_fewer_layers_on_one_of_both_is_a_problem(fewer: str, images: Tensor) -> None:
    class Shallow(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            is_view = x.shape[-1] < x.shape[-2]
            x = self.embed(x)
            for block in self.blocks[: 1 if is_view == (fewer == "the view") else 2]:
                x = block(x)
            return self.head(x.mean(1))

    report = check(Shallow(Attention(), Attention()), images, Rotate90())
    assert not report.ok
    assert "(0,)" in report.problems[0]
    assert "(0, 1)" in report.problems[0]


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="older torch cannot differentiate through these writes")
def test_a_model_may_write_into_its_images(images: Tensor) -> None:
    given = images.clone()
    report = check(Before(lambda x: x.sub_(x.mean()).mul_(2)), images)
    assert report.ok
    assert report.warnings == ()
    assert report.layers[0].query_offset is not None
    assert torch.equal(images, given)


def test_the_models_own_error_is_raised(images: Tensor) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        check(Broken(), images)
