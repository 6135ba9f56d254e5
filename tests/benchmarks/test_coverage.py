"""A slice of benchmarks/coverage/: a row of every kind of attention is green, and a row that should not be is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm  # noqa: F401  # this file is left out where the extras are not installed
import torch

from acr_reg.placement.modules import batch_norms
from benchmarks.coverage import batches
from benchmarks.coverage.__main__ import PAGE, RESULTS, recorded_page
from benchmarks.coverage.candidate import Candidate
from benchmarks.coverage.measure import measure
from benchmarks.coverage.models import CANDIDATES
from benchmarks.coverage.page import summary, table

SLICE = [
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_224 (unfused)",
    "cait_xxs24_224",
    "convit_tiny",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
    "levit_conv_128s",
    "xcit_nano_12_p16_224",
    "davit_tiny",
    "mobilevitv2_050",
    "poolformer_s12",
    "SegformerForImageClassification",
    "HieraForImageClassification",
    "CLIPTextModel (eager)",
    "SwinTransformer (v2)",
    "nn.TransformerDecoder",
]


SAID = {"mobilevitv2_050": "softmax over (2, 1, 4, 16)", "poolformer_s12": "nothing like attention ran"}  # if refused


def candidate(name: str) -> Candidate:
    return next(c for c in CANDIDATES if c.name == name)


@pytest.mark.parametrize("name", SLICE)
@pytest.mark.filterwarnings("ignore")  # foreign models warn of their configs
def test_a_row_is_green(name: str) -> None:
    row = measure(candidate(name))
    assert row.green, row.reason
    assert (row.verdict == "refused") == (row.expected == 0)
    assert SAID.get(name, "") in row.reason


def test_the_table_holds_what_was_asked_for() -> None:
    counts = {library: sum(c.library == library for c in CANDIDATES) for library in {c.library for c in CANDIDATES}}
    assert counts["timm"] >= 60
    assert counts["transformers"] >= 15
    assert counts["vit-pytorch"] >= 6
    assert {"torchvision", "open_clip", "torch"} <= set(counts)
    assert len({(c.library, c.name) for c in CANDIDATES}) == len(CANDIDATES)


def test_the_page_shows_the_recorded_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == recorded_page(), "run python -m benchmarks.coverage --page"
    recorded = {(row["library"], row["name"]) for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    assert recorded == {(c.library, c.name) for c in CANDIDATES}, "run python -m benchmarks.coverage --write"


class Silent(torch.nn.Module):
    """One layer by hand, and one whose softmax nobody sees."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Conv2d(3, 16, 16, 16)
        self.one, self.two = torch.nn.Linear(16, 48), torch.nn.Linear(16, 48)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.proj(images).flatten(2).mT[:, None]
        for linear, softmax in (
            (self.one, torch.softmax),
            (self.two, lambda scores, dim: torch.ops.aten._softmax.default(scores, dim, False)),
        ):
            q, k, v = linear(x).chunk(3, -1)
            x = x + softmax(q @ k.mT / 4, -1) @ v
        return x.mean((1, 2))


def silent(expected: int) -> Candidate:
    like = candidate("vit_tiny_patch16_224")
    return replace(
        like, build=Silent, inputs=lambda: (torch.randn(2, 3, 64, 64),), expected=expected, logits=lambda o: o
    )


def test_a_layer_that_is_not_seen_makes_the_row_wrong() -> None:
    row = measure(silent(2))
    assert not row.green
    assert "1 of 2 layers" in row.reason
    assert "2 kernels ran" in row.reason, "counted beneath the capture"
    assert "kernels ran" in measure(silent(1)).reason, "even where the count by hand was wrong too"
    assert "0.0 %" in summary([row]) and "**1 of 2**" in table([row])


def test_batches_are_compared_where_batch_norms_know_their_inputs(monkeypatch):
    """Otherwise the logits of a random network grow until softmax shows their rounding, which depends on the batch."""
    seen = []
    monkeypatch.setattr(batches, "_describe", lambda model, inputs: seen.append(model) or ((), []))
    batches.differing(next(candidate for candidate in CANDIDATES if candidate.name == "visformer_tiny"))
    norms = batch_norms(seen[0])
    assert len(norms) > 10
    assert all(norm.running_mean.any() and not norm.training for norm in norms)
