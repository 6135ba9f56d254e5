"""A model's attention to one photo as a picture: what the class token looks at, and what a view changes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Lattice,
    LayerAttention,
    View,
    align_tokens,
    attention_rollout,
    capture_attention,
    class_attention,
    token_validity,
)
from acr_reg.alignment.pairs import AlignedPair, plan_of
from acr_reg.capture.evaluation import eval_mode, running_view
from acr_reg.losses.functional import Distance
from acr_reg.losses.terms import LayerTerms, evaluate_dense
from acr_reg.tokens import patch_index
from acr_reg.views.view import require_view

Patch = tuple[int, int]  # row and column on the grid

_COLUMNS = 5
_LETTERS = 150  # of a heading's line
_WIDTH, _GAP, _LINE, _BAR = 2.6, 0.2, 0.24, 0.42  # inches: a panel, between panels, a line of text, below a panel
_SHARE = 0.99  # of the tokens have less than the full colour
_FADE = 0.5  # how much of the photo's grey is left under a map


Colour = tuple[float, float, float]

_CLASS: Colour = (0.85, 0.08, 0.08)
_PATCH: Colour = (0.0, 0.30, 0.85)
_DIFFERENCE: Colour = (0.55, 0.0, 0.65)


@dataclass(frozen=True, eq=False)
class _Panel:
    """Values (h, w) of tokens on ``lattice`` over a photo (3, H, W), or the photo alone. ``full`` is the value of
    the full colour. ``shown`` (h, w) is False where there is no value. ``mark`` is a cell to outline."""

    title: str
    photo: Tensor
    lattice: Lattice
    values: Tensor | None = None
    colour: Colour = _CLASS
    full: float | None = None
    shown: Tensor | None = None
    mark: tuple[Lattice, Patch] | None = None


def show_attention(
    model: nn.Module,
    image: Tensor,
    photo: Tensor,
    view: View,
    *,
    layer: int = -1,
    patch: Patch | None = None,
    class_token: int | None = None,
    distance: Distance = "l1",
    forward: Callable[[Tensor], Any] | None = None,
    **capture: Any,
) -> Figure:
    """Draws what a model attends to in one photo, as a matplotlib Figure for ``savefig``.

    Above, the class token's attention of one layer: its mean over heads, its rollout
    (:func:`~acr_reg.attention_rollout`) and then head by head (:func:`~acr_reg.class_attention`). The rollout
    multiplies the layers up to this one; in a pyramid, those of its stage. Without a class token it is the mean over
    all queries, the heads are left out, and the heading says so.

    Below, the attention of one patch, a row of the N x N map, as its mean over heads: on the photo and on its view as
    the model computes them, then as :class:`~acr_reg.AllPairsConsistencyLoss` compares them, with the view brought back
    onto the photo, and their difference. The heading gives the distance that the loss sees, for this patch and for the
    layer.

    Args:
        model: as for :func:`~acr_reg.capture_attention`. It runs twice, in eval mode and without gradients, and is left
            as it was.
        image: (1, bands, H, W), as the model takes it: normalised, on its device.
        photo: (3, H, W) in [0, 1], the same pixels to draw.
        view: the second view, as HorizontalFlip().
        layer: index of the layer; negative counts from the last.
        patch: (row, column) of the patch on the layer's grid, from the top left; None takes the one nearest the middle.
        class_token: which class token if there are several; None takes the only one.
        distance: as for :class:`~acr_reg.AllPairsConsistencyLoss`.
        forward: runs the model, if ``model(image)`` does not, e.g. ``model.forward_features``.
        capture: other arguments of :func:`~acr_reg.capture_attention`, such as ``modules`` or ``class_tokens``.

    Raises ValueError for an image, a photo or a patch that does not fit, and what
    :func:`~acr_reg.capture_attention` and :func:`~acr_reg.class_attention` raise.

    >>> import torch
    >>> from acr_reg import HorizontalFlip
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    >>> class Vit(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.patch_embed, self.block = torch.nn.Conv2d(3, 32, 8, 8), layer
    ...     def forward(self, images):
    ...         return self.block(self.patch_embed(images).flatten(2).mT).mean(1)
    >>> photo = torch.rand(3, 32, 48)
    >>> figure = show_attention(Vit(), photo[None] - 0.5, photo, HorizontalFlip(), patch=(1, 2))
    >>> figure.savefig("attention.png")
    """
    _check(image, photo)
    require_view(view)
    maps = _observe(model, (image, view(image)), model if forward is None else forward, capture)
    with torch.no_grad():
        pair = maps[0].select([layer])[0], maps[1].select([layer])[0]
        picture = photo.detach().float().cpu().clamp(0, 1)
        upper, note = _class_panels(maps[0], pair[0], class_token, picture)
        patch = _shown_patch(pair, view, patch)
        lower, of_patch = _patch_panels(pair, view, patch, distance, picture)
        activation = None if pair[0].layout.class_tokens else 0.0
        acr = AllPairsConsistencyLoss(view, activation, distance=distance, layers=[pair[0].index])
        _, terms = acr(*maps, return_terms=True)
    name = distance if isinstance(distance, str) else getattr(distance, "__name__", "given")
    heading = (
        f"What the patch in row {patch[0]}, column {patch[1]} (from 0) attends to, mean over heads, on the photo and "
        f"on its view {view.brief}. The loss compares the two by the {name} distance: {of_patch:.3g} for this patch, "
        f"{terms['affinity'].item():.3g} on average over all patches"
    )
    if "activation" in terms:
        heading += f", {terms['activation'].item():.3g} for the class token"
    shown = lower[-1].shown
    heading += "." if shown is None or shown.all() else ". Grey: hidden in one of them."
    title = f"{type(model).__name__}: attention of layer {pair[0].index} ({pair[0].name})"
    return _draw(title, [(note, upper), (heading, lower)])


def _check(image: Tensor, photo: Tensor) -> None:
    for name, given in (("image", image), ("photo", photo)):
        if not isinstance(given, Tensor):
            raise TypeError(f"The {name} is a {type(given).__name__}. Convert it to a tensor.")
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"The image has shape {tuple(image.shape)}, not (1, bands, H, W). Pass one image as a batch.")
    if photo.shape != (3, *image.shape[-2:]):
        raise ValueError(
            f"The photo has shape {tuple(photo.shape)}, not {(3, *image.shape[-2:])}. Pass the pixels of the image, "
            "cropped and resized as the model takes them."
        )
    if not photo.is_floating_point():
        raise ValueError(f"The photo is {photo.dtype}. Pass numbers in [0, 1], as photo / 255.")


def _observe(
    model: nn.Module, images: Sequence[Tensor], forward: Callable[[Tensor], Any], capture: dict[str, Any]
) -> list[AttentionMaps]:
    hints = {"image_channels": images[0].shape[1], "no_grad": True, **capture}
    maps = []
    with eval_mode(model), torch.no_grad(), capture_attention(model, **hints) as attention:
        for each in images:
            with running_view(each, images[0]):
                forward(each)
            maps.append(attention.take())
    return maps


def _class_panels(
    maps: AttentionMaps, layer: LayerAttention, class_token: int | None, photo: Tensor
) -> tuple[list[_Panel], str]:
    """The panels of the class token, and their heading."""
    grid = layer.layout.key
    heads, note = None, "There is no class token: the heads are left out"
    if layer.layout.known_class_tokens():
        heads = class_attention(maps, layer.index, class_token)[0]
        note = f"What {'the class token' if class_token is None else f'class token {class_token}'} attends to"
    panels = [_Panel("photo", photo, grid)]
    if heads is not None:
        panels.append(_Panel("mean over heads", photo, grid, heads.mean(0)))
    try:
        below = _same_tokens(maps, layer)
        rollout = attention_rollout(maps, below, class_token, "all" if heads is None else "class")[0]
        title = f"rollout, layers {below[0]} to {below[-1]}"
        panels.append(_Panel(title, photo, grid, rollout))
        note += (
            ", and the rollout is the mean over all queries." if heads is None else ". Each panel has its own scale."
        )
    except ValueError as error:
        reason = str(error).partition(". ")[0]  # without the advice, which names arguments of attention_rollout
        note += f". The rollout is left out: {reason}."
    panels += [
        _Panel(f"head {head}", photo, grid, each) for head, each in enumerate(heads if heads is not None else ())
    ]
    return panels, note


def _same_tokens(maps: AttentionMaps, layer: LayerAttention) -> list[int]:
    """The layer and those right below it with the same tokens: all of a plain transformer, or of one stage."""
    found: list[int] = []
    for other in maps:
        if other.placed != layer.placed:
            found = []
        else:
            found.append(other.index)
        if other.index == layer.index:
            break
    return found


def _shown_patch(pair: tuple[LayerAttention, LayerAttention], view: View, patch: Patch | None) -> Patch:
    """The patch, checked; by default the one nearest the middle of those that the view shows."""
    grid = pair[0].layout.query
    shown = token_validity(view, pair[1].layout.query, grid)[0].unflatten(0, (grid.height, grid.width))
    places = [(int(y), int(x)) for y, x in shown.nonzero()]
    if not places:
        raise ValueError(f"{view.brief} shows no patch of the photo. Draw a larger crop.")
    middle = (grid.height - 1) / 2, (grid.width - 1) / 2
    nearest = min(places, key=lambda place: (place[0] - middle[0]) ** 2 + (place[1] - middle[1]) ** 2)
    if patch is None:
        return nearest
    if not (0 <= patch[0] < grid.height and 0 <= patch[1] < grid.width):
        raise ValueError(
            f"patch={patch} is not on the {grid} grid of the layer. Choose (row, column) up to "
            f"({grid.height - 1}, {grid.width - 1})."
        )
    if not shown[patch]:
        raise ValueError(f"{view.brief} does not show patch={patch}. Choose one that it shows, such as {nearest}.")
    return patch[0], patch[1]


def _patch_panels(
    pair: tuple[LayerAttention, LayerAttention], view: View, patch: Patch, distance: Distance, photo: Tensor
) -> tuple[list[_Panel], float]:
    """The panels of one patch, and the distance of its rows as the loss sees it."""
    a, b = pair
    device = str(a.device)
    grids = a.layout.query, b.layout.query
    token = torch.tensor([patch[0] * grids[0].width + patch[1]], device=device)
    at_patch = torch.zeros(1, len(grids[0]), 1, device="cpu").index_fill(1, token.cpu(), 1.0)
    there = int(align_tokens(at_patch, view.inverse, *grids).argmax())  # the view's patch that shows most of it
    before = [_patch_row(layer, int(at)) for layer, at in ((a, token), (b, there))]

    plan = plan_of(a, b, view)
    aligned, row = AlignedPair(a, b, plan, with_entropy=False), (plan.blocks[0], (plan.tokens == token).nonzero()[0])
    layer = LayerTerms(aligned, {"affinity": 1.0}, [row], None, distance, "row", "mean", share=0)
    compared, _ = evaluate_dense(layer)
    rows = aligned.rows(*row)
    after = [row[0, 0, 0].cpu() for row in rows.comparable("mean")[:2]]
    keys = a.layout.key
    size = (keys.height, keys.width)
    shown = rows.keys_valid[0].cpu().unflatten(0, size)
    after = [row.unflatten(0, size) for row in after]
    full = _full(*(row[shown] for row in after))
    marks = (grids[0], patch), (grids[1], divmod(there, grids[1].width))
    panels = [
        _Panel("photo", photo, keys, before[0], _PATCH, None, None, marks[0]),
        _Panel("view", view(photo[None])[0].clamp(0, 1), b.layout.key, before[1], _PATCH, None, None, marks[1]),
        _Panel("photo, as compared", photo, keys, after[0], _PATCH, full, shown, marks[0]),
        _Panel("view, brought back", photo, keys, after[1], _PATCH, full, shown, marks[0]),
        _Panel("difference", photo, keys, (after[0] - after[1]).abs(), _DIFFERENCE, None, shown, marks[0]),
    ]
    return panels, compared.item()


def _patch_row(layer: LayerAttention, patch: int) -> Tensor:
    """(h, w): the attention of one patch to all patches, mean over heads."""
    layout = layer.layout
    query = torch.arange(layout.num_queries, device="cpu")[patch_index(layout, "query", "cpu")][patch : patch + 1]
    row = layer.weights(query.to(layer.device)).mean(1)[0, 0].cpu()
    return row[patch_index(layout, "key", "cpu")].unflatten(0, (layout.key.height, layout.key.width))


def _draw(title: str, parts: Sequence[tuple[str, Sequence[_Panel]]]) -> Figure:
    """One part below the other: its heading, then its panels in rows."""
    size = parts[0][1][0].photo.shape[-2:]
    high = (_WIDTH - _GAP) * size[0] / size[1]
    texts = [textwrap.fill(heading, _LETTERS) for heading, _ in parts]
    headings = [_LINE * (1.2 + text.count("\n")) for text in texts]
    rows = [-(-len(panels) // _COLUMNS) for _, panels in parts]
    down = _LINE + high + _BAR
    width, height = _COLUMNS * _WIDTH, 2 * _LINE + sum(headings) + sum(rows) * down
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 0.4 * _LINE / height, title, fontsize=13, fontweight="bold", ha="center", va="top")
    top = 1.7 * _LINE  # inches from above
    for text, heading, (_, panels) in zip(texts, headings, parts, strict=True):
        figure.text(_GAP / 2 / width, 1 - top / height, text, fontsize=11, va="top")
        top += heading
        for number, panel in enumerate(panels):
            row, column = divmod(number, _COLUMNS)
            left, below = column * _WIDTH + _GAP / 2, top + row * down + _LINE + high
            across = (_WIDTH - _GAP) / width
            ax = figure.add_axes((left / width, 1 - below / height, across, high / height), anchor="N")
            bar = figure.add_axes((left / width, 1 - (below + 0.14) / height, across, 0.08 / height))
            _show(figure, ax, bar, panel)
        top += -(-len(panels) // _COLUMNS) * down
    return figure


def _opacity(colour: Colour) -> Colormap:
    """The higher the value, the more the colour covers the photo; grey where there is no value."""
    scale = LinearSegmentedColormap.from_list("opacity", [(*colour, 0.0), (*colour, 0.9)])
    return scale.with_extremes(bad=(0.75, 0.75, 0.75, 1.0))


def _show(figure: Figure, ax: Axes, bar: Axes, panel: _Panel) -> None:
    ax.set_axis_off()
    ax.set_title(panel.title, fontsize=10, pad=3)
    lattice = panel.lattice
    height, width = lattice.extent
    photo = panel.photo
    if panel.values is None:
        bar.set_axis_off()
    else:
        photo = 1 - _FADE * (1 - photo.mean(0, keepdim=True)).expand(3, -1, -1)
    ax.imshow(photo.movedim(0, -1).numpy(), extent=(0, width, height, 0), interpolation="antialiased")
    if panel.values is not None:
        values = panel.values.cpu()
        if panel.shown is not None:
            values = values.masked_fill(~panel.shown, torch.nan)
        top, left = lattice.offset
        cells = (left, left + lattice.width * lattice.stride[1], top + lattice.height * lattice.stride[0], top)
        full = (_full(values) if panel.full is None else panel.full) or 1.0
        drawn = ax.imshow(values.numpy(), _opacity(panel.colour), vmin=0, vmax=full, extent=cells, aspect="equal")
        scale = figure.colorbar(drawn, cax=bar, orientation="horizontal")
        scale.set_ticks([0, full], labels=["0", f"{full:.2g} or more"])
        bar.tick_params(labelsize=8, length=2, pad=1)
        lowest, highest = bar.get_xticklabels()
        lowest.set_horizontalalignment("left")
        highest.set_horizontalalignment("right")
    ax.set(xlim=(0, width), ylim=(height, 0))
    if panel.mark is not None:
        grid, (row, column) = panel.mark
        corner = grid.offset[1] + column * grid.stride[1], grid.offset[0] + row * grid.stride[0]
        for colour, line in (("black", 3.5), ("#39ff14", 1.8)):
            cell = Rectangle(corner, grid.stride[1], grid.stride[0], fill=False, edgecolor=colour, linewidth=line)
            ax.add_patch(cell)


def _full(*values: Tensor) -> float:
    """The value of the full colour. A few tokens often hold many times as much as all others (Darcet et al. 2023,
    arXiv 2309.16588), and would leave the rest of the picture blank."""
    return max(float(each[~each.isnan()].double().quantile(_SHARE)) for each in values)
