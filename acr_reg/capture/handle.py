"""The handle of a capture: :func:`capture_attention` starts it, :class:`AttentionCapture` hands out the maps.

:class:`Removable` is the base of every handle on a hooked model.
"""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TypeVar

from torch import nn

from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.capture.hooks import Alone
from acr_reg.capture.recorder import Recorder
from acr_reg.capture.refusals import one_of, refuse_empty, refuse_no_images, refuse_partial, refuse_split
from acr_reg.capture.runs import Keep, Run
from acr_reg.errors import CaptureError, listed
from acr_reg.placement.grids import LayoutHints
from acr_reg.placement.kinds import explain_windows
from acr_reg.placement.modules import ModuleIndex
from acr_reg.placement.placer import Placer

Self = TypeVar("Self", bound="Removable")


def capture_attention(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = None,
    modules: Iterable[str | nn.Module] | None = None,
    patch_size: int | Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    num_suffix_tokens: int | None = None,
    class_tokens: int | Sequence[int] | None = None,
    image_channels: int | None = None,
    keep: Keep = "only",
    no_grad: bool = False,
    double_backward: bool = False,
    graph_from: int | None = None,
    record_products: bool = False,
) -> AttentionCapture:
    """Captures the self-attention of every forward pass of ``model`` from now on, whichever method starts it.

    Args:
        model: any module. Its kernels, outputs, parameters, modes and state dict stay as they are.
        layers: attention layers to keep, by the order in which they run (negative: from the last); None keeps all.
        modules: capture only attention within these modules or names, such as one of two encoders; None means all.
        class_tokens: for models with several class tokens, such as MCTformer. C (the number of classes) says that the
            first C tokens are class tokens and token c belongs to class c. A list gives positions among all tokens (-1
            is the last). Not needed for one class token, nor for a parameter named ``cls_token(s)`` or
            ``class_token(s)``.
        patch_size, num_prefix_tokens, num_suffix_tokens: describe the tokens if the model's own fields are missing or
            wrong. Prefix tokens stand before the patches and suffix tokens behind them.
        image_channels: the number of bands of the images, if they have more than four.
        keep: the encoder runs that :meth:`AttentionCapture.take` accepts, as training code may run the model several
            times a step. "only" refuses more than one, "first" and "last" keep one of them and release the others at
            once, "all" keeps all for ``take(i)``.
        no_grad: also record runs under ``torch.no_grad``; off by default, so that validation costs nothing.
        double_backward: use the attention kernel that can be differentiated twice, for a CAM inside the loss.
        graph_from: start the autograd graph at this layer (negative: from the last) if the backbone is frozen, so that
            class maps by gradient work; layers below stay without a graph.
        record_products: also keep query, key, value and output of unfused layers, at the cost of their memory, for
            :func:`~acr_reg.check`.

    Copies and pickles of the model that are made meanwhile, such as an EMA, are not captured and load without this
    package. Call ``remove()`` before you script a model by ``torch.jit``, or pickle one for that.

    Threads, generators and asyncio tasks that run the model in turns make runs of their own. A thread takes the runs
    that it made; those of threads that never call ``take()``, such as workers, go to the thread that does. Forwards
    that :class:`~acr_reg.GradientCam` and :func:`~acr_reg.check` make are not recorded.

    Returns an :class:`~acr_reg.AttentionCapture`. Call ``take()`` after each forward, and ``remove()`` when done (or
    leave its ``with`` block, or drop it). Raises :class:`~acr_reg.CaptureError` for modules that are compiled,
    scripted, traced or exported, because their kernels cannot be seen, and inside a forward of the model.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    >>> with capture_attention(layer) as attention:
    ...     tokens = layer(torch.randn(2, 1 + 4 * 6, 32))
    ...     maps = attention.take().with_layout(grid=(4, 6), num_prefix_tokens=1)
    >>> maps
    AttentionMaps(layers 0; 2 images; 4 heads; 25 tokens: 1 prefix + 4 x 6)
    """
    if keep not in ("only", "first", "last", "all"):
        raise ValueError(f'keep={keep!r} is unknown. Choose "only", "first", "last" or "all".')
    wanted = None if layers is None else listed("layers", layers)
    hints = LayoutHints(patch_size, num_prefix_tokens, class_tokens, num_suffix_tokens, image_channels=image_channels)
    placer = Placer(ModuleIndex(model, modules), hints)
    recorder = Recorder(placer, keep, no_grad, double_backward, graph_from, record_products)
    return AttentionCapture(recorder, wanted)


class Removable(ABC):
    """Hooks a model until :meth:`remove` is called or its ``with`` block is left."""

    @abstractmethod
    def remove(self) -> None:
        """Removes every hook. May be called again."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class AttentionCapture(Removable):
    """A running capture, made by :func:`~acr_reg.capture_attention`."""

    def __init__(self, recorder: Recorder, layers: tuple[int, ...] | None = None) -> None:
        self._recorder: Recorder | None = recorder
        self._layers = layers
        self._warned: set[str] = set()
        self._taken = threading.local()

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(module name, reason) for everything in the runs that this thread took last that is not token-to-token
        self-attention."""
        return getattr(self._taken, "skipped", ())

    def remove(self) -> None:
        """Removes every hook and forgets every run; maps already taken stay valid. May be called again."""
        if self._recorder is not None:
            self._recorder.stop()
        self._recorder = None

    def clear(self) -> None:
        """Forgets the runs not yet taken, for instance after an exception in a training step. Raises
        :class:`~acr_reg.CaptureError` inside a forward of the model, as ``take()`` does."""
        recorder = self._running()
        recorder.refuse_inside("clear()")
        recorder.clear()

    def take(self, run: int | None = None) -> AttentionMaps:
        """The maps of the encoder run since the last take. They hold the graph: delete them after ``backward``.

        With ``keep="all"``, ``run`` picks one of several, counted from 0; the others are forgotten too. Raises
        :class:`~acr_reg.CaptureError` if there was no run, or more runs than ``keep`` allows, and inside a forward of
        what is captured, because layers may be missing.
        """
        recorder = self._running()
        recorder.refuse_inside("take()")
        runs = self._finished(recorder)
        chosen = one_of(runs, recorder.log.keep, run)
        maps = self._maps(recorder, chosen, {"last": chosen.position, "all": None}.get(recorder.log.keep, 0))
        assert maps is not None
        return maps

    def take_all(self) -> list[AttentionMaps]:
        """The maps of every encoder run since the last take that has token-to-token attention, with ``keep="all"``.
        Raises :class:`~acr_reg.CaptureError` if none has."""
        recorder = self._running()
        recorder.refuse_inside("take_all()")
        if recorder.log.keep != "all":
            raise CaptureError(f'take_all() needs keep="all". This capture has keep="{recorder.log.keep}".')
        runs = self._finished(recorder)
        found: list[AttentionMaps] = []
        skipped: list[tuple[str, str]] = []
        for left, run in zip(reversed(range(len(runs))), runs, strict=True):
            maps = self._maps(recorder, run, may_be_empty=left > 0 or bool(found))
            found += [] if maps is None else [maps]
            skipped += self.skipped
        self._taken.skipped = tuple(dict.fromkeys(skipped))
        return found

    def _alone(self) -> Alone:
        return Alone(self._running().hooks)

    def _running(self) -> Recorder:
        if self._recorder is None:
            raise CaptureError("This capture was removed. Call capture_attention(model) again.")
        return self._recorder

    @staticmethod
    def _finished(recorder: Recorder) -> list[Run]:
        runs = recorder.finish()
        if not runs:
            refuse_empty(recorder.index, recorder.log)
        return runs

    def _warn(self, kind: str, message: str | None) -> None:
        """Warns once of each kind."""
        if message is not None and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)

    def _maps(
        self, recorder: Recorder, run: Run, position: int | None = None, may_be_empty: bool = False
    ) -> AttentionMaps | None:
        index = recorder.index
        refuse_partial(index, run)
        refuse_no_images(run)
        refuse_split(index, run, recorder.split)
        layers: list[LayerAttention] = []
        cross: list[str] = []
        beside = "no attention was seen in it; it may have none, or a kernel that cannot be captured"
        skipped = [*run.skipped, *((name, beside) for name in index.beside(run.silent, run.fired))]
        placements = recorder.placer.placements(run.calls, run.images)
        for call, placement in zip(run.calls, placements, strict=True):
            if placement.refusal is None:
                layers.append(placement.layer(len(layers), call))
            else:
                skipped.append((call.name, placement.refusal))
                cross += [call.name] if placement.may_be_self else []
        self._taken.skipped = tuple(dict.fromkeys(skipped))
        if not layers and may_be_empty:
            return None
        if not layers:
            refuse_empty(index, recorder.log, self.skipped)
        self._warn("padding", recorder.images.padding)
        if cross:
            names = f"{', '.join(list(dict.fromkeys(cross))[:4])}{' and more' * (len(cross) > 4)}"
            self._warn(
                "cross",
                f"The maps leave out {names}: as many keys as queries, but other tokens. Wrap such maps by "
                "AttentionMaps.from_tensors if they are self-attention.",
            )
        recorder.starts.last_count = len(layers)
        maps = AttentionMaps(explain_windows(layers), index.training_batch_norms(), position)
        return maps if self._layers is None else maps.select(self._layers)


def alone(attention: AttentionCapture) -> Alone:
    """A block whose forwards, on this thread, no other capture records, unless it was made within the block."""
    return attention._alone()
