"""Infers the grid of a layer's tokens from the model's fields and from the number of tokens.

:func:`read_fields` gathers the fields; :func:`infer_layout` finds the one grid and prefix that fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from acr_reg.errors import LayoutError
from acr_reg.placement.windows import pair
from acr_reg.tokens import Lattice, TokenLayout, check_counts, with_class_tokens

# Longer prefixes exist (prompt tuning), but a longer guess is more often a wrong grid.
MAX_GUESSED_PREFIX = 24
_LARGEST_GUESSED_PATCH = 32  # px; above, the channels of channel attention begin to look like a few huge patches
# Guesses of a patch size: sizes that divide the image, and these, which may leave a margin.
_COMMON_PATCHES = (8, 14, 16, 32)

_CLASS_TOKEN_NAMES = ("cls_token", "cls_tokens", "class_token", "class_tokens", "class_embedding")
_REGISTER_NAMES = ("dist_token", "distillation_token", "reg_token", "reg_tokens", "register_tokens", "storage_tokens")
# A parameter of such a name may hold prefix tokens.
_TOKEN_LIKE = ("token", "cls", "class_emb", "prompt", "register", "query", "latent")
_STAGES = 6  # of a pyramid; each stage halves the grid
_STEM_STRIDES = (4, 8, 16)  # of several convolutions before the first attention


@dataclass(frozen=True)
class Stem:
    """The one convolution that reads the images, where its windows overlap: kernel, stride and padding (y, x)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = ((image_size[i] + 2 * self.padding[i] - self.kernel[i]) // self.stride[i] + 1 for i in (0, 1))
        return rows, columns


@dataclass(frozen=True)
class ModelFields:
    """What a model states about its own tokens; ``None`` if it states nothing, or contradicts itself.

    ``reads_patches``: whether a convolution cuts the images into these patches. A quarter of the tokens is then a later
    stage only if the run ``is_pyramid`` (ever fewer tokens); otherwise masking or patch dropout removed the rest, and
    no grid is left. ``states_prefix``: whether a field says that tokens stand before the patches; parameters do not say
    where theirs stand."""

    patch_size: tuple[int, int] | None = None
    num_prefix_tokens: int | None = None
    num_class_tokens: int | None = None
    stem: Stem | None = None
    reads_patches: bool = False
    is_pyramid: bool = False
    states_prefix: bool = False


@dataclass(frozen=True)
class LayoutHints:
    """What the user states about the tokens, which wins over the model's fields; None if not stated. ``between`` holds
    the positions of tokens between patches; see :class:`~acr_reg.TokenLayout`."""

    patch_size: int | Sequence[int] | None = None
    num_prefix_tokens: int | None = None
    class_tokens: int | Sequence[int] | None = None
    num_suffix_tokens: int | None = None
    between: Sequence[int] = ()
    image_channels: int | None = None

    def __post_init__(self) -> None:
        check_counts(num_prefix_tokens=self.num_prefix_tokens, num_suffix_tokens=self.num_suffix_tokens)
        if (patch := self.patch_size) is None:
            return
        sides = [] if isinstance(patch, str) else list(patch) if isinstance(patch, Iterable) else [patch]
        if len(sides) not in (1, 2) or any(side < 1 or side % 1 for side in sides):
            raise LayoutError(f"patch_size={patch!r} is no size in pixels. Pass patch_size=16, or (height, width).")


def read_fields(model: nn.Module, channels: int | None = None) -> ModelFields:
    """Reads patch size and prefix tokens by the names that timm, torchvision, transformers and WSSS hosts use."""
    class_tokens = _count_parameters(model, _CLASS_TOKEN_NAMES)
    others = _count_parameters(model, _REGISTER_NAMES)
    stated = {n for m in model.modules() if isinstance(n := getattr(m, "num_prefix_tokens", None), int)}
    states_prefix = len(stated) == 1
    prefix = stated.pop() if states_prefix else (class_tokens + others if class_tokens + others else None)
    if prefix is None and not stated and _image_convolutions(model, channels) and not _may_hold_tokens(model):
        prefix = 0
    known = prefix is not None and class_tokens <= prefix and (class_tokens > 0 or bool(others) or prefix == 0)
    patches = _patches_cut(model, channels)
    reads_patches = bool(patches)
    patches = patches or _patches_stated(model)
    patch = patches.pop() if len(patches) == 1 else None
    class_count = class_tokens if known else None
    return ModelFields(patch, prefix, class_count, _stem(model, channels), reads_patches, states_prefix=states_prefix)


def class_token_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that hold class tokens, by name."""
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] in _CLASS_TOKEN_NAMES]


def _count_parameters(model: nn.Module, names: Iterable[str]) -> int:
    """Counts tokens in tensors of these names: (1, T, D) and (T, D) hold T, (D,) holds one. A name counts once."""
    counts: dict[str, int] = {}
    for name, tensor in _named_tensors(model):
        if name in names:
            counts[name] = max(counts.get(name, 0), tensor.shape[-2] if tensor.ndim > 1 else 1)
    return sum(counts.values())


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of all modules, and the tensors that are their attributes: FullyShardedDataParallel with
    use_orig_params=False leaves nothing else of a parameter."""
    for module in model.modules():
        yield from module.named_parameters(recurse=False)
        yield from ((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))


def _image_convolutions(model: nn.Module, channels: int | None) -> list[nn.Conv2d]:
    read = (1, 3, 4, channels)
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels in read and m.groups == 1]


def _stem(model: nn.Module, channels: int | None) -> Stem | None:
    convolutions = _image_convolutions(model, channels)
    if len(convolutions) != 1 or isinstance(convolutions[0].padding, str):  # "same", "valid"
        return None
    (conv,) = convolutions
    padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    stem = Stem(pair(conv.kernel_size), pair(conv.stride), pair(padding))
    return None if stem.kernel == stem.stride or stem.stride == (1, 1) else stem


def _may_hold_tokens(model: nn.Module) -> bool:
    names = (name for name, tensor in _named_tensors(model) if tensor.ndim <= 3)
    return any(like in name and name != "mask_token" for name in names for like in _TOKEN_LIKE)


def _patches_cut(model: nn.Module, channels: int | None) -> set[tuple[int, int]]:
    read = (1, 2, 3, 4, channels)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels in read]
    return {pair(m.stride) for m in convolutions if m.kernel_size == m.stride and m.stride[0] > 1}


def _patches_stated(model: nn.Module) -> set[tuple[int, int]]:
    values = [
        value
        for module in model.modules()
        for value in (getattr(module, "patch_size", None), getattr(getattr(module, "config", None), "patch_size", None))
    ]
    pairs = [v for v in values if isinstance(v, (tuple, list)) and len(v) == 2 and isinstance(v[0], int)]
    return {pair(value) for value in [*pairs, *(v for v in values if isinstance(v, int))]}


def infer_layout(
    num_tokens: int,
    image_size: tuple[int, int] | None,
    fields: ModelFields,
    hints: LayoutHints | None = None,
    num_keys: int | None = None,
) -> TokenLayout:
    """The one layout of ``num_tokens`` queries and ``num_keys`` keys (None: as many) that fits an image of
    ``image_size`` (height, width) in pixels.

    What the user gives as ``hints`` wins over the model's ``fields``, which may or may not count tokens behind and
    between the patches, so that only hints place any there. In later stages of a pyramid the patch is doubled and the
    prefix may be missing. If the numbers of queries and keys differ, the smaller lattice is the larger one reduced.
    Raises :class:`~acr_reg.LayoutError` if no layout fits, or if several do; the error lists them.

    >>> infer_layout(25, (64, 96), ModelFields(patch_size=(16, 16))).query
    Lattice(height=4, width=6, stride=(16.0, 16.0), offset=(0.0, 0.0), extent=(64.0, 96.0))
    >>> print(infer_layout(384, (64, 96), ModelFields(num_prefix_tokens=0), num_keys=6).key)
    2 x 3
    """
    num_keys = num_tokens if num_keys is None else num_keys
    hints = LayoutHints() if hints is None else hints
    num_prefix_tokens, class_tokens = hints.num_prefix_tokens, hints.class_tokens
    suffix, between = hints.num_suffix_tokens or 0, tuple(hints.between)
    beyond = suffix + len(between)  # the prefix
    if image_size is None:
        raise LayoutError(
            f"{num_tokens} tokens lack a grid: no module was given an image (B, C <= 4, H, W). Call "
            "with_layout(grid=(h, w), num_prefix_tokens=)."
        )
    if hints.patch_size is not None:
        fields = replace(fields, patch_size=pair(hints.patch_size), stem=None)
    choices = _prefix_choices(num_prefix_tokens, fields.num_prefix_tokens, beyond)

    def fits_of(count: int) -> list[_Fit]:
        return [fit for choice in choices for fit in _first_fits(count - beyond, image_size, fields, choice)]

    fits, fitted = fits_of(num_tokens), num_tokens
    if num_keys != num_tokens and (len(fits) != 1 or num_keys > num_tokens):  # the larger one tells more
        of_keys = fits_of(num_keys)
        fits, fitted = (of_keys, num_keys) if len(of_keys) == 1 else (fits, fitted)
    if len(fits) != 1:
        known = [choice[0] for choice in choices]
        raise LayoutError(_misfit(num_tokens, image_size, fields.patch_size, known, suffix, len(between), fits))
    prefix, lattice = fits[0]
    query = lattice if num_tokens == fitted else _in_proportion(lattice, num_tokens - prefix - beyond)
    key = lattice if num_keys == fitted else _in_proportion(lattice, num_keys - prefix - beyond)
    stated = fields.num_class_tokens
    # Class tokens come first in a prefix; where they stand among tokens at several places, no field says.
    if class_tokens is None and stated is not None and (stated in (0, prefix + beyond) if beyond else stated <= prefix):
        class_tokens = stated
    elif class_tokens is None and num_prefix_tokens is None and prefix + beyond < (fields.num_prefix_tokens or 0):
        class_tokens = 0
    layout = TokenLayout(query, key, prefix, num_suffix_tokens=suffix, between=between)
    return with_class_tokens(layout, class_tokens)


def _prefix_choices(stated: int | None, of_fields: int | None, beyond: int) -> list[list[int | None]]:
    """Lengths of the prefix, of which one must fit; in each choice the first that fits counts. ``beyond`` is the number
    of tokens behind and between the patches."""
    if stated is not None:
        return [[stated]]
    if beyond and of_fields:  # it counts these too, or not
        return [[of_fields], [of_fields - beyond]] if of_fields >= beyond else [[of_fields]]
    # A class token may join in the last stage only; one that the user states is there.
    return [[of_fields, 0] if of_fields else [of_fields]]


_Fit = tuple[int, Lattice]


def _first_fits(
    num_tokens: int, image_size: tuple[int, int], fields: ModelFields, prefixes: Sequence[int | None]
) -> list[_Fit]:
    """The first fits among the stated patch, the stem and their later stages; common patches if nothing is stated."""
    for prefix in prefixes:
        fits = _patch_fits(num_tokens, image_size, fields.patch_size, prefix)
        if not fits and prefix is not None:
            fits = _stage_fits(num_tokens, image_size, fields, prefix)
        if fits:
            return fits
    return []


def _patch_fits(
    num_tokens: int, image_size: tuple[int, int], patch: tuple[int, int] | None, prefix: int | None
) -> list[_Fit]:
    """Every (prefix, lattice) that adds up to ``num_tokens``, one for each grid."""
    height, width = image_size
    if patch is not None:
        patches = [patch]
    else:
        largest = min(height, width, _LARGEST_GUESSED_PATCH)
        dividing = [p for p in range(1, largest + 1) if height % p == 0 and width % p == 0]
        patches = [(p, p) for p in (*_COMMON_PATCHES, *dividing)]  # for one grid, a dividing patch wins
    fits: dict[tuple[int, int], _Fit] = {}
    for size in patches:
        grid = (height // size[0], width // size[1])
        left = num_tokens - grid[0] * grid[1]
        if min(grid) > 0 and (left == prefix if prefix is not None else 0 <= left <= MAX_GUESSED_PREFIX):
            fits[grid] = (left, _lattice(grid, size, image_size))
    return [fits[grid] for grid in sorted(fits, key=lambda grid: (fits[grid][0], grid))]


def _stage_fits(num_tokens: int, image_size: tuple[int, int], fields: ModelFields, prefix: int) -> list[_Fit]:
    """The fit on the stem's grid or on a later stage of a pyramid. Each stage halves the rows and columns of the one
    before, rounded either way."""
    height, width = image_size
    bases: list[tuple[tuple[int, int], tuple[int, int], bool]] = []  # grid, stride, whether it is centred on the image
    if fields.stem is not None:
        bases.append((fields.stem.grid(image_size), fields.stem.stride, fields.stem.padding == (0, 0)))
    if fields.patch_size is not None:
        patch = fields.patch_size
        bases += [((height // patch[0], width // patch[1]), patch, False)]
        bases += [((-(-height // patch[0]), -(-width // patch[1])), patch, False)]
    if fields.stem is None and not fields.reads_patches:  # a stem of several convolutions
        bases += [((-(-height // p), -(-width // p)), (p, p), False) for p in _STEM_STRIDES]
    fits: dict[tuple[int, int], _Fit] = {}
    stages = 1 if fields.reads_patches and not fields.is_pyramid else _STAGES
    for base, patch, centred in bases:
        grids = {base}
        for stage in range(stages):
            for grid in grids:
                if min(grid) > 0 and grid[0] * grid[1] + prefix == num_tokens and grid not in fits:
                    stride = (patch[0] << stage, patch[1] << stage)
                    fits[grid] = (prefix, _lattice(grid, stride, image_size, centred))
            grids = {(n, m) for h, w in grids for n, m in ((h // 2, w // 2), (-(-h // 2), -(-w // 2)))}
    return list(fits.values())


def _lattice(
    grid: tuple[int, int], stride: tuple[int, int], image_size: tuple[int, int], centred: bool = False
) -> Lattice:
    height, width = float(image_size[0]), float(image_size[1])
    offset = ((height - grid[0] * stride[0]) / 2, (width - grid[1] * stride[1]) / 2) if centred else (0.0, 0.0)
    return Lattice(*grid, (float(stride[0]), float(stride[1])), offset, (height, width))


def _in_proportion(lattice: Lattice, count: int) -> Lattice:
    """The lattice of ``count`` tokens over the same image, with the proportions of ``lattice``."""
    height, width = lattice.height, lattice.width
    grids = [
        (rows, count // rows)
        for rows in range(1, count + 1)
        if count % rows == 0 and abs(rows * width - count // rows * height) < max(height, width, rows, count // rows)
    ]
    if len(grids) != 1:
        listed = " or ".join(f"{rows} x {columns}" for rows, columns in grids) or "no grid"
        raise LayoutError(
            f"{count} patch tokens fit {listed} with the proportions of the {lattice} grid. Name both grids by "
            "with_layout(grid=, key_grid=)."
        )
    rows, columns = grids[0]
    fits = [r for r in range(1, height + 1) if height // r == rows and width // r == columns]
    by = min(fits, key=lambda r: (height % r + width % r, r), default=None)
    step = (float(by), float(by)) if by is not None else (height / rows, width / columns)
    stride = (lattice.stride[0] * step[0], lattice.stride[1] * step[1])
    return Lattice(rows, columns, stride, lattice.offset, lattice.extent, is_unit=lattice.is_unit)


def _misfit(
    num_tokens: int,
    image_size: tuple[int, int],
    patch: tuple[int, int] | None,
    prefixes: Sequence[int | None],
    suffix: int,
    between: int,
    fits: list[_Fit],
) -> str:
    seen = f"{num_tokens} tokens for an image of {image_size[0]} x {image_size[1]} px"
    beyond = [f"{count} {name}" for name, count in (("suffix", suffix), ("in-between", between)) if count]
    if fits:
        listed = " or ".join(" + ".join([f"{left} prefix", str(lattice), *beyond]) for left, lattice in fits)
        return f"{seen} fit {listed}. Pass patch_size= or num_prefix_tokens=."
    before = " or ".join(f"{prefix} prefix" for prefix in prefixes if prefix is not None)
    named = [before, *beyond] if before else beyond
    known = [" and ".join(named) + " tokens"] if named else []
    if patch:
        grid = f"{image_size[0] // patch[0]} x {image_size[1] // patch[1]}"
        known.append(f"patches of {patch[0]} x {patch[1]} px (a grid of {grid})")
    return (
        f"{seen} do not fit {' and '.join(known) or 'any common patch size'}. Pass patch_size=, "
        "num_prefix_tokens= and num_suffix_tokens=. If tokens were dropped or masked, run without that."
    )
