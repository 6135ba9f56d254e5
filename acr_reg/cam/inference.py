"""Computes a model's class maps for inference, over several views, in one call that runs the forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acr_reg._torch_private import shards_parameters
from acr_reg.attention.maps import AttentionMaps
from acr_reg.cam.gradient import Method, class_token_gradient_cam
from acr_reg.cam.refinement import multi_view_cam, propagate_cam
from acr_reg.capture.evaluation import eval_mode
from acr_reg.capture.handle import AttentionCapture, alone, capture_attention
from acr_reg.capture.refusals import refuse_sharded
from acr_reg.capture.removable import Removable
from acr_reg.errors import CaptureError
from acr_reg.tokens import Lattice
from acr_reg.views.constructors import HorizontalFlip, Identity
from acr_reg.views.view import View


class GradientCam(Removable):
    """Class-token-gradient maps of a model, propagated over the affinity and summed over views.

    This is the inference that ACR publishes (arXiv 2308.04321): :func:`~acr_reg.class_token_gradient_cam`, one step of
    :func:`~acr_reg.propagate_cam` over all layers, summed over the image and its flip. The model runs in eval mode, no
    parameter needs a gradient, and layers below ``start_layer`` run without a graph; if it is negative, the first call
    runs one more image to count the layers. The model's modes and flags are restored afterwards.

    Args:
        model: as for :func:`~acr_reg.capture_attention`.
        start_layer, method, query: as for :func:`~acr_reg.class_token_gradient_cam`.
        steps, propagation_layers: as for :func:`~acr_reg.propagate_cam`, which needs layers on one grid, so the last
            stage of a pyramid; 0 steps leave propagation out.
        views, merge: as for :func:`~acr_reg.multi_view_cam`; merge by "mean" if the views are crops.
        forward: returns the logits (B, C) of images, if ``model(images)`` does not.
        modules, patch_size, num_prefix_tokens, num_suffix_tokens, class_tokens: as for
            :func:`~acr_reg.capture_attention`.

    ``remove()``, or leaving a ``with`` block, ends the capture.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64)
    >>> class Vit(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.patch_embed, self.block = torch.nn.Conv2d(3, 32, 8, 8), layer
    ...     def forward(self, images):
    ...         return self.block(self.patch_embed(images).flatten(2).permute(2, 0, 1)).mean(0)[:, :5]
    >>> with GradientCam(Vit(), start_layer=0, query="all") as cam:
    ...     cam(torch.randn(2, 3, 32, 48), labels=torch.eye(5)[:2]).shape
    torch.Size([2, 5, 4, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        start_layer: int = -2,
        method: Method = "grad",
        query: Literal["class", "all"] = "class",
        steps: int = 1,
        propagation_layers: Iterable[int] | None = None,
        views: Sequence[View] | None = None,
        merge: Literal["sum", "max", "mean"] = "sum",
        forward: Callable[[Tensor], Tensor] | None = None,
        *,
        modules: Iterable[str | nn.Module] | None = None,
        patch_size: int | Sequence[int] | None = None,
        num_prefix_tokens: int | None = None,
        num_suffix_tokens: int | None = None,
        class_tokens: int | Sequence[int] | None = None,
    ) -> None:
        if steps < 0:
            raise ValueError(f"steps={steps} is negative. Pass 0 or more; 0 leaves propagation out.")
        self.model, self.forward = model, model if forward is None else forward
        self.start_layer, self.method, self.query = start_layer, method, query
        self.steps = steps
        self.propagation_layers = None if propagation_layers is None else tuple(propagation_layers)
        self.views = (Identity(), HorizontalFlip()) if views is None else tuple(views)
        self.merge = merge
        self._hints: dict[str, Any] = {
            "modules": modules if modules is None else tuple(modules),
            "patch_size": patch_size,
            "num_prefix_tokens": num_prefix_tokens,
            "num_suffix_tokens": num_suffix_tokens,
            "class_tokens": class_tokens,
        }
        self._attention: AttentionCapture | None = None
        self._removed = False

    def remove(self) -> None:
        """Removes every hook from the model. May be called more than once."""
        self._removed = True
        if self._attention is not None:
            self._attention.remove()

    def __call__(self, images: Tensor, labels: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Class maps (B, C, h, w) >= 0, detached, not normalised; 0 where ``labels`` (B, C), if given, are not > 0.

        ``size`` is (h, w), by default the token grid.
        """

        if shards_parameters(self.model):
            refuse_sharded()

        def one_view(view: Tensor) -> tuple[Tensor, Lattice]:
            logits, maps = self._run(attention, view)
            cam = class_token_gradient_cam(logits, maps, labels, self.start_layer, self.method, self.query)
            grid = maps[-1].layout.key
            if self.steps:
                with torch.no_grad():
                    cam = propagate_cam(cam, maps, self.propagation_layers, self.steps)
            return cam, grid

        images = images.detach()
        with eval_mode(self.model), _frozen(self.model), torch.inference_mode(False), torch.enable_grad():
            attention = self._running(images)
            return multi_view_cam(one_view, images, self.views, self.merge, size)

    def _running(self, images: Tensor) -> AttentionCapture:
        """The capture. It needs the index of the first layer with a graph."""
        if self._removed:
            raise CaptureError("This GradientCam was removed. Make another one.")
        if self._attention is None:
            first = self.start_layer
            if first < 0:
                # No parameter needs a gradient, so no graph is made. Under no_grad, the count would include layers that
                # the model itself runs under no_grad, which the capture does not record later.
                with capture_attention(self.model, keep="all", **self._hints) as attention:
                    first = max(0, len(self._run(attention, images[:1])[1]) + first)
            self._attention = capture_attention(self.model, keep="all", graph_from=first, **self._hints)
        return self._attention

    def _run(self, attention: AttentionCapture, images: Tensor) -> tuple[Tensor, AttentionMaps]:
        """The logits and the maps of one forward. Refuses several encoder runs itself: its caller has no ``keep``."""
        attention.clear()
        with alone(attention):
            logits = self.forward(images)
        runs = attention.take_all()
        if len(runs) > 1:
            raise CaptureError(
                f"The forward ran the encoder {len(runs)} times. Pass a forward= that runs it once, or modules= of one "
                "encoder."
            )
        return logits, runs[0]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freezes every parameter inside the block and restores it afterwards."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
