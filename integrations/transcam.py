"""TransCAM: a Conformer. Its transformer branch has one class token, and its class map comes from its convolutions.

What is regularised: the class token's and patches' attention in all 12 blocks, and the map of the convolutional head.
Weights to start from: Conformer-S of ImageNet, passed as ``--weights``, as in the host's README. Views: square images
whose side is a multiple of 16 (there is no position table): flips, quarter turns, crops and scales to a square.

Run on 2026-11-25 with torch 2.14.1 and timm 1.0.31 on a CPU, random weights, Conformer-S at 64 px: two iterations of
the script itself under ``nn.DataParallel`` without a GPU; the model in training mode under DDP on two gloo ranks.
Replaced: the data set and its loader, the checkpoint, the TensorBoard writer, the log file. The crops are padded with
zeros, a value that no normalised pixel has: ``valid`` leaves the padding out.

Where tokens are. The stem's windows put the tokens of the first block 1.5 px before the middle of their pixels, so they
are 3 px apart under a flip. From the fifth block on, strided convolutions (3.5 px, then 7.5 px) are added to those
tokens, and no single place is known: on the model alone the loss warns, and ``acr_reg.check`` reports them 4.7 px
apart. ``capture`` takes the place of the first block for all blocks. Measured by the gradient to the pixels, the tokens
before blocks 1, 4, 5, 8, 9 and 12 lie 1.5 to 1.8 px before the middle, and the class map 7.4 px (three seeds, 128 px).
With mirrored kernels and sharpened attention (two seeds, 192 px), the affinity term of blocks 5 to 12 under a flip is
1.22 with tokens in the middle, 1.16 as here, and 1.17 at 2.5 px; the class map's term is 0.19, 0.18, and smallest
(0.17) at 3.5 px. For trained weights none of this was measured.

Noise floor, from drop_path of 0.1. Means of four pairs of passes in training mode, on two images of uniform noise at
224 px, seed 0, random weights, under identity / flip: activation 0.0051 / 0.0332, affinity 0.0057 / 0.0315, cam 0.088 /
0.170. Four other draws gave up to twice as much under identity. In eval mode the floor is 0. At least half of the class
map's term is noise: give it a small weight, or the model a smaller drop_path.

What does not work. The host's ``nn.DataParallel`` on several GPUs is refused by name. Train on one GPU
(CUDA_VISIBLE_DEVICES=0), or with one process per GPU: in line 79 write ``DistributedDataParallel(model.cuda(rank),
device_ids=[rank])``, in lines 58 and 59 ``sampler=DistributedSampler(train_dataset)`` instead of ``shuffle=True``, and
pass that ``model`` to ``capture``. Every parameter gets a gradient. BatchNorm normalises each view by itself; its
running statistics stay those of the host's own passes.

The lines to add stand before the given line of the host's file at that commit, at that line's indentation. The host
itself needs the line "on today's torch and timm": Pillow has dropped a name.

    liruiwen/TransCAM at 4ffe693
        title: TransCAM
        regularises: the class token's row, the affinity, the convolutional head's map
        views: squares, multiples of 16
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

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the class token's and patches' attention in all transformer blocks, all on the lattice of the first, and
    the output of the convolutional head. Raises ValueError for a model of another family."""
    network = unwrap(model)
    first = part(network, "trans_1", "TransCAM")
    others = [module for name, module in network.named_children() if name.startswith("conv_trans_")]
    head = part(network, "conv_cls_head", "TransCAM")
    attention = capture_attention(model, modules=[first, *others], num_prefix_tokens=1, class_tokens=1)
    return _OnOneLattice(model, attention, FeatureRecorder(head))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """Runs the whole model on square ``images`` (B, 3, S, S), S a multiple of 16, through DDP if the model is wrapped.
    BatchNorm's running statistics stay those of the host's own passes. ``output`` is what the model returns: the
    logits of both branches and a class map. Raises ValueError for images of another shape."""
    height, width = images.shape[-2:]
    if height != width or height % 16:
        raise ValueError(
            f"The view is {height} x {width} px. TransCAM's two branches fit together on squares of a multiple of 16 "
            "only: crop or scale to one."
        )
    return host.run(lambda: host.model("convcam", images))


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w) of the convolutional branch, in any range, C without the background, on the graph. The
    host's "transcam" map is ``propagate_cam(cams(view), view.attention)``."""
    assert view.features is not None
    return view.features[:, 1:]


class _OnOneLattice(HostCapture):
    def _view(self, output: Any, features: Tensor | None, run: int | None = None) -> HostView:
        view = super()._view(output, features, run)
        layout = view.attention[0].layout
        return replace(view, attention=view.attention.with_layout(layout.query, 1, 1))
