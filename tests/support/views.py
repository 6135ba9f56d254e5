"""Views for tests: exact ones with the same thing said by torch and of coordinates, boxes, crops, and random maps."""

import pytest
import torch
import torch.nn.functional as F

from acr_reg import Compose, Crop, HorizontalFlip, Identity, Rotate90, VerticalFlip
from tests.support.attention import generator
from tests.support.oracles import chain, mirror, stay, turn, upend

SIZE = (12, 17)
BOXES = {
    "inside": (3, 5, 6, 8),
    "top left": (0, 0, 5, 7),
    "bottom right": (4, 9, 8, 8),
    "one row": (6, 2, 1, 9),
    "one column": (2, 16, 7, 1),
    "one pixel": (11, 16, 1, 1),
    "whole": (0, 0, 12, 17),
}
BEYOND = {
    "all around": (-2, -3, 17, 24),
    "top left": (-4, -5, 9, 11),
    "bottom right": (8, 12, 9, 9),
    "a corner pixel": (-3, 16, 4, 5),
    "inside": (1, 2, 3, 4),
}
any_box = pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
any_box_beyond = pytest.mark.parametrize("box", BEYOND.values(), ids=BEYOND)
# Crops of four images of 12 x 16 to 6 x 6, that resample and that do not.
CROPS = [
    Crop(0, 0, 6, 6, size=6, image_size=(12, 16)),
    Crop(3, 5, 6, 9, size=6, image_size=(12, 16)),
    Compose([Rotate90(), Crop(4, 1, 8, 7, size=6, image_size=(16, 12))]),
    Compose([Crop(-2, -3, 14, 14, size=6, image_size=(12, 16), pad=True), Rotate90(3), HorizontalFlip()]),
]
EXACT_CROPS = [
    Crop(0, 0, 6, 6, image_size=(12, 16)),
    Compose([Crop(4, 9, 6, 6, image_size=(12, 16)), HorizontalFlip()]),
    Compose([Rotate90(), Crop(7, 1, 6, 6, image_size=(16, 12))]),
    Compose([Crop(-2, 13, 6, 6, image_size=(12, 16), pad=True), Rotate90(3), VerticalFlip()]),
]
# Each exact view, what torch calls it, and the same said of coordinates.
EXACT = {
    "identity": (Identity(), lambda x: x, stay),
    "horizontal": (HorizontalFlip(), lambda x: x.flip(-1), mirror),
    "vertical": (VerticalFlip(), lambda x: x.flip(-2), upend),
    "turn 0": (Rotate90(0), lambda x: x, stay),
    "turn 1": (Rotate90(1), lambda x: torch.rot90(x, 1, (-2, -1)), turn),
    "turn 2": (Rotate90(2), lambda x: torch.rot90(x, 2, (-2, -1)), chain(turn, turn)),
    "turn 3": (Rotate90(3), lambda x: torch.rot90(x, 3, (-2, -1)), chain(turn, turn, turn)),
    "turn -1": (Rotate90(-1), lambda x: torch.rot90(x, -1, (-2, -1)), chain(turn, turn, turn)),
    "transposition": (Compose([Rotate90(1), VerticalFlip()]), lambda x: x.mT, chain(turn, upend)),
    "turned mirror": (
        Compose([HorizontalFlip(), Rotate90(1), VerticalFlip()]),
        lambda x: torch.rot90(x.flip(-1), 1, (-2, -1)).flip(-2),
        chain(mirror, turn, upend),
    ),
}
any_exact = pytest.mark.parametrize("name", EXACT)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def ramp(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def interpolate(images, size):
    assert size[1] > 1  # torch 2.14 on a CPU is wrong for outputs one pixel wide (not for ones one pixel high)
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
