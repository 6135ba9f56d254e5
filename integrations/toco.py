"""ToCo and the networks that grew from it (DuPL, SeCo): a ViT encoder with one class token, a class map by 1 x 1
convolution, and a training call that runs the encoder on crops as well.

Regularised is the first pass of the training call, that on the images, and only it. The second view runs the encoder
alone, outside of DDP's wrapper: its gradients join those of the wrapped pass before DDP averages them. The class logits
are max-pooled from patches, so the host's own loss gives the last layer's class token no gradient; the activation term
does.

Weights to start from: DeiT-B or ViT-B of ImageNet, which the host loads itself (``--backbone``, ``--pretrained``).
Views: any flip, quarter turn, crop or scale whose size is a multiple of 16; the position table is resized.

Run on 2026-11-25 with torch 2.14.1 and timm 1.0.31 on a CPU, random weights, DeiT-S at 96 px: ``train()`` itself, two
iterations, on one and on two gloo ranks. Replaced: the dataset, the compiled CRF loss (its weight is 0 up to iteration
2000), the devices of DDP. The host needs on today's versions: ``np.float`` is gone from numpy (utils/optimizer.py), and
scikit-learn returns plain floats (utils/evaluate.py), which have no ``item()``.

Noise floor: 0. The host drops no paths, so two passes on the same images are equal (at 224 px, random weights, under a
flip: activation 0.029, affinity 0.029, cam 0.22). What does not work: the aux classifier's map is not regularised.

The lines to add stand before the given line of the host's file at that commit, at that line's indentation.

    rulixiang/ToCo at e13514d
        scripts/dist_train_voc_seg_neg.py, before line 10:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import toco
        scripts/dist_train_voc_seg_neg.py, before line 240:
            host = toco.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        scripts/dist_train_voc_seg_neg.py, before line 275:
            first = host.take()
            second = toco.second_view(host, acr.view(inputs))
        scripts/dist_train_voc_seg_neg.py, before line 302:
            loss = loss + acr(
                first.attention, second.attention, toco.cams(first), toco.cams(second), labels=cls_label
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
    """Captures the class token's and the patches' attention in the encoder's first pass of each training call, and the
    feature map that reaches the segmentation decoder."""
    network = unwrap(model)
    attention = capture_attention(
        model, modules=[part(network, "encoder.blocks", "ToCo")], num_prefix_tokens=1, class_tokens=1, keep="first"
    )
    return HostCapture(model, attention, FeatureRecorder(part(network, "decoder", "ToCo"), "input", keep="first"))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """The encoder alone on ``images`` (B, 3, H, W), H and W multiples of the patch size."""
    encoder = part(host.network, "encoder", "ToCo")
    rows, columns = (side // int(encoder.patch_size) for side in images.shape[-2:])  # type: ignore[arg-type]

    def feature_map(output: tuple[Tensor, ...]) -> Tensor:
        return output[1].transpose(1, 2).unflatten(2, (rows, columns))

    return host.run(lambda: encoder.forward_features(images), feature_map)  # type: ignore[operator]


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w) of any range, C without the background, on the graph; the host detaches its own."""
    assert view.features is not None
    classifier = part(view.network, "classifier", "ToCo")
    return F.conv2d(view.features, classifier.weight)  # type: ignore[arg-type]
