"""A script that writes class maps, for tests that start it in several processes: ``python -m tests.support.shared_run
FOLDER``. Image N is N everywhere, so that each call of ``cam`` can note what it was asked to make."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acr_reg.integrations.cam_folder import write_cams

COUNT = 24
NAMES = [f"{number:03}" for number in range(COUNT)]


def make_photos(folder: Path) -> None:
    for number, name in enumerate(NAMES):
        Image.fromarray(np.full((6 + number % 3, 8, 3), number, np.uint8)).save(folder / f"{name}.png")


def calls(folder: Path, target: str = "cams") -> list[str]:
    """What ``cam`` was asked to make so far for one target, by all processes."""
    log = folder / f"{target}_calls.txt"
    return log.read_text().split() if log.exists() else []


def transform(photo: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255


def noting_cam(log: Path, seconds: float, killed_once: str) -> Callable[[Tensor, Tensor], Tensor]:
    def cam(images: Tensor, labels: Tensor) -> Tensor:
        time.sleep(seconds)
        names = [NAMES[round(image[0, 0, 0].item() * 255)] for image in images]
        if killed_once in names and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        with open(log, "a") as file:
            file.write("".join(f"{name}\n" for name in names))
        return images[:, :1]

    return cam


def main(folder: Path, seconds: str = "0.05", killed_once: str = "") -> None:
    photos = [folder / f"{name}.png" for name in NAMES]
    for target in ("cams", "more"):  # two runs in one job
        cam = noting_cam(folder / f"{target}_calls.txt", float(seconds), killed_once)
        report = write_cams(cam, photos, {name: [1] for name in NAMES}, folder / target, transform, batch_size=2)
        result = [report.written, report.existing, report.failed]
        (folder / f"{target}_report_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
