"""The pictures of docs/guides/pictures: contact sheets of the demo's scenes, by the command ``python -m acr_reg show``.

    python -m benchmarks.pictures sheet    # writes docs/guides/pictures/sheet.png and heat.png; two minutes

The scenes are composed from files that scikit-image and matplotlib ship. The class maps are the fused maps of the
demo's small vision transformer, trained for a short while on image labels alone, without ACR.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from acr_reg.__main__ import main as acr_reg
from acr_reg.demo import scenes
from acr_reg.demo.scene_task import FUSED, QUICK, SceneSettings, SceneTask
from acr_reg.demo.scoring import class_maps, resized
from acr_reg.integrations.formats import save_cams
from acr_reg.integrations.formats.masks import save_mask

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "guides" / "pictures"
SHOWN = 8  # scenes
SETTINGS = SceneSettings(pretrain_steps=300, train_scenes=8000)  # less than the demo's: these pictures prove nothing
COMMAND = [
    "show",
    "--cams",
    "cams",
    "--photos",
    "photos",
    "--list",
    "val.txt",
    "--names",
    "names.txt",
    "--panel",
    "120",
]
PICTURES = {"sheet": ["--masks", "masks"], "heat": ["--first", "4"]}


def write_data(folder: Path, settings: SceneSettings) -> None:
    """The scenes with their masks and class maps, as a user of the command has them."""
    task = SceneTask(0, settings)
    task.pretrain(lambda: None)
    data = scenes.compose(SHOWN, 0, "dev")
    with task.reading(task.fork()) as read:
        found, _ = class_maps(read, scenes.to_input(data.images), data.labels)
    for name in ("photos", "masks", "cams"):
        (folder / name).mkdir()
    names = [f"scene_{i + 1}" for i in range(SHOWN)]
    for i, name in enumerate(names):
        Image.fromarray(data.images[i].movedim(0, -1).numpy()).save(folder / "photos" / f"{name}.png")
        save_mask(folder / "masks" / f"{name}.png", data.masks[i].numpy())
        present = data.labels[i].nonzero()[:, 0].tolist()
        maps = resized(found[FUSED][i, present], data.masks[i].shape).numpy()
        save_cams(folder / "cams" / f"{name}.npy", dict(zip(present, maps, strict=True)))
    (folder / "val.txt").write_text("\n".join(names), encoding="utf-8")
    (folder / "names.txt").write_text("\n".join(scenes.CLASSES), encoding="utf-8")


def write(folder: Path, settings: SceneSettings) -> None:
    """Write the pictures."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data, _inside(Path(data)):
        write_data(Path(data), settings)
        for name, options in PICTURES.items():
            if acr_reg([*COMMAND, *options, "--output", f"{name}.png"]):
                raise RuntimeError(f"The command for {name}.png failed. Its message stands above.")
            Image.open(f"{name}.png").save(folder / f"{name}.png", optimize=True)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The pictures name the files by short paths."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.pictures sheet", description="Draw docs/guides/pictures/*.png."
    )
    parser.add_argument("--quick", action="store_true", help="train for a few steps: the maps mean nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the pictures (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are small
    write(options.folder, QUICK if options.quick else SETTINGS)
    return 0
