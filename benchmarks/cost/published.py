"""The published procedure (arXiv 2308.04321) for timm's ViTs, written from its formulas, to compare the library with.

Attention is explicit, the head means of all layers are stacked, and the flip is undone in place, one token row of the
image at a time. As published, it serves square grids and one class token only.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class ExplicitMaps:
    """Makes a timm ViT form its attention maps (B, H, 1 + N, 1 + N) and keeps those of the last forward pass."""

    def __init__(self, model: VisionTransformer) -> None:
        self._maps: list[Tensor] = []
        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._maps.append(inputs[0])  # before dropout

    def take(self) -> list[Tensor]:
        maps, self._maps = self._maps, []
        return maps


def published_consistency(maps_a: list[Tensor], maps_b: list[Tensor], weight: float = 100.0) -> Tensor:
    """weight * 1/(B L N) sum |A1[0,1:] - A2[0,1:] P|  +  weight * 1/(B L N^2) sum |A1[1:,1:] - P^T A2[1:,1:] P|."""
    # Autocast leaves softmax in half precision on a CPU, in float32 on CUDA.
    a, b = (torch.stack([each.float().mean(1) for each in maps], 1) for maps in (maps_a, maps_b))
    row, affinity = b[:, :, 0, 1:].clone(), b[:, :, 1:, 1:].clone()
    side = math.isqrt(row.shape[-1])
    slices = [slice(y * side, (y + 1) * side) for y in range(side)]
    for part in slices:
        row[:, :, part] = row[:, :, part].flip(2)
    for part in slices:
        affinity[:, :, part] = affinity[:, :, part].flip(2)
    for part in slices:
        affinity[:, :, :, part] = affinity[:, :, :, part].flip(3)
    return weight * (a[:, :, 0, 1:] - row).abs().mean() + weight * (a[:, :, 1:, 1:] - affinity).abs().mean()


def published_cam(
    model: VisionTransformer, explicit: ExplicitMaps, images: Tensor, labels: Tensor, last: int = 2
) -> Tensor:
    """Class maps (B, C, h, w), summed over the image and its flip: a full backward pass for each class, view and image.

    M_c = sum over the last layers of mean_h relu(dy_c/dA)[0, 1:], multiplied once by the sum over all layers of
    mean_h A[1:, 1:]. ``model`` is in eval mode.
    """
    side = math.isqrt(model.patch_embed.num_patches)
    found = images.new_zeros(*labels.shape, side, side)
    for number in range(len(images)):  # one image at a time, as published
        for flipped in (False, True):
            image = images[number : number + 1]
            logits = model(image.flip(-1) if flipped else image)
            maps = explicit.take()
            gradients: dict[int, Tensor] = {}
            for layer, each in enumerate(maps):
                each.register_hook(partial(gradients.__setitem__, layer))
            affinity = torch.stack([each.detach()[0].mean(0)[1:, 1:] for each in maps]).sum(0)
            for label in labels[number].nonzero()[:, 0].tolist():
                model.zero_grad()
                logits[0, label].backward(retain_graph=True)
                rows = [gradients[layer][0, :, 0, 1:].relu().mean(0) for layer in range(len(maps))[-last:]]
                cam = (affinity @ torch.stack(rows).sum(0)).reshape(side, side)
                found[number, label] += cam.flip(-1) if flipped else cam
    return found


def hooked_cam(
    model: VisionTransformer, explicit: ExplicitMaps, images: Tensor, labels: Tensor, last: int = 2
) -> Tensor:
    """The same maps before that multiplication, as one writes them by hand: the whole batch at once, and for each class
    a backward pass that ends at the maps of the last layers."""
    side = math.isqrt(model.patch_embed.num_patches)
    found = images.new_zeros(*labels.shape, side, side)
    for flipped in (False, True):
        logits = model(images.flip(-1) if flipped else images)
        maps = explicit.take()[-last:]
        for label in labels.any(0).nonzero()[:, 0].tolist():
            gradients = torch.autograd.grad(logits[:, label].sum(), maps, retain_graph=True)
            rows = torch.stack([each[:, :, 0, 1:].relu().mean(1) for each in gradients]).sum(0)
            cam = rows.unflatten(1, (side, side)) * labels[:, label, None, None]
            found[:, label] += cam.flip(-1) if flipped else cam
    return found


def sweep(
    cams: list[np.ndarray], masks: list[np.ndarray], classes: list[list[int]], num_classes: int, all_maps: bool
) -> np.ndarray:
    """mIoU (100,) at thresholds 0, 0.01, ..., 0.99, with an argmax and a confusion matrix for each.

    ``all_maps`` puts the maps into an array of all ids, as the usual scripts do; otherwise only present ones take part.
    """
    found = []
    for threshold in np.arange(100) / 100:
        confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        for cam, mask, ids in zip(cams, masks, classes, strict=True):
            order = np.arange(num_classes) if all_maps else np.array([0, *ids])
            scores = np.zeros((len(order), *mask.shape), dtype=cam.dtype)
            scores[ids if all_maps else slice(1, None)] = cam
            scores[0] = threshold
            predicted = order[scores.argmax(0)]
            counted = mask != 255
            pairs = mask[counted].astype(np.int64) * num_classes + predicted[counted]
            confusion += np.bincount(pairs, minlength=num_classes**2).reshape(confusion.shape)
        right = np.diag(confusion)
        with np.errstate(invalid="ignore"):  # 0 / 0: a class that does not occur
            found.append(np.nanmean(right / (confusion.sum(0) + confusion.sum(1) - right)))
    return np.array(found)
