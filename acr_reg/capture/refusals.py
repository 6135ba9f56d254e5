"""Finds, words and raises what is wrong with the encoder runs of a capture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass, replace
from typing import Any, NoReturn

from torch import Tensor, nn

from acr_reg._torch_private import (
    backward_number,
    comes_from_split,
    has_dtensors,
    is_dtensor,
    is_replica,
    is_split,
)
from acr_reg.attention.call import AttentionCall
from acr_reg.capture.runs import REMEMBERED, Keep, Run, RunLog
from acr_reg.errors import CaptureError, some
from acr_reg.placement.modules import ModuleIndex


def refuse_unknown_module(module: nn.Module) -> NoReturn:
    """Raises for a module that the capture did not hook: a replica, or one that joined the model later."""
    name = type(module).__name__
    if is_replica(module):
        raise CaptureError(
            f"nn.DataParallel runs replicas of a captured {name}, which are not captured. Use DistributedDataParallel."
        )
    raise CaptureError(
        f"A {name} that runs joined the model after the capture began, or is of a copy. Capture what runs."
    )


def refuse_inside(module: nn.Module, action: str) -> NoReturn:
    """Raises because layers would be missing: the module's forward is still running."""
    raise CaptureError(
        f"{action} inside the forward of {type(module).__name__} would miss layers. Wait for its end, or capture only "
        "modules= that are not running."
    )


def refuse_elsewhere(model: nn.Module) -> NoReturn:
    """Raises because another thread runs the model: its run is not whole, and the one asked for may be released."""
    raise CaptureError(
        f"Another thread is inside the forward of {type(model).__name__}. Call take() after it, or capture a copy for "
        "each thread."
    )


def one_of(runs: list[Run], keep: Keep, run: int | None) -> Run:
    """The run that ``take(run)`` asks for."""
    if keep == "only" and len(runs) > 1:
        listed = "; ".join(dict.fromkeys(map(_summary, runs)))
        more = " or more" if len(runs) >= REMEMBERED else ""  # earlier ones are no longer remembered
        raise CaptureError(
            f"{len(runs)}{more} encoder runs wait: {listed}. Take each, clear() those of validation or an "
            'interruption, or set keep="first", "last" or "all".'
        )
    if keep == "all" and run is None and len(runs) > 1:
        raise CaptureError(f"{len(runs)} encoder runs happened. Choose one by take(0) to take({len(runs) - 1}).")
    chosen = {"first": 0, "last": -1}.get(keep, run or 0)
    if not -len(runs) <= chosen < len(runs):
        raise CaptureError(
            f"There is no run {run}: {len(runs)} encoder runs happened. Count from 0 to {len(runs) - 1}."
        )
    return runs[chosen]


def _summary(run: Run) -> str:
    return f"{len(run.shapes)} attention calls, the first on {tuple(run.shapes[0])}" if run.shapes else "none"


def refuse_partial(index: ModuleIndex, run: Run) -> None:
    """Raises where layers of a run are missing, as the loss would miss them without a word."""
    joined = index.joined()
    if joined:
        raise CaptureError(
            f"{', '.join(joined[:4])} joined the model after the capture began. Capture again after the change."
        )
    if run.reentrant:
        checkpointed = sorted(index.names[m] for m in run.reentrant)
        raise CaptureError(
            f"Reentrant checkpointing runs {', '.join(checkpointed[:4])} without a graph. Use use_reentrant=False."
        )
    silent = (run.silent & index.alike()) - run.fired.keys() if run.silent else set()
    unseen = [*dict.fromkeys(f"{name} ({kernel})" for name, kernel in run.unknown), *(index.names[m] for m in silent)]
    if unseen:
        more = " and more" * (len(unseen) > 4)
        raise CaptureError(
            f"{len(run.fired)} modules were captured, but not {', '.join(unseen[:4])}{more}: "
            "their kernel is hidden. Turn off xformers, flash_attn and the like, or set modules=."
        )


def refuse_no_images(run: Run) -> None:
    """Raises for a batch of no images: a mean over it would be NaN, and no ratio tells images from heads."""
    if run.shapes and not any(shape[0] for shape in run.shapes):
        raise CaptureError("The model ran on a batch of 0 images. Skip such batches, or clear() their runs.")


def refuse_split(index: ModuleIndex, run: Run, split: set[nn.Module]) -> None:
    """Raises where this rank ran a part of the attention: its loss and its gradient would be of that part alone.

    ``split`` are the modules that ran with parameters split over ranks.
    """
    if not has_dtensors():
        return
    seen: set[Any] = set()
    parts = [call.name for call in run.calls if _is_part(index, call, split, seen)]
    if parts:
        raise CaptureError(
            f"Tensor parallelism splits the attention of {some(parts)} over ranks. Leave its projections out of "
            "parallelize_module."
        )
    whole = [call.name for call in run.calls if is_dtensor(call.recorded.seen)]
    if whole:
        raise CaptureError(f"The attention of {some(whole)} is a DTensor. Call to_local() on what its module is given.")


def _is_part(index: ModuleIndex, call: AttentionCall, split: set[nn.Module], seen: set[Any]) -> bool:
    tensors = [t for t in (call.recorded.map, call.recorded.query, call.recorded.key) if t is not None]
    if any(map(is_split, tensors)):
        return True
    if any(tensor.grad_fn is not None for tensor in tensors):
        return any(comes_from_split(tensor, seen) for tensor in tensors)
    # No graph tells what made the tensors, so any split module within the attention may have.
    part = index.part(call.module)
    return any(not part or f"{index.names[module]}.".startswith(f"{part}.") for module in split)


def refuse_sharded() -> NoReturn:
    """Raises for what needs several backwards of a forward: ranks make different numbers of them, and FSDP, which
    communicates in each, frees the parameters after the first."""
    raise CaptureError(
        "Class maps and checks take several backwards, which FSDP cannot run. Use a plain model or "
        "DistributedDataParallel."
    )


def insist_on_output(output: Any, run: Run) -> None:
    """Marks the recorded tensors of a run as those of an FSDP model, and makes a backward raise that reaches them but
    not the model's output.

    FSDP gathers parameters and averages gradients when a gradient reaches the output. Without one, gradients stay those
    of a rank, or their computation fails on freed parameters.
    """
    reached = [-1]  # the number of the last backward that came through the output

    def note(_: Tensor) -> None:
        reached[0] = backward_number()

    def insist(_: Tensor) -> None:
        if reached[0] != backward_number():
            raise CaptureError(
                "FSDP needs the model's output in each backward. Add the loss on attention to your criterion, then "
                "call backward once."
            )

    outputs = [tensor for tensor in _tensors_in(output) if tensor.requires_grad]
    for tensor in outputs:
        tensor.register_hook(note)
    for call in run.calls:
        call.recorded = replace(call.recorded, sharded=True)
        for recorded in (call.recorded.map, call.recorded.query, call.recorded.key):
            if outputs and recorded is not None and recorded.requires_grad:
                recorded.register_hook(insist)


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in whatever containers FSDP itself looks into."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors_in(part)
    elif isinstance(output, Mapping):
        yield from _tensors_in(list(output.values()))
    elif is_dataclass(output):
        yield from _tensors_in(list(vars(output).values()))


def refuse_empty(index: ModuleIndex, log: RunLog, skipped: Iterable[tuple[str, str]] = ()) -> NoReturn:
    """Raises if no layer was captured, and lists everything that was seen instead, which the log then forgets."""
    if log.runs and not skipped:
        raise CaptureError(
            f"Only other threads ran {type(index.model).__name__} since the last take(). A thread takes the runs it "
            "made: call take() where the model runs."
        )
    reasons = [*(f"{name}: {reason}" for name, reason in skipped), *dict.fromkeys(log.outside)]
    if log.taken and not reasons and not log.without_grad:
        raise CaptureError(
            f"No attention of {type(index.model).__name__} ran since the last take(). Take once after each forward "
            "of this model, not of a copy such as an EMA."
        )
    if log.without_grad:
        reasons.append(
            f"{log.without_grad} module calls ran under torch.no_grad: capture with no_grad=True, or "
            "use_reentrant=False if checkpointing made them"
        )
    log.without_grad, log.outside = 0, []
    named = index.named_attention()
    if named and not any(name.partition(" ")[0] in reason for name in named for reason in reasons):
        reasons.append(f"none was seen in {', '.join(named[:3])}{' and more' * (len(named) > 3)}")
    seen = f" ({'; '.join(reasons)})" if reasons else ""
    raise CaptureError(
        f"No token-to-token attention of {type(index.model).__name__} ran{seen}. It must run in this model, not a "
        "copy, by softmax or scaled_dot_product_attention."
    )
