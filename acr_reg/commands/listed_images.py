"""The images of a list as a contact sheet shows them: finds their files, reads them, brings them to one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from acr_reg.errors import CommandError, some
from acr_reg.integrations.formats import Format, Maps, load_cams
from acr_reg.integrations.formats.labels import pseudo_labels
from acr_reg.integrations.formats.masks import IGNORED, read_mask
from acr_reg.integrations.formats.photos import open_photo
from acr_reg.integrations.scoring import CAM_SUFFIXES, LABEL_SUFFIXES, Sample, resized, score_cams
from acr_reg.metrics import CamMeanIoU
from acr_reg.pictures.sheet import SheetImage

Size = tuple[int, int]


@dataclass(frozen=True)
class ListedImage:
    """The files of one image. Of class maps and label map there is one."""

    id: str
    photo: Path
    cams: Path | None
    labels: Path | None
    mask: Path | None


@dataclass(frozen=True)
class Drawing:
    """How class maps become a picture: ``heat`` maps, or class colours at the threshold (without background: of the
    highest map)."""

    heat: bool
    threshold: float | None
    background: bool
    format: Format | None
    resize: bool


def find_files(
    entries: Sequence[tuple[str, str]], photos: Path, cams: Path | None, labels: Path | None, masks: Path | None
) -> list[ListedImage]:
    """The files of every entry (id, file name of the mask). All files that a folder lacks are reported together."""
    Image.init()
    ids = [name for name, _ in entries]
    of_photos = _by_id("--photos", photos, ids, tuple(Image.registered_extensions()))
    of_cams = [None] * len(ids) if cams is None else _by_id("--cams", cams, ids, CAM_SUFFIXES)
    of_labels = [None] * len(ids) if labels is None else _by_id("--labels", labels, ids, LABEL_SUFFIXES)
    of_masks: Sequence[Path | None] = [None] * len(ids)
    if masks is not None:
        of_masks = [_folder("--masks", masks) / name for _, name in entries]
        _report("--masks", masks, [path.name for path in of_masks if path is not None and not path.is_file()], len(ids))
    return [ListedImage(*files) for files in zip(ids, of_photos, of_cams, of_labels, of_masks, strict=True)]


def _by_id(option: str, folder: Path, ids: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The file of each id with one of the suffixes, in capitals or not."""
    files: dict[str, list[Path]] = {}
    for path in sorted(_folder(option, folder).iterdir()):
        if path.suffix.lower() in suffixes and path.is_file():
            files.setdefault(path.stem, []).append(path)
    kind = f"{suffixes[0]}" if len(suffixes) <= len(LABEL_SUFFIXES) else "photos"
    _report(option, folder, [name for name in ids if name not in files], len(ids), kind)
    for name in ids:
        if len(files[name]) > 1:
            raise CommandError(
                f"{option} {folder} holds {len(files[name])} files of {name}: "
                f"{some([path.name for path in files[name]])}. Keep one of them."
            )
    return [files[name][0] for name in ids]
