"""The comparison on a folder of photos: trains the upper half of a pretrained ViT-S/14 on image-level labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from acr_reg import (
    AllPairsConsistencyLoss,
    HorizontalFlip,
    capture_attention,
    class_token_gradient_cam,
    propagate_cam,
)
from acr_reg.demo.baselines import Sample, largest_class, location_prior
from acr_reg.demo.comparison import Plan, Report, Row, background_baselines, baseline_row, losses
from acr_reg.demo.photos.folder import PhotoFolder
from acr_reg.demo.photos.pretrained import MEAN, PATCH, STD, build, describe
from acr_reg.demo.scoring import Read, Reading, Truth, present_ids
from acr_reg.demo.train import Batch, Training, shuffled, train, with_grid

RAW, PROPAGATED = "raw CAM", "propagated CAM"

_AT_ONCE = 32  # photos in memory at once in full precision, outside training


@dataclass(frozen=True)
class PhotoSettings:
    """Weights are per query row. Class maps read the blocks from `start_layer` on, counted from the last.

    The weights come from a scouting run on other VOC photos (20 / 64 tokens). They were not tuned on the development
    photos of either set.
    """

    size: int = 112
    epochs: int = 4
    batch_size: int = 32
    frozen: int = 6
    rate: float = 1e-4
    head_rate: float = 1e-3
    activation_weight: float = 0.3
    affinity_weight: float = 0.3
    start_layer: int = -3
    train_images: int | None = None


def plan_photos(folder: PhotoFolder, weights: Path | None, settings: PhotoSettings, controls: bool) -> Plan:
    origin = describe(weights)
    return Plan(
        title=f"{folder.root.name} at {settings.size} px ({origin})",
        where=f"on {folder.root.name}",
        notes=(
            f"{folder.root.name} has {len(folder.numbers)} classes. Model: {origin}. Masks are used for scoring only.",
        ),
        names=folder.names,
        background=folder.background,
        settings=settings,
        conditions=losses(settings.activation_weight, settings.affinity_weight, 0.0, controls),
        start=lambda seed, report: PhotoTask(folder, weights, settings, seed, report),
    )


class PhotoTask:
    """A photo folder as a `Task`. The tokens of the frozen half, of both views, are computed once, at construction."""

    pretraining: Training | None = None

    def __init__(
        self, folder: PhotoFolder, weights: Path | None, settings: PhotoSettings, seed: int, report: Report
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.seed = seed
        self.background = folder.background
        self.grid = (settings.size // PATCH, settings.size // PATCH)
        torch.manual_seed(seed)
        self.lower, self._checkpoint = build(len(folder.numbers), settings.size, settings.frozen, weights)
        self._train_ids = some(folder.splits["train"], settings.train_images, seed)
        self._labels = folder.label_matrix(self._train_ids)
        self._tokens = self._lower_tokens(report)
        self._batch_size = min(settings.batch_size, len(self._train_ids))
        self.steps = settings.epochs * (len(self._train_ids) // self._batch_size)

    def _lower_tokens(self, report: Report) -> Tensor:
        """Tokens (2, photos, 1+N, D) of the photos and of their flips, in half precision."""
        flip = HorizontalFlip()
        parts = [self._train_ids[i : i + _AT_ONCE] for i in range(0, len(self._train_ids), _AT_ONCE)]
        advance = report("frozen blocks", len(parts))
        tokens = []
        for part in parts:
            images = load_photos(self.folder, part, self.settings.size)
            tokens.append(torch.stack([self.lower(images), self.lower(flip(images))]).half())
            advance()
        return torch.cat(tokens, dim=1)

    def fork(self) -> nn.Module:
        return copy.deepcopy(self._checkpoint)

    def train(self, model: nn.Module, acr: AllPairsConsistencyLoss | None, advance: Callable[[], None]) -> Training:
        settings = self.settings
        optimizer = make_optimizer(model, settings.rate, settings.head_rate)
        scheduler = CosineAnnealingLR(optimizer, self.steps)
        return train(model, self._batches(), optimizer, scheduler, acr, self.grid, advance=advance)

    def _batches(self) -> Iterator[Batch]:
        for chosen in shuffled(len(self._train_ids), self._batch_size, self.steps, self.seed):
            images, viewed = self._tokens[:, chosen].float()
            yield images, viewed, self._labels[chosen]

    def truths(self, split: str) -> list[Truth]:
        ids = self.folder.splits[split]
        parts = [ids[i : i + _AT_ONCE] for i in range(0, len(ids), _AT_ONCE)]
        return [
            Truth(
                load_photos(self.folder, part, self.settings.size),
                self.folder.label_matrix(part),
                [self.folder.mask(name) for name in part],
            )
            for part in parts
        ]

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[Read]:
        model.eval()
        with capture_attention(model) as attention:

            def read(images: Tensor, labels: Tensor) -> Reading:
                logits = model(self.lower(images))
                captured = with_grid(attention.take(), self.grid)
                cam = class_token_gradient_cam(logits, captured, labels, self.settings.start_layer)
                with torch.no_grad():
                    return Reading(logits, captured, {RAW: cam, PROPAGATED: propagate_cam(cam, captured)})

            yield read

    def baselines(self, split: str) -> list[Row]:
        if self.folder.background:
            samples = {name: self._samples(name) for name in ("dev", split)}
            return background_baselines(samples, split, self._labels, RAW)
        classes, shown, training = len(self.folder.names), self._samples(split), self._samples("train")
        largest = largest_class(shown, classes, training)
        prior = location_prior(shown, classes, training)
        return [
            baseline_row("largest present class", RAW, largest, largest),
            baseline_row("location prior", RAW, prior, prior),
        ]

    def _samples(self, split: str) -> list[Sample]:
        ids = self.folder.splits[split]
        present = [present_ids(labels, self.folder.background) for labels in self.folder.label_matrix(ids)]
        return [(self.folder.mask(name), found) for name, found in zip(ids, present, strict=True)]

    def pixels(self, images: Tensor) -> np.ndarray:
        return to_pixels(images)


def to_pixels(images: Tensor) -> np.ndarray:
    """Turns what :func:`load_photos` returned back into uint8 pixels (B,H,W,3)."""
    colours = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (colours.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def load_photos(folder: PhotoFolder, ids: Sequence[str], size: int) -> Tensor:
    """Photos (B,3,size,size), stretched to a square and normalised for the model."""
    photos = [np.asarray(folder.photo(name).resize((size, size), Image.Resampling.BICUBIC)) for name in ids]
    images = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def make_optimizer(model: nn.Module, rate: float, head_rate: float) -> torch.optim.Optimizer:
    """AdamW. The head is new and learns at its own rate."""
    is_head = {name: name.startswith("head.") for name, _ in model.named_parameters()}
    head = [parameter for name, parameter in model.named_parameters() if is_head[name]]
    body = [parameter for name, parameter in model.named_parameters() if not is_head[name]]
    return torch.optim.AdamW([{"params": body, "lr": rate}, {"params": head, "lr": head_rate}])


def some(ids: Sequence[str], count: int | None, seed: int) -> list[str]:
    """Draws `count` ids by the seed, or all of them if `count` is None or too large."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return [ids[i] for i in order[:count]]
