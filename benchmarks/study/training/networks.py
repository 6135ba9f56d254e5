"""The networks of the study: what a forward pass leaves to train on and to read class maps from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from acr_reg import AttentionMaps
from acr_reg.demo.class_tokens import ClassTokenOutput, ClassTokens
from acr_reg.demo.photos.pretrained import UpperHalf
from acr_reg.demo.train import classification_loss
from benchmarks.study.settings import CLASS_TOKENS

EMBEDDING_SCALE = 0.05  # of new class tokens; the class token that they start from has a root mean square of 0.13


class ClassTokenHalf(nn.Module):
    """Maps tokens (B,1+N,D) of the lower blocks, on a square grid, to a :class:`ClassTokenOutput`: every class's token
    starts from the photo's class token. As in MCTformer+, no norm follows the last block."""

    def __init__(self, upper: UpperHalf, num_classes: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_classes
        self.blocks = upper.blocks
        self.head = ClassTokens(num_classes, upper.norm.normalized_shape[0], EMBEDDING_SCALE)

    def forward(self, tokens: Tensor) -> ClassTokenOutput:
        side = round((tokens.shape[1] - 1) ** 0.5)
        output: ClassTokenOutput = self.head(tokens[:, :1], tokens[:, 1:], self.blocks, (side, side))
        return output


StudyNetwork = UpperHalf | ClassTokenHalf


def made(network: str, upper: UpperHalf, num_classes: int) -> StudyNetwork:
    return ClassTokenHalf(upper, num_classes) if network == CLASS_TOKENS else upper


@dataclass(frozen=True, eq=False)
class Run:
    """One view's forward pass. ``attention`` is None for a condition that needs no maps. ``output`` is None for the
    network with one class token, which has logits alone."""

    logits: Tensor
    attention: AttentionMaps | None
    output: ClassTokenOutput | None = None

    @classmethod
    def of(cls, output: Tensor | ClassTokenOutput, attention: AttentionMaps | None) -> Run:
        if isinstance(output, ClassTokenOutput):
            return cls(output.logits, attention, output)
        return cls(output.float(), attention)

    @property
    def maps(self) -> AttentionMaps:
        assert self.attention is not None
        return self.attention

    def classification(self, labels: Tensor) -> Tensor:
        return classification_loss(self.logits if self.output is None else self.output, labels)
