"""WeCLIP, WeCLIP+ and ExCEL: a decoder learns to segment from the features of a frozen CLIP.

What is regularised. The pairs of patches in the decoder's three blocks, and the probabilities that the decoder gives
the classes. Nothing else can learn: the encoder is frozen, so its attention and the host's own class maps, which come
from it, have no gradient and are not captured. There is no class token, so the activation term has weight 0. The host
predicts an affinity by a sigmoid (``attn_pred``). It is not attention and has the host's own loss.

What was run. Two steps of ``train()`` ran on 2026-11-29, on a CPU with random weights, torch 2.14.1 and timm 1.0.31.
Replaced were the data set and its loader, CLIP (by one of 12 blocks and 64 channels), OpenCV (its resize by torch's;
the boxes around contours by the whole map), lxml (by the standard library's XML), TensorBoard and the GPU. The COCO
scripts, ViT-L/14 and several GPUs did not run.

Noise floor. In training the floor is above 0, because the fused features have dropout of 0.1.

Several processes. The second view runs the frozen encoder, ``decoder_fts_fuse`` and ``decoder``, outside DDP's wrapper.
The host's whole forward would read the image's labels from a file, compute and refine Grad-CAM, and count an iteration.

    zbf1991/WeCLIP at 0f47db4 (WeCLIP)
        title: WeCLIP
        regularises: the decoder's affinity and class probabilities, without padding
        views: multiples of 16

        Weights to start from. CLIP ViT-B/16, which the host loads itself.

        What was run. The masks of made-up images were read as the host reads them. Iterations past 15000, where the
        pseudo labels change, did not run.

        Views. Sides that are multiples of 16.

        Noise floor. In the first step under the flip, the terms are 0.072 (affinity) and 0.093 (class map).

        Memory. Validation runs with a graph. Each forward of the model forgets the decoder runs of the forward before,
        so little memory is held.

        WeCLIP/scripts/dist_clip_voc.py, before line 17:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import weclip
        WeCLIP/scripts/dist_clip_voc.py, before line 235:
            host = weclip.capture(WeCLIP_model)
            acr = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)
        WeCLIP/scripts/dist_clip_voc.py, before line 263:
            first = host.take()
            second = weclip.second_view(host, acr.view(inputs.cuda()))
            maps = weclip.cams(first), weclip.cams(second)
            known = {"labels": cls_labels.cuda(), "valid": weclip.inside(img_box, inputs.cuda())}
            loss = loss + acr(first.attention, second.attention, *maps, **known)
            del first, second, maps

    zbf1991/WeCLIP at 0f47db4 (WeCLIP+)
        title: WeCLIP+
        regularises: the decoder's affinity on CLIP's and on DINO's features, class probabilities, without padding
        views: multiples of 16

        What is regularised. One decoder runs on the features of CLIP and of DINO, both frozen. Both runs are
        regularised.

        Weights to start from. CLIP ViT-B/16, and DINOv2 ViT-S/14 from torch.hub, which the host loads itself.

        What was run. DINOv2 was replaced by a patch embedding with its interface. The annotations of made-up images
        were read as the host reads them. Iterations past 18000, where the pseudo labels change, did not run.

        Views. Sides that are multiples of 16.

        Noise floor. In the first step under the flip, the terms are 0.086 (affinity) and 0.069 (class map).

        Memory. Validation runs with a graph. Each forward of the model forgets the decoder runs of the forward before,
        so little memory is held.

        WeCLIP+/scripts/dist_clip_voc.py, before line 16:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import weclip
        WeCLIP+/scripts/dist_clip_voc.py, before line 247:
            host = weclip.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)
        WeCLIP+/scripts/dist_clip_voc.py, before line 290:
            first = host.take()
            second = weclip.second_view(host, acr.view(inputs.cuda()))
            maps = weclip.cams(first), weclip.cams(second)
            known = {"labels": cls_labels.cuda(), "valid": weclip.inside(img_box, inputs.cuda())}
            loss = loss + acr(first.attention, second.attention, *maps, **known)
            del first, second, maps

    zbf1991/WeCLIP at 0f47db4, on today's torch and timm
        setuptools has dropped ``pkg_resources``, and numpy ``numpy.lib.utils``, which the data sets import without
        using it.

        WeCLIP/clip/clip.py, in place of lines 6 to 6:
            import packaging.version
        WeCLIP/datasets/voc.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used
        WeCLIP/datasets/coco.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used
        WeCLIP+/clip/clip.py, in place of lines 6 to 6:
            import packaging.version
        WeCLIP+/datasets/coco.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used

    zwyang6/ExCEL at 2cd7f51
        title: ExCEL
        regularises: the decoder's affinity and class probabilities, without padding
        views: squares, multiples of 16

        Weights to start from. CLIP ViT-B/16, which the host loads itself.

        What was run. ExCEL's bank of attributes was replaced, too. ExCEL ran under DDP with one rank. Iterations past
        14000, where the pseudo labels change, did not run.

        Views. Squares whose side is a multiple of 16, because ExCEL resizes its position table to squares only.

        Noise floor. In the first step under the flip, the terms are 0.098 (affinity) and 0.094 (class map).

        scripts/train_voc.py, before line 12:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import weclip
        scripts/train_voc.py, before line 172:
            host = weclip.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)
        scripts/train_voc.py, before line 188:
            first = host.take()
        scripts/train_voc.py, before line 217:
            second = weclip.second_view(host, acr.view(inputs))
            maps = weclip.cams(first), weclip.cams(second)
            known = {"labels": cls_labels, "valid": weclip.inside(img_box, inputs)}
            loss = loss + acr(first.attention, second.attention, *maps, **known)
            del first, second, maps

    zwyang6/ExCEL at 2cd7f51, on today's torch and timm
        setuptools has dropped ``pkg_resources``. numpy has dropped ``numpy.lib.utils``, which the data sets import
        without using it. ``torch.distributed.launch`` passes ``--local-rank``, with a dash.

        clip/clip.py, in place of lines 6 to 6:
            import packaging.version
        datasets/voc.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used
        datasets/coco.py, in place of lines 2 to 2:
            # numpy.lib.utils is gone, and its deprecate was not used
        scripts/train_voc.py, before line 81:
            parser.add_argument("--local-rank", dest="local_rank", default=-1, type=int)
"""

from __future__ import annotations

from dataclasses import replace
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import AttentionMaps, capture_attention
from acr_reg.capture.hooks import HookSet
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, inside, part, unwrap

__all__ = ["cams", "capture", "inside", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the decoder's attention and its segmentation logits in the last forward of the model. WeCLIP+ runs the
    decoder twice: the layers of the run on CLIP's features come first, then the layers of the run on DINO's. Raises
    ValueError for a model of another family."""
    for name in ("encoder.visual", "decoder_fts_fuse", "decoder.transformer.resblocks"):
        part(unwrap(model), name, "WeCLIP")
    return _DecoderCapture(model)


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """Runs the frozen encoder and then the decoder on ``images`` (B, 3, H, W), whose sides are multiples of the patch
    size of CLIP. ExCEL takes squares only. The second view reads no file and makes no pseudo labels. It runs outside
    DDP's wrapper, and its gradients join the gradients of the wrapped pass before DDP averages them. Raises ValueError
    for images of another size."""
    network: Any = host.network
    patch, (height, width) = _patch_size(network), images.shape[-2:]
    sides = "equal multiples" if _is_excel(network) else "multiples"
    if height % patch or width % patch or (_is_excel(network) and height != width):
        raise ValueError(
            f"The view is {height} x {width} px. Its sides must be {sides} of {patch}: use flips, quarter turns, "
            "Scale(..., keep_size=True) or a crop."
        )
    return host.run(lambda: [network.decoder(features) for features in _decoder_inputs(network, images)])


def cams(view: HostView) -> Tensor:
    """The class map (B, C, h, w) in [0, 1], without background, on the graph: the probability of each class in the
    segmentation. WeCLIP+ uses the mean of the logits of both runs, as the host does."""
    assert view.features is not None
    return view.features.softmax(1)[:, 1:]


class _DecoderCapture(HostCapture):
    """Keeps all decoder runs of one forward. The next forward forgets them, so that validation, which the hosts run
    with a graph, holds the runs of one image at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._forwards = HookSet(self)
        self._forwards.watch_only([unwrap(model)])
        decoder = part(unwrap(model), "decoder", "WeCLIP")
        attention = capture_attention(model, modules=[decoder], num_prefix_tokens=0, keep="all")
        self._logits = FeatureRecorder(decoder, keep="all", pick=lambda result: result[0])
        super().__init__(model, attention, self._logits)

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        self.clear()

    def left(self, module: nn.Module, result: Any, failed: bool) -> None:
        pass

    def remove(self) -> None:
        self._forwards.remove()
        super().remove()

    def _view(self, output: Any, features: Tensor | None, run: int | None = None) -> HostView:
        try:
            runs, logits = self._attention.take_all(), self._logits.take_all()
            height, width = logits[0].shape[-2:]
            placed = [maps.with_layout(grid=(height, width), num_prefix_tokens=0) for maps in runs]
            layers = [layer for maps in placed for layer in maps]
            attention = AttentionMaps(replace(layer, index=index) for index, layer in enumerate(layers))
            return HostView(attention, torch.stack(logits).mean(0), output, self.network)
        finally:
            self.clear()


def _is_excel(network: nn.Module) -> bool:
    return hasattr(network, "text_attr")


def _patch_size(network: Any) -> int:
    return int(network.encoder.visual.conv1.weight.shape[-1])


def _decoder_inputs(network: Any, images: Tensor) -> list[Tensor]:
    """The inputs (B, C, h, w) of the decoder in the host's forward."""
    height, width = images.shape[-2:]
    patch = _patch_size(network)
    grid = height // patch, width // patch
    if _is_excel(network):
        *_, layers = network.encoder.encode_image(images, True, None)
        tokens = torch.stack(layers)  # (layers, B, 1 + N, width)
        return [network.decoder_fts_fuse(_on_grid(tokens[:, :, 1:], grid))]
    if not hasattr(network, "dino_encoder"):
        layers, _ = network.encoder.encode_image(images, height, width, require_all_fts=True)
        return [network.decoder_fts_fuse(_on_grid(torch.stack(layers)[:, 1:].transpose(1, 2), grid))]
    layers, _ = network.encoder.encode_image(images, height, width, require_all_fts=True, clip_flag=network.clip_flag)
    of_clip = network.decoder_fts_fuse(_on_grid(layers[-1][None, 1:].transpose(1, 2), grid))
    dino_grid = height // 14, width // 14
    with torch.no_grad():
        resized = F.interpolate(images, [14 * side for side in dino_grid], mode="bilinear", align_corners=False)
        tokens = network.dino_encoder.forward_features(resized)["x_norm_patchtokens"]
    of_dino = network.dino_decoder_fts_fuse(_on_grid(tokens[None], dino_grid))
    return [of_clip, F.interpolate(of_dino, grid, mode="bilinear", align_corners=False)]


def _on_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(layers, B, N, width) to (layers, B, width, h, w)."""
    return tokens.transpose(2, 3).unflatten(3, grid)
