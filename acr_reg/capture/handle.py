"""Captures the self-attention of any forward pass, on its graph, without changing the model or its outputs.

:func:`capture_attention` hooks the model's modules; while an attention module runs, a torch function mode sees the
kernel it calls (see ``_interception``). Every encoder run becomes one :class:`~acr_reg.AttentionMaps`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps
from acr_reg.capture.recorder import Recorder
from acr_reg.capture.refusals import nothing_captured, one_of, refuse_partial, removed
from acr_reg.capture.removable import Removable
from acr_reg.capture.runs import Keep, Run
from acr_reg.errors import CaptureError
from acr_reg.placement.grids import LayoutHints
from acr_reg.placement.kinds import explain_windows, is_pyramid
from acr_reg.placement.modules import ModuleIndex
from acr_reg.placement.placer import Placer


def capture_attention(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = None,
    modules: Iterable[str | nn.Module] | None = None,
    patch_size: int | Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    class_tokens: int | Sequence[int] | None = None,
    keep: Keep = "only",
    no_grad: bool = False,
    double_backward: bool = False,
    graph_from: int | None = None,
    record_products: bool = False,
) -> AttentionCapture:
    """Captures the self-attention of every forward pass of ``model`` from now on, whichever method starts it.

    Args:
        model: any module; its kernels, outputs, parameters, modes and state dict stay as they are.
        layers: indices of the attention layers to keep, in the order they run (negative: from the last); None keeps
            all.
        modules: names (or modules) within which attention counts, e.g. one of two encoders; None means anywhere.
        patch_size, num_prefix_tokens, class_tokens: where the model's own fields do not say, or say it wrongly.
            ``class_tokens`` is a count from the first prefix token, or their positions; token c belongs to class c.
        keep: what :meth:`AttentionCapture.take` does with several encoder runs since the last take: "only" refuses
            them, "first" and "last" keep one of them, "all" keeps all for ``take(i)``. Tensors of the others are
            released at once.
        no_grad: also record runs under ``torch.no_grad``, which cost nothing otherwise.
        double_backward: run the attention kernel whose gradient is itself differentiable, for a CAM inside the loss.
        graph_from: start the autograd graph at this layer (negative: from the last) where none reaches it, as with a
            frozen backbone, so that a class map by gradient works; layers below stay without a graph.
        record_products: also keep the query, key, value and output of unfused layers, which only checks of a capture
            need (:func:`~acr_reg.check` does); they take memory.

    Returns an :class:`AttentionCapture`: ``take()`` the maps after each forward, ``remove()`` (or leave its ``with``
    block) when done. Dropping it also ends the capture. Raises :class:`CaptureError` for modules whose kernels cannot
    be seen: compiled, scripted, traced or exported.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    >>> with capture_attention(layer) as attention:
    ...     tokens = layer(torch.randn(2, 1 + 4 * 6, 32))
    ...     maps = attention.take().with_layout(grid=(4, 6), num_prefix_tokens=1)
    >>> maps
    AttentionMaps(layers 0; 2 images; 4 heads; 25 tokens: 1 prefix + 4 x 6)
    """
    if keep not in ("only", "first", "last", "all"):
        raise ValueError(f'found keep={keep!r}; expected "only", "first", "last" or "all"; choose one of these')
    placer = Placer(ModuleIndex(model, modules), LayoutHints(patch_size, num_prefix_tokens, class_tokens))
    recorder = Recorder(placer, keep, no_grad, double_backward, graph_from, record_products)
    return AttentionCapture(recorder, layers)


class AttentionCapture(Removable):
    """The handle of a running capture. Made by :func:`capture_attention`."""

    def __init__(self, recorder: Recorder, layers: Iterable[int] | None = None) -> None:
        self._recorder: Recorder | None = recorder
        self._layers = None if layers is None else tuple(layers)
        self._warned = False
        self.skipped: tuple[tuple[str, str], ...] = ()
        """(module name, reason) of what the last taken run used that is not token-to-token self-attention."""

    def remove(self) -> None:
        """Removes every hook and forgets every run. Maps already taken stay valid. May be called again."""
        if self._recorder is not None:
            self._recorder.stop()
        self._recorder = None

    def clear(self) -> None:
        """Forgets the runs not taken so far, for instance after an exception in a training step."""
        self._running().log.clear()

    def take(self, run: int | None = None) -> AttentionMaps:
        """The maps of the encoder run since the last take, which are then the caller's alone; delete them after
        ``backward``.

        ``run`` picks one of several with ``keep="all"``, 0 the first; the runs not picked are forgotten too. Raises
        :class:`CaptureError` where there was no run, or more than ``keep`` allows.
        """
        recorder = self._running()
        position = recorder.log.started - 1
        runs = self._finished(recorder)
        chosen = one_of(runs, recorder.log.keep, run)
        return self._maps(recorder, chosen, {"last": position, "all": None}.get(recorder.log.keep, 0))

    def take_all(self) -> list[AttentionMaps]:
        """The maps of every encoder run since the last take, with ``keep="all"``; at least one, or a
        :class:`CaptureError`."""
        recorder = self._running()
        if recorder.log.keep != "all":
            raise CaptureError(
                f'found keep="{recorder.log.keep}"; expected keep="all"; capture with keep="all" to take every run'
            )
        return [self._maps(recorder, run) for run in self._finished(recorder)]

    def _running(self) -> Recorder:
        if self._recorder is None:
            raise removed()
        return self._recorder

    @staticmethod
    def _finished(recorder: Recorder) -> list[Run]:
        runs = recorder.finish()
        if not runs:
            raise nothing_captured(recorder.index, recorder.log)
        return runs

    def _maps(self, recorder: Recorder, run: Run, position: int | None = None) -> AttentionMaps:
        index = recorder.index
        refuse_partial(index, run)
        layers: list[LayerAttention] = []
        beside = "nothing was seen in it: no attention, or by another kernel"
        skipped = [*run.skipped, *((name, beside) for name in index.beside(run.silent, run.fired))]
        pyramid = is_pyramid(run.calls)
        for call in run.calls:
            placement = recorder.placer.placement(call, run.images, pyramid)
            if placement.refusal is None:
                layers.append(placement.layer(len(layers), call))
            else:
                skipped.append((call.name, placement.refusal))
        self.skipped = tuple(dict.fromkeys(skipped))
        if not layers:
            raise nothing_captured(index, recorder.log, self.skipped)
        if recorder.images.padding is not None and not self._warned:
            self._warned = True
            warnings.warn(recorder.images.padding, stacklevel=3)
        recorder.last_count = len(layers)
        maps = AttentionMaps(explain_windows(layers), index.training_batch_norms(), position)
        return maps if self._layers is None else maps.select(self._layers)
