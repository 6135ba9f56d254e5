"""Computes a model's class maps for inference, over several views, in one call that runs the forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from acr_reg._torch_private import comes_from_shards, entered, shards_parameters, take_off
from acr_reg.attention.maps import AttentionMaps
from acr_reg.cam.class_rows import ClassRows
from acr_reg.cam.gradient import Method, Turns, gradient_maps, has_graph, settle, used_layers
from acr_reg.cam.refinement import multi_view_cam, propagated_maps
from acr_reg.cam.settings import CamSettings
from acr_reg.capture.evaluation import eval_mode
from acr_reg.capture.handle import AttentionCapture, Removable, alone, capture_attention
from acr_reg.capture.refusals import refuse_sharded
from acr_reg.errors import CaptureError, LayoutError, listed, some
from acr_reg.placement.kinds import unordered_tokens
from acr_reg.tokens import Lattice
from acr_reg.views.constructors import HorizontalFlip, Identity
from acr_reg.views.view import View


class GradientCam(Removable):
    """Makes the class maps of a model in one call: gradient maps, spread over the affinity, summed over views.

    For each view of the images it computes :func:`~acr_reg.class_token_gradient_cam`, spreads the maps by
    :func:`~acr_reg.propagate_cam`, and merges all views by :func:`~acr_reg.multi_view_cam`. The defaults are those of
    ACR (arXiv 2308.04321): one step over all layers, and the sum over the image and its flip.

    The model runs in eval mode, and its modes and flags are restored afterwards. Threads that make class maps of one
    model wait for each other; do not train it on another thread meanwhile. No parameter needs a gradient, so
    frozen models work. Layers below ``start_layer`` run without a graph, unless the model needs one there. The first
    call runs one image once more to see the layers. A training capture of the same model does not record these runs.

    Args:
        model: any module that :func:`~acr_reg.capture_attention` can capture.
        start_layer: first layer whose gradient is used; negative counts from the last layer.
        method: formula of :func:`~acr_reg.class_token_gradient_cam`.
        query: "class" reads the row of the class token. "all" averages over all rows, for models without one.
        steps: propagation steps; 0 returns the raw maps.
        propagation_layers: layers that propagate; None takes all. They must lie on one grid, so take the last stage of
            a pyramid.
        views: views of the images; None takes the image and its flip.
        merge: "sum", "max" or "mean" over views and scales. Take "mean" if the views are crops.
        scales: scales of the images, such as ``[0.5, 1.0, 1.5]`` for multi-scale maps; every view runs at every scale.
            The model must take images of these sizes (timm: ``dynamic_img_size=True``).
        forward: returns the logits (B, C) of images, if ``model(images)`` does not. If the output is not a tensor, its
            ``.logits`` or ``["logits"]`` is used, as of Hugging Face models.
        class_tokens: for models with several class tokens. C (the number of classes) says that the first C tokens are
            class tokens and token c belongs to class c; a list gives their positions. Not needed for one class token.
        modules, patch_size, num_prefix_tokens, num_suffix_tokens: as for :func:`~acr_reg.capture_attention`.
        grid: (height, width) of the images in tokens, if the capture cannot infer it. Views of other sizes get a grid
            in proportion.
        no_grad: whether to use layers that the model runs under ``torch.no_grad`` for propagation. They have no
            gradient, so ``start_layer`` must lie above them. None leaves them out with a warning.

    ``remove()``, or leaving a ``with`` block, ends the capture. Calls raise :class:`~acr_reg.LayoutError` if the
    settings do not suit the model, and name the settings that do. They raise :class:`~acr_reg.CaptureError` if the
    attention cannot be captured.

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
        forward: Callable[[Tensor], Any] | None = None,
        *,
        scales: Iterable[float] = (1.0,),
        modules: Iterable[str | nn.Module] | None = None,
        patch_size: int | Sequence[int] | None = None,
        num_prefix_tokens: int | None = None,
        num_suffix_tokens: int | None = None,
        class_tokens: int | Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
        no_grad: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module. Pass a function as forward=.")
        if steps < 0:
            raise ValueError(f"steps={steps} is negative. Pass 0 or more; 0 leaves propagation out.")
        if grid is not None and (not isinstance(grid, (tuple, list)) or len(grid) != 2 or min(grid) < 1):
            raise LayoutError(f"grid={grid!r} is not (height, width) in tokens. Pass grid=(14, 14) for 196 patches.")
        self.model, self.forward = model, model if forward is None else forward
        self.start_layer, self.method, self.query = start_layer, method, query
        self.steps = steps
        self.propagation_layers = (
            None if propagation_layers is None else listed("propagation_layers", propagation_layers)
        )
        self.views = (Identity(), HorizontalFlip()) if views is None else listed("views", views)
        self.merge, self.scales = merge, listed("scales", scales)
        self.grid, self.no_grad = grid, no_grad
        self._hints: dict[str, Any] = {
            "modules": None if modules is None else listed("modules", modules),
            "patch_size": patch_size,
            "num_prefix_tokens": num_prefix_tokens,
            "num_suffix_tokens": num_suffix_tokens,
            "class_tokens": class_tokens,
        }
        self._attention: AttentionCapture | None = None
        self._rows: ClassRows | None = None  # of which alone the gradient is computed
        self._whole_graph = False  # the model needs a graph below start_layer too
        self._removed = False

    def remove(self) -> None:
        """Removes every hook from the model. May be called more than once."""
        self._removed = True
        self._end_capture()

    def _end_capture(self) -> None:
        if self._attention is not None:
            self._attention.remove()
        if self._rows is not None:
            take_off(self._rows)  # if an interruption left it there
        self._attention, self._rows, self._whole_graph = None, None, False

    def _running(self) -> AttentionCapture:
        if self._attention is None:
            raise CaptureError("This GradientCam was removed. Make another one.")
        return self._attention

    def __call__(self, images: Tensor, labels: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Returns class maps (B, C, h, w) >= 0, detached and not normalised.

        Args:
            images: (B, bands, H, W), with any number of bands.
            labels: (B, C), > 0 for the classes present. Maps of other classes are 0. None computes all classes.
            size: (h, w) of the maps, by default the token grid. Pass the size of the image for maps to threshold.
        """
        _check_images(images)
        if self._removed:
            self._running()
        image_size = (images.shape[-2], images.shape[-1])

        if shards_parameters(self.model):
            refuse_sharded()

        turns: list[Turns] = []

        def maps_of(view: Tensor) -> tuple[Tensor, Lattice]:
            logits = self._logits(view, changed)
            maps = self._running().take()
            if maps.run:
                _refuse_runs(maps.run + 1)
            maps = self._placed(maps, (view.shape[-2], view.shape[-1]), image_size)
            layers = used_layers(logits, maps, labels, self.start_layer, self.method, self.query)
            if not turns:
                turns.append(Turns.of(labels, logits))  # of all views, so that the labels are read once
            cam, contributed = gradient_maps(logits, layers, turns[0], self.method, self.query)
            made = {"The class maps": cam}
            if self.steps:
                wanted = turns[0].wanted[:, :, None, None].expand(-1, -1, *cam.shape[-2:])  # the others' maps are 0
                with torch.no_grad():
                    spread = propagated_maps(cam.gather(1, wanted), maps, self.propagation_layers, self.steps)
                    cam = torch.zeros_like(cam).scatter(1, wanted, spread)
                made["The propagated maps"] = cam
            settle(logits, layers, turns[0], self.query, contributed, made)
            return cam, maps[-1].layout.key

        def one_view(view: Tensor) -> tuple[Tensor, Lattice]:
            try:
                return maps_of(view)
            except Exception:  # NaN where the model needs other rows, or a checkpointed layer that ran otherwise
                if self._rows is None:
                    raise
            self._rows = None
            return maps_of(view)

        images, changed = images.detach(), eval_mode(self.model)
        try:
            with changed, torch.inference_mode(False):  # which enables gradients, too
                changed.freeze()
                if self._attention is None:
                    self._begin(images[:1], image_size, changed)
                return multi_view_cam(one_view, images, self.views, self.merge, size, self.scales)
        except BaseException:  # an interruption may have come anywhere
            changed.restore()
            self._end_capture()
            raise

    def _begin(self, image: Tensor, image_size: tuple[int, int], changed: eval_mode) -> None:
        """Begins the capture, whose graph starts at the first layer used; one image shows which that is."""
        hints = {**self._hints, "image_channels": image.shape[1]}
        # A graph from the first layer on shows which layers the model runs with one. It need not save any tensor.
        self._attention = capture_attention(self.model, keep="all", no_grad=True, graph_from=0, **hints)
        logits = self._logits(image, changed, saves=False)
        if comes_from_shards(logits):  # of a part of forward that the model does not hold
            refuse_sharded()
        runs = self._attention.take_all()
        self._attention.remove()
        if not self.no_grad:  # the forward may run the encoder under no_grad, too
            runs = [run for run in runs if any(map(has_graph, run))] or runs[:1]
        if len(runs) > 1:
            _refuse_runs(len(runs))
        maps = self._placed(runs[0], image_size, image_size)
        if maps[-1].placed is None and (unordered := unordered_tokens(self.model)) is not None:
            raise LayoutError(unordered)
        settings = CamSettings(self.start_layer, self.query, self.steps, self.propagation_layers, self.no_grad)
        first = settings.first_layer(type(self.model).__name__, maps, logits.shape[1])
        self._attention = capture_attention(
            self.model, keep="last", no_grad=bool(self.no_grad), graph_from=first, **hints
        )
        used = [layer for layer in maps if self.no_grad or has_graph(layer)][first:]
        self._rows = None if self._whole_graph else ClassRows.of([layer.layout for layer in used], self.query)

    def _forward(self, images: Tensor) -> Any:
        rows = None if torch.is_anomaly_enabled() else self._rows  # which refuses NaN in a gradient
        if rows is not None:
            rows.batch = len(images)
        with alone(self._running()), nullcontext() if rows is None else entered(rows):
            return self.forward(images)

    def _logits(self, images: Tensor, changed: eval_mode, saves: bool = True) -> Tensor:
        """The logits of one forward, with a graph below ``start_layer`` if the model cannot do without. A graph that
        ``saves`` no tensors shows which layers are on it."""
        self._running().clear()
        if not self._whole_graph:
            try:
                with nullcontext() if saves else saved_tensors_hooks(lambda tensor: None, _refuse_backward):
                    found = self._forward(images)
            except CaptureError:
                raise
            except Exception:  # the model may need a graph below start_layer, as to hook its tensors
                if self._rows is not None:  # or may not take these
                    raise
                self._whole_graph = True
                self._running().clear()
        if self._whole_graph:
            changed.unfreeze()
            images = images.detach().clone()  # a clone can have a gradient where an inference tensor cannot
            found = self._forward(images.requires_grad_() if images.is_floating_point() else images)
        return _logits_of(found, len(images))

    def _placed(self, maps: AttentionMaps, size: tuple[int, int], image_size: tuple[int, int]) -> AttentionMaps:
        """The maps on the ``grid`` that the user gives, in proportion for a view of another ``size``."""
        if self.grid is None:
            return maps
        if (unordered := unordered_tokens(self.model)) is not None:
            raise LayoutError(unordered)
        rows, columns = (self.grid[i] * size[i] / image_size[i] for i in (0, 1))
        if rows % 1 or columns % 1:
            raise LayoutError(
                f"grid={self.grid} of {image_size[0]} x {image_size[1]} px gives no whole grid for a view of {size[0]} "
                f"x {size[1]} px. Choose other views=."
            )
        stride = size[0] / rows, size[1] / columns
        lattice = Lattice(int(rows), int(columns), stride, extent=(float(size[0]), float(size[1])))
        prefix, suffix = (self._hints[name] or 0 for name in ("num_prefix_tokens", "num_suffix_tokens"))
        layout = partial(
            AttentionMaps.with_layout,
            grid=lattice,
            num_prefix_tokens=prefix,
            num_suffix_tokens=suffix,
            class_tokens=self._hints["class_tokens"],
        )
        tokens = prefix + len(lattice) + suffix
        given = [layer.window is None and layer.shape[2:] == (tokens, tokens) for layer in maps]
        if not any(given):
            return layout(maps)  # which says what the layers have instead
        layers = [layout(maps.select([layer.index]))[0] if on else layer for layer, on in zip(maps, given, strict=True)]
        return AttentionMaps(layers, maps.batch_norms, maps.run)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"The images are a {type(images).__name__}. Pass a tensor (B, bands, H, W), such as torch.from_numpy(...)."
        )
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"The images have shape {tuple(images.shape)}. Pass (B, bands, H, W), at least one image.")


def _refuse_backward(saved: None) -> NoReturn:
    raise RuntimeError("This graph saved no tensors.")  # caught: the model then gets one that does


def _refuse_runs(count: int) -> NoReturn:
    raise CaptureError(
        f"The forward ran the encoder {count} times. Pass a forward= that runs it once, or modules= of one encoder."
    )


def _logits_of(found: Any, images: int) -> Tensor:
    """The logits (B, C) in what the forward returned."""
    logits = found["logits"] if isinstance(found, Mapping) and "logits" in found else getattr(found, "logits", found)
    if not isinstance(logits, Tensor):
        raise TypeError(f"The forward returned {_brief(found)}. Pass forward= that returns the logits (B, C).")
    if logits.ndim != 2 or len(logits) != images:
        raise ValueError(
            f"The forward returned logits of shape {tuple(logits.shape)} for {images} images. Pass forward= that "
            f"returns (B, C), one row per image."
        )
    return logits


def _brief(found: Any) -> str:
    """What was returned, in words: the kind and what it holds."""
    kind = type(found).__name__
    if isinstance(found, Mapping):
        return f"a {kind} of {some([str(key) for key in found])}"
    if isinstance(found, (tuple, list)):
        return f"a {kind} of {some([type(each).__name__ for each in found])}"
    return f"a {kind}"
