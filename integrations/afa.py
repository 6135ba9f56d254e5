"""AFA: a Mix Transformer (MiT) without class token, with reduced keys, and a class map by 1 x 1 convolution.

What is regularised. The attention of all blocks of the four stages on the training images, and the class map. There is
no class token, so the activation term has weight 0. Passes under ``torch.no_grad``, which make the pseudo labels of
each step, are never recorded. The ``attns`` that the host returns are pooled logits without scale and are not used.

Weights to start from. SegFormer's MiT-B1 of ImageNet-1k, ``pretrained/mit_b1.pth``, which the host loads itself.

What was run. Two steps of ``train()`` of both scripts ran on 2026-11-25, on a CPU with torch 2.14.1, timm 1.0.31 and
random weights, with MiT-B1 at 64 px: one before and one after ``cam_iters``. The VOC script also ran with logging and
validation, and on two gloo ranks. Replaced were the data set, the YAML configuration, TensorBoard, pydensecrf, the CUDA
calls, and mmcv's ConvModule, whose SyncBN refuses a CPU. mmcv 1.7.2 does not build on Python 3.11, but mmcv-lite 2.2.0
has everything that the host needs: with it (and BatchNorm for SyncBN), the VOC steps and the VOC data set ran on
made-up photos.

Views. Flips, quarter turns, crops and scales, square or not, whose sides are multiples of 32. ``second_view`` refuses
other sizes, because the host cannot pool their logits.

Padding. The host pads photos that are smaller than the crop. ``img_box`` says where a crop shows the photo, and
``valid`` leaves the padding out of both terms.

Where tokens are. Queries and keys lie on different grids, and overlapping patch embeddings move tokens by up to 7.5 px
off the middle of their pixels. The capture reads both from the convolutions that ran.

Noise floor. The model drops paths at random (``drop_path`` of up to 0.1), so two passes on the same images differ. We
measured two images of uniform noise at 320 px in train mode, with two classes present, seed 0 and random weights, whose
attention is close to uniform. Under identity, 16 pairs of passes gave affinity 0.0015 (standard deviation 0.0011,
largest 0.0032) and class map 0.042 (0.019, 0.061), and 0 if no path was dropped. Under the flip, 4 pairs gave 0.0266
and 0.194. In eval mode the floor is exactly 0.

What does not work. An activation term, and class maps by a class token's gradient. The second view runs the encoder
alone, so the paper's second classification loss needs a line of its own, on
``network.classifier(network.pooling(second.features, (1, 1)))``. As in the host's own loss, the maximum over patches
gives that loss a gradient at one patch per class only. The class map's term has a gradient at all patches.

    rulixiang/afa at adcfa29
        title: AFA
        regularises: the affinity on reduced keys, the classifier's map, both without padding
        views: multiples of 32
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
                first.attention,
                second.attention,
                afa.cams(first),
                afa.cams(second),
                labels=cls_labels,
                valid=afa.inside(img_box, inputs),
            )
            del first, second
        scripts/dist_train_coco.py, before line 8:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import afa
        scripts/dist_train_coco.py, before line 281:
            host = afa.capture(wetr)
            acr = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)
        scripts/dist_train_coco.py, before line 300:
            first = host.take()
            second = afa.second_view(host, acr.view(inputs))
        scripts/dist_train_coco.py, before line 349:
            loss = loss + acr(
                first.attention,
                second.attention,
                afa.cams(first),
                afa.cams(second),
                labels=cls_labels,
                valid=afa.inside(img_box, inputs),
            )
            del first, second

    rulixiang/afa at adcfa29, on today's torch and timm
        numpy has dropped ``numpy.lib.utils``, which the data sets import without using it. ``torch.distributed.launch``
        passes ``--local-rank``, with a dash. The scripts import pydensecrf, but training does not call it.

        datasets/voc.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used
        datasets/coco.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used
        scripts/dist_train_voc.py, before line 47:
            parser.add_argument("--local-rank", default=-1, type=int)
        scripts/dist_train_coco.py, before line 43:
            parser.add_argument("--local-rank", default=-1, type=int)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, inside, part, unwrap

__all__ = ["cams", "capture", "inside", "second_view"]

# Keys of the first three stages are reduced to one per 32 x 32 px, and the host folds its logits onto them.
_MULTIPLE = 32


def capture(model: nn.Module) -> HostCapture:
    """Captures the attention of all blocks in the four stages, and the feature map of the last stage. Raises ValueError
    for a model of another family."""
    network = unwrap(model)
    for name in ("encoder.block4", "classifier"):
        part(network, name, "AFA")
    encoder = part(network, "encoder", "AFA")
    attention = capture_attention(model, modules=[encoder], num_prefix_tokens=0)
    return HostCapture(model, attention, FeatureRecorder(encoder, pick=lambda result: result[0][-1]))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """Runs the encoder alone on ``images`` (B, 3, H, W), whose sides are multiples of 32. It runs outside DDP's
    wrapper, and its gradients join the gradients of the wrapped pass before DDP averages them. Raises ValueError for
    images of another size."""
    height, width = images.shape[-2:]
    if height % _MULTIPLE or width % _MULTIPLE:
        raise ValueError(
            f"The view is {height} x {width} px. Its sides must be multiples of {_MULTIPLE}: use flips, quarter turns, "
            "Scale(..., keep_size=True) or a crop."
        )
    encoder = part(host.network, "encoder", "AFA")
    return host.run(lambda: encoder(images))


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w) without background, not normalised, on the graph. The host detaches its own map."""
    assert view.features is not None
    classifier = part(view.network, "classifier", "AFA")
    return F.conv2d(view.features, classifier.weight)  # type: ignore[arg-type]
