"""Where the tokens of an attention layer sit on the image, and which of them are class tokens.

A transformer's tokens are a few prefix tokens (class, distillation, register) followed by the patches of an image in
row-major order. A :class:`Lattice` places those patches in pixels; a :class:`TokenLayout` joins the lattices of queries
and keys with the prefix. :func:`infer_layout` reads both off the input size and the model's own fields, or says why it
cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

# Longer prefixes exist (prompt tuning), but beyond this a guess is more often a wrong grid than a long prefix.
MAX_GUESSED_PREFIX = 24
_LARGEST_GUESSED_PATCH = 32  # px; above, the channels of channel attention begin to look like a few huge patches
# Where the patch size is to be guessed: those that divide the image, and these, under which a margin may be left over.
_COMMON_PATCHES = (8, 14, 16, 32)

_CLASS_TOKEN_NAMES = ("cls_token", "cls_tokens", "class_token", "class_tokens", "class_embedding")
_OTHER_PREFIX_NAMES = (
    "dist_token",
    "distillation_token",
    "reg_token",
    "reg_tokens",
    "register_tokens",
    "storage_tokens",
)


class LayoutError(ValueError):
    """The grid or the prefix of a layer's tokens is not known, or more than one fits."""


@dataclass(frozen=True)
class Lattice:
    """A grid of tokens, row-major, laid over an image.

    ``height`` x ``width`` tokens; ``stride`` (y, x) is the distance between neighbouring centres and ``offset`` (y, x)
    how far the first centre lies beyond half a stride, both in pixels; ``extent`` (height, width) is the image's size
    in pixels. The centre of token (i, j) is at ``offset + (i + 1/2, j + 1/2) * stride``. By default a token is one unit
    and the grid covers the image.

    >>> Lattice(2, 3, stride=(16.0, 16.0)).extent
    (32.0, 48.0)
    """

    height: int
    width: int
    stride: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    extent: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise LayoutError(
                f"found a token grid of {self.height} x {self.width}; expected at least 1 x 1; pass the grid as "
                "(height, width)"
            )
        if self.extent == (0.0, 0.0):
            object.__setattr__(self, "extent", (self.height * self.stride[0], self.width * self.stride[1]))

    def __len__(self) -> int:
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


@dataclass(frozen=True)
class TokenLayout:
    """Queries (N = prefix + query lattice) and keys (M = prefix + key lattice) of one attention layer.

    ``class_tokens`` are positions within the prefix. One class token serves all classes; with C > 1 of them, position c
    of the tuple is the token of class c. ``()`` says the layer has none, ``None`` that it is not known which prefix
    tokens they are.
    """

    query: Lattice
    key: Lattice
    num_prefix_tokens: int = 0
    class_tokens: tuple[int, ...] | None = ()

    def __post_init__(self) -> None:
        outside = [c for c in self.class_tokens or () if not 0 <= c < self.num_prefix_tokens]
        if self.num_prefix_tokens < 0 or outside:
            raise LayoutError(
                f"found class tokens at {outside or self.class_tokens} of {self.num_prefix_tokens} prefix tokens; "
                "expected positions within the prefix, counted from 0; correct num_prefix_tokens= or class_tokens="
            )

    @property
    def num_queries(self) -> int:
        return self.num_prefix_tokens + len(self.query)

    @property
    def num_keys(self) -> int:
        return self.num_prefix_tokens + len(self.key)

    def known_class_tokens(self) -> tuple[int, ...]:
        """The class tokens, or a :class:`LayoutError` where it is not known which prefix tokens they are."""
        if self.class_tokens is None:
            raise LayoutError(
                f"found {self.num_prefix_tokens} prefix tokens and nothing that says which are class tokens; expected "
                "to know; pass class_tokens= (1 for one class token followed by registers, 20 for one token for each "
                "of 20 classes)"
            )
        return self.class_tokens


@dataclass(frozen=True)
class ModelFields:
    """What a model says about its own tokens; ``None`` where it says nothing (or more than one thing)."""

    patch_size: tuple[int, int] | None = None
    num_prefix_tokens: int | None = None
    num_class_tokens: int | None = None


def class_token_positions(class_tokens: int | Sequence[int] | None, num_prefix_tokens: int) -> tuple[int, ...] | None:
    """``class_tokens`` as users give it, as positions: an int counts them from the first; None is known for 0 or 1
    prefix tokens."""
    if class_tokens is None:
        return tuple(range(num_prefix_tokens)) if num_prefix_tokens <= 1 else None
    return tuple(range(class_tokens)) if isinstance(class_tokens, int) else tuple(class_tokens)


def read_fields(model: nn.Module) -> ModelFields:
    """Reads patch size and prefix tokens off the names and shapes that timm, torchvision, transformers and WSSS hosts
    use."""
    class_tokens = _count_parameters(model, _CLASS_TOKEN_NAMES)
    others = _count_parameters(model, _OTHER_PREFIX_NAMES)
    stated = {n for m in model.modules() if isinstance(n := getattr(m, "num_prefix_tokens", None), int)}
    prefix = stated.pop() if len(stated) == 1 else (class_tokens + others if class_tokens + others else None)
    known = prefix is not None and class_tokens <= prefix and (class_tokens > 0 or bool(others) or prefix == 0)
    return ModelFields(_patch_size(model), prefix, class_tokens if known else None)


def _count_parameters(model: nn.Module, names: Iterable[str]) -> int:
    """Tokens held by parameters of these names: (1, T, D) and (T, D) hold T, (D,) holds one; a name counts once (its
    largest)."""
    counts: dict[str, int] = {}
    for full_name, parameter in model.named_parameters():
        name = full_name.rpartition(".")[2]
        if name in names:
            counts[name] = max(counts.get(name, 0), parameter.shape[-2] if parameter.ndim > 1 else 1)
    return sum(counts.values())


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    patchify = {
        (int(conv.stride[0]), int(conv.stride[1]))
        for conv in model.modules()
        if isinstance(conv, nn.Conv2d)
        and conv.in_channels <= 4
        and conv.kernel_size == conv.stride
        and conv.stride[0] > 1
    }
    stated = {
        _pair(value)
        for module in model.modules()
        for value in (getattr(module, "patch_size", None), getattr(getattr(module, "config", None), "patch_size", None))
        if isinstance(value, int)
        or (isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], int))
    }
    found = patchify or stated
    return found.pop() if len(found) == 1 else None


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def infer_layout(
    num_tokens: int,
    image_size: tuple[int, int] | None,
    fields: ModelFields,
    patch_size: int | Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    class_tokens: int | Sequence[int] | None = None,
) -> TokenLayout:
    """The one layout of ``num_tokens`` self-attending tokens that fits an image of ``image_size`` (height, width) in
    pixels.

    What the user gives (``patch_size``, ``num_prefix_tokens``, ``class_tokens``) goes before what the model's
    ``fields`` say. Raises :class:`LayoutError` where nothing fits, or where more than one layout does, and lists those.

    >>> infer_layout(25, (64, 96), ModelFields(patch_size=(16, 16))).query
    Lattice(height=4, width=6, stride=(16.0, 16.0), offset=(0.0, 0.0), extent=(64.0, 96.0))
    """
    if image_size is None:
        raise LayoutError(
            f"found {num_tokens} tokens and no image on their way (no module of the model was given a (B, C, H, W) "
            "tensor of at most 4 channels); expected one, to tell the grid; call "
            "attention.take().with_layout(grid=(h, w), num_prefix_tokens=)"
        )
    patch = _pair(patch_size) if patch_size is not None else fields.patch_size
    prefix = num_prefix_tokens if num_prefix_tokens is not None else fields.num_prefix_tokens
    fits = _fits(num_tokens, image_size, patch, prefix)
    if len(fits) != 1:
        raise LayoutError(_misfit(num_tokens, image_size, patch, prefix, fits))
    prefix, (height, width), stride = fits[0]
    extent = (float(image_size[0]), float(image_size[1]))
    lattice = Lattice(height, width, (float(stride[0]), float(stride[1])), extent=extent)
    if class_tokens is None and fields.num_class_tokens is not None and fields.num_class_tokens <= prefix:
        class_tokens = fields.num_class_tokens
    return TokenLayout(lattice, lattice, prefix, class_token_positions(class_tokens, prefix))


_Fit = tuple[int, tuple[int, int], tuple[int, int]]


def _fits(
    num_tokens: int, image_size: tuple[int, int], patch: tuple[int, int] | None, prefix: int | None
) -> list[_Fit]:
    """Every (prefix, grid, patch size) that adds up to ``num_tokens``, one for each grid."""
    height, width = image_size
    if patch is not None:
        patches = [patch]
    else:
        largest = min(height, width, _LARGEST_GUESSED_PATCH)
        dividing = [p for p in range(1, largest + 1) if height % p == 0 and width % p == 0]
        patches = [(p, p) for p in (*_COMMON_PATCHES, *dividing)]  # of patches with the same grid, a dividing one stays
    fits = {}
    for size in patches:
        grid = (height // size[0], width // size[1])
        left = num_tokens - grid[0] * grid[1]
        if min(grid) > 0 and (left == prefix if prefix is not None else 0 <= left <= MAX_GUESSED_PREFIX):
            fits[grid] = (left, grid, size)
    return sorted(fits.values())


def _misfit(
    num_tokens: int,
    image_size: tuple[int, int],
    patch: tuple[int, int] | None,
    prefix: int | None,
    fits: list[_Fit],
) -> str:
    seen = f"found {num_tokens} tokens for an image of {image_size[0]} x {image_size[1]} px"
    if fits:
        listed = " or ".join(f"{left} prefix + {grid[0]} x {grid[1]}" for left, grid, _ in fits)
        return (
            f"{seen}, which fit {listed}; expected one fit; pass patch_size= or num_prefix_tokens= to capture_attention"
        )
    said = (
        [f"patch size {patch[0]} x {patch[1]}, so a grid of {image_size[0] // patch[0]} x {image_size[1] // patch[1]}"]
        if patch
        else []
    )
    said += [f"{prefix} prefix tokens"] if prefix is not None else []
    return (
        f"{seen}; expected prefix tokens + grid to add up to that "
        f"({' and '.join(said) or 'nothing is known of patch or prefix'}); pass patch_size= and num_prefix_tokens= to "
        "capture_attention, or name the layout by with_layout(grid=, num_prefix_tokens=)"
    )
