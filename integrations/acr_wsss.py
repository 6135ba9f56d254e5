"""ACR_WSSS, the published code of all-pairs consistency. The library's loss gives the same gradients, on any number of
ranks and any grid.

``AllPairsConsistencyLoss.paper`` replaces the host's loops over rows. With the horizontal flip on square images, its
gradients equal the host's up to rounding. It is also right in two cases where the host is wrong: on images that are not
square, and for the distilled DeiT, whose second prefix token shifts the host's rows by one. The class map of ``getam``
with ``--aff`` is ``propagate_cam(class_token_gradient_cam(...))``. This also works for the distilled DeiT, at which
infer_cam.py stops.

What is regularised. The class token's row and the pairs of patches, in all twelve blocks. To add the class map's term,
pass ``acr_wsss.cams(first), acr_wsss.cams(second), labels=label`` to the loss; its weight is then 1.

Weights to start from. The ImageNet weights at 384 px that the host itself downloads: ``jx_vit_base_resnet50_384``,
``jx_vit_base_p16_384``, ``deit_base_patch16_384`` and ``deit_base_distilled_patch16_384``.

What was run. On 2026-11-25, on a CPU with torch 2.14.1, timm 1.0.31 and random weights at 64 px, two steps of these
ran: ``train()`` of train_acr.py with vitb_hybrid, deit and deit_distilled on one rank, and with deit on two gloo ranks;
``train()`` of train_acr_coco.py with deit; and ``train()`` of infer_cam.py with vitb_hybrid. vitb ran forward only.
Replaced were the images (OpenCV), pydensecrf, nccl, ``.cuda()``, SyncBatchNorm, saving, and the download.

Views. Any view whose sides are multiples of 16, square or not, because the host resizes its position table.
``acr.view`` makes the second image; the host's own ``img2`` is no longer used.

Where tokens are. vitb_hybrid, the default, has a ResNet stem that puts tokens off the middle of their 16 pixels, and no
module says where they are. The loss warns and takes the middle, as the published code does. ``acr_reg.check`` measures
how far apart the flip matches tokens there. With random weights it is 10 px for queries and 17 px for keys at 128 px,
and 12 and 11 px at 192 px. For deit_distilled it is below 1 px.

Noise floor. The floor is 0, in train mode too: no backbone drops paths or features, and none has BatchNorm. Under a
flip with random weights, activation and affinity per row are 0.07 (vitb_hybrid, 192 and 224 px) and 0.08
(deit_distilled, 64 px).

Faults of the published code. The added lines repair four: the call around DDP, after which each rank has different
gradients; wrong grids for images that are not square; the second prefix token of the distilled DeiT; and the copies of
the stacked maps in backward. These faults remain. Weight decay is passed as momentum. All ranks read the same list.
Maps stay on the modules with their graph until the next pass; meanwhile a deepcopy of the model fails, and inference or
validation under ``torch.no_grad`` reads stale maps. All models of a process share one table of activations. Inference
takes batches of one only.

What does not work. vitl: its tokens are 1024 wide and its head takes 768, so the host's forward pass fails.

    OpenNLPLab/ACR_WSSS at 530a59d
        title: ACR_WSSS
        regularises: the class token's row and the affinity in all blocks, as its own loop does
        views: multiples of 16

        The model has no ``forward``, which DDP needs. The first line within ``train`` gives it one.

        train_acr.py, before line 2:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import acr_wsss
        train_acr.py, before line 94:
            model.forward = model.forward_cls
        train_acr.py, before line 101:
            host = acr_wsss.capture(model)
            acr = AllPairsConsistencyLoss.paper(HorizontalFlip(), weight=args.alpha)
        train_acr.py, in place of lines 138 to 161:
            x1, *_ = model(img)
            first = host.take()
            second = acr_wsss.second_view(host, acr.view(img))
            x2, *_ = second.output
        train_acr.py, in place of lines 167 to 168:
            loss = cls_loss_1 + cls_loss_2 + acr(first.attention, second.attention)
            del first, second
        train_acr_coco.py, before line 2:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import acr_wsss
        train_acr_coco.py, before line 93:
            model.forward = model.forward_cls
        train_acr_coco.py, before line 100:
            host = acr_wsss.capture(model)
            acr = AllPairsConsistencyLoss.paper(HorizontalFlip(), weight=args.alpha)
        train_acr_coco.py, in place of lines 135 to 159:
            x1, *_ = model(img)
            first = host.take()
            second = acr_wsss.second_view(host, acr.view(img))
            x2, *_ = second.output
        train_acr_coco.py, in place of lines 164 to 165:
            loss = cls_loss_1 + cls_loss_2 + acr(first.attention, second.attention)
            del first, second

    OpenNLPLab/ACR_WSSS at 530a59d, on today's torch and timm
        numpy has dropped the name ``np.float``.

        myTool.py, before line 14:
            np.float = float
"""

from __future__ import annotations

from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the attention of the class token and patches in all blocks, and the tokens of the last block. It knows
    the second prefix token of a distilled DeiT. Raises ValueError for a model of another family."""
    vit = part(unwrap(model), "pretrained.model", "ACR_WSSS")
    blocks = part(vit, "blocks", "ACR_WSSS")
    last = list(blocks.children())[-1]
    attention = capture_attention(
        model,
        modules=[blocks],
        num_prefix_tokens=int(vit.num_tokens),  # type: ignore[arg-type]
        class_tokens=1,
    )
    return HostCapture(model, attention, FeatureRecorder(last))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """Runs the model's ``forward``, here ``forward_cls``, on ``images`` (B, 3, H, W), whose sides are multiples of 16,
    through DDP if the model is wrapped. ``output`` holds its result, which begins with the class token's logits."""
    return host.run(lambda: host.model(images))


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w), not normalised, on the graph: the classification head applied to each patch.

    The host's ``forward_cam`` also applies a ReLU, and takes the distillation token for a patch."""
    assert view.features is not None
    layout = view.attention[-1].layout
    head = part(view.network, "cls_head", "ACR_WSSS")
    patches = head(view.features[:, layout.num_prefix_tokens :])
    grid: Tensor = patches.transpose(1, 2).unflatten(2, (layout.query.height, layout.query.width))
    return grid
