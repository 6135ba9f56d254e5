"""Wall and CPU time of jobs over a folder: class maps that write_cams makes, and scores of saved class maps.

    python -m benchmarks.cost folders            # 16 photos through a ViT-S at 224 px, 256 images scored
    python -m benchmarks.cost folders --write    # also benchmarks/cost/results/folders.json

Photos, masks and the scored maps are generated: 366 x 500 px, 1 to 3 of 20 classes each. write_cams is timed with
batches of 1 and 8, reading in its own process and in a worker. Scoring is timed in one process, in two workers, and as
updates of the counters alone, without files. All variants of a job are timed in turns in one process. CPU time includes
the workers; torch has one thread. The command also prints how far class maps and mIoU are from the first variant's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from acr_reg import CamMeanIoU, GradientCam
from acr_reg.integrations.cam_folder import write_cams
from acr_reg.integrations.formats import load_cams, save_cams
from acr_reg.integrations.formats.masks import read_mask, save_mask
from acr_reg.integrations.scoring import Sample, score_cams
from benchmarks.cost.process import RESULTS, Quartiles, in_turns, merge, parse, quartiles

CLASSES = 20


@dataclass(frozen=True)
class Config:
    model: str = "vit_small_patch16_224"
    size: int = 224
    written: int = 16
    scored: int = 64  # files, each of which is scored several times
    times: int = 4
    height: int = 366
    width: int = 500
    most_present: int = 3
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One variant of a job. Quartiles are (lower, median, upper) over rounds, ratios to the job's first variant in each
    round. ``difference`` is the largest one of class maps in [0, 1], or of mIoU at any threshold, to that variant's."""

    job: str
    variant: str
    images: int
    rounds: int
    wall_seconds: Quartiles
    cpu_seconds: Quartiles
    wall_ratio: Quartiles
    cpu_ratio: Quartiles
    difference: float


class Seconds(NamedTuple):
    wall: float
    cpu: float


def now() -> Seconds:
    """CPU time is that of this process and of the workers that have ended."""
    return Seconds(time.perf_counter(), time.process_time() + sum(os.times()[2:4]))


def compare(job: str, images: int, variants: Mapping[str, Callable[[], list[np.ndarray]]], rounds: int) -> list[Result]:
    """Time the variants in turns. Each returns what it computed."""
    spent: dict[str, list[Seconds]] = {name: [] for name in variants}
    found: dict[str, list[np.ndarray]] = {}

    def measured(name: str) -> None:
        begin = now()
        found[name] = variants[name]()
        end = now()
        spent[name].append(Seconds(end.wall - begin.wall, end.cpu - begin.cpu))

    in_turns({name: partial(measured, name) for name in variants}, rounds)
    first = next(iter(variants))
    results = []
    for name in variants:
        pairs = list(zip(spent[name], spent[first], strict=True))[1:]  # without the round that warms up
        results.append(
            Result(
                job,
                name,
                images,
                rounds,
                quartiles([own.wall for own, _ in pairs]),
                quartiles([own.cpu for own, _ in pairs]),
                quartiles([own.wall / other.wall for own, other in pairs]),
                quartiles([own.cpu / other.cpu for own, other in pairs]),
                max(float(np.abs(a - b).max()) for a, b in zip(found[name], found[first], strict=True)),
            )
        )
    return results


# ---------------------------------------------------------------- write_cams


@dataclass(frozen=True)
class Transform:
    """From a photo to the model's input, in a worker if there is one."""

    size: int

    def __call__(self, photo: Image.Image) -> Tensor:
        pixels = np.array(photo.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def measure_writing(config: Config, folder: Path) -> list[Result]:
    random = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    labels: dict[str, np.ndarray] = {}
    for number in range(config.written):
        pixels = random.integers(0, 256, (config.height // 8, config.width // 8, 3), np.uint8)
        photo = Image.fromarray(pixels).resize((config.width, config.height), Image.Resampling.BICUBIC)
        photo.save(folder / f"{number:03}.jpg")
        labels[f"{number:03}"] = np.isin(np.arange(CLASSES), present(config, random)).astype(np.float32)
    model = timm.create_model(config.model, num_classes=CLASSES, img_size=config.size)
    with GradientCam(model) as cam:

        def write(batch: int, workers: int) -> list[np.ndarray]:
            target = folder / "cams"
            images, transform = [folder / f"{name}.jpg" for name in labels], Transform(config.size)
            options = {"batch_size": batch, "workers": workers, "overwrite": True, "progress": False, "share": False}
            report = write_cams(cam, images, labels, target, transform, **options)  # type: ignore[arg-type]
            assert not report.failed, report
            return [np.stack(list(load_cams(target / f"{name}.npy").values())) for name in labels]

        variants = {
            f"batches of {batch}, {'a worker reads' if workers else 'no worker'}": partial(write, batch, workers)
            for workers in (0, 1)
            for batch in config.batches
        }
        return compare("write_cams", config.written, variants, config.rounds)


def present(config: Config, random: np.random.Generator) -> list[int]:
    """The 0-based classes of an image."""
    count = random.integers(1, config.most_present + 1)
    return sorted(random.choice(CLASSES, count, replace=False).tolist())


# ---------------------------------------------------------------- evaluate


def measure_scoring(config: Config, folder: Path) -> list[Result]:
    random = np.random.default_rng(config.seed)
    samples = []
    for number in range(config.scored):
        classes = present(config, random)
        maps = {k: random.random((config.height, config.width), dtype=np.float32) for k in classes}
        sample = Sample(f"{number:03}", folder / f"{number:03}.npy", folder / f"{number:03}.png")
        save_cams(sample.prediction, maps)
        save_mask(sample.mask, random.choice([0, *(k + 1 for k in classes)], (config.height, config.width)))
        samples.append(sample)
    samples *= config.times
    loaded = [(load_cams(sample.prediction), read_mask(sample.mask)) for sample in samples[: config.scored]]
    empty = CamMeanIoU(CLASSES + 1)

    def evaluate(workers: int) -> list[np.ndarray]:
        return [score_cams(samples, empty, workers=workers, progress=False).compute().miou]

    def update() -> list[np.ndarray]:
        metric = CamMeanIoU(CLASSES + 1)
        for maps, mask in loaded * config.times:
            metric.update(np.stack(list(maps.values())), mask, [k + 1 for k in maps])
        return [metric.compute().miou]

    variants: dict[str, Callable[[], list[np.ndarray]]] = {
        "no worker": partial(evaluate, 0),
        "two workers": partial(evaluate, 2),
        "counting alone, no files": update,
    }
    return compare("evaluate", len(samples), variants, config.rounds)


def measure(config: Config) -> list[Result]:
    torch.set_num_threads(config.threads)
    results = []
    for job in (measure_writing, measure_scoring):
        with tempfile.TemporaryDirectory() as folder:
            results += job(config, Path(folder))
    return results


def show(results: Sequence[Result]) -> None:
    for r in results:
        wall, cpu = (1000 * seconds[1] / r.images for seconds in (r.wall_seconds, r.cpu_seconds))
        (low, ratio, high), of_cpu = r.wall_ratio, r.cpu_ratio[1]
        print(
            f"{r.job:11}{r.variant:30} an image: {wall:7.1f} ms, {cpu:7.1f} ms of CPU time; of the first {ratio:.2f} "
            f"({low:.2f} to {high:.2f}), {of_cpu:.2f} of its CPU time; differs by {r.difference:.0e}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost folders", description="Time of jobs over a folder.")
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    args = parse(parser, "folders", None, arguments)
    if args is None:
        return 0
    config = Config(rounds=args.rounds)
    results = measure(config)
    show(results)
    if args.write:
        merge(RESULTS / "folders.json", [asdict(r) for r in results], ("job", "variant"), config=asdict(config))
    return 0
