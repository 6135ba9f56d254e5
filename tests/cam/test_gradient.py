"""Class-token-gradient CAM against one backward per class and image on an unfused model; propagation; merging of
views."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from acr_reg import (
    AttentionMaps,
    HorizontalFlip,
    Identity,
    Rotate90,
    Scale,
    capture_attention,
    class_token_gradient_cam,
    multi_view_cam,
    propagate_cam,
)
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


def fused_copy(model: nn.Module) -> nn.Module:
    """The same function of the same parameters through the fused kernel."""
    fused = copy.deepcopy(model)
    for index, block in enumerate(model.encoder):
        other = MultiheadBlock(False)
        other.attention.in_proj_weight.data, other.attention.in_proj_bias.data = (
            block.qkv.weight.data,
            block.qkv.bias.data,
        )
        other.attention.out_proj.weight.data, other.attention.out_proj.bias.data = (
            block.proj.weight.data,
            block.proj.bias.data,
        )
        fused.encoder[index] = other.to(block.qkv.weight.dtype)
    return fused


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
            with pytest.raises(
                ValueError, match=rf"found start_layer={start}; expected one of the captured layers \(0, 1, 2\)"
            ):
                class_token_gradient_cam(logits, maps, start_layer=start)


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
        with pytest.raises(
            RuntimeError, match=r"found a graph that backward\(\) has already freed; expected it alive; compute"
        ):
            class_token_gradient_cam(logits, maps)


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
            with pytest.raises(
                ValueError, match=r"found create_graph=True on fused attention \(layer 0 .*double_backward=True"
            ):
                class_token_gradient_cam(logits, attention.take(), create_graph=True)


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
            with pytest.warns(
                UserWarning, match=r"the class row of layer 1 \(encoder.1.*\) received no positive gradient"
            ):
                cam = class_token_gradient_cam(logits, maps)
            assert cam.amax() > 0, "layer 0's class row reaches the patches of layer 1"
            assert class_token_gradient_cam(logits, maps, start_layer=-1, query="all").amax() > 0


def test_bad_input_is_named() -> None:
    model, images = multihead_vit(), torch.randn(2, 3, 32, 48)
    with capture_attention(model) as attention:
        logits = model(images)
        maps = attention.take()
        for call, message in (
            (
                lambda: class_token_gradient_cam(logits[:1], maps),
                r"found logits of shape \(1, 5\) for attention of 2 images",
            ),
            (
                lambda: class_token_gradient_cam(logits, maps, torch.ones(2, 4)),
                r"found labels of shape \(2, 4\); expected \(2, 5\)",
            ),
            (lambda: class_token_gradient_cam(logits, maps, method="gradcam"), "found method='gradcam'"),  # type: ignore[arg-type]
            (lambda: class_token_gradient_cam(logits.detach(), maps), "found no graph under the logits"),
            (
                lambda: class_token_gradient_cam(logits, maps.detach()),
                r"found no graph under layer 0 \(encoder.0.attention\)",
            ),
            (lambda: class_token_gradient_cam(model(images), maps), "found logits that do not depend on these maps"),
            (
                lambda: class_token_gradient_cam(logits, maps.with_layout((4, 5), 5, class_tokens=3)),
                "found 3 class tokens for 5 classes; expected 1 or one per class",
            ),
            (
                lambda: class_token_gradient_cam(logits, maps.with_layout((5, 5), 0)),
                "found 0 class tokens for 5 classes",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()


def test_what_breaks_the_identity_is_refused() -> None:
    model = multihead_vit(dropout=0.3).train()
    with capture_attention(model) as attention:
        logits = model(torch.randn(2, 3, 32, 48))
        with pytest.raises(ValueError, match=r"layer 0 .*found attention dropout 0.3 active in a fused kernel"):
            class_token_gradient_cam(logits, attention.take())
    model = nn.Sequential(nn.BatchNorm2d(3), explicit_vit())
    with capture_attention(model) as attention:
        logits = model(torch.randn(2, 3, 32, 48))
        with pytest.raises(ValueError, match=r"found BatchNorm in training mode \(0\).*call eval\(\)"):
            class_token_gradient_cam(logits, attention.take())
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


# ---- propagation and views


def test_propagation_is_the_summed_affinity_times_the_map() -> None:
    maps = [torch.rand(2, 3, 25, 25).softmax(-1) for _ in range(3)]
    attention = AttentionMaps.from_tensors(maps, num_prefix_tokens=1, grid=(4, 6))
    cam = torch.rand(2, 5, 4, 6, requires_grad=True)
    for layers, chosen in ((None, [0, 1, 2]), ([-1, 0], [2, 0])):
        affinity = sum(maps[i][:, :, 1:, 1:].mean(1) for i in chosen)
        expected = torch.einsum("bij,bcj->bci", affinity, cam.flatten(2)).reshape_as(cam)
        torch.testing.assert_close(propagate_cam(cam, attention, layers), expected)
        twice = torch.einsum("bij,bcj->bci", affinity, expected.flatten(2)).reshape_as(cam)
        torch.testing.assert_close(propagate_cam(cam, attention, layers, steps=2), twice)
    assert torch.autograd.grad(propagate_cam(cam, attention).sum(), cam)[0].amin() > 0
    with pytest.raises(ValueError, match=r"found a map of shape \(2, 5, 6, 4\).*expected \(2, C, 4, 6\)"):
        propagate_cam(cam.mT, attention)
    with pytest.raises(ValueError, match="found steps=0"):
        propagate_cam(cam, attention, steps=0)


def test_propagation_from_factors_equals_that_from_maps() -> None:
    explicit = explicit_vit().double()
    images, cam = torch.randn(2, 3, 32, 48, dtype=torch.float64), torch.rand(2, 3, 4, 6, dtype=torch.float64)
    found = []
    for model in (explicit, fused_copy(explicit)):
        with capture_attention(model) as attention:
            model(images)
            found.append(propagate_cam(cam, attention.take()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("view", [HorizontalFlip(), Rotate90(1), Rotate90(3)], ids=repr)
def test_views_are_undone_before_they_are_merged(view: object) -> None:
    images = torch.rand(2, 3, 8, 12)
    merged = multi_view_cam(lambda x: x[:, :2], images, [Identity(), view])
    assert torch.equal(merged, 2 * images[:, :2])
    assert torch.equal(multi_view_cam(lambda x: x[:, :2], images, [view], merge="max"), images[:, :2])


def test_views_of_other_sizes_meet_on_one_grid() -> None:
    rows = torch.linspace(0, 1, 32)[:, None].expand(32, 48)
    images = rows.expand(1, 3, 32, 48)
    pooled = lambda x: torch.nn.functional.avg_pool2d(x, 4)[:, :1]  # noqa: E731
    merged = multi_view_cam(pooled, images, [Identity(), Scale(2), Scale(0.5)])
    assert merged.shape == (1, 1, 8, 12)
    torch.testing.assert_close(merged[0, 0, 2:-2, 0] / 3, pooled(images)[0, 0, 2:-2, 0], rtol=0, atol=1e-2)
    assert multi_view_cam(pooled, images, [Scale(2)], size=(5, 7)).shape == (1, 1, 5, 7)
    with pytest.raises(ValueError, match=r"found maps of shape \(1, 32, 48\) from cam_fn; expected \(1, C, h, w\)"):
        multi_view_cam(lambda x: x[:, 0], images, [Identity()])
    with pytest.raises(ValueError, match="found no views"):
        multi_view_cam(pooled, images, [])
    with pytest.raises(ValueError, match='found merge=\'median\'; expected "sum", "max" or "mean"'):
        multi_view_cam(pooled, images, [Identity()], merge="median")  # type: ignore[arg-type]


def test_nan_is_an_error_and_not_a_map() -> None:
    model, images = multihead_vit(), torch.randn(2, 3, 32, 48)
    with capture_attention(model) as attention:
        logits = model(images) * torch.tensor(float("nan"))
        maps = attention.take()
        with pytest.raises(ValueError, match="found NaN or infinite values in the class maps"):
            class_token_gradient_cam(logits, maps)
        with pytest.raises(ValueError, match="found NaN or infinite values in the propagated map"):
            propagate_cam(torch.full((2, 5, 4, 6), float("nan")), maps)
        with pytest.raises(TypeError, match="found labels of type list"):
            class_token_gradient_cam(logits, maps, [[1, 0]])  # type: ignore[arg-type]
