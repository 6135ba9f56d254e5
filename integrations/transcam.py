"""TransCAM: a Conformer, whose transformer branch has one class token, and whose class map comes from its convolutions.

Its stem of overlapping windows puts tokens 1.5 px before the middle of their pixels, and the loss compares them there.
From the fifth block on, where strided convolutions of the other branch join in, their place is not known: the loss
warns, and takes the middle. BatchNorm runs on each view on its own, as on each batch. The host trains under
``nn.DataParallel``, which on several GPUs is refused by name: run it on one, or wrap the model in
DistributedDataParallel.

Weights to start from: Conformer-S of ImageNet, ``--weights``, as the host's README names it.
Views: the model takes square images whose side is a multiple of 16: flips, quarter turns, crops and scales to a square.

Run on 2026-11-25 with torch 2.14.1 and timm 1.0.31 on a CPU, random weights, Conformer-S at 64 px: the script itself,
two iterations under ``nn.DataParallel`` without a GPU; the model wrapped in DDP on two gloo ranks. Replaced: the
dataset, the checkpoint, the writer for TensorBoard.

Noise floor: drop_path of 0.1. Means of four pairs in train mode, two images of uniform noise at 224 px, seed 0, random
weights, under identity / flip: activation 0.0096 / 0.0348, affinity 0.0103 / 0.0336, cam 0.144 / 0.173; in eval mode
the floor is 0. Most of the class map's term is noise then: give it a small weight, or the model a smaller drop_path.

The lines to add stand before the given line of the host's file at that commit, at that line's indentation.

    liruiwen/TransCAM at 4ffe693
        train_TransCAM.py, before line 5:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import transcam
        train_TransCAM.py, before line 82:
            host = transcam.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        train_TransCAM.py, before line 94:
            first = host.take()
            second = transcam.second_view(host, acr.view(img))
        train_TransCAM.py, before line 95:
            maps = transcam.cams(first), transcam.cams(second)
            loss = loss + acr(first.attention, second.attention, *maps, labels=label[:, 1:, 0, 0])
            del first, second, maps
"""

from __future__ import annotations

from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the class token's and the patches' attention of all transformer blocks, and the convolutional head."""
    head = part(unwrap(model), "conv_cls_head", "TransCAM")
    attention = capture_attention(model, num_prefix_tokens=1, class_tokens=1)
    return HostCapture(model, attention, FeatureRecorder(head))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """The whole model on square ``images`` (B, 3, S, S), S a multiple of 16, through DDP where the model is wrapped.
    ``output`` is what it returns: the logits of both branches, and a class map."""
    return host.run(lambda: host.model("convcam", images))


def cams(view: HostView) -> Tensor:
    """The convolutional branch's class map (B, C, h, w) of any range, C without the background, on the graph."""
    assert view.features is not None
    return view.features[:, 1:]
