"""The pictures of docs/guides/views.md: what each kind of view does to an image, a class map and a row of attention.

    python -m benchmarks.pictures views    # writes docs/guides/views/ and the table of views.md; 15 seconds

It needs no download and no weights: the photographs come with scikit-image, and the network has no parameters; its
tokens attend to patches of their own colour and texture. The library treats it like any model (capture_attention, the
loss, align_attention, View.align). The numbers are the affinity and cam terms of the loss (mean L1 distance per row and
per pixel), once with the view and once as if its pixels were those of the image.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    Lattice,
    PerImage,
    Rotate90,
    Scale,
    VerticalFlip,
    View,
    align_attention,
    align_tokens,
    capture_attention,
    token_validity,
)
from acr_reg.demo.record import write_json
from benchmarks.marked_page import begin, fill
from benchmarks.pictures.panels import CAM, ROW, Box, Colour, Panel, box_around, draw, over_tokens

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "guides" / "views"
PAGE = FOLDER.with_suffix(".md")
MARKER = begin("pictures views")
SIZE = (320, 480)
PATCH = 16
STEM = 32  # px, the stride of the overlapping stem
_SHARPNESS = 5.0
_CLASS_SHARPNESS = 2.0


@dataclass(frozen=True)
class Photo:
    """A photograph of scikit-image, cut to 2 : 3 from row ``top``. The row of the patch ``query`` and the map of the
    class of the patch ``of_class`` are drawn; both are (row, column) of 20 x 30."""

    name: str
    top: int
    query: tuple[int, int]
    of_class: tuple[int, int]

    def image(self) -> Tensor:
        """(1, 3, H, W) in [0, 1], in double precision, so that exact alignment gives 0."""
        from skimage import data

        pixels = torch.from_numpy(getattr(data, self.name)()).movedim(-1, 0)[None].double() / 255
        height = pixels.shape[-1] * 2 // 3
        cut = pixels[..., self.top : self.top + height, :]
        return F.interpolate(cut, SIZE, mode="bilinear", antialias=True).clamp(0, 1)


ASTRONAUT = Photo("astronaut", 26, query=(16, 5), of_class=(17, 25))  # the orange suit; the black table
COFFEE = Photo("coffee", 0, query=(2, 13), of_class=(11, 5))  # the white of the cup; the red saucer
CAT = Photo("chelsea", 0, query=(11, 24), of_class=(5, 5))  # the shade behind the cat; its fur


class ColourNetwork(nn.Module):
    """Tokens are the mean and the spread of colour in a patch, attention is softmax(-sharpness |q - k|^2 / 2), and a
    class map shows how close a token is to the colour of a class. Nothing is learned or depends on the position.

    With ``overlapping`` the tokens come from five successive 3 x 3 windows of stride 2 and padding 1: the stride is
    32 px, and the first centre is in the middle of the first pixel, as in the last stage of MiT.
    """

    def __init__(self, overlapping: bool = False) -> None:
        super().__init__()
        self.overlapping = overlapping
        self.attention = DistanceAttention()

    def features(self, images: Tensor) -> Tensor:
        """(B, h, w, 6)."""
        mean, square = self._pool(images), self._pool(images.square())
        spread = (square - mean.square()).clamp(min=1e-6).sqrt()
        # Fixed constants: a mean over the image would differ between an image and a crop of it.
        return torch.cat([(mean - 0.5) / 0.25, (spread - 0.1) / 0.1 * 0.25], 1).movedim(1, -1)

    def _pool(self, maps: Tensor) -> Tensor:
        if not self.overlapping:
            return F.avg_pool2d(maps, PATCH)
        line = torch.tensor([0.25, 0.5, 0.25], dtype=maps.dtype)
        kernel = torch.outer(line, line).expand(maps.shape[1], 1, 3, 3)
        for _ in range(5):
            maps = F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), kernel, stride=2, groups=maps.shape[1])
        return maps

    def forward(self, images: Tensor, prototypes: Tensor) -> Tensor:
        """(B, 1, h, w) in [0, 1]: the map of one class for each image, whose ``prototypes`` are (B, 6)."""
        features = self.features(images)
        self.attention(features.flatten(1, 2))
        far = (features - prototypes[:, None, None]).square().sum(-1)
        return (-_CLASS_SHARPNESS / 2 * far).exp()[:, None]


class DistanceAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        # q k = x y - |y|^2 / 2 = -|x - y|^2 / 2 + |x|^2 / 2, and the last part is the same for a whole row.
        query = torch.cat([x, torch.ones_like(x[..., :1])], -1)[:, None]
        key = torch.cat([x, -x.square().sum(-1, keepdim=True) / 2], -1)[:, None]
        return F.scaled_dot_product_attention(query, key, x[:, None], scale=_SHARPNESS)


@dataclass(frozen=True)
class Kind:
    """What a picture shows: ``view`` of the photographs, or ``view`` and ``view_a``. ``exact``: every token falls on a
    token, so that the aligned numbers are 0 up to rounding."""

    photos: tuple[Photo, ...]
    view: View
    exact: bool
    view_a: View | None = None
    overlapping: bool = False


KINDS = {
    "horizontal_flip": Kind((ASTRONAUT,), HorizontalFlip(), exact=True),
    "vertical_flip": Kind((COFFEE,), VerticalFlip(), exact=True),
    "quarter_turn": Kind((ASTRONAUT,), Rotate90(), exact=True),
    "scale": Kind((COFFEE,), Scale(0.6), exact=False),
    "crop_resized": Kind((CAT,), Crop(90, 130, 210, 340, size=(320, 480), image_size=SIZE), exact=False),
    "two_crops": Kind(
        (ASTRONAUT,),
        Compose([Crop(96, 0, 224, 432, image_size=SIZE), HorizontalFlip()]),
        exact=True,
        view_a=Crop(48, 32, 256, 384, image_size=SIZE),
    ),
    "per_image": Kind(
        (ASTRONAUT, COFFEE, CAT),
        PerImage([HorizontalFlip(), Crop(10, 30, 240, 360, size=SIZE, image_size=SIZE), Rotate90(2)]),
        exact=False,
    ),
    "padded": Kind((ASTRONAUT,), Crop(64, -128, *SIZE, image_size=SIZE, pad=True), exact=True),
    "overlapping_stem": Kind((ASTRONAUT,), HorizontalFlip(), exact=False, overlapping=True),
}


@dataclass(frozen=True)
class Side:
    """One of the two views compared: its images (B, 3, H, W), their attention and their class maps (B, 1, h, w)."""

    images: Tensor
    attention: AttentionMaps
    cam: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def lattice(self) -> Lattice:
        return self.attention[0].layout.query


class Comparison:
    """Both sides of a kind, and the view that leads from the first to the second."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.photographs = torch.cat([photo.image() for photo in kind.photos])
        self.network = ColourNetwork(kind.overlapping)
        features = self.network.features(self.photographs)
        self.prototypes = torch.stack([features[i][self._token(photo)] for i, photo in enumerate(kind.photos)])
        first, second = kind.view_a or Identity(), kind.view
        self.relation = second if kind.view_a is None else Compose([first.inverse, second])
        self.a, self.b = self._run(first(self.photographs)), self._run(second(self.photographs))
        self.before_a, self.before_b, self.before = self.a, self.b, self.relation
        if kind.overlapping:  # what is wrong before is not the view but the places of its tokens
            self.a, self.b = (self._placed(side) for side in (self.a, self.b))
        else:  # before, pixel (y, x) of the second is taken for pixel (y, x) of the first
            self.before = Crop(0, 0, *self.b.size, image_size=self.a.size, pad=True)

    def _token(self, photo: Photo) -> tuple[int, int]:
        stride = STEM if self.kind.overlapping else PATCH
        return photo.of_class[0] * PATCH // stride, photo.of_class[1] * PATCH // stride

    def _run(self, images: Tensor) -> Side:
        with (
            torch.no_grad(),
            capture_attention(self.network, patch_size=PATCH, num_prefix_tokens=0, no_grad=True) as attention,
        ):
            cam = self.network(images, self.prototypes)
            maps = attention.take()
        if self.kind.overlapping:
            maps = maps.with_layout(grid=_lattice(images, cam, offset=0.0), num_prefix_tokens=0)
        return Side(images, maps, cam)

    def _placed(self, side: Side) -> Side:
        """The centre of the first token is at 1/2 px, not at half a stride."""
        grid = _lattice(side.images, side.cam, offset=0.5 - STEM / 2)
        return Side(side.images, side.attention.with_layout(grid=grid, num_prefix_tokens=0), side.cam)

    def numbers(self) -> dict[str, float]:
        """The loss's affinity term (L1 per row, in [0, 2]) and cam term (L1 per pixel, in [0, 1]), before and after."""
        acr = AllPairsConsistencyLoss(activation_weight=0)
        found: dict[str, float] = {}
        before = (self.before_a, self.before_b, self.before)
        for name, (a, b, view) in (("before", before), ("after", (self.a, self.b, self.relation))):
            with torch.no_grad():
                _, terms = acr(a.attention, b.attention, a.cam, b.cam, view=view, return_terms=True)
            found |= {f"{term}_{name}": terms[term].item() for term in ("affinity", "cam")}
        return found

    def panels(self, image: int) -> dict[str, Panel]:
        """The panels of one image of the batch."""
        first, second = self.a, self.b
        view_a, view_b = self.kind.view_a or Identity(), self.kind.view.of_image(image)
        relation, before = self.relation.of_image(image), self.before.of_image(image)
        row, column = self.kind.photos[image].query
        asked = torch.zeros(1, 1, *SIZE)
        asked[..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 1
        box_a, box_b = (box_around(view(asked)[0, 0] > 0.5) for view in (view_a, view_b))
        token_a, token_b = _token_at(first.lattice, box_a), _token_at(second.lattice, box_b)

        valid = token_validity(relation, second.lattice, first.lattice)[0]
        valid_before = token_validity(before, self.before_b.lattice, self.before_a.lattice)[0]
        own = _conditional(first.attention[0].weights()[image, 0], valid)[token_a]
        there = second.attention[0].weights()[image, 0, token_b]
        not_aligned = self._carried(self.before_a, self.before_b, before, image)[token_a]
        aligned = self._carried(first, second, relation, image)[token_a]
        cam = second.cam[image : image + 1].flatten(2)
        cam_back = align_tokens(cam, relation, second.lattice, first.lattice, dim=-1)[0, 0]

        everywhere = torch.ones(len(second.lattice), dtype=torch.bool)
        padding = ~relation.valid(first.size, second.size)[0]

        def on_a(title: str, values: Tensor, valid: Tensor, colour: Colour = ROW) -> Panel:
            return over_tokens(title, first.images[image], values, valid, first.lattice, colour)

        def on_b(title: str, values: Tensor, colour: Colour = ROW) -> Panel:
            panel = over_tokens(title, second.images[image], values, everywhere, second.lattice, colour)
            return panel.striped(padding)

        names = ("image", "view") if self.kind.view_a is None else ("view_a", "view_b")
        brightest = own.max()
        return {
            "a": Panel(names[0], first.images[image]).marked(box_a),
            "b": Panel(names[1], second.images[image]).striped(padding).marked(box_b),
            "cam": on_b("class map of the view", cam[0, 0], CAM),
            "cam back": on_a("carried back", cam_back, valid, CAM),
            "own": on_a("row of the patch", own / brightest, valid).marked(box_a),
            "there": on_b("the same in the view", there / brightest).marked(box_b),
            "before": on_a("view's row, not aligned", not_aligned / brightest, valid_before).marked(box_a),
            "after": on_a("view's row, aligned", aligned / brightest, valid).marked(box_a),
        }

    def _carried(self, first: Side, second: Side, view: View, image: int) -> Tensor:
        """The second side's map on the tokens of the first, (N, N), with rows normalised over what both show."""
        layout_a, layout_b = first.attention[0].layout, second.attention[0].layout
        maps = second.attention[0].weights()[image : image + 1]
        carried = align_attention(maps, view, layout_b, layout_a)[0, 0]
        return _conditional(carried, token_validity(view, layout_b.key, layout_a.key)[0])


def _lattice(images: Tensor, cam: Tensor, offset: float) -> Lattice:
    height, width = cam.shape[-2:]
    extent = (float(images.shape[-2]), float(images.shape[-1]))
    return Lattice(height, width, (float(STEM), float(STEM)), (offset, offset), extent)


def _conditional(rows: Tensor, valid: Tensor) -> Tensor:
    rows = rows * valid
    return rows / rows.sum(-1, keepdim=True).clamp_min(1e-12)


def _token_at(lattice: Lattice, box: Box) -> int:
    """The token nearest to the middle of a box (top, left, height, width) in pixels."""
    i = round((box[0] + box[2] / 2 - lattice.offset[0]) / lattice.stride[0] - 0.5)
    j = round((box[1] + box[3] / 2 - lattice.offset[1]) / lattice.stride[1] - 0.5)
    return min(max(i, 0), lattice.height - 1) * lattice.width + min(max(j, 0), lattice.width - 1)


def rows_of(comparison: Comparison) -> list[list[Panel]]:
    """The panels of a picture, row by row."""
    made = [comparison.panels(image) for image in range(len(comparison.kind.photos))]
    if len(made) > 1:
        return [[panel for name, panel in panels.items() if name != "there"] for panels in made]
    (panels,) = made
    top = [panels[name] for name in ("a", "b", "cam", "cam back")]
    bottom = [panels[name] for name in ("own", "there", "before", "after")]
    if comparison.kind.view_a is None:
        return [top, bottom]
    photograph = comparison.photographs[0]
    shown = [
        view.inverse.valid(side.size, SIZE)[0]
        for view, side in ((comparison.kind.view_a, comparison.a), (comparison.kind.view, comparison.b))
    ]
    boxes = [box_around(part) for part in shown]
    common = Panel("what both show", photograph).striped(~(shown[0] & shown[1]))
    return [[Panel("image with both crops", photograph, boxes), *top], [common, *bottom]]


def write(folder: Path, kinds: list[str], dpi: int = 100) -> dict[str, dict[str, float]]:
    """Write the pictures and return the numbers."""
    numbers = {}
    for name in kinds:
        comparison = Comparison(KINDS[name])
        numbers[name] = comparison.numbers()
        draw(folder / f"{name}.png", rows_of(comparison), dpi)
        print(f"{name:17}", "  ".join(f"{term} {value:.2g}" for term, value in numbers[name].items()))
    return numbers


def table(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """The affinity term of every picture, in the order of the page."""
    lines = ["| picture | without alignment | aligned |", "|---|---|---|"]
    for kind, terms in numbers.items():
        before, after = terms["affinity_before"], terms["affinity_after"]
        lines.append(f"| {kind.replace('_', ' ')} | {before:.2f} | {after + 0.0:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.pictures views", description="Draw docs/guides/views/*.png.")
    known = f"{', '.join(KINDS)} (default: all, and views.json)"
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], metavar="KIND", help=known)
    kinds = parser.parse_args(arguments).kinds
    torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
    FOLDER.mkdir(parents=True, exist_ok=True)
    numbers = write(FOLDER, kinds or list(KINDS))
    if not kinds:
        rounded = {kind: {term: round(v, 6) for term, v in values.items()} for kind, values in numbers.items()}
        write_json(FOLDER / "views.json", rounded)
        fill(PAGE, MARKER, table(rounded))
    return 0
