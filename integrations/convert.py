"""Converts a folder of class maps into another format. Readers of the wrong format score mIoU 0 without an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from acr_reg.integrations.formats import Format, Maps, check_format, load_cams
from acr_reg.integrations.formats.save import ALPHAS
from acr_reg.integrations.jobs.folder import CamFolder, FolderReport, fill

__all__ = ["convert_cams"]

CAM_SUFFIXES = (".npy", ".npz")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


def convert_cams(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: Format,
    source_format: Format | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    alphas: tuple[float, float] = ALPHAS,
    overwrite: bool = False,
    progress: bool = True,
) -> FolderReport:
    """Read every .npy and .npz file of one folder, and write it under the same name to another folder in ``format``.

    Files that exist in the target are passed over, and a file is either whole or absent. A file that cannot be read or
    written is named on standard error and skipped; the report names it too. Maps keep their values, except for what
    :func:`~acr_reg.integrations.formats.save_cams` says of each format. A source of ``psa_crf`` loses its background.

    Args:
        source: a folder. Of a CRF pair, give one of the two.
        target: another folder, made if it does not exist. ``psa_crf`` makes two, ``target_4`` and ``target_32``, named
            after the alphas.
        format: one of :data:`~acr_reg.integrations.formats.FORMATS`.
        source_format: by default it is found from each file. A file whose format is not clear fails.
        images: the folder of the photos, to resize the maps to their sizes (needs pillow). By default the maps keep
            their size. ``irn``, ``clip_es`` and ``psa_crf`` need ``images`` for images without a class.
        alphas: as for :func:`~acr_reg.integrations.formats.save_crf_pair`. No CRF is run.
        overwrite: convert files again that exist.
        progress: show progress. Failures are written in any case.

    Raises:
        ValueError: the source holds no such files or is the target, or the target holds files of another format.

    >>> import os, numpy as np
    >>> from acr_reg.integrations.formats import load_cams, save_cams
    >>> os.mkdir("psa")
    >>> save_cams("psa/2007_000032.npy", {14: np.eye(6, 8)})
    >>> convert_cams("psa", "irn", "irn", progress=False).written
    ['2007_000032']
    >>> load_cams("irn/2007_000032.npy", "irn")[14].shape
    (6, 8)
    """
    source = Path(source)
    check_format(source_format)
    folder = CamFolder(Path(target), format, alphas)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder. Give the folder that holds the .npy or .npz files.")
    if any(source.resolve() == path.resolve() for path in folder.folders):
        raise ValueError(f"{source} is both source and target. Name another target folder.")
    files = {path.stem: path for path in sorted(source.iterdir()) if path.suffix in CAM_SUFFIXES and path.is_file()}
    if not files:
        raise ValueError(f"There are no .npy or .npz files in {source}. Give the folder that holds one per image.")

    sizes = None if images is None else _sizes_of_photos(Path(images))

    def maps_of(name: str) -> tuple[Maps, tuple[int, int] | None]:
        return load_cams(files[name], source_format), None if sizes is None else sizes(name)

    return fill(folder, list(files), maps_of, f"To {format}", overwrite, progress)


def _sizes_of_photos(images: Path) -> Callable[[str], tuple[int, int]]:
    """The function from an ID to the (H, W) of its photo."""
    from PIL import Image  # an extra, which no other conversion needs

    def size(name: str) -> tuple[int, int]:
        found = [path for suffix in IMAGE_SUFFIXES if (path := images / f"{name}{suffix}").is_file()]
        if not found:
            raise ValueError(f"There is no photo {name}.jpg or {name}.png in {images}. Give the folder of the photos.")
        with Image.open(found[0]) as photo:
            return photo.height, photo.width

    return size
