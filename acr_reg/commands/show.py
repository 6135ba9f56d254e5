"""The ``show`` command: draws class maps or label maps over photos, or what a model attends to in one photo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from acr_reg.commands.evaluate import id_or_none
from acr_reg.commands.listed_images import Drawing, ListedImage, best_threshold, find_files, read_image
from acr_reg.commands.models import (
    LARGEST,
    VIEWS,
    add_hints,
    add_model,
    build,
    forward_of,
    hints_of,
    in_options,
    load_weights,
)
from acr_reg.errors import CommandError, some
from acr_reg.integrations.formats import FORMATS
from acr_reg.integrations.formats.class_names import class_names
from acr_reg.integrations.formats.files import IGNORED
from acr_reg.integrations.formats.photos import open_photo
from acr_reg.integrations.formats.write import replacing
from acr_reg.integrations.jobs.progress import show_progress
from acr_reg.integrations.scoring import read_list
from acr_reg.pictures.attention import show_attention
from acr_reg.pictures.sheet import SheetImage, contact_sheet

FIRST = 24  # images on a page, and in the whole sheet without --first or --all
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
WIDEST_PANEL = 4096
EITHER = "Give --cams or --labels for a contact sheet, or MODEL and PHOTO for the attention of a model."

# The options of each use. Their defaults are None, False or [], so that one which was given is noticed.
# fmt: off
OF_SHEET = (
    "cams", "labels", "photos", "list", "masks", "names", "draw", "threshold", "format", "no_background",
    "ignore_index", "resize", "first", "all", "columns", "panel",
)
OF_MODEL = (
    "model", "photo", "set", "weights", "layer", "patch", "class_token", "view", "size", "mean", "std",
    "no_normalization", "method", "modules", "patch_size", "prefix_tokens", "suffix_tokens", "class_tokens",
)
# fmt: on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.usage = (
        "%(prog)s (--cams DIR | --labels DIR) --photos DIR --list FILE [--masks DIR] [options]\n"
        "       %(prog)s MODEL PHOTO [options]"
    )
    parser.epilog = (
        "Lists, maps and masks are as for evaluate, models as for check. Errors are marked as false (a class on "
        "background), missed (no class on a class) and wrong class, in colours that colour-blind people can tell apart."
    )
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: sheet.png, or attention.png")
    add = parser.add_argument_group("a contact sheet of a list of images").add_argument
    add("--cams", type=Path, metavar="DIR", help="folder of ID.npy or ID.npz: class maps")
    add("--labels", type=Path, metavar="DIR", help="folder of ID.png: label maps")
    add("--photos", type=Path, metavar="DIR", help="folder of the photos")
    add("--list", type=Path, metavar="FILE", help="one image a line: an id, or the paths of image and mask")
    add(
        "--masks", type=Path, metavar="DIR", help="folder of palette or grey PNG masks: also mark errors, with the mIoU"
    )
    add(
        "--names", metavar="FILE", help="names of the classes: voc, coco, a file of one a line, or an image_labels.json"
    )
    add(
        "--draw",
        choices=("heat", "classes"),
        help="a heat map for each class, or the colours of the classes (default: classes, where it is known how)",
    )
    add("--threshold", type=float, metavar="T", help="background is <= T (default: the best of the images, by --masks)")
    add("--format", choices=FORMATS, help="of the maps (default: found from each file)")
    add("--no-background", action="store_true", help="id 0 is a class, and class k has id k")
    add("--ignore-index", type=id_or_none, nargs=1, metavar="ID", help="of pixels not counted, or none (default: 255)")
    add("--resize", action="store_true", help="resize all to the size of the mask, or without masks of the photo")
    add("--first", type=int, metavar="N", help=f"show the first N images (default: {FIRST})")
    add("--all", action="store_true", help=f"show all images, {FIRST} on a page: sheet_1.png, sheet_2.png, ...")
    add("--columns", type=int, metavar="N", help="panels across a page (default: 8)")
    add("--panel", type=int, metavar="PX", help="longer side of a panel (default: 160)")
    group = parser.add_argument_group("what a model attends to in one photo")
    add_model(group, optional=True)
    add = group.add_argument
    add("photo", nargs="?", type=Path, metavar="PHOTO", help="an image file")
    add("--weights", type=Path, metavar="FILE", help="a state dict: .pt, .pth, .safetensors or .npz (default: random)")
    add("--layer", type=int, metavar="I", help="of the attention maps (default: -1, the last)")
    add("--patch", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="whose attention is drawn (default: the middle)")
    add("--class-token", type=int, metavar="I", help="which one, if the model has several")
    add("--view", choices=VIEWS, help="the second view (default: hflip)")
    add("--size", type=int, nargs="+", metavar="PX", help="height and width of the input, cut from the photo's middle")
    add(
        "--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of the photos (default: the model's, or ImageNet)"
    )
    add("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="of the photos (default: the model's, or ImageNet)")
    add("--no-normalization", action="store_true", help="the model takes photos in [0, 1]")
    add_hints(group)


def run(args: argparse.Namespace) -> int:
    """Write the pictures, print their paths. Errors of the user are CommandErrors."""
    sheet, model = ([name for name in names if _is_given(getattr(args, name))] for names in (OF_SHEET, OF_MODEL))
    if sheet and model:
        raise CommandError(f"{_option(model[0])} does not go with {_option(sheet[0])}. {EITHER}")
    if args.output is not None and args.output.suffix.lower() != ".png":
        raise CommandError(f"--output {args.output} does not end in .png. Pictures are PNG files.")
    if args.output is not None and not args.output.parent.is_dir():
        raise CommandError(f"--output {args.output}: The folder {args.output.parent} does not exist. Make it first.")
    if args.model is not None and args.photo is not None:
        return _run_attention(args)
    if (args.cams is None) != (args.labels is None):
        return _run_sheet(args)
    raise CommandError(EITHER)


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value != []


def _option(name: str) -> str:
    return name.upper() if name in ("model", "photo") else f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------- contact sheets


def _run_sheet(args: argparse.Namespace) -> int:
    _check_sheet(args)
    background = not args.no_background
    try:
        entries = read_list(args.list)
    except ValueError as error:
        raise CommandError(f"--{error}") from error  # "list FILE ..."
    try:
        names = [] if args.names is None else class_names(args.names, None, background)
    except ValueError as error:
        raise CommandError(f"--names {error}") from error
    count = len(entries) if args.all else min(args.first or FIRST, len(entries))
    try:
        images = find_files(entries[:count], args.photos, args.cams, args.labels, args.masks)
    except ValueError as error:
        raise CommandError(str(error)) from error
    said = f"{count} images" if count == len(entries) else f"the first {count} of {len(entries)} images"
    notes = [f"{args.cams or args.labels}: {said} of {args.list}"]
    drawing, how = _drawing(args, images)
    if how:
        notes.append(how)

    first = args.output or Path("sheet.png")
    pages = -(-count // FIRST)
    paths = [first] if pages == 1 else [first.with_stem(f"{first.stem}_{i + 1}") for i in range(pages)]
    drawn: set[int] = set()
    with ExitStack() as unfinished, show_progress() as progress:  # no page stays if a later one fails
        step = progress.begin("Drawing", count)

        def read() -> Iterator[SheetImage]:
            for files in images:
                image = read_image(files, drawing)
                drawn.update(_ids_in(image))
                yield image
                step()

        ways: dict[str, Any] = {"background": background, "ignore_index": drawing.ignore_index, "notes": notes}
        options = {name: value for name in ("columns", "panel") if (value := getattr(args, name)) is not None}
        try:
            sheet = contact_sheet(read(), names=names, per_page=FIRST, **ways, **options)
            for path, page in zip(paths, sheet, strict=True):
                page.save(unfinished.enter_context(replacing(path)), format="PNG")
        except (OSError, ValueError) as error:
            raise CommandError(str(error)) from error
    print("\n".join(map(str, paths)))
    if how:
        print(how)
    unnamed = sorted(drawn - set(range(len(names))) - {drawing.ignore_index})
    if args.names is not None and unnamed:
        without = some([str(each) for each in unnamed])
        print(f"note: --names {args.names} has names of ids 0 to {len(names) - 1}, not of {without}.", file=sys.stderr)
    if count < len(entries):
        print(f"{len(entries) - count} of {len(entries)} images are left out. Show more by --first N, or --all.")
    return 0


def _ids_in(image: SheetImage) -> set[int]:
    """The ids of all classes that the sheet shows of an image, and the ignored id."""
    maps = [ids for ids in (image.labels, image.mask) if ids is not None]
    return {int(each) for ids in maps for each in np.unique(ids)} | set(image.cams)


def _check_sheet(args: argparse.Namespace) -> None:
    for name in ("photos", "list"):
        if getattr(args, name) is None:
            raise CommandError(f"A contact sheet needs --{name}. {EITHER}")
    for name, least in (("first", 1), ("columns", 1), ("panel", 32)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise CommandError(f"--{name} is {value}. It must be at least {least}.")
    if args.panel is not None and args.panel > WIDEST_PANEL:
        raise CommandError(f"--panel is {args.panel}. It must be at most {WIDEST_PANEL}.")
    if args.all and args.first is not None:
        raise CommandError(f"--first {args.first} does not go with --all. Give one of them.")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise CommandError(f"--threshold is {args.threshold}. It must lie in [0, 1], as the maps do.")
    for what, is_given in (("--labels", args.labels), ("--no-background", args.no_background)):
        if is_given and args.threshold is not None:
            raise CommandError(f"--threshold is for class maps with background. Leave it out with {what}.")
    for name in ("draw", "format"):
        if args.labels is not None and getattr(args, name) is not None:
            raise CommandError(f"--{name} is for class maps. Leave it out with --labels.")
    if args.draw == "heat" and args.threshold is not None:
        raise CommandError("--threshold is for class colours. Leave it out with --draw heat.")
    needs = args.cams is not None and args.draw == "classes" and not args.no_background
    if needs and args.threshold is None and args.masks is None:
        raise CommandError("--draw classes needs --threshold T, or --masks DIR to find the best one.")


def _drawing(args: argparse.Namespace, images: list[ListedImage]) -> tuple[Drawing, str]:
    """How images are drawn, and the line that says at which threshold."""
    known = args.threshold is not None or args.masks is not None or args.no_background
    heat = args.cams is not None and (args.draw or ("classes" if known else "heat")) == "heat"
    [ignored] = args.ignore_index or [IGNORED]
    drawing = Drawing(heat, not args.no_background, args.threshold, ignored, args.format, args.resize)
    if heat or args.labels is not None or args.no_background:
        return drawing, ""
    if args.threshold is not None:
        return drawing, f"background threshold {args.threshold:.4g}"
    threshold, miou = best_threshold(images, drawing)
    how = f"background threshold {threshold:.4g}, the best of these images (mIoU {miou:.4f} over all of them)"
    return replace(drawing, threshold=threshold), how


# ---------------------------------------------------------------- attention


def _run_attention(args: argparse.Namespace) -> int:
    if args.size is not None and (len(args.size) > 2 or min(args.size) < 1 or max(args.size) > LARGEST):
        raise CommandError(
            f"--size {' '.join(map(str, args.size))} is not one or two numbers of pixels from 1 to {LARGEST}."
        )
    if args.no_normalization and (args.mean or args.std):
        raise CommandError("--no-normalization does not go with --mean or --std. Give one of them.")
    if args.std is not None and min(args.std) <= 0:
        raise CommandError(f"--std {' '.join(map(str, args.std))} is not above 0. The photo is divided by it.")
    try:
        photo = open_photo(args.photo)
    except (OSError, ValueError) as error:
        raise CommandError(f"The photo {args.photo} cannot be read. {error}") from error
    model = build(args.model, args.set)
    if args.weights is not None:
        load_weights(model, args.weights)
    size = args.size or input_size(model)
    fitted = ImageOps.fit(photo, (size[-1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(fitted))
    pixels = pixels.movedim(-1, 0).float() / 255
    image = pixels if args.no_normalization else _normalized(pixels, model, args)
    path = args.output or Path("attention.png")
    try:
        with show_progress() as progress:
            progress.begin(f"running {type(model).__name__}", None)
            figure = show_attention(
                model,
                image[None],
                pixels,
                VIEWS[args.view or "hflip"],
                layer=-1 if args.layer is None else args.layer,
                patch=None if args.patch is None else tuple(args.patch),
                class_token=args.class_token,
                forward=forward_of(model, args),
                **hints_of(args),
            )
    except CommandError:
        raise
    except Exception as error:  # of an option, or of the model on this image
        raise CommandError(
            f"The attention of {type(model).__name__} to an image {tuple(image.shape)} cannot be shown. "
            f"{in_options(error, layers='--layer')}"
        ) from error
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")
    print(path)
    if args.weights is None and args.model.startswith(("timm:", "torchvision:")):
        print(f"note: {args.model} has random weights. Give trained ones by --weights FILE.", file=sys.stderr)
    return 0


def input_size(model: nn.Module) -> Sequence[int]:
    """Height and width of the images that a model of timm was built for; 224 where the model does not say it."""
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return built_for or (_known_of(model, "input_size") or (224, 224))[-2:]


def _known_of(model: nn.Module, name: str) -> Any:
    """What timm says of the images of a model, or None."""
    known = getattr(model, "pretrained_cfg", None)
    return known.get(name) if isinstance(known, dict) else None


def _normalized(pixels: Tensor, model: nn.Module, args: argparse.Namespace) -> Tensor:
    mean, std = (
        torch.tensor(getattr(args, name) or _known_of(model, name) or IMAGENET[name]).view(3, 1, 1)
        for name in ("mean", "std")
    )
    return (pixels - mean) / std
