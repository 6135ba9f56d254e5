"""A capture of tokens before and behind the patches, as the arguments of the capture describe them."""

import pytest
import torch

from acr_reg import (
    AllPairsConsistencyLoss,
    GradientCam,
    HorizontalFlip,
    LayoutError,
    capture_attention,
)
from tests.support.attention import says
from tests.support.models import ExplicitBlock, MultiheadBlock
from tests.support.orders import OrderedVit

BLOCKS = {"explicit": ExplicitBlock, "fused": lambda: MultiheadBlock(False)}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
every_kind = pytest.mark.parametrize("kind", ["behind", "around"])


def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def captured(model, **hints):
    with capture_attention(model, **hints) as attention:
        return [(model(batch), attention.take())[1] for batch in (images(), images().flip(-1))]


@every_block
@every_kind
def test_the_loss_of_an_equivariant_model_is_0(kind, block):
    """As the case that was found: the class token last, or registers behind."""
    model = OrderedVit(kind, block)
    pair = captured(model, **model.hints)
    expected = "0 prefix + 4 x 6 + 3 suffix" if kind == "behind" else "1 prefix + 4 x 6 + 2 suffix"
    assert str(pair[0][0].layout) == expected
    assert pair[0][0].layout.class_tokens == model.layout.class_tokens
    loss, terms = AllPairsConsistencyLoss(HorizontalFlip())(*pair, return_terms=True)
    assert loss.item() < 1e-12
    assert "activation" in terms


@every_block
@every_kind
def test_it_trains_as_with_the_tokens_in_front(kind, block):
    gradients = []
    for model in (OrderedVit(None, block), OrderedVit(kind, block)):
        model.patch_embed.weight.data[..., 0] += 0.1  # no longer equivariant
        loss = AllPairsConsistencyLoss(HorizontalFlip())(*captured(model, **model.hints))
        loss.backward()
        assert loss > 1e-6
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-8, atol=1e-12, msg=name)


@every_block
@every_kind
def test_class_maps_are_those_with_the_tokens_in_front(kind, block):
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    maps = []
    for model in (OrderedVit(None, block), OrderedVit(kind, block)):
        with GradientCam(model, **model.hints) as cam:
            maps.append(cam(images(), labels))
    assert maps[0].max() > 0
    torch.testing.assert_close(*maps, rtol=1e-8, atol=1e-12)


def test_the_prefix_is_found_where_only_the_suffix_is_stated():
    """The run shows where the others stand, and which of them is the class token."""
    for kind, prefix, suffix in (("behind", 0, 3), ("around", 1, 2)):
        model = OrderedVit(kind, ExplicitBlock)
        layout = captured(model, num_suffix_tokens=suffix)[0][0].layout
        assert (layout.num_prefix_tokens, layout.num_suffix_tokens) == (prefix, suffix)
        assert layout.class_tokens == model.layout.class_tokens


@every_kind
def test_maps_may_be_placed_afterwards(kind):
    model = OrderedVit(kind, ExplicitBlock)
    maps = captured(model, **model.hints)[0]
    placed = maps.with_layout((4, 6), **model.hints)
    assert placed[0].layout.order("key") == maps[0].layout.order("key")


@pytest.mark.parametrize("hints", [{"num_prefix_tokens": 1, "num_suffix_tokens": 3}, {"num_suffix_tokens": 5}])
def test_counts_that_do_not_add_up_are_named(hints):
    maps = captured(OrderedVit("around", ExplicitBlock), **hints)[0]
    with pytest.raises(LayoutError) as error:
        _ = maps[0].layout
    given = ", ".join(f"{name}={count}" for name, count in hints.items())
    assert says(error, given, "1 tokens stand before the patches", "2 behind")


@pytest.mark.parametrize("name", ["num_prefix_tokens", "num_suffix_tokens"])
def test_a_negative_count_is_refused_at_once(name):
    with pytest.raises(LayoutError, match=f"{name}=-1"):
        capture_attention(OrderedVit("behind", ExplicitBlock), **{name: -1})


@pytest.mark.parametrize(("given", "said"), [([-4], "[-4]"), ([0], "[0]"), ([27], "[27]"), (4, "class_tokens=4")])
def test_class_tokens_on_a_patch_are_refused(given, said):
    maps = captured(OrderedVit("behind", ExplicitBlock), num_prefix_tokens=0, num_suffix_tokens=3, class_tokens=given)
    with pytest.raises(LayoutError, match="3 suffix tokens") as error:
        _ = maps[0][0].layout
    assert says(error, said)
