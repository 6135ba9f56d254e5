"""Capture and loss together: the captured fused model against maps that hooks keep of an unfused copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, Compose, HorizontalFlip, Rotate90, VerticalFlip, View, capture_attention
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder
from tests.support.oracles import chain, mirror, official_objective, pairwise_terms, turn, upend


def two_models(grid: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    """One function of the same parameters twice: by hand, and through the fused kernel."""
    torch.manual_seed(0)
    explicit = PlainEncoder(nn.Sequential(ExplicitBlock(), ExplicitBlock()))
    explicit.pos_embed = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1], 32))
    fused = copy.deepcopy(explicit)
    for index, block in enumerate(explicit.encoder):
        other = MultiheadBlock(False).attention
        other.in_proj_weight, other.in_proj_bias = block.qkv.weight, block.qkv.bias
        other.out_proj.weight, other.out_proj.bias = block.proj.weight, block.proj.bias
        fused.encoder[index] = MultiheadBlock(False)
        fused.encoder[index].attention = other
    for name in ("proj", "head"):
        setattr(fused, name, getattr(explicit, name))
    fused.cls_token, fused.pos_embed = explicit.cls_token, explicit.pos_embed
    return explicit.double(), fused.double()


def hooked(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps of the explicit model, kept by hooks of the test's own."""
    kept: list[Tensor] = []
    handles = [block.drop.register_forward_hook(lambda _m, _i, out: kept.append(out)) for block in model.encoder]
    model(images)
    for handle in handles:
        handle.remove()
    return kept


def captured_loss(model: nn.Module, images: Tensor, acr: AllPairsConsistencyLoss, together: bool) -> Tensor:
    with capture_attention(model) as attention:
        if together:
            model(torch.cat([images, acr.view(images)]))
            a, b = attention.take().chunk(2)
        else:
            model(images)
            a = attention.take()
            model(acr.view(images))
            b = attention.take()
        return acr(a, b)


@pytest.mark.parametrize("together", [False, True], ids=["two forwards", "one forward"])
def test_the_paper_s_loss_on_a_captured_model(together: bool) -> None:
    explicit, fused = two_models((4, 4))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = official_objective(hooked(explicit, images), hooked(explicit, images.flip(-1)), 4)
    parameters = [p for n, p in explicit.named_parameters() if "head" not in n]
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for model in (explicit, fused):
        found = captured_loss(model, images, AllPairsConsistencyLoss.paper(HorizontalFlip()), together)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        gradients = torch.autograd.grad(found, parameters, allow_unused=True)
        for gradient, want in zip(gradients, wanted, strict=True):
            if want is None:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("view", "move"),
    [
        (HorizontalFlip(), mirror),
        (VerticalFlip(), upend),
        (Compose([HorizontalFlip(), VerticalFlip()]), chain(mirror, upend)),
        (Rotate90(2), chain(turn, turn)),
    ],
    ids=lambda value: repr(value) if isinstance(value, View) else None,
)
def test_any_exact_view_on_a_captured_model_of_an_oblong_grid(view: View, move: object) -> None:
    explicit, fused = two_models((4, 6))
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    activation, affinity = pairwise_terms(hooked(explicit, images), hooked(explicit, view(images)), (4, 6), move)
    for model in (explicit, fused):
        found = captured_loss(model, images, AllPairsConsistencyLoss(view, 0.3, 0.7), together=False)
        assert found.item() == pytest.approx(0.3 * activation + 0.7 * affinity, rel=1e-10)


def test_a_training_loop_with_class_maps_learns_to_agree() -> None:
    """Ten steps on the consistency alone lower both its terms, with class maps of the model's own in the loss."""
    _, model = two_models((4, 6))
    model = model.float()
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0, cam_weight=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, labels = torch.randn(4, 3, 32, 48), torch.tensor([[1, 1, 0, 0, 0]] * 4)

    def patch_maps(batch: Tensor) -> Tensor:
        return torch.einsum("bdhw,cd->bchw", model.proj(batch), model.head.weight)

    seen = []
    with capture_attention(model) as attention:
        for _ in range(10):
            model(images)
            attn_a = attention.take()
            model(acr.view(images))
            attn_b = attention.take()
            cams = patch_maps(images), patch_maps(acr.view(images))
            loss, terms = acr(attn_a, attn_b, *cams, labels=labels, return_terms=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(terms)
    for name in ("activation", "affinity", "cam"):
        assert seen[-1][name] < seen[0][name]
