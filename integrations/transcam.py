"""TransCAM: a Conformer, whose transformer branch has one class token, and whose class map comes from its convolutions.

Its stem of overlapping windows puts tokens 1.5 px before the middle of their pixels, and the loss compares them there.
From the fifth block on, where strided convolutions of the other branch join in, their place is not known: the loss
warns, and takes the middle. BatchNorm runs on each view on its own, as on each batch. The host trains under
``nn.DataParallel``, which on several GPUs is refused by name: run it on one, or wrap the model in
DistributedDataParallel.

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
