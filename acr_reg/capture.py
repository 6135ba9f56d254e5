"""Captures the self-attention of any forward pass, on its graph, without changing the model or its outputs.

:func:`capture_attention` hooks the model's modules; while an attention module runs, a torch function mode sees the
kernel it calls (see ``_interception``). Every encoder run becomes one :class:`~acr_reg.attention.AttentionMaps`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import nn

from acr_reg._interception import AttentionCall
from acr_reg._recorder import Keep, Recorder, Run
from acr_reg.attention import AttentionMaps, LayerAttention


class CaptureError(RuntimeError):
    """No attention, or not the attention that was asked for, was captured."""


def capture_attention(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    modules: Iterable[str | nn.Module] | None = None,
    patch_size: int | Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    class_tokens: int | Sequence[int] | None = None,
    keep: Keep = "only",
    no_grad: bool = False,
    double_backward: bool = False,
) -> AttentionCapture:
    """Captures the self-attention of every forward pass of ``model`` from now on, whichever method starts it.

    Args:
        model: any module; its kernels, outputs, parameters, modes and state dict stay as they are.
        layers: indices of the attention layers to keep, in the order they run (negative: from the last); None keeps
            all.
        modules: names (or modules) within which attention counts, e.g. one of two encoders; None means anywhere.
        patch_size, num_prefix_tokens, class_tokens: where the model's own fields do not say (see ``infer_layout``).
            ``class_tokens`` is a count from the first prefix token, or their positions; token c belongs to class c.
        keep: what :meth:`AttentionCapture.take` does with several encoder runs since the last take: "only" refuses
            them, "first" and "last" keep one of them, "all" keeps all for ``take(i)``. Tensors of the others are
            released at once.
        no_grad: also record runs under ``torch.no_grad``, which cost nothing otherwise.
        double_backward: run the attention kernel whose gradient is itself differentiable, for a CAM inside the loss.

    Returns an :class:`AttentionCapture`: ``take()`` the maps after each forward, ``remove()`` (or leave its ``with``
    block) when done. Dropping it also ends the capture.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    >>> with capture_attention(layer) as attention:
    ...     tokens = layer(torch.randn(2, 1 + 4 * 6, 32))
    ...     maps = attention.take().with_layout(grid=(4, 6), num_prefix_tokens=1)
    >>> maps
    AttentionMaps(layers 0; 2 images; 4 heads; 25 tokens: 1 prefix + 4 x 6)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"found a {type(model).__name__}; expected a torch.nn.Module; pass the model itself")
    if keep not in ("only", "first", "last", "all"):
        raise ValueError(f'found keep={keep!r}; expected "only", "first", "last" or "all"; choose one of these')
    within = None if modules is None else [_named(model, module) for module in modules]
    hints = (patch_size, num_prefix_tokens, class_tokens)
    return AttentionCapture(Recorder(model, within, keep, no_grad, double_backward), layers, hints)


def _named(model: nn.Module, module: str | nn.Module) -> nn.Module:
    known = dict(model.named_modules())
    found = known.get(module) if isinstance(module, str) else module
    if found is None or not any(found is m for m in known.values()):
        raise ValueError(
            f"found {module!r}, which is no module of {type(model).__name__}; expected names from "
            f"model.named_modules(), such as {[name for name in known if name][:4]}; correct modules="
        )
    return found


class AttentionCapture:
    """The handle of a running capture. Made by :func:`capture_attention`."""

    def __init__(self, recorder: Recorder, layers: Iterable[int] | None, hints: tuple[Any, Any, Any]) -> None:
        self._recorder: Recorder | None = recorder
        self._layers = None if layers is None else tuple(layers)
        self._hints = hints
        self._warned = False
        self.skipped: tuple[tuple[str, str], ...] = ()
        """(module name, reason) of what the last taken run used that is not token-to-token self-attention."""

    def __enter__(self) -> AttentionCapture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

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
        return self._maps(recorder, runs[chosen])

    def take_all(self) -> list[AttentionMaps]:
        """The maps of every encoder run since the last take, with ``keep="all"``; the list may be empty."""
        recorder = self._running()
        if recorder.keep != "all":
            raise CaptureError(
                f'found keep="{recorder.keep}"; expected keep="all"; capture with keep="all" to take every run'
            )
        return [self._maps(recorder, run) for run in recorder.finish()[0]]

    def _running(self) -> Recorder:
        if self._recorder is None:
            raise CaptureError(
                "found a capture that was removed; expected a running one; call capture_attention(model) again"
            )
        return self._recorder

    def _maps(self, recorder: Recorder, run: Run) -> AttentionMaps:
        layers: list[LayerAttention] = []
        skipped = list(run.skipped)
        for name, call in run.calls:
            layer = self._layer(recorder, run, len(layers), name, call)
            if isinstance(layer, str):
                skipped.append((name, layer))
            else:
                layers.append(layer)
        self.skipped = tuple(dict.fromkeys(skipped))
        if not layers:
            raise CaptureError(recorder.nothing_captured(self.skipped))
        if recorder.padding is not None and not self._warned:
            self._warned = True
            warnings.warn(recorder.padding, stacklevel=3)
        maps = AttentionMaps(layers, recorder.training_batch_norms())
        return maps if self._layers is None else maps.select(self._layers)

    def _layer(self, recorder: Recorder, run: Run, index: int, name: str, call: AttentionCall) -> LayerAttention | str:
        """The layer's attention, or why it is not token-to-token self-attention."""
        if call.refusal is not None:
            return call.refusal
        recorded = call.recorded
        largest = recorded.seen.ndim
        if largest > 4:
            return f"{largest}-dimensional attention: windows or another layout than (B, H, N, M)"
        layer = LayerAttention(index, name, recorded, "", call.dropout, call.stochastic)
        batch, _, queries, keys = layer.shape
        if queries != keys:
            return f"{queries} queries but {keys} keys: reduced keys, pooling or cross-attention"
        if queries == 1:
            return "one token attends to itself: pooling"
        images = run.images
        flat = recorded.heads is None and largest == 3  # (B H, N, M) or (B, N, M), without a word about H
        if flat and images is not None and batch % images[0] == 0:
            layer = replace(layer, recorded=replace(recorded, heads=batch // images[0]))
            batch = layer.shape[0]
        if images is not None and batch != images[0]:
            return f"a batch of {batch} for {images[0]} images: windows, or tokens regrouped"
        size = None if images is None else (images[1], images[2])
        located = recorder.layout(queries, size, self._hints)
        return replace(layer, located=located)
