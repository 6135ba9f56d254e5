"""Every run that a capture refuses is found and worded here."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from acr_reg._torch_private import is_replica
from acr_reg.capture.runs import REMEMBERED, Keep, Run, RunLog
from acr_reg.errors import CaptureError
from acr_reg.placement.modules import ModuleIndex

_KERNELS = "F.scaled_dot_product_attention, softmax and matmul, or nn.MultiheadAttention"


def removed() -> CaptureError:
    return CaptureError("found a capture that was removed; expected a running one; call capture_attention(model) again")


def unknown_module(module: nn.Module) -> CaptureError:
    what = "nn.DataParallel runs replicas of it" if is_replica(module) else "it joined the model since"
    return CaptureError(
        f"found a forward of a {type(module).__name__} that the capture does not know ({what}); expected the "
        "modules that were there when it began; use DistributedDataParallel, or capture again after the change"
    )


def one_of(runs: list[Run], keep: Keep, run: int | None) -> Run:
    """The run that ``take(run)`` asks for."""
    if keep == "only" and len(runs) > 1:
        listed = "; ".join(_summary(each) for each in runs)
        more = " or more" if len(runs) >= REMEMBERED else ""  # earlier ones are no longer remembered
        raise CaptureError(
            f"found {len(runs)}{more} encoder runs since the last take: {listed}; expected one; take() "
            'after each forward, or choose keep="first", "last" or "all" (then take(i))'
        )
    if keep == "all" and run is None and len(runs) > 1:
        raise CaptureError(
            f"found {len(runs)} encoder runs; expected to be told which; call take(0) to take({len(runs) - 1})"
        )
    chosen = {"first": 0, "last": -1}.get(keep, run or 0)
    if not -len(runs) <= chosen < len(runs):
        raise CaptureError(
            f"found {len(runs)} encoder runs; expected run {run} among them; call take(0) to take({len(runs) - 1})"
        )
    return runs[chosen]


def _summary(run: Run) -> str:
    return f"{len(run.shapes)} attention calls, the first on {tuple(run.shapes[0])}" if run.shapes else "none"


def refuse_partial(index: ModuleIndex, run: Run) -> None:
    """Layers that are missing from a run would be missing from the loss without a word."""
    joined = index.joined()
    if joined:
        raise CaptureError(
            f"found {', '.join(joined[:4])}, which joined the model since the capture began; expected the modules "
            "that were there then; capture again after the change"
        )
    if run.reentrant:
        checkpointed = sorted(index.names[m] for m in run.reentrant)
        raise CaptureError(
            f"found reentrant checkpointing around {', '.join(checkpointed[:4])}, which runs without a "
            "graph; expected every layer on the graph; checkpoint with use_reentrant=False"
        )
    silent = (run.silent & index.alike()) - run.fired.keys() if run.silent else set()
    unseen = [*dict.fromkeys(f"{name} ({kernel})" for name, kernel in run.unknown), *(index.names[m] for m in silent)]
    if unseen:
        raise CaptureError(
            f"found attention in {len(run.fired)} modules, but none that can be captured in {', '.join(unseen[:4])}"
            f"{' and more' if len(unseen) > 4 else ''}; expected all that ran to go through "
            f"{_KERNELS}; switch other kernels "
            "(xformers, flash_attn, flex_attention) off, or name the part to capture by modules="
        )


def nothing_captured(index: ModuleIndex, log: RunLog, skipped: Iterable[tuple[str, str]] = ()) -> CaptureError:
    """The error where no layer is left, with what was seen instead since the last of its kind."""
    reasons = [*(f"{name}: {reason}" for name, reason in skipped), *dict.fromkeys(log.outside)]
    if log.without_grad:
        reasons.append(
            f"{log.without_grad} module calls ran under torch.no_grad (capture with no_grad=True to record them; "
            "reentrant checkpointing also runs its forward without a graph: use_reentrant=False)"
        )
    log.without_grad, log.outside = 0, []
    named = index.named_attention()
    if named and not any(name.partition(" ")[0] in reason for name in named for reason in reasons):
        reasons.append(f"nothing of the kind was seen in {', '.join(named[:3])}{' and more' * (len(named) > 3)}")
    return CaptureError(
        f"found no token-to-token attention of {type(index.model).__name__} since the last "
        f"take{' (' + '; '.join(reasons) + ')' if reasons else ''}; expected at least one layer that goes through "
        f"{_KERNELS}; run this model (not a "
        "copy, nor a compiled or traced one) before take(), and take() once per forward"
    )
