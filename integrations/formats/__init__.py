"""Reads and writes class maps in the file formats that WSSS codebases pass from stage to stage."""

from acr_reg.integrations.formats.files import FORMATS, Format, Maps, check_format
from acr_reg.integrations.formats.load import cam_format, load_cams
from acr_reg.integrations.formats.save import resize_map, save_cams, save_crf_pair

__all__ = [
    "FORMATS",
    "Format",
    "Maps",
    "cam_format",
    "check_format",
    "load_cams",
    "resize_map",
    "save_cams",
    "save_crf_pair",
]
