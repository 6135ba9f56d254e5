"""WeCLIP's decoder, whose blocks call a copy of torch's multi_head_attention_forward: seen as the original is.

The network around it (CLIP with its weights) and its training loop are not run here.
"""

import importlib
import sys
import types

import torch

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention
from tests.support.hosts import checkout, host_on_path, in_fresh_process

COMMIT = "0f47db4"
GRID = (3, 4)


def decoder_run(folder):
    host_on_path(folder / "WeCLIP")
    sys.modules["clip"] = types.ModuleType("clip")  # without its __init__, which asks packages that are gone
    sys.modules["clip"].__path__ = [str(folder / "WeCLIP" / "clip")]
    torch.manual_seed(0)
    decoder = importlib.import_module("WeCLIP_model.Decoder.TransDecoder").DecoderTransformer(32, 3, 4, 21)
    features, taken, returned = torch.randn(2, 32, *GRID), [], []
    with capture_attention(decoder) as attention:
        for view in (features, features.flip(-1), torch.randn_like(features)):
            returned.append(decoder(view)[1])
            taken.append(attention.take().with_layout(grid=GRID, num_prefix_tokens=0))
    acr = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)
    losses = [acr(taken[0], other) for other in taken[1:]]
    losses[1].backward()
    same = [
        torch.equal(layer.weights().mean(1), own)
        for maps, weights in zip(taken, returned, strict=True)
        for layer, own in zip(maps, weights, strict=True)
    ]
    norms = [block.attn.in_proj_weight.grad.norm().item() for block in decoder.transformer.resblocks]
    return same, [loss.item() for loss in losses], norms


def test_the_decoders_attention_is_what_it_returns_and_has_a_gradient():
    same, losses, norms = in_fresh_process(decoder_run, checkout("zbf1991/WeCLIP", COMMIT))
    assert same == [True] * 9
    # Nothing of the decoder knows places: the flip of its input has the flip of its attention, other features have not.
    assert losses[0] < 1e-6 < 1e-3 < losses[1]
    assert all(norm > 0 for norm in norms) and len(norms) == 3
