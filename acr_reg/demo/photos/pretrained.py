"""The pretrained model for photos: timm's ViT-S/14, split into frozen lower blocks and an upper half that trains."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg.errors import CommandError

NAME = "vit_small_patch14_dinov2"
PATCH = 14  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What is known about weights, by the SHA-256 of their file.
KNOWN_WEIGHTS = {
    "b732d1ee7bdd2d4b95f8deb17f95b9e9010678c23a5a90db61b53dcd7551fdb4": "saliency-tuned weights, not image-level WSSS",
}


class UpperHalf(nn.Module):
    """Maps tokens (B,1+N,D) of the lower blocks to logits (B,C)."""

    def __init__(self, vit: Any, frozen: int) -> None:
        super().__init__()
        self.num_prefix_tokens = 1
        self.blocks = vit.blocks[frozen:]
        self.norm = vit.norm
        self.head = vit.head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


class LowerHalf(nn.Module):
    """Maps images (B,3,H,W) to tokens (B,1+N,D). It is never trained."""

    def __init__(self, vit: Any, frozen: int) -> None:
        super().__init__()
        self.patch_embed = vit.patch_embed
        self.cls_token = vit.cls_token
        self.pos_embed = vit.pos_embed
        self.blocks = vit.blocks[:frozen]
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """`positions` (1,1+N,D) replace the model's own."""
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return self.blocks(tokens + (self.pos_embed if positions is None else positions))


def build(num_classes: int, size: int, frozen: int, weights: Path | None) -> tuple[LowerHalf, UpperHalf]:
    """Both halves, for images of `size` x `size` pixels. The head is new, drawn from torch's global generator."""
    if size % PATCH or size < PATCH:
        raise CommandError(
            f"--size is {size}. It must be a multiple of {PATCH}: try {max(1, round(size / PATCH)) * PATCH}."
        )
    vit = timm.create_model(NAME, pretrained=False, img_size=size, num_classes=num_classes)
    if not 0 < frozen < len(vit.blocks):
        raise CommandError(
            f"--frozen is {frozen}. Give 1 to {len(vit.blocks) - 1}: the model has {len(vit.blocks)} blocks."
        )
    state = load_weights(weights) if weights is not None else download_weights()
    state["pos_embed"] = resize_positions(state["pos_embed"], size // PATCH)
    missing, unexpected = vit.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith("head.")]
    if missing or unexpected:
        raise CommandError(
            f"The weights do not fit timm's {NAME}. Missing: {missing[:3]}. Unexpected: {list(unexpected)[:3]}. "
            "Give weights of that model by --weights FILE."
        )
    return LowerHalf(vit, frozen), UpperHalf(vit, frozen)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads an .npz of arrays or a torch file of tensors, under timm's names, as float32."""
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file) as arrays:
                state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float() for name, tensor in state.items()}
    except Exception as error:  # a damaged or hostile file may fail anywhere in the decoding
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CommandError:
    return CommandError(
        f"--weights {path} cannot be read ({type(error).__name__}). Give an .npz or torch file of tensors."
    )


def download_weights() -> dict[str, Tensor]:
    try:
        return timm.create_model(NAME, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # the hub raises whatever its network stack does
        raise CommandError(
            f"The weights of {NAME} could not be downloaded ({type(error).__name__}). "
            "Connect to the network, or give a file by --weights FILE."
        ) from error


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resamples a position table (1,1+n*n,D) to side x side patches: plain bicubic, as these weights were trained."""
    first, table = positions[:, :1], positions[:, 1:]
    old = round(table.shape[1] ** 0.5)
    if old == side:
        return positions
    table = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, table.flatten(2).transpose(1, 2)], dim=1)


def describe(weights: Path | None) -> str:
    """What is known about the origin of the weights. It accompanies every result."""
    if weights is None:
        return f"timm's {NAME}"
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise unreadable(weights, error) from error
    return KNOWN_WEIGHTS.get(digest, f"weights of {weights.name}, which may have seen masks")
