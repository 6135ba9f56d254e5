"""A plan of placements serves the runs that made the same sorts of calls on as many images of the same size, and no
others."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from acr_reg import AttentionMaps, LayoutError, capture_attention
from acr_reg.placement.placer import Placer
from tests.support.capturing import images
from tests.support.models import explicit_vit


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls that were placed anew."""
    found: list[str] = []
    place = Placer._placement

    def noted(self: Placer, call, size, pyramid):  # type: ignore[no-untyped-def]
        found.append(call.name)
        return place(self, call, size, pyramid)

    monkeypatch.setattr(Placer, "_placement", noted)
    return found


def layouts(maps: AttentionMaps) -> list[tuple[object, ...]]:
    return [(layer.index, layer.name, layer.shape, layer.placed, layer.why_unplaced) for layer in maps]


def alone(model: nn.Module, x: Tensor) -> list[tuple[object, ...]]:
    with capture_attention(model) as attention:
        model(x)
        return layouts(attention.take())


def test_runs_on_images_of_three_sizes_by_turns_are_planned_once_each(placed: list[str]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=0, dynamic_img_size=True).eval()
    batches = [images(2, (64, 64)), images(2, (32, 96)), images(3, (64, 64))]
    expected = [alone(model, x) for x in batches]
    with capture_attention(model) as attention:
        for turn in range(3):
            for x, wanted in zip(batches, expected, strict=True):
                placed.clear()
                model(x)
                assert layouts(attention.take()) == wanted
                assert placed == ([] if turn > 1 else placed)
    assert placed == []


def test_a_run_of_fewer_layers_is_planned_anew(placed: list[str]) -> None:
    model, tokens = explicit_vit(3), torch.randn(2, 25, 32)
    names = ["encoder.0", "encoder.1", "encoder.2"]
    with capture_attention(model, num_prefix_tokens=1) as attention:
        for first in (0, 0, 1, 0, 2, 2):
            placed.clear()
            model.encoder[first:](tokens)
            assert [layer.name for layer in attention.take()] == names[first:]
    assert placed == []


def test_a_run_of_fewer_tokens_on_the_same_images_is_planned_anew(placed: list[str]) -> None:
    model, x = explicit_vit(2), images(2)
    with capture_attention(model) as attention:
        for stride, tokens, refusal in ((8, 24, None), (16, 6, "7 tokens for an image of 32 x 48 px"), (8, 24, None)):
            model.proj.stride = (stride, stride)
            model.pos_embed.data = model.pos_embed.data[:, :1].expand(-1, 1 + tokens, -1).contiguous()
            placed.clear()
            model(x)
            for layer in attention.take():
                if refusal is None:
                    assert layer.layout.num_queries == 25
                else:
                    with pytest.raises(LayoutError, match=refusal):
                        layer.layout  # noqa: B018  # it raises
            assert len(placed) == 2
