"""From photos to class maps: reads each photo, puts those of one shape into a batch, and makes their maps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from acr_reg import Lattice, View, multi_view_cam, normalize_cam
from acr_reg.integrations.formats.photos import open_photo, photo_size
from acr_reg.integrations.jobs.reading import Failure, StopRun, failure_of

_TRIES = 3  # this many images must fail, and none succeed, before the run blames the caller's code
_BATCHES_WAITING = 4  # images of many shapes wait for their like, as many as this many batches hold

Cam = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Lattice]]
Maps = tuple[dict[int, npt.NDArray[Any]], tuple[int, int]]


class Photo(NamedTuple):
    """``image`` (bands, h, w) as the transform returned it, and the (H, W) of the photo."""

    image: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class PhotoReader:
    """Reads a photo by its ID. Workers get a copy."""

    files: Mapping[str, Path]
    transform: Callable[[Any], Any]
    takes: Literal["photo", "path"]

    def __call__(self, name: str) -> Photo | Failure:
        path = self.files[name]
        photo = open_photo(path) if self.takes == "photo" else None
        try:
            found = self.transform(path if photo is None else photo)
            image, size = found if photo is None and isinstance(found, tuple) and len(found) == 2 else (found, None)
            if not isinstance(image, Tensor) or image.ndim != 3:
                kind = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"type {type(image).__name__}"
                raise ValueError(f"The transform returned an image of {kind}. Return a tensor (bands, h, w).")
            self._refuse_cuda_in_worker(image.device.type != "cpu", f"it returned a tensor on {image.device}")
        except StopRun:
            raise
        except Exception as error:
            self._refuse_cuda_in_worker(isinstance(error, RuntimeError) and "CUDA" in str(error), str(error))
            return failure_of(error, "transform")
        if photo is not None:
            size = (photo.height, photo.width)
        elif size is None:
            size = (image.shape[1], image.shape[2])
            with suppress(OSError, ValueError):  # Pillow does not know the format
                size = photo_size(path)
        return Photo(image.detach(), (int(size[0]), int(size[1])))

    def _refuse_cuda_in_worker(self, used: bool, how: str) -> None:
        if used and get_worker_info() is not None:
            raise StopRun(
                f"The transform uses a GPU in a worker process: {how}. Return the image on the CPU and pass device=, "
                "or pass workers=0."
            )


class _Waiting(NamedTuple):
    name: str
    photo: Photo
    labels: Tensor


@dataclass
class BatchedCams:
    """Makes the maps of each photo from batches of photos of one shape."""

    cam: Cam
    labels: Mapping[str, npt.NDArray[Any]]
    views: Sequence[View]
    merge: Literal["sum", "max", "mean"]
    normalize: Literal["minmax", "max"]
    batch_size: int
    device: torch.device | None
    is_new_run: Callable[[], bool]
    successes: set[str] = field(default_factory=set)  # of "transform", "cam"
    failures: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, items: Iterator[tuple[str, Photo | Failure]]) -> Iterator[tuple[str, Maps | Failure]]:
        waiting: dict[Any, list[_Waiting]] = {}
        for name, photo in items:
            if isinstance(photo, Failure):
                self._count(name, photo)
                yield name, photo
                continue
            self.successes.add("transform")
            if photo.image.device.type == "cpu" and photo.image.is_shared():
                # Of a worker: while it waits it would hold an open file and a part of /dev/shm, which are scarce.
                photo = photo._replace(image=photo.image.clone())
            image = photo.image
            labels = torch.tensor(self.labels[name], device="cpu")  # a copy: numpy may forbid writing
            key = image.shape, image.dtype, image.device, labels.shape, labels.dtype
            batch = waiting.setdefault(key, [])
            batch.append(_Waiting(name, photo, labels))
            if sum(map(len, waiting.values())) > self.batch_size * _BATCHES_WAITING:
                key, batch = max(waiting.items(), key=lambda item: len(item[1]))
                yield from self._maps_of(waiting.pop(key))
            elif len(batch) == self.batch_size:
                yield from self._maps_of(waiting.pop(key))
        for batch in waiting.values():
            yield from self._maps_of(batch)

    def _maps_of(self, batch: list[_Waiting]) -> Iterator[tuple[str, Maps | Failure]]:
        try:
            made = self._run(batch)
        except StopRun:
            raise
        except Exception as error:
            if len(batch) == 1:
                failure = failure_of(error, "cam")
                self._count(batch[0].name, failure, error)
                yield batch[0].name, failure
                return
            alone = [each for one in batch for each in self._maps_of([one])]
            if not any(isinstance(result, Failure) for _, result in alone):
                warnings.warn(
                    f"cam failed on a batch of {len(batch)} images and not on each alone: {failure_of(error).text}. "
                    "Pass a smaller batch_size.",
                    stacklevel=2,
                )
            yield from alone
        else:
            self.successes.add("cam")
            for one, maps in zip(batch, made, strict=True):
                yield one.name, maps

    def _run(self, batch: list[_Waiting]) -> list[Maps]:
        images = torch.stack([one.photo.image for one in batch])
        images = images if self.device is None else images.to(self.device)
        labels = torch.stack([one.labels for one in batch])
        labels = (labels.float() if labels.dtype == torch.float64 else labels).to(images.device)  # MPS has no float64
        found = [self._checked(self.cam(view(images), labels), labels) for view in self.views]
        return [self._merged(found, images[i : i + 1], i, one) for i, one in enumerate(batch)]

    def _checked(self, found: Any, labels: Tensor) -> tuple[Tensor, Lattice | None]:
        count, classes = labels.shape
        maps, lattice = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if not isinstance(maps, Tensor):
            raise TypeError(
                f"cam returned a {type(maps).__name__}. Return maps ({count}, {classes}, h, w), as a GradientCam does, "
                "and not what the model returns."
            )
        if count > 1 and len(maps) != count:
            raise StopRun(
                f"cam returned maps of shape {tuple(maps.shape)} for a batch of {count} images. Return ({count}, "
                f"{classes}, h, w), or leave batch_size at 1."
            )
        if maps.ndim != 4 or maps.shape[:2] != labels.shape:
            raise ValueError(
                f"cam returned maps of shape {tuple(maps.shape)} for {count} images and {classes} classes. Return one "
                f"map per class: ({count}, {classes}, h, w)."
            )
        return maps.detach(), lattice

    def _merged(self, found: list[tuple[Tensor, Lattice | None]], image: Tensor, index: int, one: _Waiting) -> Maps:
        """The maps of the classes present, at the photo's own size."""
        numbers = torch.nonzero(one.labels > 0)[:, 0]
        views = iter([(maps[index : index + 1, numbers.to(maps.device)], lattice) for maps, lattice in found])

        def next_view(_: Tensor) -> Tensor | tuple[Tensor, Lattice]:
            maps, lattice = next(views)
            return maps if lattice is None else (maps, lattice)

        merged = multi_view_cam(next_view, image, self.views, self.merge, one.photo.size)
        bounded = normalize_cam(merged, self.normalize)[0].cpu().numpy()
        return dict(zip(numbers.tolist(), bounded, strict=True)), one.photo.size

    def _count(self, name: str, failure: Failure, error: Exception | None = None) -> None:
        """Ends the run if code of the caller fails for each of the first images."""
        if not failure.blame or failure.blame in self.successes:
            return
        failed = self.failures.setdefault(failure.blame, [])
        failed.append(name)
        if len(failed) == _TRIES and self.is_new_run():
            needed = "maps (B, C, h, w)" if failure.blame == "cam" else "a tensor (bands, h, w)"
            raise StopRun(
                f"{failure.blame} failed for each of the first images, {', '.join(failed)}: "
                f"{failure.text.rstrip('.')}. Nothing was written. Make it return {needed}, and run again."
            ) from error
