"""Class-token-gradient CAM against one backward per class and image on an unfused model."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

from acr_reg import capture_attention, class_token_gradient_cam
from tests.support.attention import says
from tests.support.fused import fused_copy
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder, explicit_vit, multihead_vit

METHODS = ("grad", "grad_s", "cam_grad", "cam_grad_s")
LABELS = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def oracle(
    maps_of: nn.Module, images: Tensor, labels: Tensor, start: int, method: str, query: str, prefix: int
) -> Tensor:
    """A full backward for each image and class, on maps that the explicit model keeps; literally the formulas."""
    found = torch.zeros(*labels.shape, 4 * 6, dtype=images.dtype)
    for image in range(len(images)):
        for label in range(labels.shape[1]):
            if not labels[image, label]:
                continue
            kept: list[Tensor] = []
            model = copy.deepcopy(maps_of)
            for block in model.encoder:
                block.drop.register_forward_hook(
                    lambda _m, _i, out, kept=kept: (out.retain_grad(), kept.append(out))[1]
                )
            model(images[image : image + 1])[0, label].backward()
            for layer in kept[start:]:
                for row in range(layer.shape[2]) if query == "all" else [label if prefix > 1 else 0]:
                    gradient, attention = layer.grad[0, :, row, prefix:], layer[0, :, row, prefix:]
                    grad = gradient.clamp(min=0).mean(0)
                    weighted = (gradient * attention).clamp(min=0).mean(0)
                    value = {"grad": grad, "grad_s": grad * grad, "cam_grad": weighted, "cam_grad_s": weighted * grad}[
                        method
                    ]
                    found[image, label] += value.detach() / (layer.shape[2] if query == "all" else 1)
    return found.reshape(*labels.shape, 4, 6)


class PerClass(PlainEncoder):
    """One class token for each of five classes, as in MCTformer: the score of class c is read off token c."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        self.cls_token = nn.Parameter(torch.randn(1, 5, 32))
        self.pos_embed = nn.Parameter(torch.randn(1, 5 + 24, 32))
        self.head = nn.Linear(32, 1)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        return self.head(self.encoder(tokens)[:, :5])[..., 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("query", ["class", "all"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_cam_equals_one_backward_per_class_and_image(method: str, query: str, tokens: int) -> None:
    blocks = nn.Sequential(*(ExplicitBlock() for _ in range(3)))
    explicit = (PlainEncoder(blocks) if tokens == 1 else PerClass(blocks)).double().eval()
    images = torch.randn(4, 3, 32, 48, dtype=torch.float64)
    expected = oracle(explicit, images, LABELS, -2, method, query, tokens)
    assert expected.amax((2, 3))[LABELS > 0].min() > 0
    for model in (explicit, fused_copy(explicit)):
        torch.testing.assert_close(model(images), explicit(images))
        with capture_attention(model) as attention:
            logits = model(images)
            cam = class_token_gradient_cam(logits, attention.take(), LABELS, start_layer=-2, method=method, query=query)
        torch.testing.assert_close(cam, expected, rtol=1e-9, atol=1e-15)
        assert (cam[LABELS == 0] == 0).all()


def test_start_layer_and_every_class_without_labels() -> None:
    model, images = explicit_vit(3), torch.randn(2, 3, 32, 48)
    with capture_attention(model) as attention:
        logits = model(images)
        maps = attention.take()
        first, last = (class_token_gradient_cam(logits, maps, start_layer=s) for s in (0, 2))
        torch.testing.assert_close(class_token_gradient_cam(logits, maps, start_layer=-1), last)
        torch.testing.assert_close(
            class_token_gradient_cam(logits, maps.select([0, 1]), start_layer=0) + last, first, rtol=1e-5, atol=1e-9
        )
        assert first.shape == (2, 5, 4, 6)
        assert first.amax((2, 3)).min() > 0
        for start in (3, -4):
            with pytest.raises(ValueError, match=f"start_layer={start} ") as error:
                class_token_gradient_cam(logits, maps, start_layer=start)
            assert says(error, "(0, 1, 2)", "-3 to -1")


def test_a_batch_takes_as_many_passes_as_its_most_labelled_image(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    model = multihead_vit()
    with capture_attention(model) as attention:
        class_token_gradient_cam(model(torch.randn(4, 3, 32, 48)), attention.take(), LABELS)
    assert len(calls) == 3


def test_cam_on_either_half_of_a_concatenated_forward() -> None:
    for model in (explicit_vit(), multihead_vit()):
        images = torch.randn(4, 3, 32, 48)
        with capture_attention(model) as attention:
            alone = class_token_gradient_cam(model(images), attention.take(), LABELS)
            logits = model(torch.cat([images.flip(-1), images]))
            _, half = attention.take().chunk(2)
            found = class_token_gradient_cam(logits[4:], half, LABELS)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-8)


def test_cam_has_no_side_effect() -> None:
    model = multihead_vit().train()
    model.head.weight.requires_grad_(False)
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    with capture_attention(model) as attention:
        images = torch.randn(2, 3, 32, 48)
        logits = model(images)
        maps = attention.take()
        cam = class_token_gradient_cam(logits, maps)
        assert not cam.requires_grad
        assert model.training
        assert images.grad is None
        assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == before
        logits.sum().backward()  # the graph is still there
        with pytest.raises(RuntimeError, match="already freed") as error:
            class_token_gradient_cam(logits, maps)
        assert says(error, "before loss.backward()", "backward(retain_graph=True)")


@pytest.mark.parametrize("fused", [False, True])
def test_a_cam_inside_the_loss_has_a_gradient(fused: bool) -> None:
    explicit = explicit_vit().double()
    model = fused_copy(explicit) if fused else explicit
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)

    def loss() -> Tensor:
        logits = model(images)
        return class_token_gradient_cam(logits, attention.take(), create_graph=True).square().sum() * 1e6

    with capture_attention(model, double_backward=True) as attention:
        (gradient,) = torch.autograd.grad(loss(), model.proj.bias)
        step = torch.zeros_like(gradient)
        step[3] = 1e-5
        with torch.no_grad():
            model.proj.bias += step
        above = loss().item()
        with torch.no_grad():
            model.proj.bias -= 2 * step
        slope = (above - loss().item()) / 2e-5
    assert gradient[3].item() == pytest.approx(slope, rel=1e-4)
    if fused:
        with capture_attention(model) as attention:
            logits = model(images)
            with pytest.raises(ValueError, match="create_graph=True") as error:
                class_token_gradient_cam(logits, attention.take(), create_graph=True)
            assert says(error, "layer 0 (encoder.0.attention)", "capture_attention(model, double_backward=True)")


def test_a_layer_whose_class_row_is_unused_is_named() -> None:
    class PatchPooled(PlainEncoder):
        def forward(self, images: Tensor) -> Tensor:
            patches = self.proj(images).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
            return self.head(self.encoder(tokens)[:, 1:].amax(1))

    for block in (ExplicitBlock, lambda: MultiheadBlock(False)):
        model = PatchPooled(nn.Sequential(block(), block()))
        with capture_attention(model) as attention:
            logits = model(torch.randn(2, 3, 32, 48))
            maps = attention.take()
            with pytest.warns(UserWarning, match=r'class row of layer 1 \(encoder.1.*query="all"') as told:
                cam = class_token_gradient_cam(logits, maps)
            assert len(told) == 1
            assert "layer 0" not in str(told[0].message)
            assert cam.amax() > 0, "layer 0's class row reaches the patches of layer 1"
            assert class_token_gradient_cam(logits, maps, start_layer=-1, query="all").amax() > 0


def test_bad_input_is_named() -> None:
    model, images = multihead_vit(), torch.randn(2, 3, 32, 48)
    with capture_attention(model) as attention:
        logits = model(images)
        maps = attention.take()
        cam = class_token_gradient_cam
        for call, facts in (
            (lambda: cam(logits[:1], maps), ("logits", "(1, 5)", "2 images", "(B, C)")),
            (lambda: cam(logits, maps, torch.ones(2, 4)), ("labels have shape (2, 4)", "(2, 5)")),
            (lambda: cam(logits, maps, torch.full((2, 5), math.nan)), ("labels", "NaN", "0 for the others")),
            (lambda: cam(logits, maps, torch.tensor([[1, 0, 0, 0, 0], [1, -math.inf, 0, 0, 0]])), ("labels", "infin")),
            (lambda: cam(logits, maps, method="gradcam"), ("method='gradcam'", "cam_grad_s")),  # type: ignore[arg-type]
            (lambda: cam(logits, maps, query="patch"), ("query='patch'", "class, all")),  # type: ignore[arg-type]
            (lambda: cam(logits.detach(), maps), ("The logits have no graph", "detach")),
            (lambda: cam(logits, maps.detach()), ("graph", "layer 0 (encoder.0.attention)", "graph_from=")),
            (lambda: cam(model(images), maps), ("logits do not depend on these maps", "same forward")),
            (
                lambda: cam(logits, maps.with_layout((4, 5), 5, class_tokens=3)),
                ("layer 0", "3 class tokens for 5 classes", "1 or one per class", "class_tokens=", 'query="all"'),
            ),
            (lambda: cam(logits, maps.with_layout((5, 5), 0)), ("0 class tokens for 5 classes", 'query="all"')),
        ):
            with pytest.raises(ValueError, match=re.escape(facts[0])) as error:
                call()
            assert says(error, *facts)
        with pytest.raises(TypeError, match="labels are a list") as error:
            cam(logits, maps, [[1, 0]])  # type: ignore[arg-type]
        assert says(error, "(2, 5)")


def test_what_breaks_the_identity_is_refused() -> None:
    model = multihead_vit(dropout=0.3).train()
    with capture_attention(model) as attention:
        logits = model(torch.randn(2, 3, 32, 48))
        with pytest.raises(ValueError, match=r"layer 0 .*attention dropout 0\.3") as error:
            class_token_gradient_cam(logits, attention.take())
        assert says(error, "fused", "eval mode")
    model = nn.Sequential(nn.BatchNorm2d(3), explicit_vit())
    with capture_attention(model) as attention:
        logits = model(torch.randn(2, 3, 32, 48))
        with pytest.raises(ValueError, match=r"BatchNorm in training mode \(0\)") as error:
            class_token_gradient_cam(logits, attention.take())
        assert says(error, "eval()")
        model[0].eval()
        logits = model(torch.randn(2, 3, 32, 48))
        assert class_token_gradient_cam(logits, attention.take()).amax() > 0


def test_explicit_maps_with_dropout_take_the_gradient_before_it() -> None:
    model = explicit_vit(dropout=0.3).train()
    with capture_attention(model) as attention:
        logits = model(torch.randn(2, 3, 32, 48))
        maps = attention.take()
        cam = class_token_gradient_cam(logits, maps, start_layer=1)
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), maps[1].recorded.map)
    torch.testing.assert_close(cam[:, 2].flatten(1), gradient[:, :, 0, 1:].relu().mean(1))
    assert (gradient == 0).float().mean() > 0.2, "what was dropped has no gradient"


def test_nan_is_an_error_and_not_a_map() -> None:
    model, images = multihead_vit(), torch.randn(2, 3, 32, 48)
    with capture_attention(model) as attention:
        logits = model(images) * torch.tensor(float("nan"))
        maps = attention.take()
        with pytest.raises(ValueError, match="class maps have NaN or infinite values"):
            class_token_gradient_cam(logits, maps)
