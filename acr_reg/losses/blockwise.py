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
from acr_reg.attention.layer import LayerAttention, RecordedTensors, rows_of_block
from acr_reg.losses.functional import RowSum
from acr_reg.losses.terms import LayerTerms, mean_entropy

# Up to this size, forming all maps at once is faster: blocks of small maps take as many calls for less work.
SMALL_MEGABYTES = 128

# Of the grid, in a block of resampled rows: each block also forms the rows beside it that it reads.
RESAMPLED_ROWS = 4


def can_be_blockwise(*layers: LayerAttention) -> bool:
    """Whether every layer with a gradient has query and key. An explicit map's gradient is as large as the map."""
    return all(layer.is_factored or not layer.requires_grad for layer in layers)


def are_small(pairs: Iterable[tuple[LayerAttention, LayerAttention]], share: float) -> bool:
    """Whether this share of the rows of all maps, of both views, takes little memory."""
    elements = sum(math.prod(layer.shape) for pair in pairs for layer in pair)
    return share * elements * 4 <= SMALL_MEGABYTES * 2**20


def rows_of_plan(a: LayerAttention, b: LayerAttention, share: float, block_rows: int | None) -> tuple[int, int]:
    """The tokens of a block, of which a share is compared, where rows are permuted and where they are resampled."""
    rows = block_rows or rows_of_block((a, b))
    return math.ceil(rows / share), block_rows or max(rows, RESAMPLED_ROWS * a.layout.query.width)


class BlockedLayer:
    """A layer that gives its rows block by block, as :class:`~acr_reg.LayerAttention` does.

    ``inputs`` make its map, on the graph: query, key and an additive bias; or the map itself. A block copies the rows
    it needs into ``leaves``, in float32 at least. :meth:`add` adds the gradients of the leaves in the right places.
    """

    def __init__(self, layer: LayerAttention) -> None:
        self.layer = layer
        mask = layer.batched_mask() if layer.is_factored else None
        parts = (layer.explicit,) if not layer.is_factored else (layer.query, layer.key, mask)
        self.inputs: list[Tensor] = [part for part in parts if part is not None]
        with torch.no_grad():
            self._held = [at_least_float32(part.detach()) if part.is_floating_point() else part for part in self.inputs]
        self._learning = [torch.is_grad_enabled() and part.requires_grad for part in self.inputs]
        self._weighted: list[Tensor | None] = [None] * len(self.inputs)
        self._found: list[Tensor | None] = [None] * len(self.inputs)  # of the current term
        self._key: tuple[Tensor | None, Tensor] | None = None  # its order, and the leaf
        self._rows: Tensor | None = None
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
        self._rows, self.leaves, self._leaf_of = queries, [], []
        rows = self._leaf(0, select(self._held[0], 2, queries))
        if not self.layer.is_factored:
            return select(rows, -1, keys)
        tensors = RecordedTensors(query=rows, key=self._key_leaf(keys), scale=self.layer.recorded.scale)
        if len(self.inputs) > 2:
            tensors = replace(tensors, mask=self._mask_leaf(queries, keys))
        return _Softmax.apply(replace(self.layer, recorded=tensors, images=slice(None)).logits())

    def _leaf(self, number: int, tensor: Tensor) -> Tensor:
        if self._learning[number] and torch.is_grad_enabled():
            tensor = tensor.detach().requires_grad_()
            self.leaves.append(tensor)
            self._leaf_of.append(number)
        return tensor

    def _key_leaf(self, order: Tensor | None) -> Tensor:
        """Every block needs all keys, so they are put in order once, and their gradient is put back once."""
        if self._key is None:
            self._key = (order, select(self._held[1], 2, order))
        assert self._key[0] is order
        return self._leaf(1, self._key[1])

    def _mask_leaf(self, queries: Tensor, keys: Tensor | None) -> Tensor:
        mask = self._held[2]
        batch, heads, _, _ = mask.shape
        if queries.ndim == 2 or (keys is not None and keys.ndim == 2):
            batch = self.layer.shape[0]
        mask = mask.expand(batch, heads, *self.layer.shape[2:])
        return self._leaf(2, select(select(mask, 2, queries), 3, keys))

    def add(self, gradients: Iterator[Tensor | None]) -> None:
        """Adds the gradients of this block's leaves, in their order."""
        for number in self._leaf_of:
            gradient, found = next(gradients), self._found[number]
            if gradient is None:
                continue
            if number == 1:  # stays in the order of the leaf until the end
                self._found[1] = gradient if found is None else found.add_(gradient)
                continue
            if found is None:
                found = self._found[number] = gradient.new_zeros(self.inputs[number].shape)
            if number == 2:
                assert self._key is not None
                gradient = _put_back(gradient, 3, self._key[0], self.layer.shape[3])
                gradient = _put_back(gradient, 2, self._rows, self.layer.shape[2])
                found.add_(gradient.sum_to_size(found.shape))
            else:
                _add_rows(found, self._rows, gradient)

    def scale(self, factor: Tensor) -> None:
        """Closes a term: adds ``factor`` times its gradient to the gradient of the terms so far."""
        for number, found in enumerate(self._found):
            if found is not None:
                total, found = self._weighted[number], found.mul_(factor)
                self._weighted[number] = found if total is None else total.add_(found)
        self._found = [None] * len(self.inputs)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the inputs, over all terms."""
        if self._key is not None and (of_keys := self._weighted[1]) is not None:
            self._weighted[1] = _put_back(of_keys, 2, self._key[0], self.layer.shape[3])
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


def evaluate_blockwise(terms: LayerTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`~acr_reg.losses.terms.evaluate_dense`, block by block. The first derivative is exact; a second one is
    refused."""
    layers = BlockedLayer(terms.pair.layers[0]), BlockedLayer(terms.pair.layers[1])
    report: dict[str, Tensor] = {}
    run = partial(_in_blocks, terms, layers, report)
    inputs = [tensor for layer in layers for tensor in layer.inputs]
    learns = any(layer.learns for layer in layers)
    return _Blockwise.apply(run, layers, *inputs) if learns else run(), report


def _in_blocks(terms: LayerTerms, layers: tuple[BlockedLayer, BlockedLayer], report: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the terms; their gradients are added up in the layers, and each term goes to the report."""
    terms = replace(terms, pair=terms.pair.of(*layers))
    entropies: list[Tensor | None] = []
    weighted: list[Tensor] = []
    for term, weight in terms.weights.items():
        whole: RowSum | None = None
        learns = weight != 0 and any(layer.learns for layer in layers)
        for rows in terms.blocks if term == "affinity" else terms.blocks[:1]:
            with torch.set_grad_enabled(learns):
                block, entropy = terms.compare(term, rows)
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
