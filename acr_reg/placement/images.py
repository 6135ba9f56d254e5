"""Finds the images that an encoder run reads: their size determines the grid of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from acr_reg._tensors import is_dense
from acr_reg.placement.sources import Sources

_PADDED_AT_MOST = 64  # pixels: no patch is larger
_SHRUNK_AT_MOST = 4  # the factor by which a model may shrink its images


class ImageState:
    """The images of the coming run on one thread."""

    def __init__(self) -> None:
        self.given: tuple[int, int, int, int] | None = None  # (B, C, H, W) that the outermost module was given
        self.reset()

    def reset(self) -> None:
        """Forgets the images, so that a run without its own inherits none."""
        self.size: tuple[int, int, int] | None = None  # (B, H, W)
        self.module: nn.Module | None = None
        self.seen: Tensor | None = None


class ImageWatch:
    """Tells images from other tensors among the arguments of modules."""

    def __init__(self, channels: int | None = None) -> None:
        self._channels = channels  # of images with more than four, as the user says
        self.modules: set[nn.Module] = set()
        self.padding: str | None = None  # the warning to give if the model pads its images
        self._resizes = False  # whether a run showed that what looks like padding is none

    def note(
        self, module: nn.Module, first: Any, state: ImageState, outermost: bool, is_root: bool, sources: Sources | None
    ) -> bool:
        """Notes the images if ``module`` is given any as its ``first`` argument, and returns whether it is.

        The outermost module reads images. So do inner modules that are given the same tensor, and a convolution over
        as many channels. Elsewhere a (B, C, H, W) tensor may be the queries of three heads.
        """
        if not is_dense(first) or first.ndim != 4 or not first.is_floating_point():
            return False
        if first.shape[1] > 4 and first.shape[1] != self._channels:
            return False
        batch, channels, height, width = first.shape
        if outermost and (is_root or _reads(module, channels, state)):
            state.given = (batch, channels, height, width)
        elif first is not state.seen:
            if module not in self.modules:
                reads_images = isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
                if not reads_images or (state.given is not None and not _may_be_resized(state.given, first.shape)):
                    return False
            if state.given is not None:
                self._note_padding(state.given, first, sources)
        state.seen, state.size, state.module = first, (batch, height, width), module
        return True

    def _note_padding(self, given: Sequence[int], images: Tensor, sources: Sources | None) -> None:
        """Notes padding to whole patches, which moves a flip's tokens. Resizing moves none, and images of other sizes
        are none: a run that is followed tells them apart. Later ones are taken for like it, or are told by the size."""
        read = images.shape
        added = [read[i] - given[i] for i in (2, 3)]
        if self._resizes or not min(added) >= 0 < max(added) < _PADDED_AT_MOST:
            return
        self._resizes = sources is not None and not sources.shows_padding(images)
        if not self._resizes:
            self.padding = (
                f"The model pads images of {given[2]} x {given[3]} px to {read[2]} x {read[3]}, which moves tokens of "
                f"a flip up to {max(added)} px apart. Resize or crop to whole patches."
            )


def _reads(module: nn.Module, channels: int, state: ImageState) -> bool:
    """Whether a part of the model, called on its own, has a convolution for images with this many channels."""
    if state.size is not None and state.given is not None and channels != state.given[1]:
        return False
    return any(isinstance(m, nn.Conv2d) and m.in_channels == channels for m in module.modules())


def _may_be_resized(images: Sequence[int], maps: Sequence[int]) -> bool:
    """Whether maps (B, C, H, W) are resized images rather than feature maps of a narrow stem."""
    shrunk = [_SHRUNK_AT_MOST * maps[i] < images[i] for i in (2, 3)]
    return maps[0] == images[0] and maps[1] == images[1] and not any(shrunk)
