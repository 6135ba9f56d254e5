"""The map P from the tokens of a view back to the tokens of its image, and which tokens are not padding.

Attention A of a view is carried back as P^T A P. A flip, a quarter turn or a crop of whole tokens permutes or picks
tokens: P is an index, and is applied to queries and keys before any product. Any other view resamples rows and columns.
The image's own attention is then blurred alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acr_reg.tokens import Lattice, TokenLayout, token_order
from acr_reg.views.resampling import LatticeMap, Line
from acr_reg.views.view import View, blur_between, map_between

NO_MASS = 1e-30  # a row with less mass on tokens visible in both views counts nothing; its gradient stays finite


class AlignmentMaps:
    """P for queries and for keys, from a layout ``source`` to the layout of an image.

    Rows over keys have the tokens that are no patches in front, whatever their place in the model; ``others`` counts
    these. ``keys_shown`` (1 or B, M') marks the source's keys that the image contains; None means all. ``padded``
    (B, N'), (B, M') marks the source's queries and keys that are not padding; None means all. ``key_order``
    (others + M',) or (1 or B, others + M') are the source's keys in the order in which rows are read: that of the image
    where P permutes keys. None means the model's order.
    """

    def __init__(
        self,
        queries: LatticeMap,
        keys: LatticeMap,
        keys_shown: Tensor | None,
        source: TokenLayout,
        device: str,
        padded: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.queries, self.keys, self.keys_shown = queries, keys, keys_shown
        self.others = source.num_other_tokens
        # Resampling would mix padding into the image, so neither the keys nor the rows of padding are read.
        self.rows_read = self.keys_read = None
        if padded is not None and not (keys.is_exact and queries.is_exact):
            self.rows_read, self.keys_read = padded
        self._query_order = token_order(source, "query", device)
        self.key_order = token_order(source, "key", device)
        if self.keys.is_permutation:
            index = self.keys.index()
            kept = torch.arange(self.others, device=index.device).expand(len(index), -1)
            permuted = torch.cat([kept, self.others + index], 1)
            self.key_order = permuted if self.key_order is None else self.key_order[permuted]

    def rows(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Source rows (1 or B, R') that make up these image tokens (R,), and their mixing weights (1 or B, R, R'), None
        if the rows map one to one."""
        if self.queries.is_exact:
            return self._places(self.queries.index()[:, tokens]), None
        rows, weights = self.queries.sources(tokens, dtype)
        if self.rows_read is not None:
            read = self.rows_read.gather(1, rows.expand(len(self.rows_read), -1))
            weights = weights * read[:, None]
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return self._places(rows), weights

    def _places(self, patches: Tensor) -> Tensor:
        """The places of these patches among the source's queries."""
        tokens = self.others + patches
        return tokens if self._query_order is None else self._query_order[tokens]

    def carry_keys(self, rows: Tensor, stochastic: bool) -> Tensor:
        """Carries rows (..., source keys), read in ``key_order``, onto the image's keys; the others stay in front."""
        if self.keys.is_permutation:
            return rows
        others, patches = rows[..., : self.others], rows[..., self.others :]
        return torch.cat([others, self.carry_patches(patches, stochastic)], -1)

    def carry_patches(self, patches: Tensor, stochastic: bool) -> Tensor:
        """Resamples rows (..., M') over keys, then restores each row's mass on the keys visible in both views."""
        if self.keys.is_exact:
            return self.keys.tokens(patches)
        if self.keys_read is not None:
            patches = patches * self.keys_read[:, None, None]
        moved = self.keys.tokens(patches)
        if not stochastic:  # mixed rows have either sign, so their sum means nothing: keep their mass per area
            return moved * self.keys.area.to(moved)[:, None, None, None]
        if self.keys_shown is not None:
            patches = patches * self.keys_shown[:, None, None]
        # Divided first: the gradient of mass / sum is mass / sum^2, which overflows if the sum is 1e-20.
        return moved / moved.sum(-1, keepdim=True).clamp_min(NO_MASS) * patches.sum(-1, keepdim=True)


def maps_of_view(
    view: View, source: TokenLayout, target: TokenLayout, device: str, image: tuple[Tensor, ...] | None = None
) -> AlignmentMaps:
    """P from the layout ``source`` of a view to the layout ``target`` of its image. ``image`` (B, N), (B, M) marks the
    image's queries and keys that are not padding."""
    queries, keys = (
        map_between(view.inverse, there, here, device)
        for there, here in ((source.query, target.query), (source.key, target.key))
    )
    seen = map_between(view, target.key, source.key, device)
    padded = None
    if image is not None:
        onto_view = map_between(view, target.query, source.query, device), seen
        padded = tuple(there.tokens(tokens.float()) >= 0.5 for there, tokens in zip(onto_view, image, strict=True))
    return AlignmentMaps(queries, keys, None if seen.is_complete else seen.valid, source, device, padded)


def maps_of_image(
    view: View, source: TokenLayout, target: TokenLayout, device: str, image: tuple[Tensor, ...] | None = None
) -> AlignmentMaps | None:
    """The map of the image's layout onto itself that blurs its attention as P blurs the view's, for sharp rows differ
    from blurred ones even where the network is equivariant. None where P is an index."""
    queries, keys = (
        blur_between(view.inverse, there, here, device)
        for there, here in ((source.query, target.query), (source.key, target.key))
    )
    if queries.is_exact and keys.is_exact:
        return None
    return AlignmentMaps(queries, keys, None if keys.is_complete else keys.valid, target, device, image)


def check_lattices(name: str, view: View, source: Lattice, target: Lattice) -> None:
    """A view bound to one image size needs tokens of such images. A grid without a pixel size cannot be checked."""
    for which, grid, size in (("first", target, view.input_size), ("second", source, view.fixed_size)):
        if size is not None and not grid.is_unit and grid.extent != (float(size[0]), float(size[1])):
            raise ValueError(
                f"{name}: the tokens of the {which} view lie on images of {grid.extent[0]:g} x {grid.extent[1]:g} px, "
                f"but {view.brief} is for {size[0]} x {size[1]} px. Pass the view drawn for these images."
            )


def valid_tokens(valid: Tensor, lattice: Lattice) -> Tensor:
    """``valid`` (B, H, W), True on image and False on padding, at any resolution -> (B, tokens), True where at least
    half of a token's cell is image."""
    along_y, along_x = (_cell_shares(lattice, axis, valid.shape[axis + 1]).to(valid.device) for axis in (0, 1))
    return (along_y @ valid.float() @ along_x.mT).flatten(1) >= 0.5 - 1e-6


def _cell_shares(lattice: Lattice, axis: int, pixels: int) -> Tensor:
    """(tokens, pixels): the share of a token's cell that each pixel covers, of the part that lies on the image."""
    line = Line(lattice, axis)
    centres, half = line.places()[:, None] * pixels, line.stride / line.extent * pixels / 2
    edges = torch.arange(pixels, dtype=torch.float64, device="cpu")
    covered = (centres + half).minimum(edges + 1) - (centres - half).maximum(edges)
    covered = covered.clamp(min=0)
    return (covered / covered.sum(1, keepdim=True).clamp_min(1e-12)).float()


def check_valid(valid: Tensor, batch: int) -> None:
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid has type {type(valid).__name__}. Pass a tensor (B, H, W), one mask per image.")
    if valid.ndim != 3 or valid.shape[0] != batch:
        raise ValueError(f"valid has shape {tuple(valid.shape)}, not ({batch}, H, W). Pass one mask per image.")
