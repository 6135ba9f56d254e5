"""TransCAM: a Conformer, whose transformer branch has one class token, and whose class map comes from its convolutions.

What is regularised: the class token's and the patches' attention of all 12 blocks, and the convolutional head's map.
Weights to start from: Conformer-S of ImageNet, ``--weights``, as the host's README names it. Views: square images whose
side is a multiple of 16 (there is no position table): flips, quarter turns, crops and scales to a square.

Run on 2026-11-25 with torch 2.14.1 and timm 1.0.31 on a CPU, random weights, Conformer-S at 64 px: the script itself,
two iterations under ``nn.DataParallel`` without a GPU; the model in training mode under DDP on two gloo ranks.
Replaced: the data set and its loader, the checkpoint, the writer for TensorBoard, the file of the log. The crops are
padded with zeros, which no normalised pixel is: ``valid`` leaves the padding out.

Where tokens are. The stem's windows put the first block's tokens 1.5 px before the middle of theirs, 3 px apart under
a flip. From the fifth block on strided convolutions (3.5, then 7.5 px) are added to those tokens, no single place is
known, and on the model alone the loss warns and ``acr_reg.check`` reports them 4.7 px apart. ``capture`` takes all
blocks to be where the first is. The gradient to the pixels of tokens before blocks 1, 4, 5, 8, 9 and 12 lies 1.5 to 1.8
px before the middle, of the class map 7.4 px (three seeds, 128 px). With mirrored kernels and sharpened attention (two
seeds, 192 px) the affinity term of blocks 5 to 12 under a flip is 1.22 taken for the middle, 1.16 as here, 1.17 at
2.5 px; the class map's is 0.19, 0.18, and least, 0.17, at 3.5 px. None of this is known of trained weights.

Noise floor: drop_path of 0.1. Means of four pairs in training mode, two images of uniform noise at 224 px, seed 0,
random weights, under identity / flip: activation 0.0051 / 0.0332, affinity 0.0057 / 0.0315, cam 0.088 / 0.170; four
other draws gave up to twice as much under identity. In eval mode the floor is 0. Half of the class map's term is noise
or more: give it a small weight, or the model a smaller drop_path.

What does not work. ``nn.DataParallel`` on several GPUs, as the host has it, is refused by name. Train on one
(CUDA_VISIBLE_DEVICES=0), or with one process for each: in line 79 ``DistributedDataParallel(model.cuda(rank),
device_ids=[rank], broadcast_buffers=False)``, in lines 58 and 59 ``sampler=DistributedSampler(train_dataset)`` in place
of ``shuffle=True``, and pass ``model`` to ``capture`` as it is then. No parameter stays unused. BatchNorm normalises
each view by itself; its running statistics stay those of the host's own passes.

The lines to add stand before the given line of the host's file at that commit, at that line's indentation. Those on
today's torch and timm are what the host itself needs: Pillow has lost a name.

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
            known = {"labels": label[:, 1:, 0, 0], "valid": (img != 0).any(1)}
            loss = loss + acr(first.attention, second.attention, *maps, **known)
            del first, second, maps

    liruiwen/TransCAM at 4ffe693, on today's torch and timm
        tool/imutils.py, before line 6:
            PIL.Image.CUBIC = PIL.Image.BICUBIC
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, part, unwrap
from acr_reg.placement.modules import batch_norms

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the class token's and the patches' attention of all transformer blocks, all on the lattice of the
    first, and the convolutional head. Raises ValueError for a model of another family."""
    network = unwrap(model)
    first = part(network, "trans_1", "TransCAM")
    others = [module for name, module in network.named_children() if name.startswith("conv_trans_")]
    head = part(network, "conv_cls_head", "TransCAM")
    attention = capture_attention(model, modules=[first, *others], num_prefix_tokens=1, class_tokens=1)
    return _OnOneLattice(model, attention, FeatureRecorder(head))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """The whole model on square ``images`` (B, 3, S, S), S a multiple of 16, through DDP where the model is wrapped;
    BatchNorm's running statistics stay those of the host's own passes. ``output`` is what the model returns: the
    logits of both branches, and a class map. Raises ValueError for images of another shape."""
    height, width = images.shape[-2:]
    if height != width or height % 16:
        raise ValueError(
            f"found a view of {height} x {width} px; expected a square whose side is a multiple of 16, which alone "
            "TransCAM's two branches fit together on; crop or scale to one"
        )
    with _running_statistics_kept(host.network):
        return host.run(lambda: host.model("convcam", images))


def cams(view: HostView) -> Tensor:
    """The convolutional branch's class map (B, C, h, w) of any range, C without the background, on the graph. What the
    host returns for "transcam" is ``propagate_cam(cams(view), view.attention)``."""
    assert view.features is not None
    return view.features[:, 1:]


class _OnOneLattice(HostCapture):
    def _view(self, output: Any, features: Tensor | None, run: int | None = None) -> HostView:
        view = super()._view(output, features, run)
        layout = view.attention[0].layout
        return replace(view, attention=view.attention.with_layout(layout.query, 1, 1))


@contextmanager
def _running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """In training BatchNorm normalises by the batch at hand; only what it remembers for inference is kept."""
    norms = batch_norms(network)
    counts = [(count, count.clone()) for norm in norms if (count := norm.num_batches_tracked) is not None]
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for count, before in counts:
            count.copy_(before)
