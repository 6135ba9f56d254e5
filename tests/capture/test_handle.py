"""What capture_attention is given, and what take() returns or says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, CaptureError, HorizontalFlip, LayoutError, capture_attention
from tests.support.attention import says
from tests.support.capturing import cold_and_warm, hooks, images
from tests.support.models import MultiheadBlock, PlainEncoder, explicit_vit, multihead_vit


def test_layers_and_modules_choose() -> None:
    model = multihead_vit(depth=3)
    with capture_attention(model, layers=[-1, 0]) as attention:
        model(images())
        assert attention.take().layers == (2, 0)
    with capture_attention(model, modules=["encoder.1"]) as attention:
        model(images())
        (layer,) = attention.take()
        assert layer.name == "encoder.1.attention"
    with pytest.raises(ValueError, match=r"'encoder\.9'"):
        capture_attention(model, modules=["encoder.9"])
    with capture_attention(model, layers=[7]) as attention:
        model(images())
        with pytest.raises(IndexError, match=r"\[7\].*\[0, 1, 2\]"):
            attention.take()


def test_bad_arguments_leave_no_hook_behind() -> None:
    model = explicit_vit()
    with pytest.raises(ValueError, match=r"keep=.*'some'.*only.*first|'some'.*keep=.*only.*first"):
        capture_attention(model, keep="some")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"\bstr\b.*torch\.nn\.Module"):
        capture_attention("vit")  # type: ignore[arg-type]
    assert hooks(model) == 0


def test_a_grid_that_cannot_be_known_is_an_error_where_it_is_needed() -> None:
    model = MultiheadBlock(False)
    with capture_attention(model) as attention:
        model(torch.randn(2, 25, 32))
        maps = attention.take()
        assert maps[0].weights().shape == (2, 4, 25, 25)
        with pytest.raises(LayoutError, match=r"25 tokens.*image.*with_layout"):
            AllPairsConsistencyLoss(HorizontalFlip())(maps, maps)
        placed = maps.with_layout(grid=(4, 6), num_prefix_tokens=1)
        assert AllPairsConsistencyLoss(HorizontalFlip())(placed, placed) > 0
        with pytest.raises(LayoutError, match=r"25 queries and 25 keys.*\b24\b"):
            maps.with_layout(grid=(4, 6), num_prefix_tokens=0)


# ---- nothing to take


def test_nothing_captured_says_what_to_check() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with capture_attention(model) as attention:
        model(images())
        with pytest.raises(CaptureError, match=r"No token-to-token attention.*Sequential.*must run in this model"):
            attention.take()


class PooledAttention(nn.Module):
    """Named as if it were attention, which it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


@cold_and_warm
def test_nothing_captured_names_the_modules_that_look_like_attention(warm: bool) -> None:
    model = PlainEncoder(nn.Sequential(*(PooledAttention() for _ in range(4))))
    with capture_attention(model) as attention:
        for _ in range(1 + warm):
            model(images())
            with pytest.raises(CaptureError) as error:
                attention.take()
            named = [f"encoder.{i} (PooledAttention)" for i in range(3)]
            assert says(error, "No token-to-token attention of PlainEncoder", ", ".join(named), "and more", "softmax")


def test_a_second_take_of_one_forward_says_that_nothing_ran_since_the_first() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        model(images())
        attention.take()
        for _ in range(2):
            with pytest.raises(CaptureError, match=r"since the last take\(\).*not of a copy"):
                attention.take()
        with torch.no_grad():
            model(images())
        with pytest.raises(CaptureError, match=r"under torch\.no_grad"):
            attention.take()


def test_nothing_captured_says_that_nothing_ran() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        with pytest.raises(CaptureError) as error:
            attention.take()
        assert says(error, "must run in this model, not a copy")
        copy.deepcopy(model)(images())
        with pytest.raises(CaptureError) as error:
            attention.take()
        assert says(error, "must run in this model, not a copy")


def test_a_pass_is_taken_once() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            attention.take()
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(error, "since the last take()")
