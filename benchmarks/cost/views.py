"""CPU time of views of a batch of photos, compared with torchvision's functions on the same boxes.

    python -m benchmarks.cost views            # 16 images of 448 px; about a minute
    python -m benchmarks.cost views --write    # also benchmarks/cost/results/views.json

torchvision crops and resizes each image by itself where each has its own box; views carry out the whole batch. Both are
timed in turns in one process, in process CPU time, without and with the backward pass to the images. The command also
prints how far the images are from torchvision's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import RandomResizedCrop as GivenCrop

from acr_reg import Compose, Crop, HorizontalFlip, PerImage, Scale
from benchmarks.cost.process import RESULTS, Quartiles, in_turns, merge, parse, quartiles

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    images: int = 16
    size: int = 448
    crop: int = 224
    rounds: int = 15
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One view. Quartiles are (lower, median, upper) over rounds; ratios are computed in each round. ``difference`` is
    the largest one of a pixel in [0, 1]."""

    view: str
    backward: bool
    images: int
    size: int
    cpu_seconds: Quartiles
    over_torchvision: Quartiles
    difference: float


def pairs(config: Config, images: Tensor) -> dict[str, tuple[Function, Function]]:
    """Each view, and torchvision's functions that do the same."""
    size, to = (config.size, config.size), [config.crop, config.crop]
    boxes = [GivenCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for image in images]
    crops = [Crop(top, left, h, w, config.crop, image_size=size) for top, left, h, w in boxes]
    flipped = [Compose([crop, HorizontalFlip()]) if i % 2 else crop for i, crop in enumerate(crops)]

    def each(x: Tensor) -> list[Tensor]:
        return [TF.resized_crop(image, *box, to, antialias=True) for image, box in zip(x, boxes, strict=True)]

    def each_flipped(x: Tensor) -> Tensor:
        return torch.stack([TF.hflip(image) if i % 2 else image for i, image in enumerate(each(x))])

    def scaled(factor: float) -> Function:
        return lambda x: TF.resize(x, [round(config.size * factor)] * 2, antialias=True)

    return {
        "a random crop of each image": (PerImage(crops), lambda x: torch.stack(each(x))),
        "and a flip of every second": (PerImage(flipped), each_flipped),
        "one random crop for all": (crops[0], lambda x: TF.resized_crop(x, *boxes[0], to, antialias=True)),
        "Scale(0.5)": (Scale(0.5), scaled(0.5)),
        "Scale(1.5)": (Scale(1.5), scaled(1.5)),
        "HorizontalFlip()": (HorizontalFlip(), TF.hflip),
    }


def measure(config: Config) -> list[Result]:
    torch.manual_seed(config.seed)
    images = torch.rand(config.images, 3, config.size, config.size)
    results = []
    for name, (view, peer) in pairs(config, images).items():
        difference = (view(images) - peer(images)).abs().max().item()
        for backward in (False, True):
            calls = {"view": _call(view, images, backward), "torchvision": _call(peer, images, backward)}
            spent = in_turns(calls, config.rounds)
            ratios = quartiles([a / b for a, b in zip(spent["view"], spent["torchvision"], strict=True)])
            about = (name, backward, config.images, config.size)
            results.append(Result(*about, quartiles(spent["view"]), ratios, difference))
    return results


def _call(function: Function, images: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:
        return lambda: function(images)
    return lambda: function(images.detach().requires_grad_()).sum().backward()


def show(results: Sequence[Result]) -> None:
    for r in results:
        low, ratio, high = r.over_torchvision
        print(
            f"{r.view:28} {'with backward' if r.backward else '':13} {1000 * r.cpu_seconds[1]:7.1f} ms, {ratio:.2f} "
            f"({low:.2f} to {high:.2f}) of torchvision, pixels differ by {r.difference:.0e}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost views", description="CPU time of views of images.")
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    args = parse(parser, "views", None, arguments)
    assert args is not None
    torch.set_num_threads(Config.threads)
    config = Config(rounds=args.rounds)
    results = measure(config)
    show(results)
    if args.write:
        merge(RESULTS / "views.json", [asdict(r) for r in results], ("view", "backward"), config=asdict(config))
    return 0
