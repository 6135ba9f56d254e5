"""The pictures of docs/guides/attention: what a pretrained ViT-S/14 attends to in a photograph and in its flip.

    python -m benchmarks.pictures attention --weights FILE    # writes docs/guides/attention/*.png; 10 seconds

The photograph comes with scikit-image. Without ``--weights`` timm downloads the weights of DINOv2.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from acr_reg import HorizontalFlip
from acr_reg.demo.photos import pretrained
from acr_reg.pictures.attention import show_attention

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "guides" / "attention"
SIZE = 24 * pretrained.PATCH  # px, a square
FACE = (6, 10)  # the patch on the nose, of 24 x 24
LAST_ROW = 3.1  # inches: the panels of one patch at the bottom of the picture, which README shows alone


def photograph() -> Tensor:
    """The astronaut, (3, SIZE, SIZE) in [0, 1]."""
    from skimage import data

    pixels = torch.from_numpy(data.astronaut()).movedim(-1, 0)[None].float() / 255
    return F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)[0].clamp(0, 1)


def build(weights: Path | None) -> nn.Module:
    """The whole ViT, for images of SIZE x SIZE pixels."""
    model: nn.Module = timm.create_model(pretrained.NAME, pretrained=False, img_size=SIZE, num_classes=0)
    state = pretrained.load_weights(weights) if weights is not None else pretrained.download_weights()
    state["pos_embed"] = pretrained.resize_positions(state["pos_embed"], SIZE // pretrained.PATCH)
    model.load_state_dict(state)
    return model


def write(folder: Path, model: nn.Module, dpi: int = 80) -> Path:
    """Write astronaut.png, of a model for images of SIZE x SIZE pixels, and its last row as consistency.png."""
    photo = photograph()
    mean, std = (torch.tensor(each)[:, None, None] for each in (pretrained.MEAN, pretrained.STD))
    figure = show_attention(model, ((photo - mean) / std)[None], photo, HorizontalFlip(), patch=FACE)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "astronaut.png"
    # Half the bytes. Without k-means the few purple pixels would turn red.
    few = Image.open(drawn).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    few.crop((0, few.height - int(LAST_ROW * dpi), *few.size)).save(folder / "consistency.png", optimize=True)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.pictures attention", description="Draw docs/guides/attention."
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help=f"of timm's {pretrained.NAME} (default: download)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{write(options.folder, build(options.weights))}, with {pretrained.describe(options.weights)}")
    return 0
