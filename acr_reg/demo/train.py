"""The training loop of every condition: two views of the same images, with or without the consistency loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, capture_attention
from acr_reg.demo.class_tokens import ClassTokenOutput, classification
from acr_reg.demo.record import Meter

Batch = tuple[Tensor, Tensor, Tensor]  # the model's input for the image and for its view, labels (B,C)


@dataclass(frozen=True)
class Training:
    """What a training did and cost. `history` has a dict for each step: the loss, and with ACR its unweighted terms."""

    history: list[dict[str, float]]
    seconds: float
    cpu_seconds: float
    peak_memory: int | None


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    acr: AllPairsConsistencyLoss | None = None,
    grid: tuple[int, int] | None = None,
    class_tokens: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Training:
    """Trains `model` on each batch in turn and calls `advance` after each step.

    A model that takes tokens instead of images needs their `grid`, one with a token for each class their number. The
    class maps of its head are compared too if `acr` has a weight for them.
    """
    model.train()
    history = []
    watched = nullcontext() if acr is None else capture_attention(model, class_tokens=class_tokens)
    with Meter() as meter, watched as attention:
        for images, viewed, labels in batches:
            first = model(images)
            attn_a = None if attention is None else with_grid(attention.take(), grid)
            second = model(viewed)
            attn_b = None if attention is None else with_grid(attention.take(), grid)
            loss = classification_loss(first, labels) + classification_loss(second, labels)
            step = {"classification": loss.item()}
            if acr is not None:
                cams = (first.maps, second.maps) if class_tokens and acr.weights["cam"] else ()
                consistency, terms = acr(attn_a, attn_b, *cams, labels=labels, return_terms=True)
                loss = loss + consistency
                step |= {name: term.item() for name, term in terms.items()}
            optimizer.zero_grad()
            loss.backward()
            del attn_a, attn_b
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            history.append(step)
            advance()
    return Training(history, meter.seconds, meter.cpu_seconds, meter.peak_memory)


def classification_loss(output: Tensor | ClassTokenOutput, labels: Tensor) -> Tensor:
    if isinstance(output, ClassTokenOutput):
        return classification(output, labels)
    return F.multilabel_soft_margin_loss(output, labels)


def with_grid(attention: AttentionMaps, grid: tuple[int, int] | None, class_tokens: int = 1) -> AttentionMaps:
    """Lays out the maps of a model that took tokens instead of images: class tokens, then the grid."""
    return attention if grid is None else attention.with_layout(grid, class_tokens, class_tokens=range(class_tokens))


def shuffled(count: int, size: int, steps: int, seed: int) -> Iterable[Tensor]:
    """`steps` batches of `size` indices below `count`, epoch by epoch. The same seed gives the same batches."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * size].split(size)
