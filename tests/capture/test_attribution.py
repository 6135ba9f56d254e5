"""A layer is credited to the lowest module that holds its product, softmax and A V, in every run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from acr_reg import capture_attention
from tests.support.capturing import images, modes
from tests.support.models.tokens import Attention, Tokens


class Product(nn.Module):
    """Both products of explainability ViTs: their classes say nothing of attention."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *operands: Tensor) -> Tensor:
        return torch.einsum(self.equation, *operands)


class Apart(Attention):
    """Product, softmax and A V in modules of their own."""

    def __init__(self, qk: nn.Module, av: nn.Module, turned: bool) -> None:
        super().__init__()
        self.qk, self.softmax, self.drop, self.av, self.turned = qk, nn.Softmax(-1), nn.Dropout(0.0), av, turned

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.qk(q * q.shape[-1] ** -0.5, k.mT if self.turned else k)
        return self.av(self.drop(self.softmax(scores)), v)


class Scores(Attention):
    """Scores and softmax in one child, A V in the layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Softmax(-1))
        self.qk = Product()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scores(self.qk(q * q.shape[-1] ** -0.5, k.mT)) @ v


class InTheBlock(nn.Module):
    """The layer makes the map; the block that holds it applies it."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.v = MapAlone(), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.map(x) @ self.v(x).unflatten(-1, (4, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)


class MapAlone(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, _ = self.split(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


BUILDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one class for both": (lambda: Apart(Product(), Product(), True), "blocks.{}"),
    "two classes": (lambda: Apart(Einsum("bhid,bhjd->bhij"), Product(), False), "blocks.{}"),
    "einsum twice": (lambda: Apart(Einsum("bhid,bhjd->bhij"), Einsum("bhij,bhjd->bhid"), False), "blocks.{}"),
    "values in the layer": (Scores, "blocks.{}"),
    "values in the block": (InTheBlock, "blocks.{}"),
    "all in the layer": (Attention, "blocks.{}"),
    "a layer in a block": (lambda: nn.Sequential(nn.Identity(), Attention()), "blocks.{}.1"),
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_layers_in_parts_are_captured_on_every_take(build: str, training: bool) -> None:
    make, name = BUILDS[build]
    torch.manual_seed(0)
    model = Tokens(make(), make(), make()).train(training)
    with capture_attention(model) as attention:
        found = []
        for _ in range(3):
            output = model(images())
            maps = attention.take()
            assert [layer.name for layer in maps] == [name.format(i) for i in range(3)]
            assert attention.skipped == ()
            (gradient,) = torch.autograd.grad(output.sum(), [maps[0].recorded.map])
            assert gradient.abs().sum() > 0
            found.append([layer.index for layer in maps])
    assert found == [[0, 1, 2]] * 3 and modes() == 0


def test_a_layer_in_parts_of_the_model_itself() -> None:
    """Nothing but the model holds all three."""

    class Flat(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.qk, self.av = nn.Linear(32, 96), Product(), Product()

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for _ in range(2):
                q, k, v = self.qkv(x).chunk(3, -1)
                x = x + self.av(self.qk(q, k.mT).softmax(-1), v)
            return x

    with capture_attention(model := Flat()) as attention:
        for _ in range(2):
            model(images())
            assert [layer.name for layer in attention.take()] == ["Flat", "Flat"]
