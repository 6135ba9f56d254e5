"""Evaluates one layer's attention terms in blocks of query rows, without ever holding an N x N map of all heads.

Autograd runs inside each block, in the forward pass, and the gradients of query and key are added up in float32 at
least. Memory thus grows with N. The upstream gradient, loss scale included, is applied before anything is cast to half
precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from acr_reg._tensors import at_least_float32, select
from acr_reg.attention.layer import LEAST_ROWS, LayerAttention, RecordedTensors
from acr_reg.losses.functional import RowSum
from acr_reg.losses.terms import LayerTerms, mean_entropy

# Up to this size, all maps are formed at once: blocks of small maps take up to 1.4 times as long.
SMALL_MEGABYTES = 128

# Of the maps of both views in a block, which holds a few times as many. On a CPU, blocks of 4 MB took 1.4 times as long
# as all maps at once, and these 1.2 times in the same runs. On other devices each block costs many calls.
BLOCK_MEGABYTES, DEVICE_BLOCK_MEGABYTES = 16, 64

# Of the grid, in a block of resampled rows: each block also forms the rows beside it that it reads.
RESAMPLED_ROWS = 4


def can_be_blockwise(*layers: LayerAttention) -> bool:
    """Whether every layer with a gradient has query and key. An explicit map's gradient is as large as the map."""
    return all(layer.is_factored or not layer.requires_grad for layer in layers)


def are_small(pairs: Iterable[tuple[LayerAttention, LayerAttention]], share: float) -> bool:
    """Whether this share of the rows of all maps, of both views, takes little memory."""
    elements = sum(math.prod(layer.shape) for pair in pairs for layer in pair)
    return share * elements * 4 <= SMALL_MEGABYTES * 2**20


def size_of_block(
    a: LayerAttention, b: LayerAttention, share: float, block_rows: int | None
) -> tuple[int, tuple[int, int]]:
    """The images of a block; and its tokens, of which a share is compared, where rows are permuted and where they are
    resampled. Whole images come first: the gradient to all keys is formed once for each block of their rows."""
    batch, heads, queries, keys = (max(sizes) for sizes in zip(a.shape, b.shape, strict=True))
    if block_rows is not None:
        return batch, (math.ceil(block_rows / share), block_rows)
    room = (BLOCK_MEGABYTES if a.device.type == "cpu" else DEVICE_BLOCK_MEGABYTES) * 2**20 // 4 // 2
    rows = max(LEAST_ROWS, room // (heads * keys))
    images = min(batch, max(1, rows // queries))
    return images, (math.ceil(rows / share), max(rows, RESAMPLED_ROWS * a.layout.query.width))


class BlockedLayer:
    """A layer that gives its rows block by block, as :class:`~acr_reg.LayerAttention` does, for part of its ``images``.

    ``inputs`` make its map, on the graph: query, key and an additive bias; or the map itself. A block copies the rows
    it needs into ``leaves``, in float32 at least. :meth:`add` adds the gradients of the leaves in the right places.
    ``order`` is that of all keys; every block needs them, so they are put in order once, and their gradient back once.
    """

    def __init__(self, layer: LayerAttention, order: Tensor | None) -> None:
        self.layer, self._order = layer, order
        mask = layer.batched_mask() if layer.is_factored else None
        parts = (layer.explicit,) if not layer.is_factored else (layer.query, layer.key, mask)
        self.inputs: list[Tensor] = [part for part in parts if part is not None]
        with torch.no_grad():
            self._held = [at_least_float32(part.detach()) if part.is_floating_point() else part for part in self.inputs]
            if layer.is_factored:
                self._held[1] = select(self._held[1], 2, order)
        self._learning = [torch.is_grad_enabled() and part.requires_grad for part in self.inputs]
        self._weighted: list[Tensor | None] = [None] * len(self.inputs)
        self._found: list[Tensor | None] = [None] * len(self.inputs)  # of the current term
        self.images = slice(0, layer.shape[0])
        self._index: tuple[Tensor | None, Tensor | None] = None, None  # of the block's queries and keys
        self.leaves: list[Tensor] = []
        self._leaf_of: list[int] = []  # which input each leaf was taken from

    @property
    def learns(self) -> bool:
        return any(self._learning)

    @property
    def stochastic(self) -> bool:
        return self.layer.stochastic

    def weights(self, queries: Tensor, keys: Tensor | None = None) -> Tensor:
        """The rows of a block, on leaves of their own; ``queries`` is (R,), or (B, R) for each image."""
        self._index, self.leaves, self._leaf_of = (queries, keys), [], []
        rows = self._leaf(0, select(self._held[0][self.images], 2, queries))
        if not self.layer.is_factored:
            return select(rows, -1, keys)
        tensors = RecordedTensors(
            query=rows, key=self._leaf(1, self._held[1][self.images]), scale=self.layer.recorded.scale
        )
        if len(self.inputs) > 2:
            tensors = replace(tensors, mask=self._mask_leaf(queries, keys))
        return _Softmax.apply(replace(self.layer, recorded=tensors, images=slice(None)).logits())

    def _leaf(self, number: int, tensor: Tensor) -> Tensor:
        if self._learning[number] and torch.is_grad_enabled():
            tensor = tensor.detach().requires_grad_()
            self.leaves.append(tensor)
            self._leaf_of.append(number)
        return tensor

    def _mask_leaf(self, queries: Tensor, keys: Tensor | None) -> Tensor:
        mask = self._of_images(self._held[2])
        batch, heads, _, _ = mask.shape
        if queries.ndim == 2 or (keys is not None and keys.ndim == 2):
            batch = self.images.stop - self.images.start
        mask = mask.expand(batch, heads, *self.layer.shape[2:])
        return self._leaf(2, select(select(mask, 2, queries), 3, keys))

    def _of_images(self, tensor: Tensor) -> Tensor:
        return tensor if len(tensor) == 1 else tensor[self.images]

    def add(self, gradients: Iterator[Tensor | None]) -> None:
        """Adds the gradients of this block's leaves, in their order."""
        for number in self._leaf_of:
            gradient, found = next(gradients), self._found[number]
            if gradient is None:
                continue
            if found is None:
                if number == 1 and gradient.shape == self._held[1].shape:
                    self._found[1] = gradient
                    continue
                found = self._found[number] = gradient.new_zeros(self.inputs[number].shape)
            found = self._of_images(found)
            if number == 0:
                _add_rows(found, self._index[0], gradient)
            elif number == 1:  # stays in order until the end
                found.add_(gradient)
            else:
                gradient = _put_back(gradient, 3, self._index[1], self.layer.shape[3])
                gradient = _put_back(gradient, 2, self._index[0], self.layer.shape[2])
                found.add_(gradient.sum_to_size(found.shape))

    def scale(self, factor: Tensor) -> None:
        """Closes a term: adds ``factor`` times its gradient to the gradient of the terms so far."""
        for number, found in enumerate(self._found):
            if found is not None:
                total, found = self._weighted[number], found.mul_(factor)
                self._weighted[number] = found if total is None else total.add_(found)
        self._found = [None] * len(self.inputs)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the inputs, over all terms."""
        if self.layer.is_factored and (of_keys := self._weighted[1]) is not None:
            self._weighted[1] = _put_back(of_keys, 2, self._order, self.layer.shape[3])
        return self._weighted


class _Softmax(torch.autograd.Function):
    """A softmax that subtracts from its gradient twice what that gradient sums to, weighted by the row.

    The sum is 0. Where one key has almost all the mass, though, its gradient is a difference of almost equal numbers,
    and their rounding may exceed the gradient of all other keys. After two subtractions it does not.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        rows = logits.softmax(-1)
        ctx.save_for_backward(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        found = rows * gradient
        for _ in range(2):
            found.addcmul_(rows, found.sum(-1, keepdim=True), value=-1)
        return found


def _put_back(values: Tensor, dim: int, index: Tensor | None, count: int) -> Tensor:
    """Puts entries that ``index`` selected back into their places among ``count``; 0 elsewhere."""
    if index is None:
        return values
    whole = values.new_zeros([*values.shape[:dim], count, *values.shape[dim + 1 :]])
    _add_rows(whole.movedim(dim, 2), index, values.movedim(dim, 2))
    return whole


def _add_rows(whole: Tensor, index: Tensor | None, rows: Tensor) -> None:
    """Adds rows (B, H, R, ...) in place to the rows at ``index``, (R,), (1, R) or (B, R)."""
    assert index is not None
    if index.ndim == 1 or len(index) == 1:
        whole.index_add_(2, index.flatten(), rows)
        return
    images = torch.arange(len(index), device=index.device)[:, None]
    whole.movedim(2, 1).index_put_((images, index), rows.movedim(2, 1), accumulate=True)


def evaluate_blockwise(terms: LayerTerms, images: int) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`~acr_reg.losses.terms.evaluate_dense`, block by block of at most so many ``images``. The first derivative
    is exact; a second one is refused."""
    (a, b), plan = terms.pair.layers, terms.pair.plan
    layers = BlockedLayer(a, plan.of_image.order), BlockedLayer(b, plan.of_view.order)
    report: dict[str, Tensor] = {}
    run = partial(_in_blocks, terms, layers, images, report)
    inputs = [tensor for layer in layers for tensor in layer.inputs]
    learns = any(layer.learns for layer in layers)
    return _Blockwise.apply(run, layers, *inputs) if learns else run(), report


def _in_blocks(
    terms: LayerTerms, layers: tuple[BlockedLayer, BlockedLayer], images: int, report: dict[str, Tensor]
) -> Tensor:
    """The weighted sum of the terms; their gradients are added up in the layers, and each term goes to the report."""
    batch = layers[0].layer.shape[0]
    everything = [(slice(0, batch), replace(terms, pair=terms.pair.of(*layers)))]
    parts = [slice(first, min(first + images, batch)) for first in range(0, batch, images)]
    divided = everything if len(parts) == 1 else [(part, terms.of_images(part, *layers)) for part in parts]
    entropies: list[Tensor | None] = []
    weighted: list[Tensor] = []
    for term, weight in terms.weights.items():
        whole: RowSum | None = None
        learns = weight != 0 and any(layer.learns for layer in layers)
        for part, of_part in divided if term == "affinity" else everything:
            for layer in layers:
                layer.images = part
            for rows in of_part.blocks if term == "affinity" else of_part.blocks[:1]:
                with torch.set_grad_enabled(learns):
                    found_of, entropy = of_part.compare((term,), rows)
                block = found_of[term]
                if learns:
                    leaves = [leaf for layer in layers for leaf in layer.leaves]
                    found = iter(torch.autograd.grad(block.total, leaves, allow_unused=True))
                    for layer in layers:
                        layer.add(found)
                entropies.append(entropy)
                block = RowSum(block.total.detach(), block.weight, block.count)
                whole = block if whole is None else whole + block
        assert whole is not None
        whole = terms.closed(term, whole)
        for layer in layers:
            layer.scale(weight / whole.norm())
        report[term] = whole.mean()
        weighted.append(weight * report[term])
    value = torch.stack(weighted).sum()
    report.update(mean_entropy(entropies))
    return value


class _Blockwise(torch.autograd.Function):
    """Passes the gradients found in the forward pass to autograd, times the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[], Tensor], layers: tuple[BlockedLayer, BlockedLayer], *inputs: Tensor
    ) -> Tensor:
        value = run()
        gradients = [gradient for layer in layers for gradient in layer.gradients()]
        ctx.present = [gradient is not None for gradient in gradients]
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The blockwise loss has no second derivative (create_graph=True). Build it with blockwise=False to "
                "differentiate twice."
            )
        saved = iter(ctx.saved_tensors)
        gradients = [
            (next(saved) * upstream).to(dtype) if present else None
            for present, dtype in zip(ctx.present, ctx.dtypes, strict=True)
        ]
        return None, None, *gradients
