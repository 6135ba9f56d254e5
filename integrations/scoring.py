"""Scores the class maps or label maps of a list of images against their masks, in several processes if asked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from acr_reg.errors import some
from acr_reg.integrations.formats import Format, load_cams
from acr_reg.integrations.formats.files import CAM_SUFFIXES, IMAGE_SUFFIXES
from acr_reg.integrations.formats.masks import read_mask
from acr_reg.integrations.jobs.progress import show_progress
from acr_reg.integrations.jobs.reading import Failure, reading
from acr_reg.integrations.jobs.shares import Share
from acr_reg.metrics import CamMeanIoU, LabelMeanIoU

__all__ = ["Sample", "find_samples", "read_list", "resized", "resized_labels", "score_cams", "score_labels"]

Kind = Literal["cams", "labels"]
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")  # read_mask says why not JPEG
IMAGES_AT_ONCE = 16  # what a worker counts before it reports
FEWEST_FOR_WORKERS = 50  # starting workers takes longer than scoring fewer images

Metric = TypeVar("Metric", CamMeanIoU, LabelMeanIoU)


class Sample(NamedTuple):
    """The files of one image: its class maps or its label map, and its mask."""

    id: str
    prediction: Path
    mask: Path


def read_list(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Read ids and mask file names from a list. A line is an id, or a pair of paths as in the lists of VOC and COCO.

    Blank lines are skipped. Raises ValueError if the list cannot be read, is empty, repeats an id, or has other lines.

    >>> from pathlib import Path
    >>> _ = Path("train.txt").write_text("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png")
    >>> read_list("train.txt")
    [('2007_000032', '2007_000032.png')]
    """
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"list {path} cannot be read: {error}") from error
    entries = []
    for number, fields in enumerate(lines, start=1):
        if not fields:
            continue
        if len(fields) > 2 or (len(fields) == 2 and _stem(fields[1]) == fields[1]):
            raise ValueError(
                f"list {path}, line {number} is {' '.join(fields)!r}. Give an id, or a pair of paths such as "
                "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png."
            )
        mask = Path(fields[1]).name if len(fields) == 2 else f"{_stem(fields[0])}.png"
        entries.append((_stem(fields[0]), mask))
    if not entries:
        raise ValueError(f"list {path} is empty. Write one image a line.")
    repeated = [name for name, count in Counter(name for name, _ in entries).items() if count > 1]
    if repeated:
        raise ValueError(f"list {path} names {some(repeated)} more than once. Remove the repetitions.")
    return entries


def find_samples(
    entries: Sequence[tuple[str, str]],
    predictions: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    kind: Kind = "cams",
) -> list[Sample]:
    """Find the files of all entries of :func:`read_list`.

    Args:
        entries: ids and mask file names.
        predictions: the folder of class maps (ID.npy or ID.npz). For ``kind="labels"`` it is the folder of label maps
            (ID.png, .bmp, .tif or .tiff).
        masks: the folder of the masks. A mask may have another of these endings than the list says.
        kind: "cams" or "labels". Messages call the folder of predictions by this name.

    Raises:
        ValueError: a folder does not exist, or files are missing. The message counts all missing files.
    """
    suffixes = CAM_SUFFIXES if kind == "cams" else LABEL_SUFFIXES
    folders = {kind: Path(predictions), "masks": Path(masks)}
    for name, folder in folders.items():
        check_folder(name, folder)
    samples = []
    for name, mask in entries:
        prediction = _first_of(folders[kind], name, suffixes) or folders[kind] / f"{name}{suffixes[0]}"
        samples.append(Sample(name, prediction, mask_file(folders["masks"], mask)))
    for name, paths in ((kind, [s.prediction for s in samples]), ("masks", [s.mask for s in samples])):
        check_complete(name, folders[name], [path.name for path in paths if not path.is_file()], len(samples))
    return samples


def check_folder(name: str, folder: Path) -> None:
    """Raises ValueError if the folder does not exist. The message calls it ``name``."""
    if not folder.is_dir():
        raise ValueError(f"{name} {folder} is not a folder. Give the folder of the files.")


def check_complete(name: str, folder: Path, missing: Sequence[str], total: int) -> None:
    """Raises ValueError if files of the list are missing in the folder."""
    if missing:
        raise ValueError(
            f"{name} {folder}: {len(missing)} of {total} files are missing: {some(missing)}. "
            "Give the folder that holds these files, and the list they were made from."
        )


def score_cams(
    samples: Sequence[Sample],
    metric: CamMeanIoU,
    format: Format | None = None,
    resize: bool = False,
    workers: int = 0,
    progress: bool = True,
    share: Share | None = None,
) -> CamMeanIoU:
    """Count the class maps of all samples. Returns a new counter: ``metric`` plus these counts.

    Args:
        samples: the result of :func:`find_samples`. Class k (0-based) of the maps has mask id k + 1, or k if the metric
            has no background.
        metric: the settings, and the counts to start from (usually none). It is not changed.
        format: the format of the maps. By default it is found from each file.
        resize: resize maps (bilinear) to the size of their mask. By default another size is an error.
        workers: processes that read and count. 0 counts in this process; so does a short list.
        progress: show progress.
        share: the result of :func:`~acr_reg.integrations.jobs.shares.share_of_run`. This process counts its share of
            the samples, and every process returns the counts of all. By default this process counts everything.

    Raises:
        ValueError: a file cannot be read or does not fit its mask or the metric. The message names the file. If this
            happens in one process of a shared run, all processes raise it. Or the masks of all samples hold no class.
        RuntimeError: a worker or another process of the run died.
    """
    count = partial(_count_cams, format=format, resize=resize)
    total = metric + _counted(samples, metric.empty(), count, workers, progress, share or Share())
    _check_masks(total.counts().truth, metric.background, metric.ignore_index)
    return total


def score_labels(
    samples: Sequence[Sample],
    metric: LabelMeanIoU,
    resize: bool = False,
    background: bool = True,
    workers: int = 0,
    progress: bool = True,
    share: Share | None = None,
) -> LabelMeanIoU:
    """Count the label maps of all samples, as :func:`score_cams` counts class maps.

    ``resize`` takes the nearest pixels. ``background`` says whether id 0 is background. If it is, and the masks of all
    samples hold nothing else, that is an error.
    """
    count = partial(_count_labels, resize=resize)
    total = metric + _counted(samples, metric.empty(), count, workers, progress, share or Share())
    _check_masks(total.confusion().sum(axis=1), background, metric.ignore_index)
    return total


@dataclass(frozen=True)
class _Runs(Generic[Metric]):
    """The work of a process: it counts a run of images, given the number of the run."""

    samples: Sequence[Sample]
    at_once: int
    empty: Metric
    count: Callable[[Metric, Sample], None]

    @property
    def numbers(self) -> list[str]:
        return [str(number) for number in range(-(-len(self.samples) // self.at_once))]

    def __call__(self, number: str) -> tuple[int, Metric]:
        start = int(number) * self.at_once
        samples = self.samples[start : start + self.at_once]
        counter = self.empty.empty()
        for sample in samples:
            try:
                self.count(counter, sample)
            except (OSError, ValueError) as error:  # they name the file
                raise ValueError(str(error)) from error
            except MemoryError as error:
                raise ValueError(
                    f"{sample.prediction} with {sample.mask}: The memory is too small. Use fewer workers."
                ) from error
            except Exception as error:  # a damaged file may fail anywhere
                raise ValueError(
                    f"{sample.prediction} with {sample.mask}: {type(error).__name__}: {error}. Make the files again."
                ) from error
        return len(samples), counter


def _counted(
    samples: Sequence[Sample],
    empty: Metric,
    count: Callable[[Metric, Sample], None],
    workers: int,
    progress: bool,
    share: Share,
) -> Metric:
    """The counts of all processes of a shared run."""
    total = empty
    for part in share.gather(_count_share(share.of(samples), empty, count, workers, progress and share.speaks)):
        if isinstance(part, Failure):
            raise ValueError(part.text)
        total = total + part
    return total


def _count_share(
    samples: Sequence[Sample],
    empty: Metric,
    count: Callable[[Metric, Sample], None],
    workers: int,
    progress: bool,
) -> Metric | Failure:
    """The counts of this process. An error in the user's files is returned, so that all processes can raise it."""
    if len(samples) < FEWEST_FOR_WORKERS:
        workers = 0
    runs = _Runs(samples, IMAGES_AT_ONCE if workers else 1, empty, count)
    total = empty
    with reading(runs.numbers, runs, workers) as parts, show_progress(progress) as bar:
        step = bar.begin("Scoring", len(samples))
        for _, part in parts:
            if isinstance(part, Failure):
                return part
            images, counter = part
            total = total + counter
            for _ in range(images):
                step()
    return total


def _count_cams(metric: CamMeanIoU, sample: Sample, format: Format | None, resize: bool) -> None:
    first = 1 if metric.background else 0
    maps, mask = load_cams(sample.prediction, format), read_mask(sample.mask)
    beyond = [number for number in maps if number + first >= metric.num_classes]
    if beyond:
        raise ValueError(
            f"{sample.prediction} holds classes {beyond}, and {metric.num_classes} ids allow 0 to "
            f"{metric.num_classes - 1 - first}. Check the number of classes, and that the keys of the maps are 0-based."
        )
    if resize:
        maps = {number: resized(values, mask.shape) for number, values in maps.items()}
    for size in {values.shape for values in maps.values()}:
        _check_size(sample, size, mask.shape)
    cam = np.stack(list(maps.values())) if maps else np.zeros((0, *mask.shape), dtype=np.float32)
    try:
        metric.update(cam, mask, [number + first for number in maps])
    except ValueError as error:
        raise ValueError(f"{sample.prediction} with {sample.mask}: {error}") from error


def _count_labels(metric: LabelMeanIoU, sample: Sample, resize: bool) -> None:
    labels, mask = read_mask(sample.prediction), read_mask(sample.mask)
    if resize and labels.shape != mask.shape:
        labels = resized_labels(labels, mask.shape)
    _check_size(sample, labels.shape, mask.shape)
    try:
        metric.update(labels, mask)
    except ValueError as error:
        raise ValueError(f"{sample.prediction} with {sample.mask}: {error}") from error


def _check_masks(truth: npt.NDArray[np.int64], background: bool, ignore_index: int | None) -> None:
    """Raises ValueError for masks without a class. Their mIoU would be 0 or 1 for any prediction."""
    if not truth[int(background) :].any():
        ids = [
            *(["0 (background)"] if truth[0] else []),
            *([] if ignore_index is None else [f"{ignore_index} (ignored)"]),
        ]
        raise ValueError(
            f"The masks hold no class: every pixel is {' or '.join(ids)}. Write class ids into the masks, or change "
            "the ignored id (--ignore-index)."
        )


def _check_size(sample: Sample, size: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if size != wanted:
        raise ValueError(
            f"{sample.prediction} is {size[0]}x{size[1]} and {sample.mask} is {wanted[0]}x{wanted[1]} (HxW). "
            "Save both at one size, or resize (evaluate --resize, convert --images, resize=True)."
        )


def resized(values: npt.NDArray[np.float32], size: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Resize one map (H, W): bilinear, with pixel centres at half integers, antialiased when it shrinks."""
    if values.shape == size:
        return values
    height, width = size
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def resized_labels(labels: npt.NDArray[np.integer], size: tuple[int, ...]) -> npt.NDArray[np.integer]:
    """Resize a label map (H, W): each pixel takes the id of the nearest one."""
    return labels[np.ix_(*map(_nearest, labels.shape, size))]


def _nearest(length: int, wanted: int) -> npt.NDArray[np.intp]:
    """For each of ``wanted`` pixels along an axis, the index of the old pixel, one of ``length``, that holds its
    centre."""
    return ((2 * np.arange(wanted) + 1) * length) // (2 * wanted)


def mask_file(folder: Path, name: str) -> Path:
    """The file of this name, or else one with another ending. If neither exists, the path of this name."""
    named = folder / name
    return named if named.is_file() else _first_of(folder, _stem(name), LABEL_SUFFIXES) or named


def _first_of(folder: Path, name: str, suffixes: Sequence[str]) -> Path | None:
    """The first file of that name with one of the endings, in small or capital letters."""
    candidates = (folder / f"{name}{ending}" for suffix in suffixes for ending in (suffix, suffix.upper()))
    return next((path for path in candidates if path.is_file()), None)


def _stem(path: str) -> str:
    """The id in a path: the file name without the ending of an image. Other dots belong to the id."""
    name = Path(path).name
    return Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name
