"""Where an overlapping stem puts tokens, and how much the loss of a flipped pair errs without knowing it.

    python -m benchmarks.coverage.stem_offsets            # SegFormer (MiT) and PVTv2, random weights; a minute
    python -m benchmarks.coverage.stem_offsets --write    # also stem_offsets.json and the table of views.md

"Before" treats the tokens as a grid that divides the image evenly, so that a flip matches query and key n-1-j with j.
"After" uses the lattices that the capture reads off the model's convolutions. The distance between matched tokens on
the image is measured by the gradient of a token with respect to the pixels (``acr_reg.check`` shows it too). The loss
is the affinity term of a smooth random image and its flip, layer by layer. With "mirrored" kernels (each averaged with
its own mirror image) the network favours no side, so that only the alignment is left.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerModel

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, HorizontalFlip, Lattice, capture_attention
from acr_reg.demo.record import write_json
from acr_reg.inspection.offsets import token_offsets
from acr_reg.integrations.jobs.progress import show_progress
from benchmarks.marked_page import begin, fill

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "views.md"
MARKER = begin("coverage.stem_offsets --write")
VIEW = HorizontalFlip()


@dataclass(frozen=True)
class Config:
    image: tuple[int, int] = (192, 256)
    batch: int = 2
    sharpness: float = 1.5  # of query and key: with fresh weights attention is uniform, and any two maps agree
    blob: int = 16  # pixels, the size of the blobs on the images
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One layer: offset and stride (x) of its lattices in pixels; before and after, the measured distance in pixels
    (largest of five) between tokens that the flip matches, and the affinity term of the pair per query row."""

    model: str
    layer: int
    query: tuple[float, float]
    key: tuple[float, float]
    query_apart: tuple[float, float]
    key_apart: tuple[float, float]
    loss: tuple[float, float]
    loss_mirrored: tuple[float, float]


def segformer() -> nn.Module:
    """The stem, strides, reductions and widths of MiT-B0, with one block in each stage."""
    config = SegformerConfig(depths=[1, 1, 1, 1], drop_path_rate=0.0, attn_implementation="eager")
    return SegformerModel(config)


def pvt() -> nn.Module:
    return timm.create_model("pvt_v2_b0", num_classes=0, depths=(1, 1, 1, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {"SegFormer": segformer, "pvt_v2_b0": pvt}


def sharpened(model: nn.Module, sharpness: float) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("query", "key", "q_proj", "k_proj", "q", "kv"):
            nn.init.normal_(module.weight, std=sharpness / module.in_features**0.5)
    return model


def mirrored(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)
    return model


def smooth_images(config: Config) -> Tensor:
    small = [side // config.blob for side in config.image]
    noise = torch.randn(config.batch, 3, *small)
    return F.interpolate(noise, config.image, mode="bicubic", align_corners=False)


def evenly(maps: AttentionMaps) -> AttentionMaps:
    """The maps on lattices that divide the image evenly."""

    def divided(grid: Lattice) -> Lattice:
        return Lattice(grid.height, grid.width, (grid.extent[0] / grid.height, grid.extent[1] / grid.width))

    layers = []
    for layer in maps:
        layout = layer.layout
        placed = replace(layout, query=divided(layout.query), key=divided(layout.key))
        layers.append(replace(layer, placed=placed))
    return AttentionMaps(layers)


@contextmanager
def observing(model: nn.Module) -> Iterator[Callable[[Tensor], AttentionMaps]]:
    with capture_attention(model) as attention:

        def observe(images: Tensor) -> AttentionMaps:
            attention.clear()
            model(images)
            return attention.take()

        yield observe


def losses(model: nn.Module, images: Tensor) -> list[tuple[float, float]]:
    """The affinity term of every layer, before and after."""
    with observing(model) as observe:
        a, b = observe(images), observe(VIEW(images))
    found = []
    for layer in a.layers:
        acr = AllPairsConsistencyLoss(VIEW, 0.0, 1.0, layers=[layer])
        with torch.no_grad():
            found.append((acr(evenly(a), evenly(b)).item(), acr(a, b).item()))
    return found


def measure(name: str, config: Config) -> list[Result]:
    torch.manual_seed(config.seed)
    model, images = MODELS[name]().eval(), smooth_images(config)
    with observing(model) as observe:
        maps = observe(images)
        before = token_offsets(lambda x: evenly(observe(x)), images, VIEW)
        after = token_offsets(observe, images, VIEW)
    # Sharp attention would show the probe what a token attends to, not what it was made from.
    plain = losses(sharpened(model, config.sharpness), images)
    without_side = losses(mirrored(model), images)
    return [
        Result(
            name,
            layer.index,
            (layer.layout.query.offset[1], layer.layout.query.stride[1]),
            (layer.layout.key.offset[1], layer.layout.key.stride[1]),
            (before[i].sides["query"].under_view, after[i].sides["query"].under_view),
            (before[i].sides["key"].under_view, after[i].sides["key"].under_view),
            plain[i],
            without_side[i],
        )
        for i, layer in enumerate(maps)
    ]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """SegFormer's rows: where its tokens lie, and what matching them by their centres changes."""
    titles = (
        "queries, px",
        "keys, px",
        "queries apart, px",
        "keys apart, px",
        "affinity term",
        "with mirrored kernels",
    )
    lines = [f"| stage | {' | '.join(titles)} |", "|---|---|---|---|---|---|---|"]
    for stage, row in enumerate((row for row in rows if row["model"] == "SegFormer"), start=1):
        places = [f"{offset:g} of {stride:g}" for offset, stride in (row["query"], row["key"])]
        apart = ["{:.1f} → {:.1f}".format(*row[name]) for name in ("query_apart", "key_apart")]
        terms = ["{:.2f} → {:.2f}".format(*row[name]) for name in ("loss", "loss_mirrored")]
        lines.append(f"| {stage} | {' | '.join((*places, *apart, *terms))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.coverage.stem_offsets", description="Offsets of stems.")
    parser.add_argument("--write", action="store_true", help="write stem_offsets.json and the table of views.md")
    args = parser.parse_args(arguments)
    config = Config()
    with show_progress() as progress:
        step = progress.begin("models", len(MODELS))
        results = []
        for name in MODELS:
            results += measure(name, config)
            step()
    for r in results:
        print(
            f"{r.model:10} layer {r.layer}: queries {r.query[0]:+6.1f} of {r.query[1]:g} px, keys {r.key[0]:+6.1f} of "
            f"{r.key[1]:g} px; matched queries apart {r.query_apart[0]:.1f} -> {r.query_apart[1]:.1f} px, keys "
            f"{r.key_apart[0]:.1f} -> {r.key_apart[1]:.1f} px; affinity {r.loss[0]:.3f} -> {r.loss[1]:.3f}, mirrored "
            f"kernels {r.loss_mirrored[0]:.3f} -> {r.loss_mirrored[1]:.3f}"
        )
    if args.write:
        machine = f"{platform.machine()}, {torch.__version__}, timm {timm.__version__}"
        file = Path(__file__).with_suffix(".json")
        write_json(file, {"machine": machine, "config": config, "results": results})
        fill(PAGE, MARKER, table(json.loads(file.read_text(encoding="utf-8"))["results"]))
        print(f"Written: {file}, {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
