"""Draws contact sheets: photos with class maps, label maps, masks and errors over them, many images on a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from acr_reg.integrations.formats.files import IGNORED
from acr_reg.integrations.formats.masks import voc_palette
from acr_reg.integrations.formats.save import ROUNDING

Ids = npt.NDArray[np.integer]
Colour = tuple[int, int, int]

# Colours of Okabe and Ito, which people with any kind of colour blindness can tell apart.
FALSE, MISSED, CONFUSED = 1, 2, 3
ERRORS: dict[int, tuple[str, Colour]] = {
    FALSE: ("false: a class on background", (213, 94, 0)),
    MISSED: ("missed: no class on a class", (0, 114, 178)),
    CONFUSED: ("wrong class", (240, 228, 66)),
}

_OPACITY = 170  # of class colours, of 255
_MARK_OPACITY = 225
_DULL = (80, 180)  # the greys under errors: on white, people without blue cones would not see yellow
_SMALLEST_NAMED = 0.015  # of a panel: regions below have no room for a name
_GAP, _PAD, _LINE, _FONT = 6, 8, 17, 12  # pixels: around a panel, around the page, of a line of text, of letters
_NARROWEST = 560  # pixels: room for the legend
_INK, _FAINT, _CARD = (25, 25, 25), (110, 110, 110), (240, 240, 240)


@dataclass(frozen=True, eq=False)
class SheetImage:
    """One image of a contact sheet, with its maps, labels or mask.

    Maps, labels and mask have the size (H, W) of the photo.

    Attributes:
        name: written above the panels.
        photo: in RGB.
        cams: class id -> (H, W) map, each drawn as a heat map.
        labels: (H, W) class ids that were predicted; the ignored id is drawn as such, and is an error where the mask
            knows better.
        mask: (H, W) class ids of the truth, or the ignored id. With labels too, the errors are drawn.

    Raises:
        ValueError: a size differs from the photo's.
    """

    name: str
    photo: Image.Image
    cams: Mapping[int, npt.NDArray[np.floating]] = field(default_factory=dict)
    labels: Ids | None = None
    mask: Ids | None = None

    def __post_init__(self) -> None:
        size = (self.photo.height, self.photo.width)
        arrays = {f"cams[{number}]": values for number, values in self.cams.items()}
        for what, array in {**arrays, "labels": self.labels, "mask": self.mask}.items():
            if array is not None and array.shape != size:
                raise ValueError(
                    f"{self.name}: {what} has shape {array.shape} and the photo is {size[0]}x{size[1]} (HxW). "
                    "Resize one to the other."
                )


def contact_sheet(
    images: Iterable[SheetImage],
    *,
    names: Sequence[str] = (),
    background: bool = True,
    ignore_index: int | None = IGNORED,
    columns: int = 8,
    panel: int = 160,
    per_page: int = 24,
    notes: Sequence[str] = (),
) -> Iterator[Image.Image]:
    """Pages of panels, made one by one as they are asked for: only the images of one page are in memory.

    Each image gets a panel for the photo, each class map, the labels, the mask, and the errors of the labels with the
    image's mIoU (over the ids in its labels or its mask). Class colours are VOC's; background is left clear. The errors
    are in colours that people with colour blindness can tell apart: false (a class where the mask has background),
    missed (no class, or the ignored id, where the mask has one), wrong class. A legend names what a page shows.

    Args:
        images: read one page at a time, so that a generator can load them.
        names: names[i] is the name of id i, background included if there is one. Others are shown by their id.
        background: whether id 0 is background. Heat maps then run from 0 to 1, else from the lowest to the highest
            value of the image's maps.
        ignore_index: the id of pixels without a class. None: there is no such id.
        columns: panels across a page.
        panel: the longer side of a panel in pixels.
        per_page: images on a page.
        notes: lines of text above each page.

    Raises:
        ValueError: columns or per_page below 1, panel below 32, or, while a page is made, maps that are not finite or,
            with background, leave [0, 1].

    >>> import numpy as np
    >>> from PIL import Image
    >>> photo = Image.new("RGB", (60, 40), "gray")
    >>> ids = np.zeros((40, 60), int)
    >>> ids[10:30, 20:50] = 1
    >>> image = SheetImage("2007_000032", photo, labels=ids, mask=np.roll(ids, 5, axis=1))
    >>> [page] = contact_sheet([image], names=["background", "aeroplane"])
    >>> page.mode
    'RGB'
    """
    for what, value, least in (("columns", columns, 1), ("per_page", per_page, 1), ("panel", panel, 32)):
        if value < least:
            raise ValueError(f"{what} is {value}. It must be at least {least}.")
    return _pages(iter(images), _Style(tuple(names), background, ignore_index, columns, panel), per_page, notes)


def image_miou(labels: Ids, mask: Ids, ignore_index: int | None = IGNORED) -> float:
    """mIoU of one image: the mean over the ids in labels or mask (H, W), where the mask is not ignored. Pixels labelled
    with the ignored id are missed. NaN if the mask is ignored everywhere."""
    known = mask != ignore_index
    labels, mask = labels[known], mask[known]
    ids = set(np.unique(mask).tolist()) | (set(np.unique(labels).tolist()) - {ignore_index})
    ious = [np.sum((labels == i) & (mask == i)) / np.sum((labels == i) | (mask == i)) for i in ids]
    return float(np.mean(ious)) if ious else float("nan")


def find_errors(
    labels: Ids, mask: Ids, background: bool = True, ignore_index: int | None = IGNORED
) -> npt.NDArray[np.uint8]:
    """What is wrong with each pixel (H, W): FALSE, MISSED, CONFUSED, or 0 where it is right or the mask is ignored."""
    wrong = (labels != mask) & (mask != ignore_index)
    no_class = (labels == ignore_index) | ((labels == 0) & background)
    kinds = np.where((mask == 0) & background, FALSE, CONFUSED)
    return np.where(wrong, np.where(no_class, MISSED, kinds), 0).astype(np.uint8)


# ---------------------------------------------------------------- panels


@dataclass(frozen=True)
class _Style:
    names: tuple[str, ...]
    background: bool
    ignore_index: int | None
    columns: int
    panel: int

    def name_of(self, number: int) -> str:
        return _printable(self.names[number]) if number < len(self.names) else f"id {number}"


@dataclass(frozen=True)
class _Strip:
    """Panels of one image that stand in one line: (caption, picture)."""

    title: str
    panels: list[tuple[str, Image.Image]]


@dataclass
class _Legend:
    """What the panels of a page show, gathered while they are drawn."""

    ids: set[int] = field(default_factory=set)
    errors: set[int] = field(default_factory=set)
    ignored: bool = False
    heat: bool = False


def _panels(image: SheetImage, style: _Style, legend: _Legend) -> list[tuple[str, Image.Image]]:
    photo = _fitted(image.photo.convert("RGB"), style.panel)
    grey = Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, "white"), 0.3)
    panels = [("photo", photo)]
    if image.cams:
        low, high = _range_of(image, style.background)
        legend.heat = True
        for number, values in image.cams.items():
            panels.append((style.name_of(number), _over(grey, _heat(values, low, high))))
    for what, ids in (("labels", image.labels), ("mask", image.mask)):
        if ids is not None:
            ignored = ids == style.ignore_index
            legend.ids |= set(np.unique(ids[~ignored]).tolist()) - ({0} if style.background else set())
            legend.ignored |= bool(ignored.any())
            drawn = _over(grey, _coloured(ids, ignored, style.background, _stripe_width(ids, photo)))
            panels.append((what, _with_names(drawn, ids, style)))
    if image.labels is not None and image.mask is not None:
        kinds = find_errors(image.labels, image.mask, style.background, style.ignore_index)
        legend.errors |= set(ERRORS) if style.background else {CONFUSED, *np.unique(kinds).tolist()} - {0}
        ignored = image.mask == style.ignore_index
        stripes = _coloured(np.zeros_like(image.mask), ignored, True, _stripe_width(image.mask, photo))
        layer = np.where(kinds[..., None] > 0, _error_colours()[kinds], stripes)
        dull = photo.convert("L").point(lambda value: _DULL[0] + value * (_DULL[1] - _DULL[0]) // 255).convert("RGB")
        miou = image_miou(image.labels, image.mask, style.ignore_index)
        panels.append((f"mIoU {miou:.3f}", _over(dull, layer)))
    return panels


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Its longer side is ``side`` pixels long. Enlarged pixels stay square, so that a small image is seen as it is."""
    longer = max(picture.size)
    size = (max(1, round(picture.width * side / longer)), max(1, round(picture.height * side / longer)))
    return picture.resize(size, Image.Resampling.NEAREST if longer <= side else Image.Resampling.BOX)


def _over(under: Image.Image, layer: npt.NDArray[np.uint8]) -> Image.Image:
    """The picture under a layer (H, W, 4) of another size. Shrinking mixes colours: thin errors fade but stay."""
    enlarged = layer.shape[1] <= under.width and layer.shape[0] <= under.height
    way = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
    return Image.alpha_composite(under.convert("RGBA"), Image.fromarray(layer).resize(under.size, way)).convert("RGB")


def _range_of(image: SheetImage, background: bool) -> tuple[float, float]:
    """The values of the first and the last colour of the heat maps."""
    values = list(image.cams.values())
    low, high = (float(function([function(each) for each in values])) for function in (np.min, np.max))
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{image.name}: The maps have NaN or infinite values. Check how they are normalised.")
    if background and not -ROUNDING <= low <= high <= 1 + ROUNDING:
        raise ValueError(f"{image.name}: The maps run from {low:.4g} to {high:.4g}. Normalise each map to [0, 1].")
    return (0.0, 1.0) if background else (low, high)


@cache
def _heat_colours() -> npt.NDArray[np.uint8]:
    """(256, 4): low values let the photo through."""
    from matplotlib import colormaps

    shares = np.linspace(0, 1, 256)
    colours = colormaps["plasma"](shares)
    colours[:, 3] = 0.15 + 0.65 * shares
    return np.rint(colours * 255).astype(np.uint8)


def _heat(values: npt.NDArray[np.floating], low: float, high: float) -> npt.NDArray[np.uint8]:
    shares = (values - low) / (high - low if high > low else 1)
    return _heat_colours()[np.rint(shares * 255).clip(0, 255).astype(np.uint8)]


@cache
def _error_colours() -> npt.NDArray[np.uint8]:
    table = np.zeros((len(ERRORS) + 1, 4), np.uint8)
    for kind, (_, colour) in ERRORS.items():
        table[kind] = (*colour, _MARK_OPACITY)
    return table


def _coloured(ids: Ids, ignored: npt.NDArray[np.bool_], background: bool, stripe: int) -> npt.NDArray[np.uint8]:
    """(H, W, 4): class colours, nothing on background, and stripes on ignored pixels."""
    table = np.concatenate([voc_palette(), np.full((256, 1), _OPACITY, np.uint8)], 1)
    if background:
        table[0] = 0
    layer = table[_palette_index(ids)]
    if ignored.any():
        rows, columns = np.ogrid[: ids.shape[0], : ids.shape[1]]
        striped = (rows + columns) // stripe % 2 == 0
        layer[ignored & striped] = (*voc_palette()[IGNORED], 210)
        layer[ignored & ~striped] = (90, 90, 90, 110)
    return layer


def _palette_index(ids: Ids) -> Ids:
    """Ids above the palette take its colours again, but neither the one of ignored pixels nor that of background."""
    return np.where(ids < IGNORED, ids, ids % (IGNORED - 1) + 1)


def _stripe_width(ids: Ids, drawn: Image.Image) -> int:
    """Pixels of the image, so that stripes are four pixels wide on the panel."""
    return max(1, round(4 * ids.shape[1] / drawn.width))


def _with_names(drawn: Image.Image, ids: Ids, style: _Style) -> Image.Image:
    """Writes the names of classes into their regions, at the place that is farthest from the border."""
    from scipy.ndimage import distance_transform_edt

    write = ImageDraw.Draw(drawn)
    rows, columns = (np.arange(n) * ids.shape[axis] // n for axis, n in ((0, drawn.height), (1, drawn.width)))
    small = ids[rows[:, None], columns[None]]
    for number in np.unique(small).tolist():
        region = small == number
        if number == style.ignore_index or (number == 0 and style.background) or region.mean() < _SMALLEST_NAMED:
            continue
        distance = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        y, x = divmod(int(distance.argmax()), drawn.width)
        text = _cut(style.name_of(number), _font(), drawn.width - 4)
        half = _font().getlength(text) / 2
        x = round(min(max(x, half + 2), max(half + 2, drawn.width - half - 2)))
        write.text((x, y), text, fill="white", font=_font(), anchor="mm", stroke_width=1, stroke_fill="black")
    return drawn


# ---------------------------------------------------------------- pages


def _pages(images: Iterator[SheetImage], style: _Style, per_page: int, notes: Sequence[str]) -> Iterator[Image.Image]:
    while True:
        legend = _Legend()
        strips = []
        for image in islice(images, per_page):
            panels = _panels(image, style, legend)
            parts = [panels[i : i + style.columns] for i in range(0, len(panels), style.columns)]
            name = _printable(image.name)
            titles = [name, *[f"{name} (continued)"] * (len(parts) - 1)]
            strips += [_Strip(title, part) for title, part in zip(titles, parts, strict=True)]
        if not strips:
            return
        yield _page(strips, style, legend, notes)


def _page(strips: Sequence[_Strip], style: _Style, legend: _Legend, notes: Sequence[str]) -> Image.Image:
    lines: list[list[_Strip]] = [[]]
    for strip in strips:
        if lines[-1] and sum(len(each.panels) for each in lines[-1]) + len(strip.panels) > style.columns:
            lines.append([])
        lines[-1].append(strip)
    cell = style.panel + 2 * _GAP
    heights = [
        max(picture.height for strip in line for _, picture in strip.panels) + 2 * _LINE + 3 * _GAP for line in lines
    ]
    widest = max(sum(len(strip.panels) * cell + _GAP for strip in line) for line in lines)
    width = max(_NARROWEST, widest + 2 * _PAD)
    head = _head(width, style, legend, notes)
    page = Image.new("RGB", (width, head.height + sum(heights) + len(heights) * _GAP + _PAD), "white")
    page.paste(head, (0, 0))
    top = head.height
    for line, height in zip(lines, heights, strict=True):
        left = _PAD
        for strip in line:
            _draw_strip(page, strip, (left, top), height, cell)
            left += len(strip.panels) * cell + _GAP
        top += height + _GAP
    return page


def _draw_strip(page: Image.Image, strip: _Strip, corner: tuple[int, int], height: int, cell: int) -> None:
    draw = ImageDraw.Draw(page)
    left, top = corner
    width = len(strip.panels) * cell
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_CARD)
    draw.text(
        (left + _GAP, top + _GAP // 2), _cut(strip.title, _font(bold=True), width - 2 * _GAP), _INK, _font(bold=True)
    )
    for i, (caption, picture) in enumerate(strip.panels):
        x, y = left + i * cell + _GAP, top + _LINE + _GAP
        page.paste(picture, (x, y))
        draw.text((x, y + picture.height + 2), _cut(caption, _font(), cell - 2 * _GAP), _FAINT, _font())


def _head(width: int, style: _Style, legend: _Legend, notes: Sequence[str]) -> Image.Image:
    """The notes and the legend, in as many lines as they need."""
    swatches: list[tuple[str, Image.Image]] = []
    for number in sorted(legend.ids):
        swatches.append(
            (style.name_of(number), _swatch(tuple(voc_palette()[_palette_index(np.array(number))].tolist())))
        )
    swatches += [(ERRORS[kind][0], _swatch(ERRORS[kind][1])) for kind in sorted(legend.errors)]
    if legend.ignored:
        stripes = _coloured(np.zeros((11, 22), np.uint8), np.ones((11, 22), bool), True, 4)
        swatches.append(("ignored", _over(Image.new("RGB", (22, 11), "white"), stripes)))
    if legend.heat:
        bar = np.repeat(_heat_colours()[None, ::2], 11, 0)
        ends = "0 to 1" if style.background else "lowest to highest value of the image"
        swatches.append((f"class map: {ends}", _over(Image.new("RGB", (128, 11), "white"), bar)))
    places, x, y = [], _PAD, _PAD + len(notes) * _LINE
    for text, picture in swatches:
        needed = picture.width + 5 + round(_font().getlength(text)) + 14
        if x > _PAD and x + needed > width - _PAD:
            x, y = _PAD, y + _LINE
        places.append((x, y))
        x += needed
    head = Image.new("RGB", (width, y + (_LINE if swatches else 0) + _GAP), "white")
    draw = ImageDraw.Draw(head)
    for i, note in enumerate(notes):
        draw.text((_PAD, _PAD + i * _LINE), _cut(_printable(note), _font(), width - 2 * _PAD), _INK, _font())
    for (text, picture), (x, y) in zip(swatches, places, strict=True):
        head.paste(picture, (x, y + 2))
        draw.text((x + picture.width + 5, y), text, _INK, _font())
    return head


def _swatch(colour: Colour) -> Image.Image:
    return Image.new("RGB", (22, 11), colour)


@cache
def _font(bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans has more letters than the font that Pillow brings."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), _FONT, layout_engine=ImageFont.Layout.BASIC)  # Raqm fails on some letters


def _cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or its beginning and three dots where it is too wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _printable(text: str) -> str:
    """The text in one line."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
