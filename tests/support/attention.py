"""Attention made for tests: random probabilities, AttentionMaps of them, and maps carried to a view token by token."""

import re

import pytest
import torch

from acr_reg import AttentionMaps, Compose, HorizontalFlip, LayerAttention, Rotate90, TokenLayout, VerticalFlip
from acr_reg.attention.layer import RecordedTensors
from acr_reg.tokens import Lattice
from tests.support.oracles import chain, mirror, token_moves, turn, upend


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_logits(batch, heads, tokens, seed=0, dtype=torch.float64, sharpness=2.0):
    """(batch, heads, tokens, tokens), with gradient."""
    logits = sharpness * torch.randn(batch, heads, tokens, tokens, generator=generator(seed), dtype=torch.float64)
    return logits.to(dtype).requires_grad_()


def random_maps(grid, prefix=1, batch=2, heads=3, layers=2, seed=0, dtype=torch.float64):
    """Tensors of attention probabilities, one per layer, with gradient."""
    tokens = prefix + grid[0] * grid[1]
    return [random_logits(batch, heads, tokens, 100 * seed + layer, dtype).softmax(-1) for layer in range(layers)]


def wrap(tensors, grid, prefix=1, class_tokens=None):
    return AttentionMaps.from_tensors(tensors, num_prefix_tokens=prefix, grid=grid, class_tokens=class_tokens)


def random_attention(grid, prefix=1, class_tokens=None, **kwargs):
    return wrap(random_maps(grid, prefix, **kwargs), grid, prefix, class_tokens)


def carried(tensor, move, grid, prefix=1):
    """What an equivariant model would attend to on the view, and the view's grid: every token moved in a loop."""
    moves, moved_grid = token_moves(move, grid)
    order = list(range(prefix)) + [0] * len(moves)
    for source, target in enumerate(moves):
        order[prefix + target] = prefix + source
    return tensor[..., order, :][..., :, order], moved_grid


def factored(query, key, layout, index=0, **recorded):
    """What a fused kernel leaves behind."""
    return LayerAttention(index, f"blocks.{index}.attn", RecordedTensors(query=query, key=key, **recorded), layout)


def explicit(weights, layout, index=0, **fields):
    """What an unfused layer leaves behind; unlike from_tensors it takes rows as they are."""
    return LayerAttention(index, f"blocks.{index}.attn", RecordedTensors(map=weights), layout, **fields)


def layout_of(grid, prefix=1, class_tokens=(0,), **lattice):
    return TokenLayout(Lattice(*grid, **lattice), Lattice(*grid, **lattice), prefix, class_tokens)


def random_factors(grid, prefix, seed, heads=2, width=4):
    tokens = prefix + grid[0] * grid[1]
    return [
        torch.randn(2, heads, tokens, width, generator=generator(10 * seed + i), dtype=torch.float64).requires_grad_()
        for i in range(2)
    ]


# What a kernel may be given beside query and key, of 2 images and 2 heads with n tokens.
MASKS = {
    "none": lambda n: {},
    "bias of every head": lambda n: {"mask": torch.randn(1, 2, n, n, generator=generator(5), dtype=torch.float64)},
    "bias of every image": lambda n: {"mask": torch.randn(2, 1, n, n, generator=generator(5), dtype=torch.float64)},
    "bias in float32": lambda n: {"mask": torch.randn(n, n, generator=generator(5))},
    "bias without a batch axis": lambda n: {"mask": torch.randn(2, n, n, generator=generator(5), dtype=torch.float64)},
    "key padding": lambda n: {"mask": (torch.arange(n) < n - 3).expand(2, 1, 1, n)},
    "boolean": lambda n: {"mask": torch.rand(n, n, generator=generator(5)) > 0.3},
    "causal": lambda n: {"causal": True},
}


# Each view with the same thing said of coordinates; and whether the grid is transposed.
VIEWS = {
    "horizontal": (HorizontalFlip(), mirror),
    "vertical": (VerticalFlip(), upend),
    "turn 1": (Rotate90(1), turn),
    "turn 2": (Rotate90(2), chain(turn, turn)),
    "turn 3": (Rotate90(3), chain(turn, turn, turn)),
    "composed": (Compose([HorizontalFlip(), Rotate90(1), VerticalFlip()]), chain(mirror, turn, upend)),
}
any_view = pytest.mark.parametrize("name", VIEWS)


def transposes(name):
    return name in ("turn 1", "turn 3", "composed")


def pair_of(name, grid, prefix=1, class_tokens=None, **kwargs):
    """Random attention of an image and, unrelated, of its view."""
    grid_b = grid[::-1] if transposes(name) else grid
    tensors_a = random_maps(grid, prefix, seed=1, **kwargs)
    tensors_b = random_maps(grid_b, prefix, seed=2, **kwargs)
    return (
        tensors_a,
        tensors_b,
        wrap(tensors_a, grid, prefix, class_tokens),
        wrap(tensors_b, grid_b, prefix, class_tokens),
    )


def flipped_pair(grid=(3, 5), **kwargs):
    return random_attention(grid, seed=1, **kwargs), random_attention(grid, seed=2, **kwargs)


def terms_of(acr, *args, **kwargs):
    loss, terms = acr(*args, return_terms=True, **kwargs)
    return loss, {name: term.item() for name, term in terms.items()}


def says(error, *fragments):
    """Whether a message states the facts of a case: names, numbers, and what to do next."""
    message = str(error.value)
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is not in: {message}"
    return True


def numbers_in(error):
    """The whole numbers of a message."""
    return set(re.findall(r"\d+", str(error.value)))
