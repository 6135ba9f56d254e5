"""Finds the images that an encoder run reads, and so the size that tells the grid of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_PADDED_AT_MOST = 64  # pixels, no patch is larger
_SHRUNK_AT_MOST = 4  # times, by a model that resizes its images


class ImageState:
    """The images of the coming run on one thread."""

    def __init__(self) -> None:
        self.given: tuple[int, int, int, int] | None = None  # (B, C, H, W) that the outermost module was given
        self.reset()

    def reset(self) -> None:
        """What comes without an image of its own must not inherit one."""
        self.size: tuple[int, int, int] | None = None  # (B, H, W)
        self.module: nn.Module | None = None
        self.seen: Tensor | None = None


class ImageWatch:
    """Tells images from other tensors among what modules are given."""

    def __init__(self) -> None:
        self.modules: set[nn.Module] = set()
        self.padding: str | None = None  # the warning that is due where the model pads its images

    def note(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: ImageState,
        outermost: bool,
        is_root: bool,
    ) -> bool:
        """Whether ``module`` reads images: what the outermost one is given, and the innermost that is given the same.

        A convolution over as many channels reads images too, resized or normalised on the way. Elsewhere a (B, C, H, W)
        tensor may just as well be the queries of three heads.
        """
        first = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(first, Tensor) or first.ndim != 4 or first.shape[1] > 4 or not first.is_floating_point():
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
                self._note_padding(state.given, first.shape)
        state.seen, state.size, state.module = first, (batch, height, width), module
        return True

    def _note_padding(self, given: Sequence[int], read: Sequence[int]) -> None:
        """Padding to whole patches moves the tokens of a flipped image; resizing does not, and changes more."""
        added = [read[i] - given[i] for i in (2, 3)]
        if min(added) >= 0 < max(added) < _PADDED_AT_MOST:
            self.padding = (
                f"found images of {given[2]} x {given[3]} px that the model pads to {read[2]} x {read[3]}, so the "
                f"tokens of a flipped image lie up to {max(added)} px off those they are matched with; expected whole "
                "patches; resize or crop the images to a multiple of the patch size before both forwards"
            )


def _reads(module: nn.Module, channels: int, state: ImageState) -> bool:
    """Whether a part of the model that is called by itself has a convolution for images of so many channels."""
    if state.size is not None and state.given is not None and channels != state.given[1]:
        return False
    return any(isinstance(m, nn.Conv2d) and m.in_channels == channels for m in module.modules())


def _may_be_resized(images: Sequence[int], maps: Sequence[int]) -> bool:
    """Whether maps (B, C, H, W) of few channels are still the images, and not, say, those of a narrow stem."""
    shrunk = [_SHRUNK_AT_MOST * maps[i] < images[i] for i in (2, 3)]
    return maps[0] == images[0] and maps[1] == images[1] and not any(shrunk)
