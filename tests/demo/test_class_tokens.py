import torch
from torch import nn

from acr_reg import AttentionMaps, capture_attention
from acr_reg.demo.class_tokens import (
    LEAST_WEIGHT,
    ClassTokenOutput,
    ClassTokens,
    class_token_attention,
    classification,
    distinctness,
    fused,
    ranked_mean,
)
from acr_reg.demo.small_vit import Block

GRID = (2, 3)


def test_the_pooling_weighs_by_rank_with_a_decay_of_0996_at_784_patches():
    maps = torch.randn(2, 3, 28, 28)
    ranked = maps.flatten(2).sort(dim=2, descending=True).values
    weights = 0.996 ** torch.arange(784.0)
    torch.testing.assert_close(ranked_mean(maps), (ranked * weights).sum(2) / weights.sum(), rtol=1e-4, atol=1e-5)


def test_the_pooling_weighs_the_lowest_value_alike_at_every_size():
    for side in (2, 8):
        maps = torch.zeros(1, 1, side, side)
        maps[..., 0, 0] = -1.0
        highest = torch.ones(1, 1, side, side) + maps
        maps[..., 0, 0] = 1.0
        ratio = (1 - ranked_mean(highest)) / ranked_mean(maps)
        assert abs(ratio.item() - LEAST_WEIGHT) < 1e-5


def test_class_tokens_are_held_distinct_only_where_their_class_is_present():
    tokens = torch.randn(2, 1, 3, 4, requires_grad=True)
    distinctness(tokens, torch.tensor([[1.0, 0.0, 0.0]])).backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0
    same = torch.ones(1, 1, 3, 4)
    apart = torch.eye(3, 4)[None, None]
    labels = torch.ones(1, 3)
    assert distinctness(apart, labels) < distinctness(same, labels)
    assert distinctness(same, torch.zeros(1, 3)) == 0


def test_the_attention_of_class_tokens_is_read_by_class_on_the_grid_of_the_patches():
    torch.manual_seed(0)
    network = ClassTokens(4, 12, scale=1.0)
    blocks = nn.ModuleList([Block(12, 3) for _ in range(2)])
    with capture_attention(blocks) as capture:
        output = network(torch.randn(2, 1, 12), torch.randn(2, 6, 12), blocks, GRID)
        attention = capture.take().with_layout(GRID, num_prefix_tokens=4, class_tokens=range(4))
    assert output.maps.shape == (2, 4, *GRID) and output.class_tokens.shape == (2, 2, 4, 12)
    expected = torch.stack([layer.weights().mean(1)[:, :4, 4:] for layer in attention]).mean(0).unflatten(2, GRID)
    torch.testing.assert_close(class_token_attention(attention, (0, 1)), expected)


def test_the_fused_map_is_zero_where_the_head_sees_nothing():
    maps = torch.tensor([[[[4.0, -1.0]]]])
    torch.testing.assert_close(fused(maps, torch.full_like(maps, 0.25)), torch.tensor([[[[1.0, 0.0]]]]))


def test_classification_trains_both_logits():
    tokens, maps = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(2, 3, *GRID, requires_grad=True)
    classification(ClassTokenOutput(tokens, maps), torch.eye(3)[:2]).backward()
    assert tokens.grad is not None and maps.grad is not None
    assert tokens.grad.abs().min() > 0 and maps.grad.abs().min() > 0


def test_maps_of_ones_own_can_be_read():
    attention = AttentionMaps.from_tensors(
        [torch.rand(1, 2, 8, 8).softmax(-1)], num_prefix_tokens=2, grid=GRID, class_tokens=2
    )
    assert class_token_attention(attention, [-1]).shape == (1, 2, *GRID)
