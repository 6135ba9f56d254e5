"""The pictures and numbers of docs/start/tutorial.md: its blocks, run with the longer setting that its comment names.

    python -m benchmarks.pictures tutorial    # docs/start/tutorial/ and the table; about eight minutes on one core

The pictures show the first scenes of the test split, and the patch that the first scene's pictogram covers most.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from torch import Tensor

from acr_reg import HorizontalFlip, align_attention, capture_attention
from acr_reg.demo import scenes
from acr_reg.demo.record import write_json
from benchmarks import marked_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "start" / "tutorial.md"
FOLDER = PAGE.parent / "tutorial"
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"^(PRETRAIN, .*) = ([\d, ]+)  # the pictures: ([\d, ]+)$", re.MULTILINE)
BEGIN = marked_page.begin("pictures tutorial")
PICTURE = re.compile(r"<!-- picture (\w+): (.*?) -->")
NOT_RUN = "Not run yet: until it is, the pictures that need training and the table are missing.\n"
SHOWN = 6  # scenes in a picture
_PATCH = 8  # px


def run_page(short: bool) -> dict[str, Any]:
    """The names that the page's python and diff blocks define, run in order; ``short`` keeps the page's own setting."""
    page = PAGE.read_text(encoding="utf-8")
    if not short:
        page = SETTING.sub(r"\1 = \3", page)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the page writes a file
        try:
            for language, block in BLOCK.findall(page):
                if language == "diff":
                    block = "\n".join(line[1:] for line in block.splitlines() if not line.startswith("-"))
                exec(compile(block, PAGE.name, "exec"), namespace)
        finally:
            os.chdir(before)
    return namespace


def numbers(page: dict[str, Any]) -> dict[str, Any]:
    """What the page quotes: mIoU on the test split at the threshold of the development split, and the mean terms of the
    last 10 steps."""
    setting = [page[name] for name in ("PRETRAIN", "CONTINUE", "BATCH", "TRAIN", "SHOWN")]
    found: dict[str, Any] = {"setting": setting, "baselines": page["baselines"]}
    for name, history in page["histories"].items():
        last = history[-10:]
        found[name] = {"mAP": page["mean_ap"][name]} | {k: page["scores"][name, k] for k in ("raw", "propagated")}
        found[name] |= {term: float(np.mean([step[term] for step in last])) for term in last[0]}
    return found


def quoted(found: dict[str, Any]) -> list[str]:
    """The page's table."""
    rows = [
        "| | mAP | raw CAM mIoU | propagated | entropy | activation | affinity |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [f"| {name} | | {miou:.3f} | | | | |" for name, miou in found["baselines"].items()]
    columns = ("mAP", "raw", "propagated", "entropy", "activation", "affinity")
    for name in ("without", "with ACR", "control"):
        rows.append(f"| {name} | " + " | ".join(f"{found[name][column]:.3f}" for column in columns) + " |")
    return rows


def filled(page: str, table: str) -> str:
    """The page with its table and its pictures."""
    return PICTURE.sub(r"![\2](tutorial/\1.png)", marked_page.filled(page, BEGIN, table)).replace(NOT_RUN, "")


def pixels(images: Tensor) -> NDArray[np.floating]:
    """Images of a scene, uint8 (..., 3, H, W), as (..., H, W, 3) in [0, 1]."""
    return images.movedim(-3, -1).numpy() / 255


def colour(label: int) -> tuple[float, float, float]:
    red, green, blue = hsv_to_rgb((label * 0.618 % 1.0, 0.85, 0.95)).tolist()
    return red, green, blue


def overlay(image: NDArray[np.floating], maps: NDArray[np.floating]) -> NDArray[np.floating]:
    """The image in grey under the colour of the highest of maps (C, H, W) in [0, 1], whose value is the opacity."""
    blended = 0.35 + 0.65 * image.mean(2, keepdims=True).repeat(3, 2)
    highest = maps.argmax(0)
    share = 0.9 * maps.max(0)[..., None]
    return blended * (1 - share) + share * np.stack([colour(c) for c in range(len(maps))])[highest]


def draw_grid(
    path: Path,
    rows: dict[str, list[NDArray[np.floating]]],
    legend: Sequence[int] = (),
    titles: Sequence[str] = (),
    marks: Sequence[tuple[int, int, int, int]] = (),
) -> None:
    """Write a PNG of named rows of pictures; ``marks`` are (row, column, top, left) of patches to outline."""
    columns = max(len(row) for row in rows.values())
    figure = Figure(figsize=(1.25 * columns + 0.4, 1.25 * len(rows) + 0.35 * bool(legend)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, (name, row) in enumerate(rows.items()):
        axes[i, 0].set_ylabel(name, fontsize=9)
        for j, picture in enumerate(row):
            axes[i, j].imshow(picture.clip(0, 1), interpolation="nearest")
            axes[i, j].set(xticks=[], yticks=[])
    for j, title in enumerate(titles):
        axes[0, j].set_title(title, fontsize=9)
    for i, j, top, left in marks:
        axes[i, j].add_patch(Rectangle((left - 0.5, top - 0.5), _PATCH, _PATCH, fill=False, edgecolor="lime", lw=1.5))
    if legend:
        patches = [Patch(color=colour(c), label=scenes.CLASSES[c]) for c in legend]
        figure.legend(handles=patches, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def draw_scenes(path: Path, page: dict[str, Any]) -> None:
    images, masks, labels = (page["test"].images[:SHOWN], page["test"].masks[:SHOWN], page["test"].labels[:SHOWN])
    truth = [np.stack([mask.numpy() == c + 1 for c in range(len(scenes.CLASSES))]) for mask in masks]
    rows = {"scene": list(pixels(images)), "mask": [overlay(p, t) for p, t in zip(pixels(images), truth, strict=True)]}
    draw_grid(path, rows, labels.any(0).nonzero()[:, 0].tolist())


def draw_cams(path: Path, page: dict[str, Any]) -> None:
    images, labels = page["test"].images[:SHOWN], page["test"].labels[:SHOWN]
    rows = {"scene": list(pixels(images))}
    for name, model in page["models"].items():
        maps = page["class_maps"](model, scenes.to_input(images), labels).numpy()
        rows[name] = [overlay(picture, cam) for picture, cam in zip(pixels(images), maps, strict=True)]
    draw_grid(path, rows, labels.any(0).nonzero()[:, 0].tolist())


def draw_rows(path: Path, page: dict[str, Any]) -> None:
    """A row for each condition: the patch's attention on the image, on its flip, and on the flip undone."""
    image, mask = page["test"].images[:1], page["test"].masks[0]
    cover = (mask > 0).float().unflatten(0, (-1, _PATCH)).unflatten(2, (-1, _PATCH)).mean((1, 3))
    token, width = int(cover.argmax()), cover.shape[1]
    flipped = token - token % width + width - 1 - token % width
    flip = HorizontalFlip()
    rows, marks = {}, []
    for i, name in enumerate(["without", "with ACR"]):
        model = page["models"][name].eval()
        with capture_attention(model, no_grad=True) as attention, torch.no_grad():
            maps = []
            for view in (image, flip(image)):
                model(scenes.to_input(view))
                maps.append(attention.take()[-1])
        layout = maps[0].layout
        undone = align_attention(maps[1].weights(), flip, maps[1].layout, layout)
        shown = [maps[0].weights()[0, :, 1 + token], maps[1].weights()[0, :, 1 + flipped], undone[0, :, 1 + token]]
        under = [pixels(image)[0], pixels(flip(image))[0], pixels(image)[0]]
        heads = torch.stack(shown).mean(1)[:, 1:].reshape(3, width, width)
        spread = (heads / heads.max()).repeat_interleave(_PATCH, 1).repeat_interleave(_PATCH, 2).numpy()
        rows[name] = [under[0], *(overlay(p, s[None]) for p, s in zip(under, spread, strict=True))]
        places = [token, token, flipped, token]
        marks += [(i, j, t // width * _PATCH, t % width * _PATCH) for j, t in enumerate(places)]
    draw_grid(path, rows, titles=("patch", "row on the image", "on the flip", "flip undone"), marks=marks)


def write(folder: Path, short: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    page = run_page(short)
    found = numbers(page) | {"seconds": round(time.perf_counter() - begin)}
    folder.mkdir(parents=True, exist_ok=True)
    draw_scenes(folder / "scenes.png", page)
    draw_rows(folder / "rows.png", page)
    draw_cams(folder / "cams.png", page)
    write_json(folder / "tutorial.json", found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.pictures tutorial", description="Run docs/start/tutorial.md."
    )
    parser.add_argument("--short", action="store_true", help="keep the page's own setting, whose figures mean nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for pictures and numbers (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are small
    table = "\n".join(quoted(write(options.folder, options.short)))
    print(table)
    if not options.short and options.folder == FOLDER:
        marked_page.write_page(PAGE, filled(PAGE.read_text(encoding="utf-8"), table))
    return 0
