"""Class maps of a whole model for inference, of several views, in one call that owns the forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acr_reg.cam.gradient import Method, class_token_gradient_cam
from acr_reg.cam.refinement import multi_view_cam, propagate_cam
from acr_reg.capture.handle import AttentionCapture, capture_attention
from acr_reg.capture.removable import Removable
from acr_reg.errors import CaptureError
from acr_reg.tokens import Lattice
from acr_reg.views.constructors import HorizontalFlip, Identity
from acr_reg.views.view import View


class GradientCam(Removable):
    """Class-token-gradient maps of a model's images, spread over the affinity and summed over views.

    The whole of what ACR publishes for inference (arXiv 2308.04321): :func:`~acr_reg.class_token_gradient_cam`,
    one step of :func:`~acr_reg.propagate_cam` over all layers, summed over the image and its flip. No parameter
    needs a gradient meanwhile, and layers below ``start_layer`` run without a graph; where it is negative, the first
    call runs one image more, to count the layers. Dropout is off, and the model's modes and flags are as before
    afterwards.

    Args:
        model: as for :func:`~acr_reg.capture_attention`.
        start_layer, method, query: as for :func:`~acr_reg.class_token_gradient_cam`.
        steps, propagation_layers: as for :func:`~acr_reg.propagate_cam`; 0 steps leave it out.
        views, merge: as for :func:`~acr_reg.multi_view_cam`.
        forward: what returns the logits (B, C) of images, where ``model(images)`` does not.
        modules, patch_size, num_prefix_tokens, class_tokens: as for ``capture_attention``.

    ``remove()``, or leaving a ``with`` block, ends it.

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
        class_tokens: int | Sequence[int] | None = None,
    ) -> None:
        if steps < 0:
            raise ValueError(f"found steps={steps}; expected 0 or more; 0 leaves propagation out")
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
            "class_tokens": class_tokens,
        }
        self._attention: AttentionCapture | None = None
        self._removed = False

    def remove(self) -> None:
        """Removes every hook from the model. May be called again."""
        self._removed = True
        if self._attention is not None:
            self._attention.remove()

    def __call__(self, images: Tensor, labels: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Class maps (B, C, h, w) >= 0, detached, not normalised; 0 where ``labels`` (B, C), if given, are not > 0.

        ``size`` is (h, w), by default the token grid.
        """

        def one_view(view: Tensor) -> tuple[Tensor, Lattice]:
            attention.clear()
            logits = self.forward(view)
            maps = attention.take()
            cam = class_token_gradient_cam(logits, maps, labels, self.start_layer, self.method, self.query)
            grid = maps[-1].layout.key
            if self.steps:
                with torch.no_grad():
                    cam = propagate_cam(cam, maps, self.propagation_layers, self.steps)
            return cam, grid

        images = images.detach()
        with _for_inference(self.model):
            attention = self._running(images)
            return multi_view_cam(one_view, images, self.views, self.merge, size)

    def _running(self, images: Tensor) -> AttentionCapture:
        """The capture, which must know the first layer that needs a graph by its number."""
        if self._removed:
            raise CaptureError("found a GradientCam that was removed; expected a running one; make another")
        if self._attention is None:
            first = self.start_layer
            if first < 0:
                # No parameter asks for a gradient, so there is no graph. Not under no_grad: layers that the model runs
                # under no_grad itself would count too, and they are not captured afterwards.
                with capture_attention(self.model, **self._hints) as attention:
                    self.forward(images[:1])
                    first = max(0, len(attention.take()) + first)
            self._attention = capture_attention(self.model, graph_from=first, **self._hints)
        return self._attention


@contextmanager
def _for_inference(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no parameter that asks for a gradient; both as before afterwards."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)
