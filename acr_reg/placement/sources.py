"""Follows the pixels of images through a model's first run: which pixel every value of a tensor stems from.

Each followed tensor has a shadow of its own shape. An operation that moves values moves the shadow the same way; one
that computes with them keeps the places of its first operand. So the shadow of an attention's queries says which token
is which patch of which image, however the model cut, joined, dropped or reordered them.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg._tensors import is_dense
from acr_reg.placement.places import (
    SLIDING,
    compact,
    is_moved,
    is_spread,
    padded,
    places_of,
    slid,
    split_places,
    summed,
    through_memory,
    unfolded,
    varies,
)

# Functions by what they do to places. Any other function that keeps a shape keeps the places too.
_MOVES = {
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "unfold"),
    *("transpose", "t", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", ".T", ".mT", ".H", ".mH", ".data"),
    *("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave", "roll", "flip", "rot90"),
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "pad"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "diagonal"),
    *("ravel", "adjoint"),
    *("fliplr", "flipud", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "unsafe_chunk", "unsafe_split"),
    *("hsplit", "vsplit", "dsplit", "column_stack"),
}
_PICKS = {"__getitem__", "index_select", "gather", "take_along_dim", "take", "masked_select"}  # by an index or a mask
# These write values, the argument at this position, into a tensor or into a copy of it.
_WRITES = {
    **dict.fromkeys(("copy", "slice_scatter", "select_scatter", "diagonal_scatter"), 1),
    **dict.fromkeys(("__setitem__", "masked_scatter", "index_put", "put"), 2),
    **dict.fromkeys(("scatter", "index_copy"), 3),
}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm", "addmm", "einsum"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "norm", "vector_norm", "logsumexp", "var", "std", "prod"}
# These join tokens, or put them in an order that places do not follow.
REORDERING = {"sort", "msort", "topk", "fold", "scatter_add", "scatter_reduce", "index_add", "index_reduce"}
_HIDING = re.compile(rf"{'|'.join(sorted(REORDERING))}|grid_sample\w*|as_strided|fft_\w+")
_VALUES = {"src", "source", "values", "value"}
_CASTS = {"to", "type", "type_as", "byte", "char", "short", "int", "long"}
_FACTORY = re.compile(r"new_|\w+_like$")  # these take no values of their operands

Roots = frozenset[int]


@dataclass(frozen=True, eq=False)
class Source:
    """Where the values of a tensor come from.

    ``places`` (:mod:`~acr_reg.placement.places`) has the tensor's shape: positive for pixels and padding, negative for
    a class token (-1 is the first), 0 for anything else. It is None if an operation, ``lost_in``, hides it. ``roots``
    are the tensors that went into it since the last attention: tensors with equal roots hold the same tokens.
    ``embedded`` tells tokens from images that no weights have met.
    """

    places: Tensor | None
    roots: Roots = frozenset()
    embedded: bool = True
    lost_in: str | None = None
    number: int = 0  # older sources have smaller ones


class _KnownSources:
    """The sources of tensors that are alive, by identity."""

    def __init__(self) -> None:
        self._held: dict[int, weakref.ref[Tensor]] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], Source]] = {}
        self._at_memory: dict[Any, int] = {}
        self._numbers = count()

    def keep_only(self, made: Any) -> None:
        """Forgets all sources but those of this tensor, or of each of several."""
        kept = [(tensor, source) for tensor in _listed(made) if (source := self.of(tensor)) is not None]
        self._known.clear()
        self._at_memory.clear()
        for tensor, source in kept:
            self._note(tensor, source)

    def of(self, tensor: Any) -> Source | None:
        """The source of a tensor, or of one on the same memory, as autograd's hooks return them; None if unknown."""
        if not is_dense(tensor):
            return None
        alias, source = self._known.get(id(tensor), (None, None))
        if alias is None or alias() is not tensor:
            alias, source = self._known.get(self._at_memory.get(_memory(tensor), -1), (None, None))
        return source if alias is not None and alias() is not None else None

    def _note(self, tensor: Tensor, source: Source) -> None:
        number, memory, me = id(tensor), _memory(tensor), weakref.ref(self)

        def forget(alias: weakref.ref[Tensor]) -> None:
            if (sources := me()) is not None and sources._known.get(number, (None,))[0] is alias:
                del sources._known[number]
                if sources._at_memory.get(memory) == number:
                    del sources._at_memory[memory]

        self._known[number] = weakref.ref(tensor, forget), replace(source, number=next(self._numbers))
        if memory is not None:
            self._at_memory[memory] = number

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Notes what the model holds: it comes from no image, wherever it was made."""
        self._held.update((id(tensor), weakref.ref(tensor)) for tensor in tensors)

    def _is_held(self, tensor: Any) -> bool:
        if isinstance(tensor, nn.Parameter):  # also one that came while the model ran, as with offloaded weights
            return True
        alias = self._held.get(id(tensor))
        return alias is not None and alias() is tensor

    def _write_through(self, written: Tensor, before: Source) -> None:
        """Notes what a tensor now holds in the others on its memory, such as the one that it is a view of."""
        source = self.of(written)
        if source is None or _is_same(source.places, before.places):
            return
        for other, known, places_before in self._beside(written):
            places = None
            if source.places is not None and other.dtype == written.dtype:
                with suppress(Exception):  # an expanded tensor
                    places = through_memory(other, (other, places_before), (written, source.places))
            roots = known.roots | source.roots
            self._note(other, Source(places, roots, source.embedded, source.lost_in or "a write in place"))

    def _beside(self, tensor: Tensor) -> list[tuple[Tensor, Source, Tensor]]:
        """Other tensors on a tensor's memory, with their sources and places, where these are known."""
        memory = _storage(tensor)
        known = [(alias(), source) for alias, source in self._known.values()] if memory is not None else []
        return [
            (other, source, source.places)
            for other, source in known
            if other is not None and other is not tensor and source.places is not None and _storage(other) == memory
        ]


class Sources(_KnownSources):
    """The sources of all tensors that a model makes of images."""

    def __init__(self, class_tokens: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._roots = count()
        self._images = 1
        self._sizes: list[tuple[int, tuple[int, int]]] = []  # the first number of a batch of images, and their size
        for parameter in class_tokens:
            rows = parameter.shape[-2] if parameter.ndim > 1 else 1
            numbers = -1 - torch.arange(rows, device=parameter.device)
            self._note(parameter, Source((numbers[:, None] if parameter.ndim > 1 else numbers).expand(parameter.shape)))

    @property
    def follows_images(self) -> bool:
        return self._images > 1

    def image_size(self, number: int) -> tuple[int, int]:
        """The height and width of an image in pixels."""
        return next(size for first, size in reversed(self._sizes) if first <= number)

    def note_images(self, images: Tensor, anew: bool = False) -> None:
        """Begins to follow images (B, C, H, W), unless they were made of images that are followed. ``anew``: even then,
        if the model has flipped, cut or resized them."""
        if images.is_meta:  # places without values tell nothing
            return
        known = self.of(images)
        places = None if known is None else known.places
        if places is not None and bool((places > 0).any()) and not (anew and is_moved(places)):
            return
        places = places_of(images, self._images)
        self._sizes.append((self._images, (images.shape[2], images.shape[3])))
        self._images += len(images)
        self._note(images, Source(places, self._new_root(), embedded=False))

    def shows_padding(self, images: Tensor) -> bool:
        """Whether images (B, C, H, W) were made of images that are followed, by adding what is no pixel of them."""
        known = self.of(images)
        places = None if known is None else known.places
        if places is None or not bool((places > 0).any()):
            return False
        number, y, x = split_places(places)
        height, width = self.image_size(int(number.max()))
        return not bool(((places > 0) & (y >= 0) & (y < height) & (x >= 0) & (x < width)).all())

    def _new_root(self) -> Roots:
        return frozenset([next(self._roots)])

    def lose(self, made: Any, lost_in: str, given: Iterable[Any] | None = None) -> None:
        """Notes as lost what (one or several) operations that nobody saw made of ``given`` tensors; None: of unknown
        ones."""
        roots = None if given is None else _united(s for s in map(self.of, given) if s is not None)
        for tensor in _listed(made) if roots is None or roots else ():
            if _is_real(tensor) and self.of(tensor) is None:
                self._note(tensor, Source(None, self._new_root() if roots is None else roots, lost_in=lost_in))

    def follow(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Notes where the ``result`` of a function comes from."""
        name = _name(func)
        operands = [a for a in (*args, *kwargs.values()) for a in (a if isinstance(a, (tuple, list)) else (a,))]
        makes = _FACTORY.match(name) is not None
        sources = [] if makes else [source for operand in operands if (source := self._source(operand)) is not None]
        if name == "__setitem__":
            result = args[0]
        made = _listed(result)
        before = self.of(result) if _writes(func, kwargs) else None
        if not sources:
            for tensor in filter(_is_real, made):
                self._note(tensor, Source(_nothing(tensor)))
            return
        # Integers are followed where they are pixels, cast from what is followed; others are indices.
        are_pixels = name in _CASTS or any(not _is_real(o) and self.of(o) is not None for o in operands)
        places = [None] * len(made)
        try:
            found = self._places(func, name, args, kwargs, operands, result)
            places = _listed(found)
        except Exception:  # the model must run whatever it calls: the places are lost, which is said if they are missed
            pass
        roots, embedded = _united(sources), any(s.embedded for s in sources if s.roots)
        weighs = name == "linear" or name in _PRODUCTS or name.startswith("conv")
        if weighs and roots and not embedded:
            roots, embedded = self._new_root(), True
        elif name == "scaled_dot_product_attention" or (
            name in _PRODUCTS and sum(bool(s.roots) and s.embedded for s in sources) > 1
        ):
            roots |= self._new_root()  # attention: its output is of other tokens
        lost_in = next((s.lost_in for s in sources if s.lost_in), name)
        for tensor, where in zip(made, places, strict=False):
            if _is_real(tensor) or (are_pixels and isinstance(tensor, Tensor)):
                if where is None or where.shape != tensor.shape:
                    self._note(tensor, Source(None, roots, embedded, lost_in))
                else:
                    self._note(tensor, Source(compact(where) if name in _MOVES | _PICKS else where, roots, embedded))
        if before is not None:
            self._write_through(result, before)

    def _places(
        self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], operands: list[Any], result: Any
    ) -> Any:
        """The places of a result, or of each of several; None where they are unknown."""
        if name in _PICKS:
            return func(self._shadow(args[0]), *args[1:], **{key: v for key, v in kwargs.items() if key != "out"})
        if name in _MOVES:
            return self._moved(func, name, args, kwargs)
        if name in _WRITES:
            return self._written(func, _WRITES[name], args, kwargs)
        if name == "unfold_patches":
            return unfolded(result.shape, self._shadow(args[0]), *args[1:], **kwargs)
        if SLIDING.match(name) or name in ("interpolate", "upsample"):
            several = isinstance(result, tuple)
            places = slid(self._shadow(args[0]), name, args, kwargs, (result[0] if several else result).shape)
            return [places] if several else places
        if name == "einsum":
            return summed(args[0], [self._shadow(a) for a in operands if isinstance(a, Tensor)])
        if name in _REDUCTIONS and not any(isinstance(a, Tensor) for a in args[1:2]):
            return self._reduced(args, kwargs, result)
        if not isinstance(result, Tensor) or _HIDING.fullmatch(name):
            return None
        if name == "linear" or name == "scaled_dot_product_attention":
            return self._shadow(operands[0])[..., :1].expand(result.shape)
        if name in _PRODUCTS:
            return self._product([o for o in operands if isinstance(o, Tensor)][-2:], result.shape)
        return self._elementwise(operands, result.shape)

    def _source(self, operand: Any) -> Source | None:
        """The source of an operand; None for what the model holds, which comes from no image. Anything else that is not
        known was made where nobody saw it."""
        source = self.of(operand)
        if source is not None and (source.places is not None or not self._is_held(operand)):
            return source
        if not _is_real(operand) or self._is_held(operand):
            return None
        source = self._of_view(operand)
        if source is None:
            source = Source(None, self._new_root(), lost_in="code that calls no function of torch")
        self._note(operand, source)
        return source

    def _of_view(self, view: Tensor) -> Source | None:
        """The source of a view that nobody saw being made, such as ``qkv[0]`` in torch 2.1, from the tensor that it is
        a view of; None if that is unknown."""
        for of, known, places in self._beside(view):
            if of.dtype == view.dtype and of.numel() > view.numel():
                with suppress(Exception):
                    return replace(known, places=compact(through_memory(view, (of, places))))
        return None

    def _shadow(self, operand: Any) -> Any:
        """The places of a tensor, 0 where nothing is known of it; anything else as it is."""
        if isinstance(operand, (list, tuple)) and any(isinstance(o, Tensor) for o in operand):
            return type(operand)(self._shadow(o) for o in operand)
        source = self._source(operand)
        if source is None:
            return _nothing(operand) if _is_real(operand) else operand
        if source.places is None:
            raise ValueError(source.lost_in)
        return source.places

    def _moved(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        moved = [self._shadow(arg) for arg in args]
        if name in ("view", "view_as"):  # the shadow may lie in memory otherwise
            return moved[0].reshape(*(moved[1].shape if name == "view_as" else moved[1:] or [kwargs["size"]]))
        if _writes(func, kwargs) and "out" not in kwargs:  # other tensors may have the same places
            moved[0] = moved[0].clone()
        if name == "pad":
            pad = moved[1] if len(moved) > 1 else kwargs["pad"]
            if args[0].ndim < 4:  # around tokens in rows lies nothing
                return F.pad(moved[0], pad)
            source = self.of(args[0])
            return padded(moved[0], pad, source is not None and source.embedded)
        return func(*moved, **{key: self._shadow(value) for key, value in kwargs.items() if key != "out"})

    def _written(self, func: Any, position: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        """The places of the first argument once values were written into it; None for sums. What comes from nowhere,
        such as a number or a mask token, leaves the place as it was."""
        if kwargs.get("reduce") or kwargs.get("accumulate") or any(arg is True for arg in args[position + 1 :]):
            return None
        before = self._shadow(args[0])
        given = [places := before.clone(), *args[1:]]
        named = {key: self._values(value) if key in _VALUES else value for key, value in kwargs.items()}
        if len(given) > position:
            given[position] = self._values(given[position])
        made = func(*given, **named)
        places = places if made is None else made
        return torch.where(places == 0, before, places)

    def _values(self, values: Any) -> Any:
        """The places of values that are written somewhere."""
        if not isinstance(values, Tensor):
            return 0
        return self._shadow(values) if _is_real(values) or self.of(values) is not None else _nothing(values)

    def _product(self, operands: Sequence[Tensor], shape: Any) -> Tensor:
        """The places of the left operand's rows, or of the right one's columns, where these are the tokens."""
        left, right = operands
        rows, known = self._shadow(left)[..., :1], self.of(right)
        if known is not None and known.places is None and self.of(left) is not None:  # queries of hidden keys or values
            return rows.expand(shape)
        columns = self._shadow(right)[..., :1, :]
        by_columns = varies(columns, -1) and (self.of(left) is None or (rows.shape[-2] > 1 and not varies(rows, -2)))
        return (columns if by_columns else rows).expand(shape)

    def _reduced(self, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
        """Sums stay where their first term is, but a sum over a whole image is nowhere."""
        first = result[0] if isinstance(result, tuple) else result
        places, dims = self._shadow(args[0]), kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(first, Tensor) or dims is None:
            return None
        spread = is_spread(places)
        for axis in sorted(d % places.ndim for d in (dims if isinstance(dims, (tuple, list)) else [dims]))[::-1]:
            places = places.narrow(axis, 0, 1) if first.ndim == args[0].ndim else places.select(axis, 0)
        if spread and not is_spread(places):
            places = torch.zeros_like(places)
        return [places] if isinstance(result, tuple) else places

    def _elementwise(self, operands: list[Any], shape: Any) -> Tensor | None:
        """The places of the operand that has pixels, else class tokens; among several of the one that varies along most
        axes, then of one of the result's shape, then of the oldest: that is the residual, which stays in place, and not
        what a branch with padding made of it."""
        sources = [source for operand in operands if (source := self.of(operand)) is not None]
        sources.sort(key=lambda source: source.number)
        found = [source.places for source in sources if source.places is not None]
        is_hidden = len(found) < len(sources) and not any(s.roots for s in sources if s.places is not None)
        if is_hidden:  # what is added to hidden tokens are positions, not other tokens
            found = [places for places in found if bool((places > 0).any())]
        if len(found) > 1:
            held = [places for places in found if bool((places > 0).any())]
            found = held or [places for places in found if bool((places < 0).any())] or found
        if len(found) > 1:
            axes = [sum(varies(places, axis) for axis in range(places.ndim)) for places in found]
            found = [found[i] for i in sorted(range(len(found)), key=lambda i: (-axes[i], found[i].shape != shape))]
        return found[0].expand(shape) if found else None


def _nothing(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.long, device=tensor.device).expand(tensor.shape)


def _is_real(value: Any) -> TypeGuard[Tensor]:
    """Whether this is a tensor of values, not of indices."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes what a tensor holds."""
    name = str(getattr(func, "__name__", ""))
    in_place = name == "__setitem__" or name.startswith("__i") if name.startswith("__") else name.endswith("_")
    return in_place or "out" in kwargs


def _is_same(places: Tensor | None, before: Tensor | None) -> bool:
    return places is before or (places is not None and before is not None and _memory(places) == _memory(before))


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _storage(tensor: Tensor) -> int | None:
    """The address of a tensor's memory, which views share; None if it has none of its own."""
    if not is_dense(tensor):
        return None
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _memory(tensor: Tensor) -> Any:
    try:
        return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else None
    except RuntimeError:  # it has no memory of its own
        return None


def _united(sources: Iterable[Source]) -> Roots:
    return frozenset[int]().union(*(source.roots for source in sources))


def _name(func: Any) -> str:
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":  # a property, such as Tensor.mT
        return f".{getattr(func.__self__, '__name__', '')}"
    if func is F.unfold:
        return "unfold_patches"
    return name if name.startswith("__") else name.rstrip("_")  # in place
