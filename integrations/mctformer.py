"""MCTformer V1, V2 and MCTformer+, and the hosts built on them, WeakTr and CTI: one class token per class, unfused
attention.

What is regularised. The attention of all blocks on the training images (the class tokens' rows and the pairs of
patches), and the class map of the convolutional head.

Weights to start from. DeiT-S of ImageNet-1k, ``deit_small_patch16_224-cd65a155.pth``.

What was run. Two steps of the host's own training function ran on 2026-11-25, on a CPU with random weights, torch
2.14.1 and timm 1.0.31. The ``.cuda()`` calls, OpenCV and the data loader were replaced.

Noise floor. The model drops paths at random (``drop_path`` is 0.1), so two passes on the same images differ. In train
mode the loss is therefore above 0 even under ``Identity()``, and only the part above this floor comes from the view. In
eval mode the floor is exactly 0. We measured the means of four pairs of passes, on two images of uniform noise, with
two classes present, seed 0 and random weights, whose attention is close to uniform.

Mixed precision. The loss computes in float32, also under autocast. At 64 px with random weights, the gradient on the
query and key weights in float16 (with the scaler's initial scale) has a cosine of 0.999 with the gradient in float32.
Less than 0.1 % of it is 0. In bfloat16 the cosine is 0.76 to 0.999, depending on the host.

    xulianuwa/MCTformer at 0acc27a (MCTformer+)
        title: MCTformer+
        regularises: the class tokens' rows, the affinity, the head's map
        views: the size it trains at

        What is regularised. ``cams`` takes the head's output. The class map that the host returns ends in a square
        root, whose gradient at 0 is not a number.

        Weights to start from. Pass the path as ``--finetune``.

        What was run. The function is ``train_one_epoch``. The whole pipeline also ran on eight made-up images, by
        ``python -m benchmarks.recipe``: training, class maps and evaluation.

        Views. The host does not resize its position table in training, so every view must have the training size, 448
        px. Use flips, quarter turns, ``Scale(..., keep_size=True)`` or ``RandomResizedCrop(448)``. ``second_view``
        refuses other sizes. It also refuses oblong images with equally many patches, for which the host would use wrong
        positions.

        Noise floor. Identity gives activation 0.0025, affinity 0.0023 and class map 0.055 at 448 px. The flip gives
        0.0261, 0.0271 and 0.176.

        Mixed precision. The host trains under autocast with a scaled loss. ACR's lines stand before the scaler. Two
        steps of the loop also ran in bfloat16.

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
        timm's ``create_model`` passes arguments that these models refuse, and Pillow has dropped the name ``CUBIC``.
        With these lines ``main.py`` builds its model and loads a file shaped like the weights.

        main.py, before line 217:
            def create_model(model_name, pretrained, drop_block_rate, **options):
                return getattr(models, model_name)(**options)
        datasets.py, before line 13:
            PIL.Image.CUBIC = PIL.Image.BICUBIC

    xulianuwa/MCTformer at 9606597 (MCTformer V1 and V2)
        title: MCTformer
        regularises: the class tokens' rows, the affinity, the head's map (V1: the class tokens' map)
        views: multiples of 16

        What is regularised. V2 returns a detached class map, so ``cams`` takes the head's output. V1 has no such head:
        its class map is the class tokens' attention to the patches, summed over layers.

        Weights to start from. Pass the path as ``--finetune``.

        What was run. The function is ``train_one_epoch``.

        Views. The host resizes its position table, so flips, quarter turns, crops and scales work, square or not, if
        both sides are multiples of 16.

        Noise floor. For V1 at 224 px, identity gives activation 0.0026, affinity 0.0024 and class map 0.001. The flip
        gives 0.0244, 0.0253 and 0.008. For V2 at 224 px, identity gives 0.0027, 0.0025 and 0.060, and the flip 0.0247,
        0.0254 and 0.185.

        Mixed precision. The host trains under autocast with a scaled loss. ACR's lines stand before the scaler.

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
        timm's ``create_model`` passes arguments that these models refuse, and Pillow has dropped the name ``CUBIC``.
        With these lines ``main.py`` builds its model and loads a file shaped like the weights.

        main.py, before line 200:
            def create_model(model_name, pretrained, drop_block_rate, **options):
                return getattr(models, model_name)(**options)
        datasets.py, before line 13:
            PIL.Image.CUBIC = PIL.Image.BICUBIC

    hustvl/WeakTr at 3457ad3
        title: WeakTr
        regularises: the class tokens' rows, the affinity, the head's map
        views: multiples of 16

        What is regularised. The host returns a detached class map, so ``cams`` takes the head's output. The host's
        fused class map has no gradient on the attention that it fuses.

        Weights to start from. Pass the path as ``--finetune``.

        What was run. The function is ``train_one_epoch``.

        Views. The host resizes its position table, so flips, quarter turns, crops and scales work, square or not, if
        both sides are multiples of 16.

        Noise floor. Identity gives activation 0.0024, affinity 0.0023 and class map 0.068 at 224 px. The flip gives
        0.0247, 0.0251 and 0.178.

        Mixed precision. The host trains under autocast with a scaled loss. ACR's lines stand before the scaler. WeakTr
        has the 0.76.

        Several processes. WeakTr uses ``DistributedDataParallel``. The second view is another forward of the wrapped
        model. On two gloo ranks, both ranks have equal gradients, the mean of the two.

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
        timm's ``create_model`` passes arguments that these models refuse, and Pillow has dropped the name ``CUBIC``.
        With these lines ``main.py`` builds its model and loads a file shaped like the weights (tried with mlflow
        replaced).

        main.py, before line 297:
            def create_model(model_name, pretrained, drop_block_rate, **options):
                return getattr(models, model_name)(**options)
        datasets.py, before line 15:
            PIL.Image.CUBIC = PIL.Image.BICUBIC

    yoon307/CTI at 1c6fdb4
        title: CTI
        regularises: the class tokens' rows, the affinity, the head's map, of ``img``
        views: the size it trains at

        What is regularised. Only the pass on ``img``. ``img_pos`` is another image of the class, not a view of ``img``.
        CTI runs the model up to three more times in a step (on ``img_pos``, and twice with swapped class tokens), and
        with a graph when it scores between epochs. ``clear()`` forgets those passes. Without it, the next ``take()``
        raises an error.

        Weights to start from. The host loads them from ``pretrained/deit_small_imagenet.pth``.

        What was run. The functions are ``train_setup``, ``unpack`` and ``update``. CTI's ``__init__``, which needs the
        weights, was replaced, too.

        Views. The host does not resize its position table in training, so every view must have the training size, 224
        px. Use flips, quarter turns, ``Scale(..., keep_size=True)`` or ``RandomResizedCrop(224)``. ``second_view``
        refuses other sizes. It also refuses oblong images with equally many patches, for which the host would use wrong
        positions.

        Noise floor. Identity gives activation 0.0024, affinity 0.0023 and class map 0.078 at 224 px. The flip gives
        0.0248, 0.0254 and 0.239.

        Mixed precision. The host itself does not train under autocast. CTI has 0.97 in bfloat16.

        What does not work. The host's ``nn.DataParallel`` on several GPUs: the capture refuses its replicas. Show it
        one GPU (``CUDA_VISIBLE_DEVICES=0``).

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
        timm's ``create_model`` passes arguments that the model refuses. With this line CTI's ``__init__`` builds its
        model and loads a file shaped like the weights.

        models/model_CTI.py, before line 151:
            def create_model(model_name, pretrained, drop_block_rate, **options):
                return getattr(mctformer, model_name)(**options)
"""

from __future__ import annotations

from torch import Tensor, nn

from acr_reg import capture_attention
from acr_reg.integrations.host import FeatureRecorder, HostCapture, HostView, part, unwrap

__all__ = ["cams", "capture", "second_view"]


def capture(model: nn.Module) -> HostCapture:
    """Captures the attention of the class tokens and patches in all blocks, and the output of the convolutional head.
    Raises ValueError for a model of another family."""
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
    """Runs the whole model on ``images`` (B, 3, H, W), through DDP if the model is wrapped. ``output`` holds the result
    of the host's forward, for the paper's second classification loss. Raises ValueError for images of a size that the
    host cannot train on."""
    _refuse_other_sizes(host.network, images)
    return host.run(lambda: host.model(images))


def cams(view: HostView) -> Tensor:
    """The head's class map (B, C, h, w) of all classes, not normalised, on the graph. V1 has no head: its class map is
    the class tokens' attention to the patches, summed over layers, which is never negative."""
    background = _background_tokens(view.network)
    if view.features is not None:
        return view.features[:, background:]
    layout = view.attention[0].layout
    tokens = list(layout.known_class_tokens())
    rows = sum(layer.weights().mean(1)[:, tokens, layout.num_prefix_tokens :] for layer in view.attention)
    assert isinstance(rows, Tensor)
    return rows.unflatten(2, (layout.key.height, layout.key.width))


def _num_classes(network: nn.Module) -> int:
    """Raises ValueError for other models. A plain ViT would seem to have a thousand prefix tokens."""
    classes = int(getattr(network, "num_classes", 0))
    token = getattr(network, "cls_token", None)
    tokens = token.shape[1] if isinstance(token, Tensor) and token.ndim == 3 else 0
    if not hasattr(network, "num_classes_with_fg") and (classes == 0 or tokens != classes):
        raise ValueError(
            f"{type(network).__name__} has {tokens} class tokens for {classes} classes, unlike MCTformer. "
            "Use the host file for it (docs/hosts), or capture_attention."
        )
    return classes


def _background_tokens(network: nn.Module) -> int:
    """The number of background tokens: CTI has one, before the class tokens."""
    classes = getattr(network, "num_classes", 0)
    return int(getattr(network, "num_classes_with_fg", classes)) - int(classes)


def _refuse_other_sizes(network: nn.Module, images: Tensor) -> None:
    """MCTformer+ and CTI have a separate position table for patches and never resize it in training."""
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
