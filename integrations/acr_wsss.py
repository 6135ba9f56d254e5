"""ACR_WSSS, the published code of all-pairs consistency: the same gradients, on any number of ranks and any grid.

``AllPairsConsistencyLoss.paper`` in place of the host's own flips and means gives its gradients on square images, and
right ones on others, where the host's loops over rows are wrong. The host's model has no ``forward``, which is why its
loop calls around DDP and ranks drift apart; the first added line gives it one. ``class_token_gradient_cam`` and
``propagate_cam`` give the maps of its ``getam`` with ``--aff``. What the lines do not touch stays the host's: weight
decay passed as momentum, every rank on the same list.

Weights to start from: the ImageNet weights of its backbones, which the host loads itself (``use_pretrain``).
Views: any flip, quarter turn, crop or scale whose size is a multiple of 16. For the class maps' term, pass
``acr_wsss.cams(first), acr_wsss.cams(second), labels=label`` as well, and give it a weight: ``paper`` leaves it at 1.

Run on 2026-11-25 with torch 2.14.1 on a CPU, random weights, at 64 px: ``train()`` itself for two iterations with the
ResNet hybrid and DeiT-B, on one and on two gloo ranks. Replaced: the images, nccl, SyncBatchNorm, saving.
Its ResNet stem puts tokens off the middle of their pixels (8.5 px apart under a flip), and the library cannot tell
where: the loss warns, and takes the middle, as the host does.

Noise floor: 0, the host drops no paths (at 224 px, random weights, under a flip: activation 0.068, affinity 0.067,
per row; cam 0.25). What does not work: backbone "vitl", whose classification head has the wrong width in the host.

The lines to add stand before the given line of the host's file at that commit, at that line's indentation, or in place
of the given lines.

    OpenNLPLab/ACR_WSSS at 530a59d
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
            second = acr_wsss.second_view(host, img2)
            x2, *_ = second.output
        train_acr.py, in place of lines 167 to 168:
            loss = cls_loss_1 + cls_loss_2 + acr(first.attention, second.attention)
            del first, second
"""

from __future__ import annotations

from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the class token's and the patches' attention of all blocks, and the last block's tokens; a distilled
    DeiT has a second prefix token."""
    vit = part(unwrap(model), "pretrained.model", "ACR_WSSS")
    blocks = part(vit, "blocks", "ACR_WSSS")
    attention = capture_attention(
        model,
        modules=[blocks],
        num_prefix_tokens=int(vit.num_tokens),  # type: ignore[arg-type]
        class_tokens=1,
    )
    return HostCapture(model, attention, FeatureRecorder(part(blocks, "11", "ACR_WSSS")))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """The model's ``forward``, here ``forward_cls``, on ``images`` (B, 3, H, W), H and W multiples of 16, through DDP
    where the model is wrapped. ``output`` is what it returns, the class token's logits first."""
    return host.run(lambda: host.model(images))


def cams(view: HostView) -> Tensor:
    """The class map of the patches (B, C, h, w) of any range, on the graph: the classification head on each patch, as
    ``forward_cam`` has it, before its ReLU and without the distillation token that it takes for a patch."""
    assert view.features is not None
    layout = view.attention[-1].layout
    head = part(view.network, "cls_head", "ACR_WSSS")
    patches = head(view.features[:, layout.num_prefix_tokens :])
    grid: Tensor = patches.transpose(1, 2).unflatten(2, (layout.query.height, layout.query.width))
    return grid
