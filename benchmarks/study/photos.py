"""The photos of a set: labels, masks, and the frozen blocks' tokens of the photos and of their flips, which are
computed once and kept on disk in half precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acr_reg import HorizontalFlip, View
from acr_reg.demo.photos.folder import PhotoFolder, open_folder
from acr_reg.demo.photos.pretrained import NAME, PATCH, LowerHalf, UpperHalf, build, describe
from acr_reg.demo.photos.task import load_photos
from acr_reg.demo.record import write_json
from acr_reg.demo.train import shuffled
from acr_reg.errors import CommandError
from acr_reg.integrations.formats.write import replacing
from benchmarks.study.settings import SETS, Setting, StudyError
from benchmarks.study.views import draws_views

_AT_ONCE = 32  # photos in memory at full precision, except in training


@dataclass(frozen=True)
class Places:
    """Folders and files on this machine. ``cache`` holds tokens and trained networks, which can be made again."""

    data: Path
    weights: Path
    cache: Path


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens (B,1+N,D) of photos and of their ``view``, both grids, and labels (B,C)."""

    tokens: Tensor
    viewed: Tensor
    view: View
    labels: Tensor
    grid: tuple[int, int]
    viewed_grid: tuple[int, int]


class Photos:
    """One set at one size; the first ``frozen`` blocks never train."""

    def __init__(self, photos: str, size: int, frozen: int, places: Places) -> None:
        self.name, self.size, self.frozen, self.places = photos, size, frozen, places
        try:
            chosen = SETS[photos].classes
            self.folder: PhotoFolder = open_folder(places.data / SETS[photos].folder, chosen)
            self.origin = describe(places.weights)
        except (CommandError, OSError) as error:
            said = str(error).rstrip(".")
            raise StudyError(f"{said}. Give the folder of photo sets by --data or ACR_REG_DATA.") from error
        self.grid = (size // PATCH, size // PATCH)
        self._digest = hashlib.sha256(places.weights.read_bytes()).hexdigest()
        self.lower = cache(self._make_lower)

    @property
    def classes(self) -> int:
        return len(self.folder.numbers)

    def upper(self, seed: int) -> UpperHalf:
        """A new copy of the trained blocks, with a head drawn by ``seed``."""
        torch.manual_seed(seed)
        return build(self.classes, self.size, self.frozen, self.places.weights)[1]

    def _make_lower(self, size: int) -> LowerHalf:
        return build(1, size, self.frozen, self.places.weights)[0]

    def labels(self, split: str) -> Tensor:
        return self.folder.label_matrix(self.folder.splits[split])

    def masks(self, split: str) -> list[np.ndarray]:
        return [self.folder.mask(name) for name in self.folder.splits[split]]

    def present(self, split: str) -> list[list[int]]:
        """The mask ids of the classes in each photo's label."""
        first = int(self.folder.background)
        return [(row.nonzero()[:, 0] + first).tolist() for row in self.labels(split)]

    def images(self, split: str, chosen: Tensor) -> Tensor:
        """(B,3,size,size), normalised."""
        return load_photos(self.folder, [self.folder.splits[split][i] for i in chosen.tolist()], self.size)

    @cached_property
    def _train_images(self) -> Tensor:
        """In half precision; every step makes random views of them."""
        parts = torch.arange(len(self.folder.splits["train"])).split(_AT_ONCE)
        return torch.cat([self.images("train", part).half() for part in parts])

    # ------------------------------------------------------------ tokens of the frozen blocks

    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B,1+N,D) of square images (B,3,H,W), whose size is any multiple of the patch."""
        return self.lower(images.shape[-1])(images)

    def tokens(self, split: str) -> np.ndarray:
        """(2, photos, 1+N, D) float16, on disk: the tokens of the photos and of their flips."""
        key = self.token_key(split)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self.places.cache / "tokens" / f"{self.name}-{split}-{self.size}px-{name}.npy"
        if not path.exists():
            self._write_tokens(path, split, key)
        return np.load(path, mmap_mode="r")

    def token_key(self, split: str) -> dict[str, Any]:
        """All that the tokens depend on, except the pixels of the photos."""
        ids = hashlib.sha256("\n".join(self.folder.splits[split]).encode()).hexdigest()
        return {
            "model": NAME,
            "weights": self._digest,
            "photos": ids,
            "size": self.size,
            "views": ["Identity()", repr(HorizontalFlip())],
            "blocks": self.frozen,
        }

    def _write_tokens(self, path: Path, split: str, key: dict[str, Any]) -> None:
        flip, parts = HorizontalFlip(), torch.arange(len(self.folder.splits[split])).split(_AT_ONCE)
        found = []
        for part in parts:
            images = self.images(split, part)
            found.append(torch.stack([self.encode(images), self.encode(flip(images))]).half().numpy())
        write_json(path.with_suffix(".json"), key)  # makes the folder
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, np.concatenate(found, axis=1))

    # ------------------------------------------------------------ batches

    def steps(self, setting: Setting) -> int:
        count = len(self.folder.splits["train"])
        return setting.epochs * (count // min(setting.batch_size, count))

    def batches(self, setting: Setting, seed: int) -> Iterator[Batch]:
        """The same photos and views in every condition. The flip's tokens are cached; those of random views are
        computed as the views are drawn."""
        count = len(self.folder.splits["train"])
        tokens, labels = self.tokens("train"), self.labels("train")
        drawn = draws_views(setting.view, self.size)
        generator = torch.Generator().manual_seed(seed)
        for chosen in shuffled(count, min(setting.batch_size, count), self.steps(setting), seed):
            rows = chosen.numpy()
            own = torch.from_numpy(tokens[0][rows]).float()
            if drawn is None:
                view: View = HorizontalFlip()
                other = torch.from_numpy(tokens[1][rows]).float()
            else:
                images = self._train_images[chosen].float()
                view = drawn(images, generator)
                other = self.encode(view(images))
            side = round((other.shape[1] - 1) ** 0.5)
            yield Batch(own, other, view, labels[chosen], self.grid, (side, side))
