"""ToCo and the networks that grew from it (DuPL, SeCo, MoRe, MCC, CTFA, CoSA): a ViT encoder and a class map by 1 x 1
convolution. A training call may run the encoder on crops or other images as well.

What is regularised: the attention of all 12 blocks (the class token's row and the pairs of patches), in the pass on the
training images only, and the class map by the classifier's weight. MoRe has 20 class tokens, after 4 registers that are
not regularised. DuPL: both branches. The second view runs the encoder alone, outside DDP's wrapper: its gradients join
those of the wrapped pass before DDP averages them. SeCo's momentum encoder is not captured. The class logits are
max-pooled from patches, so the hosts' own losses on them give the last layer's class token no gradient; the activation
term does. CoSA's assignment network, a moving average that makes pseudo labels, is not captured.

Weights to start from, which the hosts load themselves: DeiT-B of ImageNet-1k (ToCo, DuPL, CTFA); ViT-B of ImageNet-21k,
fine-tuned on 1k, jx_vit_base_p16_224 (SeCo, MoRe, CoSA).

Run on 2026-11-25 (MCC, CTFA and CoSA on 2026-11-29) with torch 2.14.1 and timm 1.0.31 on a CPU, at the commits below,
with random weights: two steps of the scripts' ``train()`` (CoSA's ``main()``). Stubbed: the GPU, the data sets and
their loader, the compiled CRF loss (``bilateralfilter``), and packages that a step does not call (OpenCV, mmcv,
omegaconf, pandas, pydensecrf, tensorboardX, texttable). Not run: the COCO scripts, ToCo, DuPL, MCC, CTFA and CoSA with
a larger backbone than DeiT-S, CTFA on iSAID (at ff0bb03 that script calls ``profile``, which it does not import) and on
DeepGlobe, CTFA on two ranks (its scripts start one), SeCo past iteration 600, and iterations past 2000, where the CRF
loss and the segmentation loss of MoRe and SeCo begin.

Views: any whose sides are multiples of 16, oblong ones too, because the position table is resized to each size. Run
here: ``HorizontalFlip()`` in training on squares; ``HorizontalFlip()`` and ``Scale(2.0)`` on images of 96 x 64. A scale
changes the share of a row that falls on the prefix tokens, and the loss counts that. With one prefix token it is
little, but MoRe's 24 gave attention terms of 0.30 instead of 0.05, for 24 and 96 patches and random weights.

Noise floor: 0. The hosts build their encoders without drop_path and dropout. Under ``Identity()`` in train mode, two
passes on the same images gave exactly 0 for all three terms (the real networks, random weights, two images of 96 x 64),
so the whole loss comes from the view. Under the flip the terms (activation / affinity / cam) were: ToCo 0.069 / 0.065 /
0.30, DuPL 0.065 / 0.065 / 0.29, SeCo 0.090 / 0.088 / 0.27, MoRe 0.047 / 0.047 / 0.28; in the first step of training MCC
0.070 / 0.068 / 0.24, CTFA 0.067 / 0.067 / 0.23, CoSA 0.069 / 0.067 / 0.27. An encoder built with ``drop_path_rate`` has
a floor above 0.

What does not work: regularising the auxiliary classifier's map; the distilled DeiT backbones, whose features the hosts
themselves cannot unpack; ``nn.DataParallel`` over several GPUs; DuPL with ``--gmm_iters`` below ``--cam_iters``, where
the run that the added lines name does not exist (an error says so). From ``--gmm_iters`` on, DuPL also runs each branch
on images and augmented images together, and discards the result. That pass is not regularised, and its tensors are held
until ``take``.

The lines to add stand before the given line of the host's file at that commit, at that line's indentation. The host
itself needs the lines "on today's torch and timm": scikit-learn returns plain floats, which have no ``item()``;
``torch.distributed.launch`` passes ``--local-rank``; timm loads no weights into a ViT without ``pretrained_cfg`` (ToCo
and DuPL with ``--backbone vit_base_patch16_224``; DeiT-B loads without timm). ``np.float`` is gone too, but only the
optimizer ``CosWarmupAdamW`` uses it, which is not the default.

    rulixiang/ToCo at e13514d
        title: ToCo
        regularises: the class token's row, the affinity, the classifier's map, in the pass on the images
        views: multiples of 16
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
        scripts/dist_train_voc_seg_neg.py, before line 75:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
        scripts/dist_train_voc_seg_neg.py, before line 305:
            cls_score = np.float64(cls_score)
        model/backbone/vit.py, before line 371:
            model.pretrained_cfg = model.default_cfg

    Wu0409/DuPL at b21990f (both branches; run 1, late in training, is that on the images alone)
        title: DuPL
        regularises: as ToCo, in both branches
        views: multiples of 16
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
        train_final_voc.py, before line 461:
            cls_score = np.float64(cls_score)
        model/backbone/vit.py, before line 1098:
            model.pretrained_cfg = model.default_cfg

    zwyang6/SeCo at 202357f
        title: SeCo
        regularises: as ToCo, in the trained encoder
        views: multiples of 16
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
        scripts/train_voc.py, before line 90:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
        scripts/train_voc.py, before line 229:
            cls_score = np.float64(cls_score)

    zwyang6/MoRe at d733d34
        title: MoRe
        regularises: the rows of 20 class tokens, the affinity, the classifier's map
        views: multiples of 16
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
        scripts/train_voc.py, before line 95:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
        scripts/train_voc.py, before line 239:
            cls_score = np.float64(cls_score)

    fwu11/MCC at 0731ecc
        title: MCC
        regularises: as ToCo
        views: multiples of 16
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
        scripts/dist_train_voc_seg_neg.py, before line 78:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
        scripts/dist_train_voc_seg_neg.py, before line 291:
            cls_score = np.float64(cls_score)
        model/backbone/vit.py, before line 375:
            model.pretrained_cfg = model.default_cfg

    ZaiyiHu/CTFA at ff0bb03
        title: CTFA
        regularises: as ToCo
        views: multiples of 16
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
        datasets/potsdam.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used
        scripts/dist_train_potsdam_seg_neg_fp.py, before line 356:
            cls_score = np.float64(cls_score)
        model/backbone/vit.py, before line 382:
            model.pretrained_cfg = model.default_cfg

    youshyee/CoSA at 01d3467 (with --decoder LargeFOV, the default; its assignment network is not captured)
        title: CoSA
        regularises: as ToCo, in the trained network's pass on the strongly augmented images
        views: multiples of 16
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
    """Captures the class tokens' and patches' attention in the encoder's first pass of each training call, and the
    feature map that reaches the segmentation decoder.

    Use ``keep="all"`` for a network whose first pass is not always the one on the images: ``host.take(run)`` then picks
    it. Raises ValueError for a model of another family, and for DuPL's pair: capture each of its branches.
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
    """Runs the encoder alone on ``images`` (B, 3, H, W), H and W multiples of the patch size, outside DDP's wrapper:
    its gradients join those of the wrapped pass before DDP averages them."""
    encoder = part(host.network, "encoder", "ToCo")
    rows, columns = (side // int(encoder.patch_size) for side in images.shape[-2:])  # type: ignore[arg-type]

    def feature_map(output: tuple[Tensor, ...]) -> Tensor:
        return output[1].transpose(1, 2).unflatten(2, (rows, columns))

    return host.run(lambda: encoder.forward_features(images), feature_map)  # type: ignore[operator]


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w) in any range, C without the background, on the graph (the hosts detach theirs)."""
    assert view.features is not None
    classifier = part(view.network, "classifier", "ToCo")
    return F.conv2d(view.features, classifier.weight)  # type: ignore[arg-type]
