"""Both groups of rows of an aligned layer, for tests that look at them without a loss."""

import torch

from acr_reg.alignment.pairs import AlignedPair


def aligned_rows(a, b, view, valid=None, tokens=None):
    """The class-token rows and the patch rows, all or those of ``tokens``, of layer ``a`` and its view ``b``."""
    pair = AlignedPair(a, b, view, valid)
    return pair.activation(), pair.affinity(torch.arange(len(a.layout.query)) if tokens is None else tokens)
