"""Pictures of the study on dev photos: class maps, one patch's affinity in both views, mIoU against the threshold.

The photos are the first of a seeded shuffle, whatever they show. The networks are those of seed 0 at the settings that
dev chooses (choice.py). They come from the cache, or are trained if they are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from acr_reg import HorizontalFlip, align_attention, capture_attention
from acr_reg.demo.comparison import Picture
from acr_reg.demo.photos.task import to_pixels
from acr_reg.demo.picture import draw
from acr_reg.demo.scoring import resized
from acr_reg.demo.train import with_grid
from benchmarks.pictures.palette import with_few_colours
from benchmarks.study.choice import choose
from benchmarks.study.page.tables import Group, baseline_rows, groups
from benchmarks.study.photos import Photos
from benchmarks.study.scoring import RAW, class_maps
from benchmarks.study.settings import CONDITIONS, Cell
from benchmarks.study.store import all_cells, frozen_entries
from benchmarks.study.training.networks import StudyNetwork
from benchmarks.study.training.train import trained

SHOWN = ("two", "both", "misreported")
COLUMNS, ROWS = 8, 4  # photos of the class maps, and of the affinities
SEED = 0

Chosen = Mapping[str, Cell]


def chosen_cells(results: Path, photos: str) -> dict[str, Cell]:
    """Seed 0 of the conditions shown, at the settings and readings that are frozen, or else those that dev chooses."""
    chosen = choose(all_cells(results), photos, frozen_entries(results))
    return {name: Cell(setting, SEED, "dev", reading) for name, (setting, reading) in chosen.items() if name in SHOWN}


def first_photos(photos: Photos, count: int) -> Tensor:
    """The positions of the shown photos in dev.txt."""
    order = torch.randperm(len(photos.folder.splits["dev"]), generator=torch.Generator().manual_seed(SEED))
    return order[:count]


def draw_class_maps(path: Path, photos: Photos, cells: Chosen) -> None:
    """A row for each photo: the photo, its mask, the raw class maps of every condition."""
    positions = first_photos(photos, COLUMNS)
    labels = photos.labels("dev")[positions]
    masks, present = photos.masks("dev"), photos.present("dev")
    pictures = [
        Picture(pixels, masks[i], present[i])
        for i, pixels in zip(positions.tolist(), _pixels(photos, positions), strict=True)
    ]
    for name, cell in cells.items():
        model = _network(photos, cell)
        lowest = len(model.blocks) + cell.reading.start
        with capture_attention(model, graph_from=lowest) as attention:
            found = class_maps(model, attention, _tokens(photos, positions), labels, photos.grid, [cell.reading])
        for picture, cam, row in zip(pictures, found.merged[cell.reading.start, RAW], labels, strict=True):
            picture.maps[_SHORT[name]] = resized(cam[row.nonzero()[:, 0]], picture.mask.shape).numpy()
    title = f"Raw class maps, dev photos of {photos.name}: the first {COLUMNS} of a shuffle; {photos.origin}"
    draw(path, pictures, photos.folder.names, photos.folder.background, title, dpi=80)
    with Image.open(path) as drawn:
        fewer = with_few_colours(drawn.convert("RGB"))
    fewer.save(path, optimize=True)


_SHORT = {"two": "without", "both": "ACR", "misreported": "misreported"}


def draw_affinities(path: Path, photos: Photos, cells: Chosen) -> None:
    """A row for each photo: the patch, then its attention row (mean over heads and trained layers) on the photo and on
    its flip, with the flip undone; before training and after."""
    positions = first_photos(photos, ROWS)
    networks: dict[str, StudyNetwork] = {"before": photos.upper(SEED).eval().requires_grad_(False)}
    networks |= {_SHORT[name]: _network(photos, cell) for name, cell in cells.items() if name != "misreported"}
    found = {name: affinities(model, _tokens(photos, positions), photos) for name, model in networks.items()}
    pixels = _pixels(photos, positions).mean(3) / 255
    figure = Figure(figsize=(1.5 * (1 + 2 * len(networks)) + 0.3, 1.5 * ROWS + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(ROWS, 1 + 2 * len(networks), squeeze=False)
    patch = photos.size // photos.grid[1]
    masks, present = photos.masks("dev"), photos.present("dev")
    for row, i in enumerate(positions.tolist()):
        query = query_patch(masks[i], present[i], photos.grid)
        top, left = query // photos.grid[1] * patch, query % photos.grid[1] * patch
        shown: list[np.ndarray] = []
        for both_views in found.values():
            heat = both_views[:, row, query].reshape(2, *photos.grid)
            shown += list((heat / heat.max()).repeat_interleave(patch, 1).repeat_interleave(patch, 2).numpy())
        for axis, panel in zip(axes[row, 1:], shown, strict=True):
            axis.imshow(panel, cmap="magma", vmin=0, vmax=1, alpha=0.6, zorder=1)
        for axis in axes[row]:
            axis.imshow(pixels[row], cmap="gray", vmin=0, vmax=1, zorder=0)
            axis.set(xticks=[], yticks=[])
            axis.add_patch(Rectangle((left - 0.5, top - 0.5), patch, patch, fill=False, edgecolor="lime", lw=1.2))
    headings = ["patch", *[f"{name}: {view}" for name in networks for view in ("photo", "flip")]]
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=8)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def query_patch(mask: np.ndarray, present: Sequence[int], grid: tuple[int, int]) -> int:
    """The index, row by row, of the patch that the smallest present class covers most; among equals, the one nearest to
    the middle of that class."""
    ids, pixels = np.unique(mask[np.isin(mask, present)], return_counts=True)
    covered = torch.from_numpy((mask == ids[pixels.argmin()]).astype(np.float32))[None]
    share = torch.nn.functional.adaptive_avg_pool2d(covered, grid)[0]
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).float()
    middle = (places * share[..., None]).sum((0, 1)) / share.sum()
    distance = (places - middle).norm(dim=-1)
    return int(distance.where(share == share.max(), torch.inf).flatten().argmin())


def affinities(model: StudyNetwork, tokens: Tensor, photos: Photos) -> Tensor:
    """(2,B,N,N): the affinities of the photos, and of their flips with the flip undone."""
    found = []
    with capture_attention(model, no_grad=True) as attention, torch.no_grad():
        for view, inputs in zip((None, HorizontalFlip()), tokens, strict=True):
            model(inputs)
            maps = with_grid(attention.take(), photos.grid, model.num_prefix_tokens)
            layers = []
            for layer in maps:
                weights = layer.weights().mean(1, keepdim=True)
                if view is not None:
                    weights = align_attention(weights, view, layer.layout, layer.layout)
                prefix = layer.layout.num_prefix_tokens
                layers.append(weights[:, 0, prefix:, prefix:])
            found.append(torch.stack(layers).mean(0))
    return torch.stack(found)


def draw_curves(path: Path, results: Path, photos: str, title: str) -> bool:
    """mIoU of dev photos against the background threshold, raw and propagated, mean over seeds. Draws nothing and
    returns False for a set without a background, which has no threshold."""
    cells = chosen_cells(results, photos)
    shown = {g.setting: g for g in groups(results) if g.split == "dev" and g.setting.photos == photos}
    members: list[Group] = [shown[cell.setting] for cell in cells.values() if cell.setting in shown]
    if len(next(iter(members[0].records.values()))["raw"]["curve"]) == 1:
        return False
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, maps in zip(figure.subplots(1, 2, sharey=True), ("raw", "propagated"), strict=True):
        for group in members:
            curve = np.mean([record[maps]["curve"] for record in group.records.values()], axis=0)
            label = f"{CONDITIONS[group.setting.condition].title} ({len(group.records)} seeds)"
            axis.plot(np.arange(len(curve)) / len(curve), curve, label=label)
        for row in baseline_rows(results, photos, "dev"):
            axis.axhline(row["miou"], color="0.6", lw=0.8, ls="--")
            axis.text(1.0, row["miou"], row["name"], fontsize=6, ha="right", va="bottom", color="0.4")
        axis.set(xlabel="background threshold", title=f"{maps} class maps", ylim=(0, None))
    figure.axes[0].set_ylabel("mIoU, dev photos")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    return True


def _network(photos: Photos, cell: Cell) -> StudyNetwork:
    return trained(photos, cell.setting, cell.seed).model.eval().requires_grad_(False)


def _tokens(photos: Photos, positions: Sequence[int] | Tensor) -> Tensor:
    """(2,B,1+N,D): the tokens of photos and of their flips."""
    return torch.from_numpy(np.array(photos.tokens("dev")[:, np.asarray(positions)])).float()


def _pixels(photos: Photos, positions: Tensor) -> np.ndarray:
    """(B,H,W,3) uint8, as the network sees them."""
    return to_pixels(photos.images("dev", positions))
