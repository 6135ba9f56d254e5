"""Reads and writes what WSSS codebases pass from stage to stage: class maps, label maps, image labels; opens photos."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from acr_reg.integrations.formats.files import FORMATS, Format, Maps, check_format
from acr_reg.integrations.formats.image_labels import labels_of, load_image_labels
from acr_reg.integrations.formats.labels import pseudo_labels
from acr_reg.integrations.formats.load import cam_format, load_cams
from acr_reg.integrations.formats.save import resize_map, save_cams, save_crf_pair

if TYPE_CHECKING:
    from acr_reg.integrations.formats.masks import read_mask, save_mask
    from acr_reg.integrations.formats.photos import open_photo, photo_size

__all__ = [
    "FORMATS",
    "Format",
    "Maps",
    "cam_format",
    "check_format",
    "labels_of",
    "load_cams",
    "load_image_labels",
    "open_photo",
    "photo_size",
    "pseudo_labels",
    "read_mask",
    "resize_map",
    "save_cams",
    "save_crf_pair",
    "save_mask",
]

# Pillow is an extra, which class maps do not need: these are imported when they are asked for.
_NEED_PILLOW = {"open_photo": "photos", "photo_size": "photos", "read_mask": "masks", "save_mask": "masks"}


def __getattr__(name: str) -> Any:
    if name not in _NEED_PILLOW:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_PILLOW[name]}"), name)
