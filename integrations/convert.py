"""Converts a folder of class maps into another format or into pseudo labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from acr_reg.errors import some
from acr_reg.integrations.formats import Format, Maps, check_format, load_cams
from acr_reg.integrations.formats.files import CAM_SUFFIXES, IMAGE_SUFFIXES, files_by_id, unreadable
from acr_reg.integrations.formats.labels import LabelRule, pseudo_labels
from acr_reg.integrations.formats.save import ALPHAS
from acr_reg.integrations.jobs.folder import CamFolder, FolderReport, fill
from acr_reg.integrations.jobs.progress import show_progress
from acr_reg.integrations.jobs.shares import Share, share_of_run
from acr_reg.metrics import CamMeanIoU, CamScores

__all__ = ["convert_cams", "convert_to_labels", "score_dev_list"]

SETTINGS = "acr_reg labels"  # the text in a PNG that names the rule it was made by


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
    workers: int = 0,
    share: bool = True,
) -> FolderReport:
    """Convert a folder of class maps into ``format``. Each .npy or .npz file keeps its name in another folder.

    You can restart an interrupted run: it skips whole files in the target. A file is always complete. A file that
    cannot be read or written is skipped and named on standard error and in the report. Maps keep their values, with
    the exceptions that :func:`~acr_reg.integrations.formats.save_cams` lists for each format. Maps from ``psa_crf``
    lose their background.

    Args:
        source: the folder of the maps. ``psa_crf`` has two folders; give one of them.
        target: another folder, made if it does not exist. ``psa_crf`` makes two, ``target_4`` and ``target_32``, named
            after the alphas.
        format: one of :data:`~acr_reg.integrations.formats.FORMATS`.
        source_format: the format of the source. By default it is found from each file; a file of unclear format fails.
        images: the folder of the photos (ID.jpg, ID.png and so on). The maps are resized to the size of the upright
            photo, turned by its EXIF orientation (needs pillow). By default the maps keep their size. ``irn``,
            ``clip_es`` and ``psa_crf`` need ``images`` for images without a class.
        alphas: as for :func:`~acr_reg.integrations.formats.save_crf_pair`. No CRF runs.
        overwrite: convert files again that exist in the target.
        progress: show progress. Failures are written in any case.
        workers: processes that read and resize the maps. 0 uses this process.
        share: under torchrun, or in a job array with RANK and WORLD_SIZE, each process converts its share. Call it in
            each process with the same arguments. Every process returns the report of all; in a job array, each job
            reports its own share. False converts everything in this process.

    Raises:
        ValueError: the source has no such files or holds an image twice, source and target are the same folder, or the
            target holds files of another format, or of another size than their photos.
        OSError: a file cannot be written, as on a full disk. Its ``report`` says what was done until then.
        RuntimeError: other processes of the run did not call this or ended with an error.

    >>> import os, numpy as np
    >>> from acr_reg.integrations.formats import load_cams, save_cams
    >>> os.mkdir("psa")
    >>> save_cams("psa/2007_000032.npy", {14: np.eye(6, 8)})
    >>> convert_cams("psa", "irn", "irn", progress=False).written
    ['2007_000032']
    >>> load_cams("irn/2007_000032.npy", "irn")[14].shape
    (6, 8)
    """
    folder = CamFolder(Path(target), format, alphas)
    maps_of = _source_of(source, source_format, images, folder.folders)
    return _fill(folder, maps_of, f"To {format}", overwrite, progress, workers, share)


def convert_to_labels(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    source_format: Format | None = None,
    *,
    threshold: float | None = None,
    ignore_between: tuple[float, float] | None = None,
    alphas: tuple[float, float] | None = None,
    background: bool = True,
    images: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    workers: int = 0,
    share: bool = True,
) -> FolderReport:
    """Make pseudo labels from the class maps of one folder: one palette PNG for each .npy or .npz file.

    Files are skipped, written and reported as in :func:`convert_cams`. Each PNG holds its rule as text, so that a
    restarted run cannot mix labels of two rules.

    Args:
        source, source_format, overwrite, progress, workers, share: as for :func:`convert_cams`.
        target: another folder, made if it does not exist.
        threshold, ignore_between, alphas, background: the rule, as for
            :func:`~acr_reg.integrations.formats.labels.pseudo_labels`. :func:`score_dev_list` finds the best threshold.
        images: as for :func:`convert_cams`, but maps are resized as ``evaluate --resize`` does. Images without a class
            need it; their PNGs are all background.

    Raises:
        ValueError: the source has no such files, the target is the source or ``images``, or the rule is wrong. Or the
            target holds PNG files that another rule or program made and that ``overwrite`` does not replace.
        RuntimeError: as for :func:`convert_cams`.

    >>> import os, numpy as np
    >>> from PIL import Image
    >>> from acr_reg.integrations.formats import save_cams
    >>> os.mkdir("cams")
    >>> save_cams("cams/2007_000032.npy", {14: np.array([[0.1, 0.4, 0.9]])})
    >>> convert_to_labels("cams", "labels", ignore_between=(0.3, 0.6), progress=False).written
    ['2007_000032']
    >>> np.asarray(Image.open("labels/2007_000032.png")).tolist()
    [[0, 255, 15]]
    """
    folder = LabelFolder(Path(target), LabelRule(threshold, ignore_between, alphas, background))
    maps_of = _source_of(source, source_format, images, folder.folders, like_evaluate=True)
    folder.check_others(maps_of.files)
    return _fill(folder, maps_of, "To labels", overwrite, progress, workers, share)


def score_dev_list(
    source: str | os.PathLike[str],
    dev_list: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    num_classes: int,
    source_format: Format | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    progress: bool = True,
    workers: int = 0,
    share: bool = True,
) -> CamScores:
    """Score the listed images at every threshold, as ``evaluate`` does. Pass the ``best_threshold`` of the result to
    :func:`convert_to_labels`.

    Under torchrun each process scores its share, and every process returns the scores of the whole list. In a job
    array, whose jobs do not exchange counts, each job scores the whole list.

    Args:
        source, source_format, images, workers, share: as for :func:`convert_to_labels`.
        dev_list: a list of images, one a line, as for ``evaluate``. It chooses the threshold, so do not use the list
            that you test on.
        masks: the folder of the masks.
        num_classes: the number of ids with the background: 21 for VOC, 81 for COCO.
        progress: show progress and the best threshold.

    Raises:
        ValueError: the source lacks a listed image, a file cannot be read or does not fit its mask, or no class has a
            correct pixel at any threshold.
        RuntimeError: as for :func:`convert_cams`.
    """
    from acr_reg.integrations.scoring import find_samples, read_list, score_cams  # needs pillow

    known = _source_of(source, source_format, images, []).files
    entries = read_list(dev_list)
    unknown = [name for name, _ in entries if name not in known]
    if unknown:
        raise ValueError(
            f"{dev_list} names {some(unknown)}, and {source} has no maps of them. Make these maps, or list others."
        )
    samples, metric = find_samples(entries, source, masks), CamMeanIoU(num_classes)
    with share_of_run(share) as part:
        part = Share() if part.is_apart else part
        scores = score_cams(samples, metric, source_format, images is not None, workers, progress, part).compute()
    if not np.nansum(scores.per_class_iou[1:]):
        raise ValueError(f"No class has a correct pixel on {dev_list}. The maps may be of other images or classes.")
    if progress and part.speaks:
        with show_progress() as bar:
            bar.note(f"best threshold on {dev_list}: {scores.best_threshold} (mIoU {scores.best_miou:.4f})")
    return scores


@dataclass(frozen=True)
class LabelFolder:
    """The folder of a run's pseudo labels: one PNG per image, all made by one rule."""

    path: Path
    rule: LabelRule

    @property
    def folders(self) -> list[Path]:
        return [self.path]

    def files(self, name: str) -> list[Path]:
        return [self.path / f"{name}.png"]

    def save(self, name: str, maps: Mapping[int, npt.ArrayLike], size: tuple[int, int] | None) -> None:
        from acr_reg.integrations.formats.masks import save_mask  # needs pillow, which no other conversion does

        labels = pseudo_labels(maps, **asdict(self.rule), size=size)
        save_mask(self.files(name)[0], labels, {SETTINGS: str(self.rule)})

    def check(self, name: str) -> tuple[int, int] | None:
        """Raises ValueError if the file of an earlier run was made by another rule."""
        from acr_reg.integrations.formats.photos import opened

        (file,) = self.files(name)
        try:
            with opened(file, decode=False) as image:  # the text comes before the pixels
                found, size = image.info.get(SETTINGS), (image.height, image.width)
                image.verify()  # to the end, which decoding need not reach
        except Exception as error:
            kind = unreadable(file.read_bytes(), b"\x89PNG\r\n\x1a\n")
            reason = str(error).rstrip(".")
            raise kind(f"{file} is damaged, or no label map: {reason}. Remove it, or choose another folder.") from error
        if found is None:
            raise ValueError(
                f"{file} was not made by this conversion. Choose another folder, or overwrite its files (--overwrite)."
            )
        if found != str(self.rule):
            raise ValueError(
                f"{file} was made with {found}, and this run has {self.rule}. Choose another folder, or overwrite its "
                "files (--overwrite)."
            )
        return size

    def check_others(self, names: Mapping[str, Path]) -> None:
        """Checks the files of images that this run does not have. :func:`fill` checks its own."""
        for file in sorted(self.path.glob("*.png")):
            if file.stem not in names and file.stat().st_size:  # a machine that lost power leaves empty files
                self.check(file.stem)


def _fill(
    target: CamFolder | LabelFolder,
    source: _Source,
    what: str,
    overwrite: bool,
    progress: bool,
    workers: int,
    share: bool,
) -> FolderReport:
    """An earlier run without ``images`` wrote other sizes, and its files would be passed over."""

    def size_of(name: str) -> tuple[int, int] | None:
        with suppress(OSError, ValueError):  # of a photo that is missing or damaged: that fails where it is needed
            return source.size_of_photo(name)
        return None

    sizes = None if source.images is None else size_of
    return fill(
        target, list(source.files), source, what, overwrite, progress, workers=workers, share=share, size_of=sizes
    )


@dataclass(frozen=True)
class _Source:
    """Reads the class maps of an ID and the size of its photo, for :func:`fill`."""

    files: dict[str, Path]
    format: Format | None
    images: Path | None
    like_evaluate: bool  # how maps are resized: here for evaluate's scores, to the bit, or by save_cams
    photos: dict[str, list[Path]] = field(default_factory=dict)

    def __call__(self, name: str) -> tuple[Maps, tuple[int, int] | None]:
        maps = load_cams(self.files[name], self.format)
        if self.images is None:
            return maps, None
        size = self.size_of_photo(name)
        if self.like_evaluate:
            from acr_reg.integrations.scoring import resized

            maps = {number: resized(values, size) for number, values in maps.items()}
        return maps, size

    def size_of_photo(self, name: str) -> tuple[int, int]:
        from acr_reg.integrations.formats.photos import photo_size

        found = self.photos.get(name, [])
        if not found:
            raise ValueError(
                f"There is no photo {name}.jpg or {name}.png in {self.images}. Give the folder of the photos."
            )
        if len(found) > 1:
            names = some([path.name for path in found])
            raise ValueError(f"{self.images} holds {names}: several photos of one image. Leave one.")
        return photo_size(found[0])


def _source_of(
    source: str | os.PathLike[str],
    format: Format | None,
    images: str | os.PathLike[str] | None,
    targets: list[Path],
    like_evaluate: bool = False,
) -> _Source:
    """Checks the folders before any work is done."""
    check_format(format)
    source, photos = Path(source), None if images is None else Path(images)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder. Give the folder that holds the .npy or .npz files.")
    for path, kind in ((source, "source"), (photos, "folder of the photos")):
        if path is not None and any(path.resolve() == target.resolve() for target in targets):
            raise ValueError(f"{path} is both {kind} and target. Name another target folder.")
    files = files_by_id(source, CAM_SUFFIXES)
    if not files:
        raise ValueError(f"There are no .npy or .npz files in {source}. Give the folder that holds one per image.")
    for paths in files.values():
        if len(paths) > 1:
            raise ValueError(f"{source} holds {some([path.name for path in paths])}: one image twice. Leave one.")
    if photos is not None and not photos.is_dir():
        raise ValueError(f"{photos} is not a folder. Give the folder of the photos.")
    by_id = {} if photos is None else files_by_id(photos, IMAGE_SUFFIXES)
    return _Source({name: paths[0] for name, paths in files.items()}, format, photos, like_evaluate, by_id)
