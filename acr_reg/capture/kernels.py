"""Knows how torch spells attention: the functions that take part, their arguments, and the two products.

A new spelling is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg._tensors import is_dense
from acr_reg._torch_private import body_of, dispatches, in_transform
from acr_reg.attention.call import AttentionCall
from acr_reg.attention.layer import RecordedTensors


class Role(Enum):
    """What a function may do to attention."""

    OTHER = 0
    FUSED = 1
    MULTI_HEAD = 2
    SOFTMAX = 3
    PRODUCT = 4
    UNKNOWN_KERNEL = 5  # an operator called without its public function, or flex_attention


ROLES: dict[Any, Role] = {
    F.scaled_dot_product_attention: Role.FUSED,
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax), Role.SOFTMAX),
}

PRODUCT_NAMES = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"}

# These change dtype, memory or dropout, and leave every probability where it is.
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
SAME_MAP_NAMES = {"dropout", "dropout_", "contiguous", "clone", *_CASTS}

# These rearrange rows and keep each row's content, as long as the last axis keeps its length.
SAME_ROWS_NAMES = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand"}

_SUMS_QUERIES = "no attention of queries to keys: the product with the values sums over the queries"

body = cache(body_of)


def learn_role(func: Any) -> Role:
    """Finds the role of a function that is not in ``ROLES`` yet, and adds it."""
    name = name_of(func)
    role = Role.PRODUCT if name in PRODUCT_NAMES else Role.UNKNOWN_KERNEL if "attention" in name else Role.OTHER
    if dispatches(func) and {"query", "key", "num_heads"} <= set(_parameters(func)):
        role = Role.MULTI_HEAD  # torch's multi_head_attention_forward, or a copy of it, as in repositories around CLIP
    ROLES[func] = role
    return role


def name_of(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def _parameters(func: FunctionType) -> tuple[str, ...]:
    return func.__code__.co_varnames[: func.__code__.co_argcount]


def argument(func: FunctionType, name: str, args: Any, kwargs: Any) -> Any:
    position = _parameters(func).index(name)
    return args[position] if position < len(args) else kwargs[name]


def sdpa_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None]:
    return query, key, value, attn_mask, dropout_p, is_causal, scale


class Unrecordable(Exception):
    """A kernel that the library does not record; its text says of which arguments."""


# Arguments of xformers and flash_attn that change no probability: the implementation, and what is returned beside.
_OF_NO_CONSEQUENCE = {"op", "deterministic", "num_splits", "pack_gqa", "sm_margin", "return_attn_probs", "return_lse"}


def external_call(kernel: str, arguments: Mapping[str, Any], output: Any) -> AttentionCall:
    """What a kernel of xformers or flash_attn computed, by the names of its arguments, which the two and their versions
    share: q, k, v (B, N, H, d) or (B H, N, d), kv (B, M, 2, H, d) or qkv (B, N, 3, H, d).

    Raises :class:`Unrecordable`, also for arguments that are not known here and were given.
    """
    given = {name: value for name, value in arguments.items() if name not in _OF_NO_CONSEQUENCE}

    def take(*names: str) -> Any:
        return next((given.pop(name) for name in names if name in given), None)

    packed, query = take("qkv", "kv"), take("query", "q")
    key, value, bias = take("key", "k"), take("value", "v"), take("attn_bias")
    dropout, scale, causal = take("dropout_p", "p"), take("softmax_scale", "scale"), take("causal")
    window = tuple(-1 if size is None else size for size in take("window_size") or (-1, -1))
    unknown = [name for name, of in given.items() if isinstance(of, Tensor) or of]
    if unknown:
        raise Unrecordable(f"with {unknown[0]}=")
    if isinstance(packed, Tensor) and packed.ndim == 5:
        *first, key, value = packed.unbind(2)
        query = first[0] if first else query
    tensors = query, key, value, output
    if not all(isinstance(tensor, Tensor) and tensor.ndim in (3, 4) for tensor in tensors):
        raise Unrecordable("of tensors that are not (B, N, H, d)")
    if why := unrecordable(*tensors, bias):
        raise Unrecordable(why)
    if query.ndim == 4:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask, causal = _external_mask(bias, bool(causal), window, query, key)
    recorded = RecordedTensors(query, key, value, output, None, mask, causal, scale, kernel=kernel)
    return AttentionCall(recorded, value.shape[-1], dropout=dropout or 0.0)


def _external_mask(
    bias: Any, causal: bool, window: tuple[int, ...], query: Tensor, key: Tensor
) -> tuple[Tensor | None, bool]:
    """The mask, and whether the kernel is causal, of a bias (a tensor or xformers' class for one) or a window of
    flash_attn's: the numbers of keys (before, after) each query, negative for all."""
    if type(bias).__name__ == "LowerTriangularMask":
        return None, True
    if bias is not None and type(bias) not in (Tensor, nn.Parameter):
        raise Unrecordable(f"with attn_bias={type(bias).__name__}")
    before, after = window
    queries, keys = query.shape[-2], key.shape[-2]
    if queries != keys and (causal or max(window) >= 0):
        raise Unrecordable("with causal= or window_size= for other numbers of keys than queries")
    if max(window) < 0:
        return bias, causal
    band = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    band = band.triu(-before) if before >= 0 else band
    after = 0 if causal else after
    return band.tril(after) if after >= 0 else band, False


def dropout_of(args: Any, kwargs: Any) -> float:
    """p of an active F.dropout(input, p=0.5, training=True), or torch.dropout(input, p, train)."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return float(p) if training else 0.0


def unrecordable(*tensors: Any) -> str | None:
    """Why these arguments or results of a kernel leave nothing to record, or None."""
    if in_transform():
        return "under torch.vmap or another transform of torch.func"
    for tensor in tensors:  # a loop, because each kernel asks
        if isinstance(tensor, Tensor) and not is_dense(tensor):
            return "of nested or sparse tensors"
    return None


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same tensor, or equal views of it: nn.MultiheadAttention transposes each argument."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def is_transposed(result: Tensor, alias: Tensor) -> bool:
    """Whether one is the other with its last two axes swapped, on the same memory."""
    return (
        unrecordable(result, alias) is None
        and result.ndim == alias.ndim >= 2
        and result.shape == alias.shape[:-2] + (alias.shape[-1], alias.shape[-2])
        and result.stride() == alias.stride()[:-2] + (alias.stride(-1), alias.stride(-2))
        and result.data_ptr() == alias.data_ptr()
    )


@dataclass(frozen=True, eq=False)
class ValueProduct:
    """``value`` (..., M, d) and ``output`` (..., N, d) if the product shows them; ``refusal``: why it is not A V."""

    value: Tensor | None = None
    output: Tensor | None = None
    refusal: str | None = None


def value_product(
    equation: str | None, position: int, transposed: bool, operands: list[Tensor], output: Tensor
) -> ValueProduct:
    """The product of the map, operand number ``position`` (0 or 1), with the values.

    It is written A @ V, or V^T @ A^T if channels come first (``transposed``: the map was), or as an einsum
    ``equation`` (torch rewrites the list form of einsum as an equation).
    """
    values = operands[1 - position]
    if equation is not None:
        return _einsum(equation, position, transposed, values, output)
    if transposed == (position == 0):
        return ValueProduct(refusal=_SUMS_QUERIES)
    if transposed:
        values, output = values.transpose(-2, -1), output.transpose(-2, -1)
    return ValueProduct(values, output)


def keeps_keys(equation: str | None, position: int, transposed: bool) -> bool:
    """Whether an einsum of the map, operand number ``position``, leaves queries and keys, as a mix of heads does."""
    axes = _einsum_axes(equation, position, transposed)
    return axes is not None and {axes[2], axes[3]} <= set(axes[4])


def _einsum_axes(equation: str | None, position: int, transposed: bool) -> tuple[str, str, str, str, str] | None:
    """The subscripts of the map, of the other operand, of queries, of keys and of the result; None if not shown."""
    left, arrow, summed_to = (equation or "").replace(" ", "").partition("->")
    subscripts = left.split(",")
    if not arrow or len(subscripts) != 2 or "." in left + summed_to:
        return None
    of_map, of_values = subscripts[position], subscripts[1 - position]
    query, key = (of_map[-1], of_map[-2]) if transposed else (of_map[-2], of_map[-1])
    return of_map, of_values, query, key, summed_to


def _einsum(equation: str, position: int, transposed: bool, values: Tensor, output: Tensor) -> ValueProduct:
    axes = _einsum_axes(equation, position, transposed)
    if axes is None:
        return ValueProduct()
    of_map, of_values, query, key, summed_to = axes
    if key in summed_to or key not in of_values:
        return ValueProduct(refusal=_SUMS_QUERIES) if query not in summed_to else ValueProduct()
    rest = [letter for letter in of_values if letter not in of_map]
    if len(rest) != 1 or query not in summed_to:
        return ValueProduct()
    batch = of_map[:-2]
    try:
        return ValueProduct(
            values.permute([of_values.index(letter) for letter in f"{batch}{key}{rest[0]}"]),
            output.permute([summed_to.index(letter) for letter in f"{batch}{query}{rest[0]}"]),
        )
    except (ValueError, RuntimeError):  # one of them lacks a batch axis
        return ValueProduct()


def score_factors(equation: str | None, operands: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Query (..., N, d) and key (..., M, d) of a product (..., N, M), if they are its operands as they stand."""
    if equation is None:
        return score_views(None, operands)
    query, _, key = equation.replace(" ", "").partition("->")[0].partition(",")
    alike = query[:-2] == key[:-2] and query[-1:] == key[-1:]
    return (operands[0], operands[1]) if alike and len(operands) == 2 else None


def score_views(equation: str | None, operands: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Query (..., N, d) and key (..., M, d) of a product, as views of its operands if these stand otherwise."""
    if equation is None:
        return (operands[-2], operands[-1].transpose(-2, -1)) if len(operands) > 1 and operands[-1].ndim > 2 else None
    left, _, made = equation.replace(" ", "").partition("->")
    query, _, key = left.partition(",")
    if len(operands) != 2 or "." in left:  # "...nd, ...md -> ...nm"
        return score_factors(equation, operands)
    # As "bnhd, bmhd -> bhnm": n is the query's alone, m the key's, and d is summed over.
    shared = [letter for letter in query if letter in key]
    batch, summed = "".join(x for x in shared if x in made), "".join(x for x in shared if x not in made)
    rows, columns = ("".join(x for x in own if x not in shared) for own in (query, key))
    if not len(rows) == len(columns) == len(summed) == 1 or not batch:
        return None
    return (
        operands[0].permute([query.index(letter) for letter in batch + rows + summed]),
        operands[1].permute([key.index(letter) for letter in batch + columns + summed]),
    )


def laid_out(value: Tensor | None) -> tuple[int | None, bool]:
    """The length of a value's last axis, and whether the second-last axis is contiguous in memory."""
    if value is None:
        return None, False
    return value.shape[-1], value.stride(-2) == 1 != value.stride(-1)
