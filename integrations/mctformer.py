"""MCTformer V1, V2 and MCTformer+, and their heirs WeakTr and CTI: one class token per class, unfused attention.

What is regularised: the attention of all blocks on the training images (the class tokens' rows and the pairs of
patches) and the class map of the convolutional head. V1 has no such head: its class map is the class tokens' attention
to the patches, summed over layers. Weights to start from: DeiT-S of ImageNet-1k, deit_small_patch16_224-cd65a155.pth.
MCTformer and WeakTr load it by ``--finetune``, CTI from pretrained/deit_small_imagenet.pth.

Run on 2026-11-25 with torch 2.14.1 and timm 1.0.31 on a CPU, at the commits below, with random weights: two steps of
the training functions themselves (``train_one_epoch``; CTI's ``train_setup``, ``unpack`` and ``update``). Stubbed: the
``.cuda()`` calls, OpenCV, the data loader, and CTI's ``__init__``, which needs the weights. MCTformer+ also ran as a
whole on eight made-up images, by ``python -m benchmarks.recipe``: training, class maps, evaluation.
ChunmengLiu1/AReAM at fe708c3 could not be fetched and is not served: its blocks return logits, not probabilities.

Views. V1, V2 and WeakTr resize their position table, so they take flips, quarter turns, and crops and scales to any
multiple of 16, square or not. MCTformer+ and CTI do not resize it in training, so every view must have the side they
train at (448, 224): flips, quarter turns, ``Scale(..., keep_size=True)`` and ``RandomResizedCrop(side)``.
``second_view`` refuses other sizes. It also refuses oblong images with equally many patches, which these hosts would
take with wrong positions.

Noise floor. With drop_path of 0.1, two passes on the same images have different attention. In train mode the loss is
therefore above 0 under ``Identity()``, and only the part above this floor comes from the view. In eval mode the floor
is exactly 0. Means of four pairs of passes on two images of uniform noise, with two classes present, seed 0 and random
weights (attention close to uniform):

    model          px   activation         affinity           cam          identity / flip, each
    MCTformer V1   224  0.0026 / 0.0244    0.0024 / 0.0253    0.001 / 0.008
    MCTformer V2   224  0.0027 / 0.0247    0.0025 / 0.0254    0.060 / 0.185
    MCTformer+     448  0.0025 / 0.0261    0.0023 / 0.0271    0.055 / 0.176
    WeakTr         224  0.0024 / 0.0247    0.0023 / 0.0251    0.068 / 0.178
    CTI            224  0.0024 / 0.0248    0.0023 / 0.0254    0.078 / 0.239

Mixed precision. The hosts train under autocast with a scaled loss (CTI does not), and ACR's lines stand before the
scaler. The loss itself computes in float32. At 64 px and random weights, the cosine between the gradient on the query
and key weights and the same gradient in float32 is 0.999 in float16 (with the initial scale of the scaler), and 0.76
(WeakTr), 0.97 (CTI) to 0.999 in bfloat16. Less than 0.1 % of the gradient is 0. MCTformer+ ran two steps of its loop in
bfloat16.

Parallel. WeakTr uses DistributedDataParallel: the second view is another forward of the wrapped model. On two gloo
ranks, the gradients of its loop are equal on both ranks, and the mean of both.

What does not work. CTI uses ``nn.DataParallel`` over several GPUs, whose replicas the capture refuses: show it one GPU
(CUDA_VISIBLE_DEVICES=0). CTI's ``img_pos`` is another image of the class, not a view of ``img``. The class maps that
the hosts return are detached (V2, WeakTr), or end in a square root whose gradient at 0 is not a number (MCTformer+), so
``cams`` takes the head's output. WeakTr's fused class map has no gradient on the attention that it fuses.

The lines to add stand before the given line of the host's file at that commit, at that line's indentation. The host
itself needs the lines "on today's torch and timm": timm's ``create_model`` passes arguments that these models refuse,
and Pillow has dropped a name. With them, each ``main.py`` (WeakTr's with mlflow stubbed) and CTI's ``__init__`` build
their model and load a file shaped like the weights. ``acr_reg.integrations.added_lines`` puts the lines into a copy.

    xulianuwa/MCTformer at 0acc27a (MCTformer+)
        title: MCTformer+
        regularises: the class tokens' rows, the affinity, the head's map
        views: the size it trains at
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

    xulianuwa/MCTformer at 0acc27a, on today's torch and timm
        main.py, before line 217:
            def create_model(model_name, pretrained, drop_block_rate, **options):
                return getattr(models, model_name)(**options)
        datasets.py, before line 13:
            PIL.Image.CUBIC = PIL.Image.BICUBIC

    xulianuwa/MCTformer at 9606597 (MCTformer V1 and V2)
        title: MCTformer
        regularises: the class tokens' rows, the affinity, the head's map (V1: the class tokens' map)
        views: multiples of 16
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

    xulianuwa/MCTformer at 9606597, on today's torch and timm
        main.py, before line 200:
            def create_model(model_name, pretrained, drop_block_rate, **options):
                return getattr(models, model_name)(**options)
        datasets.py, before line 13:
            PIL.Image.CUBIC = PIL.Image.BICUBIC

    hustvl/WeakTr at 3457ad3
        title: WeakTr
        regularises: the class tokens' rows, the affinity, the head's map
        views: multiples of 16
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

    hustvl/WeakTr at 3457ad3, on today's torch and timm
        main.py, before line 297:
            def create_model(model_name, pretrained, drop_block_rate, **options):
                return getattr(models, model_name)(**options)
        datasets.py, before line 15:
            PIL.Image.CUBIC = PIL.Image.BICUBIC

    yoon307/CTI at 1c6fdb4
        title: CTI
        regularises: the class tokens' rows, the affinity, the head's map, of ``img``
        views: the size it trains at
        models/model_CTI.py, before line 44:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip
            from acr_reg.integrations import mctformer as with_acr
        models/model_CTI.py, before line 276:
            self.host = with_acr.capture(self.net_trm)
            self.acr = AllPairsConsistencyLoss(HorizontalFlip())
        models/model_CTI.py, before line 312:
            self.host.clear()
        models/model_CTI.py, before line 316:
            first = self.host.take()
            second = with_acr.second_view(self.host, self.acr.view(self.img))
        models/model_CTI.py, before line 430:
            loss_trm = loss_trm + self.acr(
                first.attention, second.attention, with_acr.cams(first), with_acr.cams(second), labels=self.label
            )
            del first, second

    yoon307/CTI at 1c6fdb4, on today's torch and timm
        models/model_CTI.py, before line 151:
            def create_model(model_name, pretrained, drop_block_rate, **options):
                return getattr(mctformer, model_name)(**options)

CTI runs the model up to three more times in a step (img_pos, and twice with swapped class tokens), and with a graph
when it scores between epochs. ``clear()`` forgets those passes. A ``take()`` after them is refused.
"""

from __future__ import annotations

from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the class tokens' and patches' attention in all blocks, and the output of the convolutional head. Raises
    ValueError for a model of another family."""
    network = unwrap(model)
    blocks = part(network, "blocks", "MCTformer")
    background = _background_tokens(network)
    count = background + _num_classes(network)
    attention = capture_attention(
        model, modules=[blocks], num_prefix_tokens=count, class_tokens=range(background, count)
    )
    head = network.head
    return HostCapture(model, attention, FeatureRecorder(head) if isinstance(head, nn.Conv2d) else None)


def second_view(host: HostCapture, images: Tensor) -> HostView:
    """Runs the whole model on ``images`` (B, 3, H, W), through DDP if the model is wrapped. ``output`` is what the
    host's forward returns, for the paper's second classification loss. Raises ValueError for images of a size at which
    the host cannot train."""
    _refuse_other_sizes(host.network, images)
    return host.run(lambda: host.model(images))


def cams(view: HostView) -> Tensor:
    """The head's class map (B, C, h, w) of all classes, in any range, on the graph. V1 has no head: its class map is
    the class tokens' attention to the patches, at least 0, summed over layers."""
    background = _background_tokens(view.network)
    if view.features is not None:
        return view.features[:, background:]
    layout = view.attention[0].layout
    tokens = list(layout.known_class_tokens())
    rows = sum(layer.weights().mean(1)[:, tokens, layout.num_prefix_tokens :] for layer in view.attention)
    assert isinstance(rows, Tensor)
    return rows.unflatten(2, (layout.key.height, layout.key.width))


def _num_classes(network: nn.Module) -> int:
    """Raises ValueError for other models: a plain ViT, taken for MCTformer, would have a thousand prefix tokens."""
    classes = int(getattr(network, "num_classes", 0))
    token = getattr(network, "cls_token", None)
    tokens = token.shape[1] if isinstance(token, Tensor) and token.ndim == 3 else 0
    if not hasattr(network, "num_classes_with_fg") and (classes == 0 or tokens != classes):
        raise ValueError(
            f"{type(network).__name__} has {tokens} class tokens for {classes} classes, unlike the MCTformer family. "
            "Use its host file (docs/hosts), or capture_attention."
        )
    return classes


def _background_tokens(network: nn.Module) -> int:
    """CTI has a background token before the class tokens."""
    classes = getattr(network, "num_classes", 0)
    return int(getattr(network, "num_classes_with_fg", classes)) - int(classes)


def _refuse_other_sizes(network: nn.Module, images: Tensor) -> None:
    """MCTformer+ and CTI have a table of their own for the patches' positions, and never resize it in training."""
    table = getattr(network, "pos_embed_pat", None)
    if not network.training or not isinstance(table, Tensor):
        return
    patch = next(part(network, "patch_embed", "MCTformer").parameters()).shape[-1]  # of the convolution's weight
    side = patch * round(table.shape[1] ** 0.5)
    if tuple(images.shape[-2:]) != (side, side):
        raise ValueError(
            f"The view is {images.shape[-2]} x {images.shape[-1]} px, but this {type(network).__name__} trains at "
            f"{side} x {side} only. Use flips, Scale(..., keep_size=True) or RandomResizedCrop({side})."
        )
