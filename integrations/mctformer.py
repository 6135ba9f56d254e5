"""MCTformer V1, V2 and MCTformer+, and their heirs WeakTr and CTI: one class token for each class, explicit attention.

Weights to start from: the DeiT-S ImageNet checkpoint that each host loads itself (``--finetune``).
Views: flips, quarter turns and rotations of the square at any weights; MCTformer+ and CTI train at one fixed, square
size, so their second view keeps that size (``Scale(..., keep_size=True)``, crops resized back to it). V1, V2 and WeakTr
resize their position table and take any multiple of 16.

The lines to add stand before the given line of the host's file at that commit, at that line's indentation.

    xulianuwa/MCTformer at 0acc27a (MCTformer+)
        engine.py, before line 5:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import mctformer
        engine.py, before line 30:
            host = mctformer.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        engine.py, before line 38:
            first = host.take()
            second = mctformer.second_view(host, acr.view(samples))
        engine.py, before line 67:
            loss = loss + acr(
                first.attention, second.attention, mctformer.cams(first), mctformer.cams(second), labels=targets
            )
            del first, second

    xulianuwa/MCTformer at 9606597 (MCTformer V1 and V2)
        engine.py, before line 5:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import mctformer
        engine.py, before line 25:
            host = mctformer.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        engine.py, before line 32:
            first = host.take()
            second = mctformer.second_view(host, acr.view(samples))
        engine.py, before line 42:
            loss = loss + acr(
                first.attention, second.attention, mctformer.cams(first), mctformer.cams(second), labels=targets
            )
            del first, second

    hustvl/WeakTr at 3457ad3
        engine.py, before line 5:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import mctformer
        engine.py, before line 26:
            host = mctformer.capture(model)
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        engine.py, before line 33:
            first = host.take()
            second = mctformer.second_view(host, acr.view(samples))
        engine.py, before line 44:
            loss = loss + acr(
                first.attention, second.attention, mctformer.cams(first), mctformer.cams(second), labels=targets
            )
            del first, second
"""

from __future__ import annotations

from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, Keep, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the class tokens' and patches' attention of all blocks, and what the convolutional head makes of the
    patches."""
    network = unwrap(model)
    background = _background_tokens(network)
    count = background + int(network.num_classes)  # type: ignore[arg-type]
    keep: Keep = "last" if background else "only"  # CTI runs the model up to three times more after its first view
    attention = capture_attention(
        model,
        modules=[part(network, "blocks", "MCTformer")],
        num_prefix_tokens=count,
        class_tokens=range(background, count),
        keep=keep,
    )
    head = network.head
    features = FeatureRecorder(head, keep=keep) if isinstance(head, nn.Conv2d) else None
    return HostCapture(model, attention, features)


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """The whole model on ``images`` (B, 3, H, W), through DDP where the model is wrapped. ``output`` is what the host's
    forward returns, for the paper's second classification loss."""
    return host.run(lambda: host.model(images))


def cams(view: HostView) -> Tensor:
    """The head's class map of the patches, (B, C, h, w), any range, on the graph. The maps that the hosts themselves
    return are detached, and MCTformer+ takes a square root at 0, whose gradient is not a number. V1 has no head: its
    class map is the class tokens' attention to the patches, in [0, 1], summed over layers."""
    background = _background_tokens(view.network)
    if view.features is not None:
        return view.features[:, background:]
    layout = view.attention[0].layout
    tokens = list(layout.known_class_tokens())
    rows = sum(layer.weights().mean(1)[:, tokens, layout.num_prefix_tokens :] for layer in view.attention)
    assert isinstance(rows, Tensor)
    return rows.unflatten(2, (layout.key.height, layout.key.width))


def _background_tokens(network: nn.Module) -> int:
    """CTI has a token of the background before those of the classes."""
    return int(getattr(network, "num_classes_with_fg", network.num_classes)) - int(network.num_classes)  # type: ignore[arg-type]
