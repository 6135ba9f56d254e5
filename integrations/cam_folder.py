"""Writes the class maps of a list of images into a folder, in the format that the next stage reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from acr_reg import Identity, Lattice, View, multi_view_cam, normalize_cam
from acr_reg.integrations.formats import Format
from acr_reg.integrations.formats.save import ALPHAS
from acr_reg.integrations.jobs.folder import CamFolder, FolderReport, StopRun, fill

__all__ = ["FolderReport", "write_cams"]

_TRIES = 3  # this many images must fail, and none succeed, before the run blames `cam` itself


def write_cams(
    cam: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Lattice]],
    images: Iterable[str | os.PathLike[str]],
    labels: Mapping[str, npt.ArrayLike],
    folder: str | os.PathLike[str],
    transform: Callable[[Image.Image], Tensor],
    format: Format = "psa",
    *,
    views: Sequence[View] = (Identity(),),
    merge: Literal["sum", "max", "mean"] = "sum",
    normalize: Literal["minmax", "max"] = "minmax",
    alphas: tuple[float, float] = ALPHAS,
    overwrite: bool = False,
    progress: bool = True,
) -> FolderReport:
    """Write the class maps of every image, at its own size and in [0, 1], to ``folder/ID.npy``. ID is the image's file
    name without its ending.

    An interrupted run can be started again: images whose files exist are passed over, and a file is either
    whole or absent. An image is skipped, and named on standard error, if it cannot be read, or if its maps cannot be
    made or hold NaN. The run ends with a summary there, and the report names the skipped images. Progress is a bar if
    standard error is a terminal and rich is installed, else a line every ten seconds.

    Args:
        cam: takes an image (1, 3, h, w) and its labels (1, C), both on the transform's device, and returns the maps
            (1, C, h', w'), not normalised: a :class:`~acr_reg.GradientCam` or your own function. Maps of absent
            classes are left out.
        images: paths of the photos.
        labels: from each ID to its (C,) labels, > 0 for the classes present, as in PSA's ``cls_labels.npy``.
        folder: made if it does not exist. ``psa_crf`` makes two, ``folder_4`` and ``folder_32``, named after the
            alphas.
        transform: turns the photo (RGB) into a tensor (3, h, w) on the model's device. It may resize the photo, but not
            crop or pad it: the maps are stretched over the whole photo.
        format: one of :data:`~acr_reg.integrations.formats.FORMATS`.
        views, merge: as for :func:`~acr_reg.multi_view_cam`, which merges them at the size of the photo. The default is
            the image alone, which is right for a GradientCam: it merges its own views.
        normalize: "minmax" as in MCTformer and ACR, or "max" as in PSA and IRN, after the maps are enlarged.
        alphas: for ``psa_crf`` only, as for :func:`~acr_reg.integrations.formats.save_crf_pair`. No CRF is run.
        overwrite: make maps again whose files exist.
        progress: show progress. Failures are written in any case.

    Raises:
        ValueError: an image has no labels, two images have one ID, or the folder holds files of another format.
        RuntimeError: ``cam`` fails for each of the first images, and the folder is empty.

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
    paths = [Path(image) for image in images]
    repeated = [name for name, count in Counter(path.stem for path in paths).items() if count > 1]
    if repeated:
        raise ValueError(f"Several images are named {repeated[:3]}. Write images of the same name to two folders.")
    files = {path.stem: path for path in paths}
    missing = [name for name in files if name not in labels]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images have no labels, such as {missing[:3]}. Key the labels by the file "
            "name without its ending."
        )
    target = CamFolder(Path(folder), format, alphas)
    failures: list[str] = []
    made = 0

    def maps_of(name: str) -> tuple[dict[int, npt.NDArray[np.float32]], tuple[int, int]]:
        nonlocal made
        with Image.open(files[name]) as photo:
            size = (photo.height, photo.width)
            image = transform(photo.convert("RGB"))[None]
        present = torch.as_tensor(labels[name], device=image.device).reshape(1, -1)
        try:
            maps = _maps(cam, image, present, size, views, merge)
        except Exception as error:
            failures.append(name)
            if made == 0 and len(failures) == _TRIES and target.is_empty():
                raise StopRun(
                    f"cam failed for each of the first images, {', '.join(failures)}: {error!r}. Nothing was written. "
                    "Make it return maps (1, C, h, w), and run again."
                ) from error
            raise
        made += 1
        numbers = torch.nonzero(present[0] > 0)[:, 0]
        bounded = normalize_cam(maps[:, numbers], normalize)[0]
        return dict(zip(numbers.tolist(), bounded.cpu().numpy(), strict=True)), size

    return fill(target, list(files), maps_of, "Class maps", overwrite, progress)


def _maps(
    cam: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Lattice]],
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    views: Sequence[View],
    merge: Literal["sum", "max", "mean"],
) -> Tensor:
    """(1, C, H, W) at the size of the photo."""
    maps = multi_view_cam(lambda view: cam(view, labels), image, views, merge, size).detach()
    if maps.shape[1] != labels.shape[1]:
        raise ValueError(
            f"cam returned maps of shape {tuple(maps.shape)} for {labels.shape[1]} classes. Return one map per class: "
            f"(1, {labels.shape[1]}, h, w)."
        )
    return maps
