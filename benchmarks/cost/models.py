"""The model, images and labels of every cost benchmark: all variants get the same weights and pixels."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from acr_reg.losses.blockwise import SMALL_MEGABYTES

PATCH = 16
HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16}


@dataclass(frozen=True)
class Setting:
    """A timm ViT with random weights and no dropout, and random images."""

    model: str = "small"
    size: int = 384
    batch: int = 1
    depth: int = 12
    classes: int = 20
    present: int = 2  # classes of each image
    seed: int = 0

    @property
    def tokens(self) -> int:
        """The number of patches of an image."""
        return (self.size // PATCH) ** 2

    @property
    def map_megabytes(self) -> float:
        """The size of all attention maps of both views in float32."""
        return 2 * self.depth * self.batch * HEADS[self.model] * (self.tokens + 1) ** 2 * 4 / 2**20

    @property
    def default(self) -> str:
        """The variant that the loss chooses by itself."""
        return "dense" if self.map_megabytes <= SMALL_MEGABYTES else "blockwise"

    def __str__(self) -> str:
        return f"ViT-{self.model[0].upper()} {self.size} px, batch {self.batch}"


def add_settings(parser: ArgumentParser) -> None:
    """Declare the options that :func:`settings` reads."""
    parser.add_argument("--models", nargs="+", choices=HEADS, default=["small"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[384])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])


def settings(args: Namespace) -> Iterator[Setting]:
    for model in args.models:
        for size in args.sizes:
            for batch in args.batches:
                yield Setting(model, size, batch)


def build_model(setting: Setting, device: str = "cpu") -> VisionTransformer:
    torch.manual_seed(setting.seed)
    name = f"vit_{setting.model}_patch{PATCH}_224"
    with torch.device(device):  # drawing the weights of a ViT-L on the CPU takes seconds
        model = timm.create_model(name, img_size=setting.size, num_classes=setting.classes, depth=setting.depth)
    return model.train()


def build_batch(setting: Setting, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B, C), whose classes differ from image to image."""
    generator = torch.Generator().manual_seed(setting.seed)
    images = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator)
    labels = torch.zeros(setting.batch, setting.classes)
    for image in range(setting.batch):
        labels[image, torch.randperm(setting.classes, generator=generator)[: setting.present]] = 1
    return images.to(device), labels.to(device)
