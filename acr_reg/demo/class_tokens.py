"""Networks in the style of MCTformer+ (Xu et al., arXiv 2308.03005): one class token for each class and a convolutional
head on the patches. Here is what such a network adds to a transformer, and the class maps that are read off it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import AttentionMaps

LEAST_WEIGHT = 0.996**783  # of the lowest of the 28 x 28 patches at 448 px, where MCTformer+ has a decay of 0.996


@dataclass(frozen=True, eq=False)
class ClassTokenOutput:
    """``class_tokens`` (L,B,C,D): the class tokens after each block. ``maps`` (B,C,h,w): the head's output."""

    class_tokens: Tensor
    maps: Tensor

    @property
    def class_logits(self) -> Tensor:
        """(B,C): a class's logit is the mean of its own token."""
        return self.class_tokens[-1].float().mean(-1)

    @property
    def patch_logits(self) -> Tensor:
        """(B,C): the head's map of a class, pooled."""
        return ranked_mean(self.maps.float())

    @property
    def logits(self) -> Tensor:
        """(B,C): the mean of both, by which images are classified."""
        return (self.class_logits + self.patch_logits) / 2


class ClassTokens(nn.Module):
    """Puts a token for each class before patches, runs all of them through ``blocks``, and reads the head off the
    patches.

    A class's token is ``start`` (B or 1,1,D) plus an embedding of its own, because equal tokens would stay equal;
    ``scale`` is the standard deviation of a new embedding. ``patches`` are (B,N,D), ``grid`` is (h,w).
    """

    def __init__(self, num_classes: int, width: int, scale: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Parameter(scale * torch.randn(1, num_classes, width))
        self.head = nn.Conv2d(width, num_classes, 3, padding=1)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.constant_(self.head.get_parameter("bias"), 0.0)

    def forward(
        self, start: Tensor, patches: Tensor, blocks: Iterable[nn.Module], grid: tuple[int, int]
    ) -> ClassTokenOutput:
        tokens = torch.cat([(start + self.embedding).expand(len(patches), -1, -1), patches], dim=1)
        after = []
        for block in blocks:
            tokens = block(tokens)
            after.append(tokens[:, : self.num_classes])
        spatial = tokens[:, self.num_classes :].transpose(1, 2).unflatten(2, grid)
        return ClassTokenOutput(torch.stack(after), self.head(spatial))


def ranked_mean(maps: Tensor) -> Tensor:
    """The global weighted ranking pooling of MCTformer+, (B,C,h,w) -> (B,C): a mean whose weights decay with the rank
    of the value. The decay is converted to the number of patches, so that the lowest value weighs the same at every
    size."""
    values = maps.flatten(2).sort(dim=2, descending=True).values
    weights = LEAST_WEIGHT ** torch.linspace(0, 1, values.shape[2], dtype=values.dtype, device=values.device)
    return (values * weights).sum(2) / weights.sum()


def classification(output: ClassTokenOutput, labels: Tensor) -> Tensor:
    """The loss of MCTformer+: both logits by the labels (B,C), and class tokens of present classes held distinct."""
    terms = (F.multilabel_soft_margin_loss(logits, labels) for logits in (output.class_logits, output.patch_logits))
    return sum(terms, distinctness(output.class_tokens, labels))


def distinctness(class_tokens: Tensor, labels: Tensor) -> Tensor:
    """The class-token contrast of MCTformer+: in each block, the cosines of a present class's token with all class
    tokens should tell which class it is. Tokens (L,B,C,D), labels (B,C)."""
    directions = F.normalize(class_tokens.float(), dim=-1)
    cosines = directions @ directions.transpose(-1, -2)
    own = cosines.log_softmax(-1).diagonal(dim1=-2, dim2=-1)  # (L,B,C)
    return -(own * labels).sum(-1).div(labels.sum(-1).clamp_min(1)).mean()


# ------------------------------------------------------------ class maps


def class_token_attention(attention: AttentionMaps, layers: Iterable[int]) -> Tensor:
    """The attention of each class token to the patches, (B,C,h,w): the mean over heads and the given layers."""
    rows = []
    for index in layers:
        layer = attention[index]
        grid, tokens = layer.layout.key, torch.tensor(layer.layout.known_class_tokens())
        row = layer.weights(tokens)[..., layer.layout.num_prefix_tokens :].mean(1)
        rows.append(row.unflatten(2, (grid.height, grid.width)))
    return torch.stack(rows).mean(0)


def fused(maps: Tensor, attention: Tensor) -> Tensor:
    """The fused class map of MCTformer+: the root of the product of head's map and class-token attention."""
    return (maps.float().relu() * attention).sqrt()
