"""The ``show`` command: draws class maps or label maps over photos, or what a model attends to in one photo."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from acr_reg.commands.models import VIEWS, add_hints, add_model, build, forward_of, hints_of, load_weights
from acr_reg.errors import CommandError, some
from acr_reg.integrations.formats import FORMATS, load_cams
from acr_reg.integrations.formats.class_names import class_names
from acr_reg.integrations.formats.labels import pseudo_labels
from acr_reg.integrations.formats.masks import IGNORED, read_mask
from acr_reg.integrations.formats.photos import open_photo
from acr_reg.integrations.formats.write import replacing
from acr_reg.integrations.jobs.progress import show_progress
from acr_reg.integrations.scoring import CAM_SUFFIXES, LABEL_SUFFIXES, Sample, read_list, resized, score_cams
from acr_reg.metrics import CamMeanIoU
from acr_reg.pictures.attention import show_attention
from acr_reg.pictures.sheet import SheetImage, contact_sheet

FIRST = 24  # images on a page, and without --first or --all in the whole sheet
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
WAYS = "Give --cams DIR or --labels DIR for a contact sheet, or MODEL PHOTO for the attention of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.usage = (
        "%(prog)s (--cams DIR | --labels DIR) --photos DIR --list FILE [--masks DIR] [options]\n"
        "       %(prog)s MODEL PHOTO [options]"
    )
    parser.epilog = (
        "Maps and lists are as for evaluate, MODEL is as for check. Errors are drawn as false (a class on background), "
        "missed (no class on a class) and wrong class, in colours that people with colour blindness can tell apart."
    )
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: sheet.png or attention.png")
    sheet = parser.add_argument_group("a contact sheet of many images")
    _SHEET.extend(_declared(sheet, _add_sheet))
    model = parser.add_argument_group("what a model attends to in one photo")
    _MODEL.extend(_declared(model, _add_attention))
