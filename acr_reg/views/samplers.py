"""Samplers: random augmentations that draw a :class:`~acr_reg.View`.

The drawn view knows what it did, so attention and class maps can be carried back. ``sample(images)`` draws one view for
the whole batch, ``sample(images, per_image=True)`` one for each image. Random numbers come from torch's global
generator or from ``generator=``.

>>> import torch
>>> from acr_reg import HorizontalFlip
>>> images = torch.rand(2, 3, 64, 96)
>>> sampler = RandomCompose([RandomApply(HorizontalFlip()), RandomResizedCrop(32)])
>>> view = sampler.sample(images, per_image=True)
>>> view(images).shape, view.num_images
(torch.Size([2, 3, 32, 32]), 2)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from acr_reg.views.constructors import Compose, Crop, Identity, PerImage, Scale
from acr_reg.views.view import Size, View

_TRIES = 10  # draws of a box before the fallback, as in torchvision


class Sampler(ABC):
    """Draws views. A subclass defines how to draw a view for images of a given size."""

    @abstractmethod
    def draw(self, size: tuple[int, int], generator: Generator | None = None) -> View:
        """Draws a view for images of ``size`` (height, width)."""

    def sample(self, images: Tensor | Size, per_image: bool = False, generator: Generator | None = None) -> View:
        """Draws a view for ``images`` (..., H, W), or for images of a size (H, W). With ``per_image`` it holds one view
        for each image of the batch (B, C, H, W), all of one output size."""
        if not isinstance(images, Tensor):
            if per_image:
                raise ValueError(
                    f"The size {tuple(images)} does not tell how many images there are. With per_image=True pass the "
                    "images (B, C, H, W)."
                )
            if len(images) != 2:
                raise ValueError(f"The size is {tuple(images)}. Pass (H, W) as images.shape[-2:], or the images.")
            return self.draw((int(images[0]), int(images[1])), generator)
        if images.ndim < (4 if per_image else 2):
            raise ValueError(
                f"The images have shape {tuple(images.shape)}. Pass (B, C, H, W){'' if per_image else ' or (H, W)'}; "
                "stack the images of a batch."
            )
        size = (images.shape[-2], images.shape[-1])
        if not per_image:
            return self.draw(size, generator)
        if len(images) == 0:
            raise ValueError(
                f"The batch {tuple(images.shape)} holds no images, and per_image=True draws one view for each. Skip it."
            )
        return PerImage([self.draw(size, generator) for _ in range(images.shape[0])])


def _uniform(low: float, high: float, generator: Generator | None) -> float:
    return low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator, device="cpu").item()


def _drawn(step: View | Sampler, size: tuple[int, int], generator: Generator | None) -> View:
    return step if isinstance(step, View) else step.draw(size, generator)


def _check_steps(steps: Sequence[View | Sampler]) -> list[View | Sampler]:
    if isinstance(steps, (View, Sampler)) or not steps:
        raise TypeError(
            f"The steps are {steps!r}. Pass a sequence of views and samplers, as [HorizontalFlip(), Identity()]."
        )
    for step in steps:
        if not isinstance(step, (View, Sampler)):
            raise TypeError(
                f"One of the steps is a {type(step).__name__}. Pass views and samplers of acr_reg; "
                "Crop(*get_params(...), ...) repeats a crop of torchvision."
            )
    return list(steps)


class RandomApply(Sampler):
    """Applies ``step``, a view or a sampler, with probability ``p``, else Identity()."""

    def __init__(self, step: View | Sampler, p: float = 0.5) -> None:
        (self.step,) = _check_steps([step])
        if not 0 <= p <= 1:
            raise ValueError(f"p={p} is not a probability. Pass one in [0, 1]; 0.5 applies the step half the time.")
        self.p = p

    def __repr__(self) -> str:
        return f"RandomApply({self.step!r}, p={self.p})"

    def draw(self, size: tuple[int, int], generator: Generator | None = None) -> View:
        return _drawn(self.step, size, generator) if _uniform(0, 1, generator) < self.p else Identity()


class _OfSteps(Sampler):
    def __init__(self, steps: Sequence[View | Sampler]) -> None:
        self.steps = _check_steps(steps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.steps})"


class RandomChoice(_OfSteps):
    """Picks one of several views or samplers, all equally likely: ``RandomChoice([Rotate90(k) for k in range(4)])``."""

    def draw(self, size: tuple[int, int], generator: Generator | None = None) -> View:
        chosen = torch.randint(len(self.steps), (), generator=generator, device="cpu").item()
        return _drawn(self.steps[int(chosen)], size, generator)


class RandomCompose(_OfSteps):
    """Applies views and samplers one after another, each drawn for the output size of the one before."""

    def draw(self, size: tuple[int, int], generator: Generator | None = None) -> View:
        views: list[View] = []
        for step in self.steps:
            views.append(_drawn(step, size, generator))
            size = views[-1].output_size(size)
        return Compose(views)


class RandomScale(Sampler):
    """Scales height and width by one factor within the range ``scale``, as ``RandomScale((0.5, 2))``. ``keep_size`` is
    as for :func:`~acr_reg.Scale`; ``per_image=True`` needs it."""

    def __init__(self, scale: tuple[float, float], keep_size: bool = False) -> None:
        if not isinstance(scale, (tuple, list)) or len(scale) != 2 or not isinstance(keep_size, bool):
            raise TypeError(
                f"scale={scale!r} and keep_size={keep_size!r} are not a range and a bool. Pass the range as a pair: "
                "RandomScale((0.5, 2))."
            )
        low, high = scale
        if not 0 < low <= high < math.inf:
            raise ValueError(f"scale={scale} is no range of factors. Pass 0 < low <= high, as RandomScale((0.5, 2)).")
        self.scale, self.keep_size = (low, high), keep_size

    def __repr__(self) -> str:
        return f"RandomScale({self.scale}{', keep_size=True' if self.keep_size else ''})"

    def draw(self, size: tuple[int, int], generator: Generator | None = None) -> View:
        return Scale(_uniform(*self.scale, generator), self.keep_size)


class RandomResizedCrop(Sampler):
    """Crops a box with a random share ``scale`` of the image's area and random proportions ``ratio`` (width over
    height), and resizes it to ``size``. The distribution equals torchvision's RandomResizedCrop."""

    def __init__(
        self,
        size: int | Size,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        pairs = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in (scale, ratio))
        if not pairs or not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1] < math.inf):
            raise ValueError(
                f"scale={scale} and ratio={ratio} are not both ranges. Pass scale with 0 < low <= high <= 1, and ratio "
                "with 0 < low <= high."
            )
        self.size, self.scale, self.ratio = size, scale, ratio

    def __repr__(self) -> str:
        return f"RandomResizedCrop({self.size}, scale={self.scale}, ratio={self.ratio})"

    def draw(self, size: tuple[int, int], generator: Generator | None = None) -> View:
        rows, columns = size
        for _ in range(_TRIES):
            area = rows * columns * _uniform(*self.scale, generator)
            ratio = math.exp(_uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), generator))
            height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < height <= rows and 0 < width <= columns:
                top, left = (
                    int(torch.randint(space + 1, (), generator=generator, device="cpu").item())
                    for space in (rows - height, columns - width)
                )
                return Crop(top, left, height, width, self.size, image_size=size)
        # Otherwise the largest box in the middle with allowed proportions.
        height, width = rows, columns
        if columns / rows < self.ratio[0]:
            height = max(1, round(columns / self.ratio[0]))
        elif columns / rows > self.ratio[1]:
            width = max(1, round(rows * self.ratio[1]))
        return Crop((rows - height) // 2, (columns - width) // 2, height, width, self.size, image_size=size)
