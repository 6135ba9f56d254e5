"""The attention maps of one encoder run, captured or brought by the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from acr_reg._tensors import at_least_float32
from acr_reg.attention.layer import LayerAttention, RecordedTensors
from acr_reg.errors import LayoutError, listed
from acr_reg.tokens import Lattice, TokenLayout, with_class_tokens

Grid = tuple[int, int] | Lattice

_ROW_ERROR = 5e-3  # what half precision makes of rows that sum to 1; weights() gives such maps in float32


def grid_layout(
    grid: Grid,
    num_prefix_tokens: int,
    class_tokens: int | Sequence[int] | None,
    key_grid: Grid | None = None,
    num_suffix_tokens: int = 0,
) -> TokenLayout:
    query = _lattice(grid, "grid")
    key = query if key_grid is None else _lattice(key_grid, "key_grid")
    if key_grid is not None and not isinstance(key_grid, Lattice):  # over the same image
        stride = (query.extent[0] / key.height, query.extent[1] / key.width)
        key = replace(key, stride=stride, extent=query.extent, is_unit=query.is_unit)
    layout = TokenLayout(query, key, num_prefix_tokens, num_suffix_tokens=num_suffix_tokens)
    return with_class_tokens(layout, class_tokens)


def _lattice(grid: Grid, name: str) -> Lattice:
    if isinstance(grid, Lattice):
        return grid
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise LayoutError(
            f"{name}={grid!r} is neither (height, width) in tokens nor a Lattice. Pass {name}=(14, 14) for 196."
        )
    return Lattice(*grid)


def check_tokens(shape: Sequence[int], index: int, layout: TokenLayout) -> None:
    if tuple(shape[-2:]) != (layout.num_queries, layout.num_keys):
        keys = f" and {layout.num_keys} keys ({layout.describe('key')})" if layout.key != layout.query else ""
        raise LayoutError(
            f"layer {index} has {shape[-2]} queries and {shape[-1]} keys. The grid is for {layout.num_queries} "
            f"({layout}){keys}. Correct grid={', key_grid=' if keys else ''}, num_prefix_tokens= or num_suffix_tokens=."
        )


def check_rows(maps: Tensor, index: int, layout: TokenLayout, stochastic: bool) -> None:
    if maps.ndim != 4 or not maps.is_floating_point() or not maps.numel():
        raise ValueError(
            f"layer {index}: a {maps.dtype} tensor of shape {tuple(maps.shape)} cannot be an attention map. Pass "
            "floating point probabilities (B, H, N, M) or (B, N, M)."
        )
    check_tokens(maps.shape, index, layout)
    rows = at_least_float32(maps.detach())
    if not rows.isfinite().all():
        raise ValueError(f"layer {index}: the map holds NaN or infinite values. Find the step that made them.")
    off, smallest = (rows.sum(-1) - 1).abs().max().item(), rows.min().item()
    if stochastic and (off > _ROW_ERROR or smallest < 0):
        raise ValueError(
            f"layer {index}: rows do not sum to 1 within {_ROW_ERROR:g} (off by {off:.2g}, min "
            f"{smallest:.2g}). Pass maps after softmax(-1), before dropout, or stochastic=False."
        )


class AttentionMaps(Sequence[LayerAttention]):
    """The attention layers of one encoder run, in the model's order.

    ``batch_norms`` names the BatchNorm modules in training mode, which couple the images of the batch. ``run`` is the
    number of encoder runs between the last take and this one; None if the caller chose the run.

    >>> import torch
    >>> maps = [torch.rand(2, 3, 1 + 4 * 6, 1 + 4 * 6).softmax(-1) for _ in range(2)]
    >>> attention = AttentionMaps.from_tensors(maps, num_prefix_tokens=1, grid=(4, 6))
    >>> attention
    AttentionMaps(layers 0, 1; 2 images; 3 heads; 25 tokens: 1 prefix + 4 x 6)
    >>> attention.chunk(2)[0].weights()[0].shape
    torch.Size([1, 3, 25, 25])
    """

    def __init__(
        self, layers: Iterable[LayerAttention], batch_norms: Sequence[str] = (), run: int | None = None
    ) -> None:
        self._layers = tuple(layers)
        self.batch_norms = tuple(batch_norms)
        self.run = run
        if not self._layers:
            raise ValueError("There is no attention layer. Pass the maps of at least one layer.")

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[Tensor],
        num_prefix_tokens: int,
        grid: Grid,
        class_tokens: int | Sequence[int] | None = None,
        key_grid: Grid | None = None,
        *,
        num_suffix_tokens: int = 0,
        stochastic: bool | Sequence[bool] = True,
    ) -> AttentionMaps:
        """Attention maps of your own code, one tensor (B, H, N, M) or (B, N, M) per layer.

        ``grid`` is (height, width) in tokens, and ``key_grid`` the same where a layer has fewer keys than queries, as
        in PVT and SegFormer; a :class:`~acr_reg.Lattice` also gives stride and offset. Of the N = ``num_prefix_tokens``
        + height * width + ``num_suffix_tokens`` queries, the first and the last are no patches. ``class_tokens`` counts
        the class tokens among those, from the first, or gives their positions in the N queries (-1 is the last);
        optional with one such token or none.

        ``stochastic`` says, for all layers or for each, that rows are probabilities. False is for maps that were gated,
        summed or mixed after softmax: their rows may sum to anything. Maps of a capture keep theirs by
        ``stochastic=[layer.stochastic for layer in maps]``. Raises ValueError if shapes disagree, a value is NaN or
        infinite, or a row of a stochastic map holds a value below 0 or does not sum to 1 within 5e-3, as logits do not.
        """
        if isinstance(tensors, Tensor):
            raise TypeError(
                "tensors= is one tensor. Pass a list, one tensor per layer: list(maps.unbind(dim)) if stacked."
            )
        layout = grid_layout(grid, num_prefix_tokens, class_tokens, key_grid, num_suffix_tokens)
        tensors = list(tensors)
        rows = [stochastic] * len(tensors) if isinstance(stochastic, bool) else list(stochastic)
        if len(rows) != len(tensors):
            raise ValueError(
                f"stochastic= has {len(rows)} values for {len(tensors)} layers. Pass one for each layer, or one bool."
            )
        layers = []
        for index, (tensor, are_probabilities) in enumerate(zip(tensors, rows, strict=True)):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"layer {index}: a {type(tensor).__name__} is not a tensor. Convert it with torch.as_tensor."
                )
            maps = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor
            check_rows(maps, index, layout, are_probabilities)
            recorded = RecordedTensors(map=maps)
            layers.append(
                LayerAttention(index, f"tensors[{index}]", recorded, layout, stochastic=bool(are_probabilities))
            )
        if len({layer.shape[0] for layer in layers}) > 1:
            raise ValueError(
                f"The layers hold batches of {[layer.shape[0] for layer in layers]} images. Pass maps of the same "
                "images, so of one batch size."
            )
        return cls(layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, position):  # type: ignore[no-untyped-def]  # int -> a layer, slice -> a tuple of them
        return self._layers[position]

    def __repr__(self) -> str:
        batch, heads, queries, keys = self[0].shape
        tokens = f"{queries} tokens" if queries == keys else f"{queries} queries, {keys} keys"
        layout = self[0].placed
        where = ", grid unknown" if layout is None else f": {layout}"
        return (
            f"AttentionMaps(layers {', '.join(map(str, self.layers))}; {batch} images; {heads} heads; {tokens}{where})"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers' indices in the model."""
        return tuple(layer.index for layer in self)

    @property
    def batch_size(self) -> int:
        """The number of images; a window layer holds several maps per image."""
        return min(layer.shape[0] for layer in self)

    def weights(self) -> list[Tensor]:
        """The map of every layer, (B, H, N, M), all at once."""
        return [layer.weights() for layer in self]

    def select(self, layers: Iterable[int]) -> AttentionMaps:
        """The layers with these model indices; negative ones count from the last recorded layer."""
        by_index = {layer.index: layer for layer in self}
        wanted = [self.layers[i] if -len(self) <= i < 0 else i for i in listed("layers", layers)]
        missing = [i for i in wanted if i not in by_index]
        if missing:
            raise IndexError(f"There are no layers {missing}. Choose layers among {list(self.layers)}.")
        return self._with_layers(by_index[i] for i in wanted)

    def chunk(self, chunks: int) -> tuple[AttentionMaps, ...]:
        """The maps of ``chunks`` equal parts of the batch, such as 2 of ``torch.cat([images, view(images)])``."""
        if chunks < 1 or self.batch_size % chunks:
            raise ValueError(
                f"A batch of {self.batch_size} is not a multiple of {chunks}. Chunk it into the parts you concatenated."
            )
        return tuple(self._with_layers(_part(layer, i, chunks) for layer in self) for i in range(chunks))

    def detach(self) -> AttentionMaps:
        """The same maps without a graph, such as those of a teacher."""
        return self._with_layers(replace(layer, recorded=layer.recorded.detach()) for layer in self)

    def with_layout(
        self,
        grid: Grid,
        num_prefix_tokens: int,
        class_tokens: int | Sequence[int] | None = None,
        key_grid: Grid | None = None,
        *,
        num_suffix_tokens: int = 0,
    ) -> AttentionMaps:
        """The same maps on a ``grid``, (height, width) or a :class:`~acr_reg.Lattice`, that the capture cannot infer.
        ``key_grid`` is the keys' grid over the same image where a layer reduces keys, as PVT and SegFormer do. The
        other arguments are as for :meth:`from_tensors`."""
        layout = grid_layout(grid, num_prefix_tokens, class_tokens, key_grid, num_suffix_tokens)
        for layer in self:
            check_tokens(layer.shape, layer.index, layout)
        return self._with_layers(replace(layer, placed=layout, why_unplaced=None) for layer in self)

    def _with_layers(self, layers: Iterable[LayerAttention]) -> AttentionMaps:
        return AttentionMaps(layers, self.batch_norms, self.run)


def _part(layer: LayerAttention, part: int, chunks: int) -> LayerAttention:
    size = layer.shape[0] // chunks
    start = (layer.images.start or 0) + part * size
    return replace(layer, images=slice(start, start + size))
