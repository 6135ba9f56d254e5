"""A layer's map of what a kernel leaves behind, against the kernel itself: masks, heads, parts of a batch."""

import pytest
import torch
import torch.nn.functional as F

from acr_reg import AttentionMaps
from tests.support.attention import MASKS, explicit, factored, generator, layout_of, random_factors


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_weights_of_factors_are_those_of_the_kernel(mask, scale):
    grid, prefix = (2, 4), 1
    recorded = MASKS[mask](9)
    query, key = random_factors(grid, prefix, 1)
    value = torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9)  # A V is then A itself
    attn_mask = recorded.get("mask")
    attn_mask = attn_mask.double() if attn_mask is not None and attn_mask.dtype == torch.float32 else attn_mask
    kernel = F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal="causal" in recorded, scale=scale)
    layer = factored(query, key, layout_of(grid, prefix), scale=scale, **recorded)
    torch.testing.assert_close(layer.weights(), kernel, rtol=1e-10, atol=1e-12)
    second = AttentionMaps([layer]).chunk(2)[1]
    torch.testing.assert_close(second[0].weights(), kernel[1:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", ["one mask of every head", "one mask of all"])
def test_weights_of_flattened_factors_are_those_of_the_kernel(shape):
    query, key = (tensor.detach().flatten(0, 1) for tensor in random_factors((2, 4), 1, 1))  # (B H, N, d), torch's MHA
    mask = torch.randn(4 if shape == "one mask of every head" else 1, 9, 9, generator=generator(5), dtype=torch.float64)
    value = torch.eye(9, dtype=torch.float64).expand(4, 9, 9)
    kernel = F.scaled_dot_product_attention(query, key, value, mask).unflatten(0, (2, 2))
    layer = factored(query, key, layout_of((2, 4)), mask=mask, heads=2)
    torch.testing.assert_close(layer.weights(), kernel, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(AttentionMaps([layer]).chunk(2)[1][0].weights(), kernel[1:], rtol=1e-10, atol=1e-12)


def test_grouped_keys_serve_several_query_heads():
    query = torch.randn(2, 4, 7, 8, generator=generator(1))
    key = torch.randn(2, 2, 7, 8, generator=generator(2))
    layer = factored(query, key, layout_of((2, 3)))
    expected = torch.einsum("bhnd,bhmd->bhnm", query, key.repeat_interleave(2, 1)).div(8**0.5).softmax(-1)
    torch.testing.assert_close(layer.weights(), expected)
    assert layer.shape == (2, 4, 7, 7)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("part", [0, 1])
def test_of_images_are_the_maps_of_these_images_in_their_order(mask, part):
    parts = [random_factors((2, 4), 1, seed) for seed in (1, 2)]
    query, key = (torch.cat(pair) for pair in zip(*parts, strict=True))  # of four images
    recorded = MASKS[mask](9)
    if "mask" in recorded and recorded["mask"].shape[0] == 2 and recorded["mask"].ndim == 4:  # of each of two images
        recorded["mask"] = torch.cat([recorded["mask"], recorded["mask"].flip(0)])
    whole = factored(query, key, layout_of((2, 4)), **recorded)
    for layer in (whole, explicit(whole.weights(), layout_of((2, 4)))):
        half = AttentionMaps([layer]).chunk(2)[part][0]
        for images in ([1], [1, 0], [0, 0, 1]):
            chosen = half.of_images(torch.tensor(images))
            assert chosen.is_factored == layer.is_factored
            assert chosen.shape == (len(images), 2, 9, 9)
            torch.testing.assert_close(chosen.weights(), half.weights()[images])
