"""Writes the class maps of a list of images into a folder, in the format that the next stage reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from acr_reg import GradientCam, Identity, Lattice, View
from acr_reg.integrations.formats import Format
from acr_reg.integrations.formats.image_labels import labels_of, load_image_labels
from acr_reg.integrations.formats.save import ALPHAS
from acr_reg.integrations.jobs.batches import BatchedCams, PhotoReader
from acr_reg.integrations.jobs.folder import CamFolder, FolderReport, fill
from acr_reg.integrations.jobs.shares import process_device

__all__ = ["FolderReport", "process_device", "write_cams"]


def write_cams(
    cam: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Lattice]],
    images: Iterable[str | os.PathLike[str]],
    labels: Mapping[Any, npt.ArrayLike] | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    transform: Callable[[Image.Image], Tensor] | Callable[[Path], Tensor | tuple[Tensor, tuple[int, int]]],
    format: Format = "psa",
    *,
    views: Sequence[View] = (Identity(),),
    merge: Literal["sum", "max", "mean"] = "sum",
    normalize: Literal["minmax", "max"] = "minmax",
    alphas: tuple[float, float] = ALPHAS,
    transform_takes: Literal["photo", "path"] = "photo",
    device: str | torch.device | None = None,
    batch_size: int = 1,
    workers: int = 0,
    share: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> FolderReport:
    """Write the class maps of many images: one file ``folder/ID.npy`` per image, at the photo's own size and in [0, 1].
    ID is the image's file name without its ending.

    You can restart an interrupted run: it skips images whose files are whole. A file is always complete. An image that
    cannot be read, or whose maps fail or hold NaN, is skipped and named on standard error; the report lists all of
    them. Progress is a bar if standard error is a terminal and rich is installed, else a line every ten seconds.

    Several processes share the images. Under ``torchrun``, or in a process group, call it in each process with the same
    images; every process returns the report of all. In a job array set RANK (from 0) and WORLD_SIZE; each job reports
    its own share. A later run, with any number of processes, makes the files that are missing.

    Args:
        cam: makes the maps: a :class:`~acr_reg.GradientCam`, or your function of images (B, bands, h, w) and labels
            (B, C) that returns maps (B, C, h', w'), not normalised. Only maps of present classes are written. For
            multi-scale maps, make the GradientCam with ``scales=``. For a model with one class token per class, make it
            with ``class_tokens=``.
        images: paths of the photos.
        labels: a dict from ID to labels (C,), > 0 for the classes present, or the path of a file of them; see
            :func:`~acr_reg.integrations.formats.load_image_labels`. IRN's integer keys are understood.
        folder: made if it does not exist. ``psa_crf`` makes two, ``folder_4`` and ``folder_32``, named after the
            alphas.
        transform: turns a photo into a tensor (bands, h, w). The photo is upright, in RGB of 8 bits, as
            :func:`~acr_reg.integrations.formats.open_photo` returns it. The transform may resize it but must not crop
            or pad it, because the maps are stretched over the whole photo.
        format: one of :data:`~acr_reg.integrations.formats.FORMATS`.
        views, merge: as for :func:`~acr_reg.multi_view_cam`, merged at the size of the photo. The default, the image
            alone, is right for a GradientCam, which merges its own views.
        normalize: "minmax" as in MCTformer and ACR, or "max" as in PSA and IRN, after the maps are enlarged.
        alphas: for ``psa_crf`` only, as for :func:`~acr_reg.integrations.formats.save_crf_pair`. No CRF runs.
        transform_takes: "photo", or "path" for a transform that reads the image itself, with any number of bands. It
            returns the tensor, or (tensor, (H, W) of the photo). Without this size, Pillow reads it from the file; if
            Pillow cannot, it is (h, w) of the tensor.
        device: where ``cam`` gets images and labels. By default the device of the GradientCam's model; for another
            ``cam``, images stay where the transform leaves them. :func:`process_device` is this process's own GPU.
        batch_size: images per call of ``cam``. Images of one shape form a batch, and each map still gets the size of
            its own photo. If a batch fails, its images are tried one by one.
        workers: processes that open and transform photos beside the model, as of a DataLoader; 0 uses this process.
            They have no GPU, so the transform returns CPU tensors. Where workers are spawned, the transform must be a
            function of a module.
        share: False makes every image in this process, for instance if only the first process of a training script
            calls this.
        overwrite: write maps again if their files exist.
        progress: show progress. Failures are written in any case.

    Raises:
        ValueError: an image has no labels, two images have the same ID, the folder holds files of another format, RANK
            and WORLD_SIZE do not fit, or processes got different images.
        OSError: a file cannot be written, as on a full disk. Its ``report`` says what was done until then.
        RuntimeError: ``cam`` or ``transform`` fails for each of the first images while the folder is empty, ``cam``
            cannot take batches, a worker cannot go on, or other processes did not start or ended early.

    >>> import numpy as np, torch
    >>> from PIL import Image
    >>> Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save("2007_000032.png")
    >>> report = write_cams(
    ...     lambda image, labels: torch.rand(1, 20, 4, 4),
    ...     images=["2007_000032.png"],
    ...     labels={"2007_000032": np.eye(20)[14]},
    ...     folder="cams",
    ...     transform=lambda photo: torch.from_numpy(np.array(photo.resize((64, 64)))).permute(2, 0, 1) / 255,
    ...     progress=False,
    ... )
    >>> from acr_reg.integrations.formats import load_cams
    >>> report.written, load_cams("cams/2007_000032.npy")[14].shape
    (['2007_000032'], (30, 40))
    """
    if normalize not in ("minmax", "max"):
        raise ValueError(f'normalize={normalize!r} is unknown. Choose "minmax" or "max".')
    if transform_takes not in ("photo", "path"):
        raise ValueError(f'transform_takes={transform_takes!r} is unknown. Choose "photo" or "path".')
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is less than 1. Pass the number of images for one call of cam.")
    paths = [Path(image) for image in images]
    repeated = [name for name, count in Counter(path.stem for path in paths).items() if count > 1]
    if repeated:
        raise ValueError(f"Several images are named {repeated[:3]}. Write images of the same name to two folders.")
    files = {path.stem: path for path in paths}
    target = CamFolder(Path(folder), format, alphas)
    device = _device_of(cam) if device is None else torch.device(device)
    labels = load_image_labels(labels) if isinstance(labels, (str, os.PathLike)) else labels
    make = BatchedCams(cam, _found(labels, files), views, merge, normalize, batch_size, device, target.is_empty)
    read = PhotoReader(files, transform, transform_takes)
    return fill(target, list(files), read, "Class maps", overwrite, progress, make, workers=workers, share=share)


def _found(labels: Mapping[Any, npt.ArrayLike], names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """The labels of each image, by its ID."""
    found, missing, why = {}, [], ""
    for name in names:
        try:
            found[name] = labels_of(labels, name)
        except KeyError as error:
            missing.append(name)
            why = why or str(error.args[0])
    if missing:
        raise ValueError(f"{len(missing)} of {len(found) + len(missing)} images lack labels: {missing[:3]}. {why}")
    return found


def _device_of(cam: object) -> torch.device | None:
    """The device of a GradientCam's model. None leaves the images where the transform puts them."""
    parameter = next(cam.model.parameters(), None) if isinstance(cam, GradientCam) else None
    return None if parameter is None else parameter.device
