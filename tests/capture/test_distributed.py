"""Two processes of DistributedDataParallel with gloo, each with half the batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention
from tests.support.capturing import gradients, query_and_key
from tests.support.models.plain import BUILDERS
from tests.support.ranks import needs_gloo, on_two_ranks

view = HorizontalFlip()


def step(model: nn.Module, captured: nn.Module, x: Tensor, labels: Tensor, forwards: int) -> dict[str, Tensor | None]:
    """One backward of a criterion and the consistency of both views, made by one forward or by two."""
    criterion, acr = nn.MultiLabelSoftMarginLoss(), AllPairsConsistencyLoss(view)
    model.zero_grad()
    with capture_attention(captured) as attention:
        for _ in range(2):  # the first run watches every module
            if forwards == 1:
                logits_a, logits_b = model(torch.cat([x, view(x)])).chunk(2)
                attn_a, attn_b = attention.take().chunk(2)
            else:
                logits_a, attn_a = model(x), attention.take()
                logits_b, attn_b = model(view(x)), attention.take()
            loss = criterion(logits_a, labels) + criterion(logits_b, labels) + acr(attn_a, attn_b)
            model.zero_grad()
            loss.backward()
    return {name.removeprefix("module."): gradient for name, gradient in gradients(model).items()}


def batch_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 32, 48, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (4, 5), generator=generator).double()


def built(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[kind](2).double()


DISTRIBUTED = [
    (kind, captured, forwards, unused)
    for kind in BUILDERS
    for captured in ("wrapper", "module")
    for forwards, unused in ((1, False), (2, False), (1, True))
]


def work(rank: int) -> dict[tuple[str, str, int, bool], dict[str, Tensor | None]]:
    """Every case on a rank's half of the batch."""
    x, labels = (part.chunk(2)[rank] for part in batch_and_labels())
    found = {}
    for case in DISTRIBUTED:
        kind, captured, forwards, unused = case
        model = built(kind, seed=rank)  # the wrapper hands the first rank's weights to the second
        wrapper = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        found[case] = step(wrapper, {"wrapper": wrapper, "module": wrapper.module}[captured], x, labels, forwards)
    return found


@needs_gloo
def test_two_processes_with_half_the_batch_each_get_the_gradient_of_one_with_all_of_it(tmp_path: Path) -> None:
    ranks = on_two_ranks(work, tmp_path)
    for case in DISTRIBUTED:
        kind, _, forwards, _ = case
        model = built(kind)
        expected = step(model, model, *batch_and_labels(), forwards)
        for name, gradient in expected.items():
            first, second = (rank[case][name] for rank in ranks)
            assert torch.equal(first, second), (case, name)
            assert (first - gradient).norm() <= 1e-9 * gradient.norm(), (case, name)
        for name, rows in query_and_key(expected):
            assert rows.abs().max() > 0, name
        for name, gradient in step(model, model, *batch_and_labels(), 3 - forwards).items():
            assert (gradient - expected[name]).norm() <= 1e-9 * gradient.norm(), "one forward and two"
