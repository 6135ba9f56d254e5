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
from acr_reg.capture.recorder import Keep, Recorder
from acr_reg.capture.removable import Removable
from acr_reg.capture.runs import Run
from acr_reg.errors import CaptureError
from acr_reg.placement.kinds import explain_windows, is_pyramid


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
    hints = (patch_size, num_prefix_tokens, class_tokens)
    recorder = Recorder(model, modules, keep, hints, no_grad, double_backward, graph_from, record_products)
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
        self._running().clear()

    def take(self, run: int | None = None) -> AttentionMaps:
        """The maps of the encoder run since the last take, which are then the caller's alone; delete them after
        ``backward``.

        ``run`` picks one of several with ``keep="all"``, 0 the first; the runs not picked are forgotten too. Raises
        :class:`CaptureError` where there was no run, or more than ``keep`` allows.
        """
        recorder = self._running()
        position = recorder.runs_started - 1
        runs, refused = recorder.finish()
        if not runs:
            raise CaptureError(recorder.nothing_captured(refused))
        keep = recorder.keep
        if keep == "only" and len(runs) > 1:
            listed = "; ".join(each.summary() for each in runs)
            raise CaptureError(
                f"found {recorder.counted(runs)} encoder runs since the last take: {listed}; expected one; take() "
                'after each forward, or choose keep="first", "last" or "all" (then take(i))'
            )
        if keep == "all" and run is None and len(runs) > 1:
            raise CaptureError(
                f"found {len(runs)} encoder runs; expected to be told which; call take(0) to take({len(runs) - 1})"
            )
        chosen = {"first": 0, "last": -1}.get(keep, run or 0)
        if not -len(runs) <= chosen < len(runs):
            raise CaptureError(
                f"found {len(runs)} encoder runs; expected run {run} among them; call take(0) to take({len(runs) - 1})"
            )
        return self._maps(recorder, runs[chosen], {"last": position, "all": None}.get(keep, 0))

    def take_all(self) -> list[AttentionMaps]:
        """The maps of every encoder run since the last take, with ``keep="all"``; at least one, or a
        :class:`CaptureError`."""
        recorder = self._running()
        if recorder.keep != "all":
            raise CaptureError(
                f'found keep="{recorder.keep}"; expected keep="all"; capture with keep="all" to take every run'
            )
        runs, refused = recorder.finish()
        if not runs:
            raise CaptureError(recorder.nothing_captured(refused))
        return [self._maps(recorder, run) for run in runs]

    def _running(self) -> Recorder:
        if self._recorder is None:
            raise CaptureError(
                "found a capture that was removed; expected a running one; call capture_attention(model) again"
            )
        return self._recorder

    def _maps(self, recorder: Recorder, run: Run, position: int | None = None) -> AttentionMaps:
        _refuse_partial(recorder, run)
        layers: list[LayerAttention] = []
        skipped = [*run.skipped, *recorder.beside(run)]
        pyramid = is_pyramid(run.calls)
        for seen in run.calls:
            placement = recorder.index.placement(seen, run.images, pyramid)
            if isinstance(placement, str):
                skipped.append((seen.name, placement))
            else:
                layers.append(placement.layer(len(layers), seen))
        self.skipped = tuple(dict.fromkeys(skipped))
        if not layers:
            raise CaptureError(recorder.nothing_captured(self.skipped))
        if recorder.images.padding is not None and not self._warned:
            self._warned = True
            warnings.warn(recorder.images.padding, stacklevel=3)
        recorder.last_count = len(layers)
        maps = AttentionMaps(explain_windows(layers), recorder.index.training_batch_norms(), position)
        return maps if self._layers is None else maps.select(self._layers)


def _refuse_partial(recorder: Recorder, run: Run) -> None:
    """Layers that are missing from a run would be missing from the loss without a word."""
    joined = recorder.joined()
    if joined:
        raise CaptureError(
            f"found {', '.join(joined[:4])}, which joined the model since the capture began; expected the modules "
            "that were there then; capture again after the change"
        )
    checkpointed = recorder.checkpointed(run)
    if checkpointed:
        raise CaptureError(
            f"found reentrant checkpointing around {', '.join(sorted(checkpointed)[:4])}, which runs without a "
            "graph; expected every layer on the graph; checkpoint with use_reentrant=False"
        )
    unseen = recorder.unseen(run)
    if unseen:
        raise CaptureError(
            f"found attention in {len(run.fired)} modules, but none that can be captured in {', '.join(unseen[:4])}"
            f"{' and more' if len(unseen) > 4 else ''}; expected all that ran to go through "
            "F.scaled_dot_product_attention, softmax and matmul, or nn.MultiheadAttention; switch other kernels "
            "(xformers, flash_attn, flex_attention) off, or name the part to capture by modules="
        )
