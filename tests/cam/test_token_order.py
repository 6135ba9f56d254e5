"""Class maps of tokens in any order are those of the same tokens with the class token and registers in front."""

import pytest
import torch
import torch.nn.functional as F

from acr_reg import AttentionMaps, class_token_gradient_cam, propagate_cam
from tests.support.attention import MASKS, explicit, factored, generator
from tests.support.orders import FIELDS, layouts, reordered

GRID = (4, 5)
COUNT = 23
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])
any_kind = pytest.mark.parametrize("kind", FIELDS)


def random(*shape, seed):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def layers(kind, fused, classes, **kernel):
    """Logits and one layer, with the others in front and in the order of ``kind``; and the leaves of both."""
    front, moved = layouts(kind, GRID, classes=classes)
    tokens = [random(2, 2, COUNT, 4, seed=i).requires_grad_() for i in range(3)]
    head = random(COUNT, 4, 3, seed=9)
    found = []
    for layout in (front, moved):
        at = (lambda tensor, *dims: tensor) if layout is front else (lambda t, *dims: reordered(t, moved, *dims))
        query, key, value = (at(tensor, -2) for tensor in tokens)
        given = {name: at(each.expand(2, 2, COUNT, COUNT), -2, -1) for name, each in kernel.items()}
        if fused:
            output = F.scaled_dot_product_attention(query, key, value, given.get("mask"))
            layer = factored(query, key, layout, value=value, output=output, **given)
        else:
            weights = (query @ key.mT / 2).softmax(-1)
            output, layer = weights @ value, explicit(weights, layout)
        logits = torch.einsum("bhnd,ndc->bc", output.tanh(), at(head, 0))
        found.append((logits, AttentionMaps([layer])))
    return found, tokens


@any_kind
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("method", ["grad", "grad_s", "cam_grad", "cam_grad_s"])
@pytest.mark.parametrize(("query", "classes"), [("class", (1,)), ("class", (2, 0, 1)), ("all", ())])
def test_the_gradient_cam(kind, fused, method, query, classes):
    runs, _ = layers(kind, fused, classes)
    expected, found = (class_token_gradient_cam(*run, LABELS, -1, method, query) for run in runs)
    assert expected.max() > 0
    same(found, expected)


@any_kind
def test_the_gradient_cam_inside_a_loss(kind):
    runs, tokens = layers(kind, False, (1,))
    weights = random(2, 3, *GRID, seed=5)
    gradients = []
    for run in runs:
        cam = class_token_gradient_cam(*run, LABELS, -1, "cam_grad", create_graph=True)
        gradients.append(torch.autograd.grad((cam * weights).sum(), tokens))
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        same(found, expected)


@any_kind
@pytest.mark.parametrize("kernel", ["explicit", "none", "bias of every head", "key padding", "boolean"])
@pytest.mark.parametrize("classes", [2, 7])  # more classes than a head is wide too
def test_propagation(kind, kernel, classes):
    mask = MASKS[kernel](COUNT) if kernel != "explicit" else {}
    runs, tokens = layers(kind, kernel != "explicit", (0,), **mask)
    cam = random(2, classes, *GRID, seed=6).abs().requires_grad_()
    weights = random(2, classes, *GRID, seed=5)
    results = []
    for _, maps in runs:
        propagated = propagate_cam(cam, maps, steps=2)
        results.append([propagated, *torch.autograd.grad((propagated * weights).sum(), [cam, *tokens[:2]])])
    for found, expected in zip(*results, strict=True):
        same(found, expected)
