"""Toy models, built with random weights: plain transformers by the names below, other kinds in a file each."""

from tests.support.models.cases import CASES, Case, every_model
from tests.support.models.plain import (
    ExplicitBlock,
    MultiheadBlock,
    PlainEncoder,
    explicit_vit,
    multihead_vit,
)

__all__ = [
    "CASES",
    "Case",
    "ExplicitBlock",
    "MultiheadBlock",
    "PlainEncoder",
    "every_model",
    "explicit_vit",
    "multihead_vit",
]
