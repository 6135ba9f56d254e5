"""A layer of both views with its rows aligned, or refused, and class maps of both views."""

import pytest
import torch

from acr_reg import AllPairsConsistencyLoss
from acr_reg.alignment.pairs import AlignedPair
from tests.support.attention import generator, says


def aligned_rows(a, b, view, valid=None, tokens=None):
    """The class-token rows and the patch rows, all or those of ``tokens``, of layer ``a`` and its view ``b``."""
    pair = AlignedPair(a, b, view, valid)
    return pair.activation(), pair.affinity(torch.arange(len(a.layout.query)) if tokens is None else tokens)


def random_cams(grid, grid_b, batch=2, seed=0):
    """Class maps (batch, 3, h, w) on both grids, with gradient."""
    return [
        torch.randn(batch, 3, *size, generator=generator(seed + k), dtype=torch.float64).requires_grad_()
        for k, size in enumerate((grid, grid_b))
    ]


def refused(view, a, b, match, *fragments, **call):
    """The error, with these facts, of the loss on maps that are no pair under this view."""
    with pytest.raises(ValueError, match=match) as error:
        AllPairsConsistencyLoss(view, 0.0, 1.0)(a, b, **call)
    assert says(error, *fragments)
    return error
