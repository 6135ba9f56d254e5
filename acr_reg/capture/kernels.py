"""The two products of attention that is not fused: of queries and keys, and of the map and its values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_SUMS_QUERIES = "a product that sums over the queries, not over the keys: no attention of queries to keys"


@dataclass(frozen=True, eq=False)
class ValueProduct:
    """``value`` (..., M, d) and ``output`` (..., N, d) where the product shows them, and why it is no A V if so."""

    value: Tensor | None = None
    output: Tensor | None = None
    refusal: str | None = None


def value_product(
    equation: str | None, position: int, transposed: bool, operands: list[Tensor], output: Tensor
) -> ValueProduct:
    """What becomes of the map, operand number ``position`` (0 or 1), in a product with values.

    A V is written as A @ V, as V^T @ A^T where channels come first (``transposed`` says the map was), or as an
    einsum ``equation`` (which torch also makes of the spelling with lists of numbers).
    """
    values = operands[1 - position]
    if equation is not None:
        return _einsum(equation, position, transposed, values, output)
    if position == 0:
        return ValueProduct(refusal=_SUMS_QUERIES) if transposed else ValueProduct(values, output)
    return (
        ValueProduct(values.transpose(-2, -1), output.transpose(-2, -1))
        if transposed
        else ValueProduct(refusal=_SUMS_QUERIES)
    )


def _einsum(equation: str, position: int, transposed: bool, values: Tensor, output: Tensor) -> ValueProduct:
    left, arrow, summed_to = equation.replace(" ", "").partition("->")
    subscripts = left.split(",")
    if not arrow or len(subscripts) != 2 or "." in equation:
        return ValueProduct()
    of_map, of_values = subscripts[position], subscripts[1 - position]
    query, key = (of_map[-1], of_map[-2]) if transposed else (of_map[-2], of_map[-1])
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
    except (ValueError, RuntimeError):  # a batch axis that one of them does not have
        return ValueProduct()


def score_factors(equation: str | None, operands: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Query (..., N, d) and key (..., M, d) of a product (..., N, M), where the way it is written shows them."""
    if equation is None:
        return (operands[-2], operands[-1].transpose(-2, -1)) if len(operands) > 1 and operands[-1].ndim > 2 else None
    query, _, key = equation.replace(" ", "").partition("->")[0].partition(",")
    alike = query[:-2] == key[:-2] and query[-1:] == key[-1:]
    return (operands[0], operands[1]) if alike and len(operands) == 2 else None
