"""Carries a folder of class maps from one format into another: readers of the wrong one score mIoU 0 in silence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from acr_reg.integrations._folder import ALPHAS, CamFolder, FolderReport, fill
from acr_reg.integrations.formats import Format, Maps, check_format, load_cams

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
    """Read every .npy and .npz of one folder and write it, under the same name, to another in ``format``.

    Files that are there are passed over, a file is whole or not there, and one that cannot be read or written is named
    on standard error and skipped; the report says which. Maps keep their values, but for what
    :func:`~acr_reg.integrations.formats.save_cams` says of each format, and ``psa_crf`` read loses its background.

    Args:
        source: a folder; of a CRF pair one of the two.
        target: another folder, made if need be. For ``psa_crf`` two, named ``target_4`` and ``target_32`` after the
            alphas.
        format: of :data:`~acr_reg.integrations.formats.FORMATS`.
        source_format: by default each file says it itself, and where it cannot be told that file fails.
        images: a folder with the photos, whose sizes the maps are resized to. Needs pillow. By default the maps have
            the size of their image; ``irn``, ``clip_es`` and ``psa_crf`` need it for images without a class.
        alphas: as for :func:`~acr_reg.integrations.formats.save_crf_pair`. No CRF is run.
        overwrite: convert again what is there.
        progress: show it. Failures are told in any case.

    Raises:
        ValueError: the source has no such files, is the target, or the target holds files of another format.

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
        raise ValueError(f"{source} is not a folder; expected one of .npy or .npz files; give the folder itself")
    if any(source.resolve() == path.resolve() for path in folder.folders):
        raise ValueError(f"found {source} as source and target; expected two folders; name another target")
    files = {path.stem: path for path in sorted(source.iterdir()) if path.suffix in CAM_SUFFIXES and path.is_file()}
    if not files:
        raise ValueError(f"found no .npy or .npz files in {source}; expected one an image; give the folder itself")

    sizes = None if images is None else _sizes_of_photos(Path(images))

    def maps_of(name: str) -> tuple[Maps, tuple[int, int] | None]:
        return load_cams(files[name], source_format), None if sizes is None else sizes(name)

    return fill(folder, list(files), maps_of, f"To {format}", overwrite, progress)


def _sizes_of_photos(images: Path) -> Callable[[str], tuple[int, int]]:
    """Of an id, the (H, W) of its photo."""
    from PIL import Image  # an extra, which no other conversion needs

    def size(name: str) -> tuple[int, int]:
        found = [path for suffix in IMAGE_SUFFIXES if (path := images / f"{name}{suffix}").is_file()]
        if not found:
            raise ValueError(f"found no image {name} in {images}; expected {name}.jpg or .png; give the photos' folder")
        with Image.open(found[0]) as photo:
            return photo.height, photo.width

    return size
