"""AFA: a Mix Transformer (MiT) without class token, whose keys are reduced, and a class map by 1 x 1 convolution.

There is no class token, hence no activation term: set its weight to 0. Queries and keys lie on grids of their own,
and overlapping patch embeddings shift the tokens; both are read off the convolutions that ran. The ``attns`` that the
host returns are pooled logits without scale, not the attention, and are not used. The pseudo labels of each step come
from further passes under ``torch.no_grad``, which are not recorded.

Weights to start from: MiT-B1 of ImageNet, ``pretrained/mit_b1.pth``, as the host expects it.
Views: any flip, quarter turn, crop or scale whose size is a multiple of 32.

Run on 2026-11-25 with torch 2.14.1 and timm 1.0.31 on a CPU, random weights, MiT-B1 at 64 px: ``train()`` itself, two
iterations, on one and on two gloo ranks. Replaced: the dataset, the YAML configuration, mmcv's ConvModule, the devices
of DDP. The host needs on today's versions: ``numpy.lib.utils`` is gone from numpy, and mmcv 1.7 does not build on
Python 3.11.

Noise floor: drop_path of 0.1 gives two passes on the same images different attention. Means of four pairs in train
mode, two images of uniform noise at 320 px, seed 0, random weights, under identity / flip: affinity 0.0023 / 0.0268,
cam 0.035 / 0.175; in eval mode the floor is 0. What does not work: an activation term, and class maps by a class
token's gradient (``query="all"`` is for models without one).

The lines to add stand before the given line of the host's file at that commit, at that line's indentation.

    rulixiang/afa at adcfa29
        scripts/dist_train_voc.py, before line 8:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import afa
        scripts/dist_train_voc.py, before line 285:
            host = afa.capture(wetr)
            acr = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)
        scripts/dist_train_voc.py, before line 304:
            first = host.take()
            second = afa.second_view(host, acr.view(inputs))
        scripts/dist_train_voc.py, before line 352:
            loss = loss + acr(
                first.attention, second.attention, afa.cams(first), afa.cams(second), labels=cls_labels
            )
            del first, second
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the attention of all four stages' blocks, and the last stage's feature map."""
    encoder = part(unwrap(model), "encoder", "AFA")
    attention = capture_attention(model, modules=[encoder], num_prefix_tokens=0)
    return HostCapture(model, attention, FeatureRecorder(encoder, pick=lambda result: result[0][-1]))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """The encoder alone on ``images`` (B, 3, H, W), H and W multiples of 32: outside of DDP's wrapper, whose gradients
    its own join before DDP averages them."""
    encoder = part(host.network, "encoder", "AFA")
    return host.run(lambda: encoder(images))


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w) of any range, C without the background, on the graph; the host detaches its own."""
    assert view.features is not None
    classifier = part(view.network, "classifier", "AFA")
    return F.conv2d(view.features, classifier.weight)  # type: ignore[arg-type]
