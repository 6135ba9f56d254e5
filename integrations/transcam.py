"""TransCAM: a Conformer. Its transformer branch has one class token, and its class map comes from its convolutions.

What is regularised. The class token's row and the pairs of patches in all 12 blocks, and the map of the convolutional
head.

Weights to start from. Conformer-S of ImageNet, passed as ``--weights``, as in the host's README.

What was run. Two iterations of the script itself ran on 2026-11-25 under ``nn.DataParallel`` without a GPU, with torch
2.14.1, timm 1.0.31 and random weights, with Conformer-S at 64 px. The model in training mode also ran under DDP on two
gloo ranks. Replaced were the data set and its loader, the checkpoint, the TensorBoard writer and the log file.

Views. Square images whose side is a multiple of 16: flips, quarter turns, and crops and scales to a square. There is no
position table.

Padding. The host pads crops with zeros, a value that no normalised pixel has. ``valid`` leaves the padding out.

Where tokens are. The stem's windows put the tokens of the first block 1.5 px before the middle of their pixels, so a
flip matches tokens 3 px apart. From the fifth block on, the host adds strided convolutions (3.5 px, then 7.5 px off) to
the tokens, and no single place is known. On the model alone the loss warns, and ``acr_reg.check`` reports tokens 4.7 px
apart. ``capture`` uses the place of the first block for all blocks. By the gradient to the pixels, the tokens before
blocks 1, 4, 5, 8, 9 and 12 lie 1.5 to 1.8 px before the middle, and the class map 7.4 px (three seeds, 128 px). We also
tried other places, with mirrored kernels and sharpened attention (two seeds, 192 px). Under a flip, the affinity term
of blocks 5 to 12 is 1.22 with tokens in the middle, 1.16 at 1.5 px, as here, and 1.17 at 2.5 px. The class map's term
is 0.19 in the middle and 0.18 as here, and smallest (0.17) at 3.5 px. None of this was measured for trained weights.

Noise floor. The floor comes from ``drop_path`` of 0.1. We measured means of four pairs of passes in training mode, on
two images of uniform noise at 224 px, with seed 0 and random weights. Identity gives activation 0.0051, affinity 0.0057
and class map 0.088. The flip gives 0.0332, 0.0315 and 0.170. Four other draws gave up to twice as much under identity.
In eval mode the floor is 0. At least half of the class map's term is noise: give the term a small weight, or the model
a smaller ``drop_path``.

Several processes. Train with one process per GPU. In line 79 write ``DistributedDataParallel(model.cuda(rank),
device_ids=[rank])``. In lines 58 and 59 write ``sampler=DistributedSampler(train_dataset)`` instead of
``shuffle=True``. Pass the wrapped ``model`` to ``capture``. Every parameter gets a gradient. BatchNorm normalises each
view by itself; its running statistics stay those of the host's own passes.

What does not work. The host's ``nn.DataParallel`` on several GPUs: an error names it. Train on one GPU
(``CUDA_VISIBLE_DEVICES=0``) or with several processes.

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
        Pillow has dropped the name ``CUBIC``.

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
    """Captures the attention of the class token and patches in all transformer blocks, and the output of the
    convolutional head. All blocks get the lattice of the first. Raises ValueError for a model of another family."""
    network = unwrap(model)
    first = part(network, "trans_1", "TransCAM")
    others = [module for name, module in network.named_children() if name.startswith("conv_trans_")]
    head = part(network, "conv_cls_head", "TransCAM")
    attention = capture_attention(model, modules=[first, *others], num_prefix_tokens=1, class_tokens=1)
    return _OnOneLattice(model, attention, FeatureRecorder(head))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """Runs the whole model on square ``images`` (B, 3, S, S), S a multiple of 16, through DDP if the model is wrapped.
    BatchNorm's running statistics do not change. ``output`` holds the logits of both branches and a class map. Raises
    ValueError for images of another shape."""
    height, width = images.shape[-2:]
    if height != width or height % 16:
        raise ValueError(
            f"The view is {height} x {width} px. TransCAM's two branches fit together on squares of a multiple of 16 "
            "only: crop or scale to one."
        )
    return host.run(lambda: host.model("convcam", images))


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w) of the convolutional branch, without background, not normalised, on the graph. The
    host's "transcam" map is ``propagate_cam(cams(view), view.attention)``."""
    assert view.features is not None
    return view.features[:, 1:]


class _OnOneLattice(HostCapture):
    def _view(self, output: Any, features: Tensor | None, run: int | None = None) -> HostView:
        view = super()._view(output, features, run)
        layout = view.attention[0].layout
        return replace(view, attention=view.attention.with_layout(layout.query, 1, 1))
