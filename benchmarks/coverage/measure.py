"""Measures one model of the coverage table: what the capture sees of it, and whether that is right and complete."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode

from acr_reg import CaptureError, capture_attention
from acr_reg.attention.layer import LayerAttention
from acr_reg.inspection.check import reconstruction_errors
from acr_reg.placement.modules import batch_norms
from benchmarks.coverage.candidate import Candidate

ALLOWED = 1e-4  # relative error of A V, and of row sums, in float32


@dataclass(frozen=True)
class Row:
    """The result of one model. Errors are the largest of all layers; None if no layer has one."""

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

    count = 0

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
            # Zeros (last scales, heads) would hide every gradient; some parameters start as unwritten memory.
            if not 0 < parameter.abs().max() < 1e4 and not name.endswith("bias"):
                parameter.normal_(std=0.02)
        settle_batch_norms(model, inputs)
    # torch annotates no __init__ of its modes.
    with torch.no_grad(), _Kernels() as kernels:  # type: ignore[no-untyped-call]
        _run(model, inputs)
    plain = candidate.logits(_run(model, inputs)).detach()
    layers: list[LayerAttention] = []
    skipped: list[tuple[str, str]] = []
    counts = []
    refusal = ""
    logits = plain
    with capture_attention(model, keep="all", record_products=True) as attention:
        for _ in range(2):  # the second time the capture watches attention modules only
            logits = candidate.logits(_run(model, inputs))
            layers, skipped = [], []
            try:
                for maps in attention.take_all():
                    layers += list(maps)
                    skipped += list(attention.skipped)
            except CaptureError as error:
                refusal, skipped = str(error), list(attention.skipped)
            counts.append(len(layers))
    found = [reconstruction_errors(layer) for layer in layers]
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


def settle_batch_norms(model: nn.Module, inputs: Any) -> None:
    """Give BatchNorm the statistics of the input; otherwise the signals of a deep random network fade to nothing, or
    grow until softmax picks one key and shows the rounding of its logits."""
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
    """Whether a loss on the map has gradients for the query and the key, if recorded, and the module's parameters."""
    weights = layer.weights()
    loss = (weights * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))).sum()
    query, key = layer.recorded.query, layer.recorded.key
    factors: list[Any] = [query, key] if query is not None and key is not None else []
    if key is not None and factors and not layer.is_factored:  # the key is a view of what met the query
        assert key.grad_fn is not None
        node, output = key.grad_fn.next_functions[0]
        assert node is not None
        factors[1] = GradientEdge(node, output)
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
    """("captured" or "refused", why layers were left out), or ("wrong", what is wrong)."""
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
    """What the refusal lists in brackets: what ran in place of attention."""
    if not refusal:
        return ""
    given = re.search(r" ran \((.*)\)\. It must run in this model", refusal)
    return given[1] if given else "nothing like attention ran"
