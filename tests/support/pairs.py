"""A layer of both views with its rows aligned, or refused, and class maps of both views."""

import pytest
import torch

from acr_reg import AllPairsConsistencyLoss
from acr_reg.alignment.pairs import AlignedPair, plan_of
from tests.support.attention import generator, says


def aligned_rows(a, b, view, valid=None, picked=None):
    """The class-token rows and the patch rows that both show, or of these those ``picked``, of layer ``a`` and its view
    ``b``."""
    plan = plan_of(a, b, view, valid)
    pair = AlignedPair(a, b, plan)
    return pair.rows(None, with_classes=True), pair.rows(plan.blocks[0], picked)


def carried_rows(rows):
    """Both sides' rows of each head over the image's keys, with their own masses; 0 where a key is not valid."""
    hidden = ~rows.keys_valid[:, None, None]
    carried = [side.onto_image("each", side.masses()[0]) for side in (rows.of_image, rows.of_view)]
    scaled = carried if rows.scale is None else [each / rows.scale for each in carried]
    return [each.masked_fill(hidden, 0) for each in scaled]


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
