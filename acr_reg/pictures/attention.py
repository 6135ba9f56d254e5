"""A model's attention to one photo as a picture: what the class token looks at, and what a view changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor, nn

from acr_reg import View
from acr_reg.losses.functional import Distance


def show_attention(
    model: nn.Module,
    image: Tensor,
    photo: Tensor,
    view: View,
    *,
    layer: int = -1,
    patch: tuple[int, int] | None = None,
    class_token: int | None = None,
    distance: Distance = "l1",
    forward: Callable[[Tensor], Any] | None = None,
    **capture: Any,
) -> Figure:
    """Draws what a model attends to in one photo, as a matplotlib Figure for ``savefig``.

    The rows, from the top: the class token's attention of one layer, head by head (:func:`~acr_reg.class_attention`);
    its mean over heads and its rollout (:func:`~acr_reg.attention_rollout`); and the attention of one patch (a row of
    the N x N map, mean over heads) on the photo and on its view, as the model computes it and after alignment, as the
    loss compares it, with the difference. The title gives the distance that :class:`~acr_reg.AllPairsConsistencyLoss`
    sees, for this patch and for the layer. Without a class token the first row is left out, and the title says so.

    Args:
        model: as for :func:`~acr_reg.capture_attention`. It runs twice, in eval mode and without gradients, and is left
            as it was.
        image: (1, bands, H, W), as the model takes it: normalised, on its device.
        photo: (3, H, W) in [0, 1], the same pixels to draw.
        view: the second view, as HorizontalFlip().
        layer: index of the layer; negative counts from the last.
        patch: (row, column) of the patch on the layer's grid, from the top left; None takes the one in the middle.
        class_token: which class token if there are several; None takes the only one.
        distance: as for :class:`~acr_reg.AllPairsConsistencyLoss`.
        forward: runs the model, if ``model(image)`` does not, e.g. ``model.forward_features``.
        capture: other arguments of :func:`~acr_reg.capture_attention`, such as ``modules`` or ``class_tokens``.

    Raises ValueError for an image, a photo or a patch that does not fit, and what
    :func:`~acr_reg.capture_attention` and :func:`~acr_reg.class_attention` raise.
    """
    raise NotImplementedError
