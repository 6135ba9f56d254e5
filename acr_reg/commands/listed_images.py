"""The images of a list as a contact sheet shows them: finds their files, reads them, brings them to one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from acr_reg.errors import CommandError, some
from acr_reg.integrations.formats import Format, load_cams
from acr_reg.integrations.formats.files import CAM_SUFFIXES, IMAGE_SUFFIXES, files_by_id
from acr_reg.integrations.formats.labels import pseudo_labels
from acr_reg.integrations.formats.masks import read_mask
from acr_reg.integrations.formats.photos import open_photo
from acr_reg.integrations.jobs.progress import show_progress
from acr_reg.integrations.scoring import (
    LABEL_SUFFIXES,
    check_complete,
    check_folder,
    mask_file,
    resized,
    resized_labels,
)
from acr_reg.metrics import CamMeanIoU
from acr_reg.pictures.sheet import SheetImage

Size = tuple[int, ...]
NUM_IDS = 255  # that class maps can have as labels

_PNG, _CAMS = "*.[pP][nN][gG]", "*.[nN][pP][yYzZ]"


@dataclass(frozen=True)
class ListedImage:
    """The files of one image: class maps or a label map, and a mask if there are masks."""

    id: str
    photo: Path
    cams: Path | None
    labels: Path | None
    mask: Path | None


@dataclass(frozen=True)
class Drawing:
    """How an image is read and drawn: ``heat`` draws each class map, else the class colours at the threshold (without
    background: of the highest map) are drawn."""

    heat: bool
    background: bool
    threshold: float | None
    ignore_index: int | None
    format: Format | None
    resize: bool


def find_files(
    entries: Sequence[tuple[str, str]], photos: Path, cams: Path | None, labels: Path | None, masks: Path | None
) -> list[ListedImage]:
    """The files of every entry (id, file name of the mask). Files that a folder lacks are reported together.

    Raises ValueError for them, in the words of the options."""
    check_kind(cams, labels)
    ids = [name for name, _ in entries]
    none = [None] * len(ids)
    return [
        ListedImage(*files)
        for files in zip(
            ids,
            _by_id("--photos", photos, ids, IMAGE_SUFFIXES),
            none if cams is None else _by_id("--cams", cams, ids, CAM_SUFFIXES),
            none if labels is None else _by_id("--labels", labels, ids, LABEL_SUFFIXES),
            none if masks is None else _by_name("--masks", masks, [mask for _, mask in entries]),
            strict=True,
        )
    ]


def check_kind(cams: Path | None, labels: Path | None) -> None:
    """Label maps given as class maps, or the reverse, would only be files that are missing."""
    if cams is not None and holds_label_maps(cams):
        raise CommandError(f"--cams {cams} holds label maps (.png) and no class maps. Pass the folder as --labels.")
    if labels is not None and any(labels.glob(_CAMS)) and not any(labels.glob(_PNG)):
        raise CommandError(f"--labels {labels} holds class maps and no label maps (.png). Pass the folder as --cams.")


def holds_label_maps(folder: Path) -> bool:
    """Whether the folder holds PNG files and no class maps."""
    return not any(folder.glob(_CAMS)) and any(folder.glob(_PNG))


def _by_id(option: str, folder: Path, ids: Sequence[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The file of each id."""
    check_folder(option, folder)
    files = files_by_id(folder, suffixes)
    check_complete(option, folder, [f"{name}{suffixes[0]}" for name in ids if name not in files], len(ids))
    for name in ids:
        if len(files[name]) > 1:
            names = some([path.name for path in files[name]])
            raise ValueError(f"{option} {folder} holds {names} for {name}. Leave one of them there.")
    return [files[name][0] for name in ids]


def _by_name(option: str, folder: Path, names: Sequence[str]) -> list[Path]:
    check_folder(option, folder)
    files = [mask_file(folder, name) for name in names]
    check_complete(option, folder, [path.name for path in files if not path.is_file()], len(names))
    return files


def best_threshold(images: Sequence[ListedImage], drawing: Drawing) -> tuple[float, float]:
    """The threshold that scores best on these images, as evaluate finds it, and its mIoU."""
    counts = CamMeanIoU(NUM_IDS, ignore_index=drawing.ignore_index)
    maps_alone = replace(drawing, heat=True)
    with show_progress() as progress:
        step = progress.begin("Scoring", len(images))
        for files in images:
            assert files.mask is not None
            try:
                mask = read_mask(files.mask)
                cams, _ = _predicted(files, mask.shape, files.mask, maps_alone)
                maps = np.stack(list(cams.values())) if cams else np.zeros((0, *mask.shape), np.float32)
                counts.update(maps, mask, list(cams))
            except (OSError, ValueError) as error:
                raise CommandError(f"{files.id}: {error}") from error
            step()
    try:
        scores = counts.compute()
    except ValueError as error:
        raise CommandError("The masks of these images hold no known pixel. Give a threshold by --threshold.") from error
    assert scores.best_threshold is not None
    return scores.best_threshold, scores.best_miou


def read_image(files: ListedImage, drawing: Drawing) -> SheetImage:
    """Read one image. With a mask, all has the mask's size, as evaluate compares it; else the photo's."""
    try:
        photo = open_photo(files.photo)
        mask = None if files.mask is None else read_mask(files.mask)
        size: Size = (photo.height, photo.width) if mask is None else mask.shape
        sized = files.photo if files.mask is None else files.mask
        if _differs((photo.height, photo.width), size, files.photo, sized, drawing):
            photo = photo.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        cams, labels = _predicted(files, size, sized, drawing)
        return SheetImage(files.id, photo, cams if drawing.heat else {}, None if drawing.heat else labels, mask)
    except (OSError, ValueError) as error:
        raise CommandError(f"{files.id}: {error}") from error


def _predicted(
    files: ListedImage, size: Size, sized: Path, drawing: Drawing
) -> tuple[dict[int, npt.NDArray[np.float32]], npt.NDArray[np.integer] | None]:
    """Class maps by their id in the masks, or the label map."""
    if files.labels is not None:
        labels = read_mask(files.labels)
        if _differs(labels.shape, size, files.labels, sized, drawing):
            labels = resized_labels(labels, size)
        return {}, labels
    assert files.cams is not None
    maps = load_cams(files.cams, drawing.format)
    for shape in {values.shape for values in maps.values()}:
        _differs(shape, size, files.cams, sized, drawing)
    maps = {number: resized(values, size) for number, values in maps.items()}
    first = int(drawing.background)
    if drawing.heat:
        return {number + first: maps[number] for number in sorted(maps)}, None
    try:
        return {}, pseudo_labels(maps, drawing.threshold, background=drawing.background, size=(size[0], size[1]))
    except ValueError as error:
        raise CommandError(f"{files.cams}: {error}") from error


def _differs(shape: Size, wanted: Size, path: Path, sized: Path, drawing: Drawing) -> bool:
    """Whether the file must be resized. Raises ValueError if it may not."""
    if shape != wanted and not drawing.resize:
        raise ValueError(
            f"{path} is {shape[0]}x{shape[1]} and {sized} is {wanted[0]}x{wanted[1]} (HxW). Save both at one size, or "
            "pass --resize."
        )
    return shape != wanted
