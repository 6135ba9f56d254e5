"""Which models does the capture serve? One row a model, built from config with random weights.

    python -m benchmarks.coverage                      # the whole table, a few minutes on one core
    python -m benchmarks.coverage --only swin vit_     # rows whose name or library contains one of these
    python -m benchmarks.coverage --write              # also docs/coverage.md and benchmarks/coverage/results.json

A row is green when every layer of token-to-token attention is captured, its map times V is the layer's own result, its
rows sum to 1, outputs do not change by a bit, gradient reaches query and key, and a logit has a gradient by the map; or
when the model has no such layer and is refused by name. Layers are counted twice without the capture: by hand, in
models.py, and as kernels that ATen runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode

from acr_reg import CaptureError, capture_attention
from acr_reg.attention.layer import LayerAttention
from acr_reg.inspection.check import errors
from acr_reg.placement.modules import batch_norms
from benchmarks.coverage.models import CANDIDATES, Candidate

LIBRARIES = ("torch", "timm", "transformers", "torchvision", "open_clip_torch", "vit-pytorch")
ALLOWED = 1e-4  # relative error of A V, and of row sums, in float32
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One model's result. Errors are the worst of all layers; None where no layer says."""

    library: str
    name: str
    kind: str
    kernels: int
    expected: int
    captured: int
    windows: int
    grids: int
    factored: int
    explicit: int
    mixed: int
    skipped: int
    product_error: float | None
    row_error: float | None
    output_change: float
    gradient_to_factors: int
    gradient_by_map: int
    seconds: float
    verdict: str
    reason: str

    @property
    def green(self) -> bool:
        return self.verdict in ("captured", "refused")


class _Kernels(TorchDispatchMode):
    """Counts softmaxes over the last axis and fused attention kernels, beneath everything the capture sees."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_softmax" and args[1] in (-1, args[0].ndim - 1) and args[0].ndim >= 3:
            self.count += 1
        if name.startswith(("_scaled_dot_product", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")):
            self.count += "math" not in name
        return func(*args, **(kwargs or {}))


def measure(candidate: Candidate) -> Row:
    begin = time.process_time()
    torch.manual_seed(0)
    model = candidate.build().eval()
    inputs = candidate.inputs()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # What starts at zero (last scales, heads) would hide every gradient; some start as unwritten memory.
            if not 0 < parameter.abs().max() < 1e4 and not name.endswith("bias"):
                parameter.normal_(std=0.02)
        _settle_batch_norms(model, inputs)
    with torch.no_grad(), _Kernels() as kernels:
        _run(model, inputs)
    plain = candidate.logits(_run(model, inputs)).detach()
    layers: list[LayerAttention] = []
    skipped: list[tuple[str, str]] = []
    counts = []
    refusal = ""
    logits = plain
    with capture_attention(model, keep="all", record_products=True) as attention:
        for _ in range(2):  # the second time only attention modules are watched
            logits = candidate.logits(_run(model, inputs))
            layers, skipped = [], []
            try:
                for maps in attention.take_all():
                    layers += list(maps)
                    skipped += list(attention.skipped)
            except CaptureError as error:
                refusal, skipped = str(error), list(attention.skipped)
            counts.append(len(layers))
    found = [errors(layer) for layer in layers]
    products, rows = (_worst(e[i] for e in found) for i in (1, 0))
    row: dict[str, Any] = {
        "library": candidate.library,
        "name": candidate.name,
        "kind": candidate.kind,
        "kernels": kernels.count,
        "expected": candidate.expected,
        "captured": len(layers),
        "windows": sum(layer.window is not None for layer in layers),
        "grids": sum(layer.placed is not None for layer in layers),
        "factored": sum(layer.is_factored for layer in layers),
        "explicit": sum(not layer.is_factored and layer.stochastic for layer in layers),
        "mixed": sum(not layer.stochastic for layer in layers),
        "skipped": len(skipped),
        "product_error": products,
        "row_error": rows,
        "output_change": (logits.detach() - plain).abs().max().item(),
        "gradient_to_factors": sum(_reaches_factors(model, layer) for layer in layers),
        "gradient_by_map": sum(_has_gradient(logits, layer) for layer in layers),
        "seconds": round(time.process_time() - begin, 1),
    }
    verdict, reason = _judge(candidate, row, counts, refusal, skipped)
    return Row(**row, verdict=verdict, reason=reason)


def _settle_batch_norms(model: nn.Module, inputs: Any) -> None:
    """Gives BatchNorm the statistics of the input: without, signals of a deep random network fade to nothing."""
    norms = batch_norms(model)
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    _run(model, inputs)
    model.eval()


def _run(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(1)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _worst(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _reaches_factors(model: nn.Module, layer: LayerAttention) -> bool:
    """Whether a loss on the map has a gradient by query and by key, where they show, and by the module's parameters."""
    weights = layer.weights()
    loss = (weights * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))).sum()
    query, key = layer.recorded.query, layer.recorded.key
    factors: list[Any] = [query, key] if query is not None and key is not None else []
    if factors and not layer.is_factored:  # the key is a view of what met the query
        factors[1] = GradientEdge(*key.grad_fn.next_functions[0])
    module = dict(model.named_modules()).get(layer.name, model)
    parameters = [p for p in module.parameters() if p.requires_grad]
    wanted = factors + (parameters or [p for p in model.parameters() if p.requires_grad])
    gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    reached = [g is not None and bool(g.isfinite().all()) and bool((g != 0).any()) for g in gradients]
    return all(reached[: len(factors)]) and any(reached[len(factors) :])


def _has_gradient(logits: Tensor, layer: LayerAttention) -> bool:
    target = layer.recorded.output if layer.is_factored else layer.recorded.map
    assert target is not None
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), [target], retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.isfinite().all()) and bool((gradient != 0).any())


def _judge(
    candidate: Candidate, row: dict[str, Any], counts: list[int], refusal: str, skipped: list[tuple[str, str]]
) -> tuple[str, str]:
    """("captured" or "refused", reasons of what was left out) where green; else "wrong" and what is."""
    reasons = "; ".join(f"{n} x {reason}" for reason, n in Counter(reason for _, reason in skipped).items())
    faults = []
    if counts[0] != counts[1]:
        faults.append(f"{counts[0]} layers at first, then {counts[1]}")
    if row["captured"] != candidate.expected:
        faults.append(f"{row['captured']} of {candidate.expected} layers")
    if row["captured"] + row["skipped"] < row["kernels"] and not candidate.note and not refusal:
        faults.append(f"{row['kernels']} kernels ran")
    if row["output_change"] != 0:
        faults.append(f"outputs changed by {row['output_change']:.1e}")
    for name in ("product_error", "row_error"):
        if row[name] is not None and row[name] > ALLOWED:
            faults.append(f"{name} {row[name]:.1e}")
    for name in ("gradient_to_factors", "gradient_by_map"):
        if row[name] != row["captured"]:
            faults.append(f"{name} in {row[name]} of {row['captured']}")
    if candidate.grids and row["grids"] != row["captured"]:
        faults.append(f"a grid for {row['grids']} of {row['captured']}")
    if candidate.expected == 0 and not refusal:
        faults.append("nothing captured, nothing said")
    if refusal and candidate.expected:
        faults.append(refusal)
    if faults:
        return "wrong", "; ".join([*faults, *([reasons] if reasons else [])])
    return ("captured" if candidate.expected else "refused"), reasons or _reason(refusal)


def _reason(refusal: str) -> str:
    """What the message says in brackets after what it found."""
    if not refusal:
        return ""
    given = refusal.partition("since the last take()")[2].partition(". Run this model,")[0]
    return given.removeprefix(" (").removesuffix(")") or "nothing like attention ran"


def table(rows: list[Row]) -> str:
    headings = (
        "library",
        "model",
        "kind",
        "layers",
        "by",
        "windows",
        "on a grid",
        "A V off",
        "rows off",
        "output change",
    )
    lines = [
        f"| {' | '.join([*headings, 'gradient to q, k', 'logit by map', 'left out, by name'])} |",
        f"|{'---|' * (len(headings) + 3)}",
    ]
    for row in rows:
        by = [f"{n} {name}" for name in ("factored", "explicit", "mixed") if (n := getattr(row, name))]
        layers = f"{row.captured} of {row.expected}" if row.green else f"**{row.captured} of {row.expected}**"
        cells = [row.library, f"`{row.name}`", row.kind, layers if row.expected else "refused", ", ".join(by) or "-"]
        cells += [str(row.windows or "-"), str(row.grids or "-"), _small(row.product_error), _small(row.row_error)]
        cells += [_small(row.output_change), str(row.gradient_to_factors or "-"), str(row.gradient_by_map or "-")]
        lines.append(f"| {' | '.join([*cells, row.reason.replace('|', '/') or '-'])} |")
    return "\n".join(lines)


def _small(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def summary(rows: list[Row]) -> str:
    having = [row for row in rows if row.expected]
    complete = [row for row in having if row.green]
    refused = [row for row in rows if not row.expected and row.green]
    return (
        f"{len(rows)} models. With token-to-token softmax: {len(having)}, captured completely {len(complete)} "
        f"({100 * len(complete) / max(1, len(having)):.1f} %). Without: {len(rows) - len(having)}, refused by name "
        f"{len(refused)}. Not green: {', '.join(row.name for row in rows if not row.green) or 'none'}."
    )


def document(rows: list[Row]) -> str:
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in LIBRARIES)
    return f"""# Coverage

{summary(rows)}

Made by `python -m benchmarks.coverage --write` on {date.today()} with {versions}; random weights, float32, CPU.

"Layers" is found of expected, counted by hand from the source; "by" says whether query and key of a fused kernel were
recorded (factored) or the map as it met V (mixed: combined across heads or gated after the softmax). "On a grid" counts
the layers whose tokens were placed on the image: the loss and the class maps take these, and refuse the others by name
(windows, tokens in another order, texts). "A V off" and "rows off" are the worst relative error of map times V against
the layer's own result, and of the sums of rows; "gradient to q, k" and "logit by map" count the layers in which a loss
on the map reaches query and key, and in which a logit has a gradient by the map.

{table(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Coverage of the capture over models built from config.")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose library or name contains one of these")
    parser.add_argument(
        "--write", action="store_true", help="write docs/coverage.md and benchmarks/coverage/results.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for candidate in CANDIDATES:
        if args.only and not any(part in f"{candidate.library} {candidate.name}" for part in args.only):
            continue
        try:
            row = measure(candidate)
        except Exception as error:
            raise RuntimeError(f"{candidate.library} {candidate.name} could not be measured") from error
        rows.append(row)
        gc.collect()
        print(f"{row.verdict:9} {row.library:13} {row.name:44} {row.captured}/{row.expected} {row.reason}", flush=True)
    print(summary(rows))
    if args.write:
        (ROOT / "docs" / "coverage.md").write_text(document(rows), encoding="utf-8")
        results = json.dumps([asdict(row) for row in rows], indent=1)
        (ROOT / "benchmarks" / "coverage" / "results.json").write_text(results + "\n", encoding="utf-8")
    return 0 if all(row.green for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
