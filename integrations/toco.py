"""ToCo and the hosts that grew from it: DuPL, SeCo, MoRe, MCC, CTFA and CoSA. Each has a ViT encoder and makes its
class map by a 1 x 1 convolution.

What is regularised. The attention of all 12 blocks in the pass on the training images (the class tokens' rows and the
pairs of patches), and the class map made with the classifier's weight. Passes on crops or other images are left alone.
The host max-pools its class logits from the patches, so its own losses on them give the last layer's class token no
gradient. The activation term does.

What was run. Two steps of the host's own training script ran on a CPU with random weights, torch 2.14.1 and timm
1.0.31. Replaced were the GPU, the data sets and their loader, the compiled CRF loss (``bilateralfilter``), and packages
that a step does not call (OpenCV, mmcv, omegaconf, pandas, pydensecrf, tensorboardX, texttable). The COCO scripts and
iterations past 2000, where the CRF loss begins, did not run.

Views. Any sides that are multiples of 16, square or not, because the host resizes its position table.
``HorizontalFlip()`` ran in training on squares, and ``HorizontalFlip()`` and ``Scale(2.0)`` on images of 96 x 64. A
scale changes the share of a row that falls on the prefix tokens, and the loss counts this change. With one prefix token
the change is small.

Noise floor. The floor is 0, because the host builds its encoder without ``drop_path`` and dropout. Under ``Identity()``
in train mode, two passes on the same images gave exactly 0 for all three terms (real networks, random weights, two
images of 96 x 64). So the whole loss comes from the view. An encoder built with ``drop_path_rate`` has a floor above 0.

Several processes. The second view runs the encoder alone, outside DDP's wrapper. Its gradients join the gradients of
the wrapped pass before DDP averages them.

What does not work. You cannot regularise the auxiliary classifier's map. The distilled DeiT backbones do not run: the
host itself cannot unpack their features. ``nn.DataParallel`` over several GPUs is refused. The optimizer
``CosWarmupAdamW``, which is not the default, uses ``np.float``, which numpy has dropped.

    rulixiang/ToCo at e13514d
        title: ToCo
        regularises: the class token's row, the affinity, the classifier's map, in the pass on the images
        views: multiples of 16

        Weights to start from. DeiT-B of ImageNet-1k, which the host loads itself.

        What was run. The run was on 2026-11-25. A backbone larger than DeiT-S did not run.

        Noise floor. Under the flip, the terms are 0.069 (activation), 0.065 (affinity) and 0.30 (class map).

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

    rulixiang/ToCo at e13514d, on today's torch and timm
        scikit-learn returns plain floats, which have no ``item()``. ``torch.distributed.launch`` passes
        ``--local-rank``, with a dash. timm loads no weights into a ViT without ``pretrained_cfg``; this matters for
        ``--backbone vit_base_patch16_224`` only, because DeiT-B loads without timm.

        scripts/dist_train_voc_seg_neg.py, before line 75:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
        scripts/dist_train_voc_seg_neg.py, before line 305:
            cls_score = np.float64(cls_score)
        model/backbone/vit.py, before line 371:
            model.pretrained_cfg = model.default_cfg

    Wu0409/DuPL at b21990f
        title: DuPL
        regularises: the class token's row, the affinity, the classifier's map, in both branches
        views: multiples of 16

        What is regularised. DuPL has two branches, and both are regularised. From ``--gmm_iters`` on, the host first
        runs each branch on images and augmented images together, and discards the result. ``host.take(1)`` then picks
        the pass on the images alone. The tensors of the other pass are held until ``take``.

        Weights to start from. DeiT-B of ImageNet-1k, which the host loads itself.

        What was run. The run was on 2026-11-25. A backbone larger than DeiT-S did not run.

        Noise floor. Under the flip, the terms are 0.065 (activation), 0.065 (affinity) and 0.29 (class map).

        What does not work. ``--gmm_iters`` below ``--cam_iters`` raises an error, because the run that the added lines
        pick does not exist then.

        train_final_voc.py, before line 14:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import toco
        train_final_voc.py, before line 157:
            hosts = [toco.capture(branch, keep="all") for branch in (model.module.branch1, model.module.branch2)]
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        train_final_voc.py, before line 458:
            for host in hosts:
                first = host.take(1 if n_iter >= args.gmm_iters else 0)
                second = toco.second_view(host, acr.view(inputs))
                loss = loss + acr(
                    first.attention, second.attention, toco.cams(first), toco.cams(second), labels=cls_label
                )
                del first, second

    Wu0409/DuPL at b21990f, on today's torch and timm
        scikit-learn returns plain floats, which have no ``item()``. timm loads no weights into a ViT without
        ``pretrained_cfg``; this matters for ``--backbone vit_base_patch16_224`` only, because DeiT-B loads without
        timm.

        train_final_voc.py, before line 461:
            cls_score = np.float64(cls_score)
        model/backbone/vit.py, before line 1098:
            model.pretrained_cfg = model.default_cfg

    zwyang6/SeCo at 202357f
        title: SeCo
        regularises: the class token's row, the affinity, the classifier's map, in the trained encoder
        views: multiples of 16

        What is regularised. The momentum encoder is not captured.

        Weights to start from. ViT-B of ImageNet-21k, fine-tuned on ImageNet-1k (``jx_vit_base_p16_224``), which the
        host loads itself.

        What was run. The run was on 2026-11-25. Iterations past 600 did not run. SeCo's segmentation loss also begins
        at iteration 2000.

        Noise floor. Under the flip, the terms are 0.090 (activation), 0.088 (affinity) and 0.27 (class map).

        scripts/train_voc.py, before line 8:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import toco
        scripts/train_voc.py, before line 120:
            host = toco.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        scripts/train_voc.py, before line 200:
            first = host.take()
            second = toco.second_view(host, acr.view(inputs))
        scripts/train_voc.py, before line 226:
            loss = loss + acr(
                first.attention, second.attention, toco.cams(first), toco.cams(second), labels=cls_label
            )
            del first, second

    zwyang6/SeCo at 202357f, on today's torch and timm
        scikit-learn returns plain floats, which have no ``item()``. ``torch.distributed.launch`` passes
        ``--local-rank``, with a dash.

        scripts/train_voc.py, before line 90:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
        scripts/train_voc.py, before line 229:
            cls_score = np.float64(cls_score)

    zwyang6/MoRe at d733d34
        title: MoRe
        regularises: the rows of 20 class tokens, the affinity, the classifier's map
        views: multiples of 16

        What is regularised. MoRe has 20 class tokens, after 4 registers that are not regularised.

        Weights to start from. ViT-B of ImageNet-21k, fine-tuned on ImageNet-1k (``jx_vit_base_p16_224``), which the
        host loads itself.

        What was run. The run was on 2026-11-25. MoRe's segmentation loss also begins at iteration 2000.

        Views. MoRe has 24 prefix tokens, and there the change is large: between views of 24 and 96 patches, with random
        weights, the activation term was 0.30 instead of 0.05.

        Noise floor. Under the flip, the terms are 0.047 (activation), 0.047 (affinity) and 0.28 (class map).

        scripts/train_voc.py, before line 8:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import toco
        scripts/train_voc.py, before line 124:
            host = toco.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        scripts/train_voc.py, before line 200:
            first = host.take()
            second = toco.second_view(host, acr.view(inputs))
        scripts/train_voc.py, before line 236:
            loss = loss + acr(
                first.attention, second.attention, toco.cams(first), toco.cams(second), labels=cls_label
            )
            del first, second

    zwyang6/MoRe at d733d34, on today's torch and timm
        scikit-learn returns plain floats, which have no ``item()``. ``torch.distributed.launch`` passes
        ``--local-rank``, with a dash.

        scripts/train_voc.py, before line 95:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
        scripts/train_voc.py, before line 239:
            cls_score = np.float64(cls_score)

    fwu11/MCC at 0731ecc
        title: MCC
        regularises: the class token's row, the affinity, the classifier's map
        views: multiples of 16

        What was run. The run was on 2026-11-29. A backbone larger than DeiT-S did not run.

        Noise floor. Under the flip in the first step, the terms are 0.070 (activation), 0.068 (affinity) and 0.24
        (class map).

        scripts/dist_train_voc_seg_neg.py, before line 14:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import toco
        scripts/dist_train_voc_seg_neg.py, before line 234:
            host = toco.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        scripts/dist_train_voc_seg_neg.py, before line 288:
            first = host.take()
            second = toco.second_view(host, acr.view(inputs))
            loss = loss + acr(
                first.attention, second.attention, toco.cams(first), toco.cams(second), labels=cls_label
            )
            del first, second

    fwu11/MCC at 0731ecc, on today's torch and timm
        scikit-learn returns plain floats, which have no ``item()``. ``torch.distributed.launch`` passes
        ``--local-rank``, with a dash. timm loads no weights into a ViT without ``pretrained_cfg``; this matters for
        ``--backbone vit_base_patch16_224`` only, because DeiT-B loads without timm.

        scripts/dist_train_voc_seg_neg.py, before line 78:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
        scripts/dist_train_voc_seg_neg.py, before line 291:
            cls_score = np.float64(cls_score)
        model/backbone/vit.py, before line 375:
            model.pretrained_cfg = model.default_cfg

    ZaiyiHu/CTFA at ff0bb03
        title: CTFA
        regularises: the class token's row, the affinity, the classifier's map
        views: multiples of 16

        Weights to start from. DeiT-B of ImageNet-1k, which the host loads itself.

        What was run. The run was on 2026-11-29. A backbone larger than DeiT-S did not run. Neither did iSAID (at
        ff0bb03 its script calls ``profile``, which it does not import), DeepGlobe, or two ranks (the scripts start
        one).

        Noise floor. Under the flip in the first step, the terms are 0.067 (activation), 0.067 (affinity) and 0.23
        (class map).

        scripts/dist_train_potsdam_seg_neg_fp.py, before line 21:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import toco
        scripts/dist_train_potsdam_seg_neg_fp.py, before line 290:
            host = toco.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        scripts/dist_train_potsdam_seg_neg_fp.py, before line 353:
            first = host.take()
            second = toco.second_view(host, acr.view(inputs))
            loss = loss + acr(
                first.attention, second.attention, toco.cams(first), toco.cams(second), labels=cls_label
            )
            del first, second

    ZaiyiHu/CTFA at ff0bb03, on today's torch and timm
        numpy has dropped ``numpy.lib.utils``, which the data set imports without using it. scikit-learn returns plain
        floats, which have no ``item()``. timm loads no weights into a ViT without ``pretrained_cfg``; this matters for
        ``--backbone vit_base_patch16_224`` only, because DeiT-B loads without timm.

        datasets/potsdam.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used
        scripts/dist_train_potsdam_seg_neg_fp.py, before line 356:
            cls_score = np.float64(cls_score)
        model/backbone/vit.py, before line 382:
            model.pretrained_cfg = model.default_cfg

    youshyee/CoSA at 01d3467
        title: CoSA
        regularises: the class token's row, the affinity, the classifier's map, on the strongly augmented images
        views: multiples of 16

        What is regularised. The trained network's pass on the strongly augmented images. The lines work with
        ``--decoder LargeFOV``, the default. The assignment network, a moving average that makes pseudo labels, is not
        captured.

        Weights to start from. ViT-B of ImageNet-21k, fine-tuned on ImageNet-1k (``jx_vit_base_p16_224``), which the
        host loads itself.

        What was run. The run was on 2026-11-29. The script's ``main()`` ran. A backbone larger than DeiT-S did not run.

        Noise floor. Under the flip in the first step, the terms are 0.069 (activation), 0.067 (affinity) and 0.27
        (class map).

        main.py, before line 13:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import toco
        main.py, before line 76:
            host = toco.capture(model_ON)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        main.py, before line 245:
            first = host.take()
            second = toco.second_view(host, acr.view(simg))
            loss = loss + acr(
                first.attention, second.attention, toco.cams(first), toco.cams(second), labels=cls_label
            )
            del first, second
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, Keep, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module, keep: Keep = "first") -> HostCapture:
    """Captures the attention of the class tokens and patches in the encoder's first pass of each training call, and the
    feature map that goes into the segmentation decoder.

    If the pass on the images is not always the first, use ``keep="all"``, and pick the pass by ``host.take(run)``.
    Raises ValueError for a model of another family, and for DuPL's pair, whose branches you capture one by one.
    """
    network = unwrap(model)
    if hasattr(network, "branch1"):
        raise ValueError(
            f"{type(network).__name__} has two branches. Use "
            "[toco.capture(branch, keep='all') for branch in (model.module.branch1, model.module.branch2)]."
        )
    encoder, classifier = part(network, "encoder", "ToCo"), part(network, "classifier", "ToCo")
    prefix = int(encoder.cls_token.shape[1])  # type: ignore[index]
    classes = int(classifier.weight.shape[0])  # type: ignore[index]
    attention = capture_attention(
        model,
        modules=[part(network, "encoder.blocks", "ToCo")],
        num_prefix_tokens=prefix,
        class_tokens=1 if prefix == 1 else range(prefix - classes, prefix),  # MoRe's registers come first
        keep=keep,
    )
    return HostCapture(model, attention, FeatureRecorder(part(network, "decoder", "ToCo"), "input", keep=keep))


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """Runs the encoder alone on ``images`` (B, 3, H, W), whose sides are multiples of the patch size. It runs outside
    DDP's wrapper, and its gradients join the gradients of the wrapped pass before DDP averages them."""
    encoder = part(host.network, "encoder", "ToCo")
    rows, columns = (side // int(encoder.patch_size) for side in images.shape[-2:])  # type: ignore[arg-type]

    def feature_map(output: tuple[Tensor, ...]) -> Tensor:
        return output[1].transpose(1, 2).unflatten(2, (rows, columns))

    return host.run(lambda: encoder.forward_features(images), feature_map)  # type: ignore[operator]


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w) without background, not normalised, on the graph. The host detaches its own map."""
    assert view.features is not None
    classifier = part(view.network, "classifier", "ToCo")
    return F.conv2d(view.features, classifier.weight)  # type: ignore[arg-type]
