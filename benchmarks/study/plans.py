"""Which cells are run, in which order: the plan for dev, written down before the first of its cells ran (only their
order has changed since), and the test cells, which frozen.json names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.study.settings import (
    CAM_WEIGHTS,
    CLASS_TOKENS,
    CONDITIONS,
    ONE_TOKEN,
    REFERENCE,
    WEIGHTS,
    Cell,
    Setting,
    Split,
    StudyError,
    base,
)
from benchmarks.study.store import frozen_cells, frozen_setting
from benchmarks.study.views import VIEWS

PLANS = ("dev", "primary", "main")

WEIGHT, CAM_WEIGHT = 0.5, 0.1  # the middle of the five of each: used where something else varies
# Added at the most epochs after tuning had shown that 0.5 is the worst of these weights at fewer epochs: otherwise
# "both" would have been tested at more epochs with that weight alone. No test photo of the set had been scored.
LIGHT = (0.06, 0.17)
FEW, MORE = (0, 1), (0, 1, 2)
FINER_SIZE = 168  # pixels, of MSRC's second grid of tokens
PAIR = (REFERENCE, "both")

Planned = tuple[Setting, tuple[int, ...]]


def plan(name: str, photos: str, results: Path, network: str = ONE_TOKEN) -> list[Cell]:
    """The cells of a plan, in order. The dev cells that the primary contrast's settings are chosen from come first; the
    others are planned only once it is frozen."""
    if name not in PLANS:
        raise StudyError(f"There is no plan {name!r}. Choose one of {', '.join(PLANS)}.")
    if name != "dev":
        shown = [cell for cell in frozen_cells(results, name) if cell.setting.photos == photos]
        # WSSS papers report training photos too. Since the primary contrast was scored, and before a test cell of
        # another condition was, only its seeds are scored on them: they would take a fifth of the time left on two
        # cores.
        scored_on_train = name == "primary" and network == ONE_TOKEN
        splits: tuple[Split, ...] = ("test", "train") if scored_on_train else ("test",)
        return [cell.on(split) for cell in shown for split in splits]
    leader = frozen_setting(results, photos, "both")
    if network == CLASS_TOKENS:
        planned = _class_token_tuning(photos) + ([] if leader is None else _class_token_conditions(leader))
    else:
        planned = _tuning(photos)
        if leader is not None:
            planned += _msrc(leader) if photos == "msrc" else _voc(leader)
    return list(dict.fromkeys(Cell(setting, seed) for setting, seeds in planned for seed in seeds))


def at(photos: str, condition: str, weight: float = WEIGHT, cam_weight: float = CAM_WEIGHT, **other: Any) -> Setting:
    """A setting with the weights of the terms that its condition has."""
    kind = CONDITIONS[condition]
    weighted = kind.activation or kind.affinity or kind.entropy_of_both
    return base(photos, condition, weight if weighted else 0.0, cam_weight if kind.cam else 0.0, **other)


def _tuning(photos: str) -> list[Planned]:
    """The cells that the primary contrast is chosen from: weights of "both", and the same epochs for it and the
    reference."""
    epochs, seeds = ((4, 16), FEW) if photos == "msrc" else ((4,), (0,))
    settings = [at(photos, name) for name in ("two", "both", "misreported")]
    settings += [at(photos, "both", weight) for weight in WEIGHTS]
    settings += [at(photos, name, epochs=each) for each in epochs for name in ("two", "both")]
    settings += [at(photos, "both", weight, epochs=max(epochs)) for weight in LIGHT]
    return [(setting, seeds) for setting in settings]


def _class_token_tuning(photos: str) -> list[Planned]:
    """The same for the network with class tokens: the reference and "both" choose among the same two numbers of epochs,
    "both" among three weights as well."""
    few, many, seeds = (8, 16, FEW) if photos == "msrc" else (1, 2, (0,))
    chosen = [(name, 0.17, each) for each in (few, many) for name in PAIR]
    chosen += [("both", weight, many) for weight in (0.06, 0.5)]
    return [(at(photos, name, weight, network=CLASS_TOKENS, epochs=each), seeds) for name, weight, each in chosen]


def _class_token_conditions(leader: Setting) -> list[Planned]:
    """The other conditions at the frozen setting, and those of MSRC on a finer grid of tokens as well."""
    names = ("misreported", "affinity", "activation", "both_cam", "smoothing")
    planned: list[Planned] = [(like(leader, name), FEW) for name in names]
    # The head's map takes part in the loss at no further pass, and on the demo's scenes it was this term that helped.
    planned += [(like(leader, name, cam_weight=each), FEW) for name in ("cam", "both_cam") for each in (1.0, 5.0)]
    if leader.photos == "msrc":
        planned += _each(leader, ("two", "both", *names), [{"size": FINER_SIZE}])
    return planned


def _msrc(leader: Setting) -> list[Planned]:
    """The rest of the full grid at the frozen epochs and weight: conditions, tokens, the control's weights, options
    that may keep mAP, other weights, views. It was planned at 8 epochs and 0.5 until the primary contrast had been
    scored, but there the reference itself is not at its best."""
    planned: list[Planned] = [
        (like(leader, name), MORE) for name, kind in CONDITIONS.items() if not (kind.blur_alike or kind.blurred)
    ]
    planned += _each(leader, ("two", "both", "misreported", "affinity"), [{"size": FINER_SIZE}])
    planned += [(like(leader, "misreported", weight), FEW) for weight in WEIGHTS]
    keeping: list[dict[str, Any]] = [
        {"distance": "js"},
        {"stop_gradient": True},
        {"layers": "upper"},
        {"layers": "lower"},
        {"warmup": 0.5},
    ]
    planned += _each(leader, ("both",), keeping)
    planned += [(like(leader, name, weight), FEW) for weight in WEIGHTS for name in ("affinity", "activation")]
    planned += [(like(leader, "cam", cam_weight=weight), FEW) for weight in CAM_WEIGHTS]
    return planned + _each(leader, ("two", "both", "misreported"), [{"view": view} for view in VIEWS if view != "flip"])


def _voc(leader: Setting) -> list[Planned]:
    """The main conditions at the frozen setting, and "both" at the default weight."""
    planned: list[Planned] = [(like(leader, "affinity"), FEW), (like(leader, "both", 0.17), FEW)]
    return planned + [(like(leader, name), (0,)) for name in ("smoothing", "activation", "plain")]


def like(leader: Setting, condition: str, weight: float | None = None, **other: Any) -> Setting:
    """A condition at the leader's epochs and, unless another is given, at its weight."""
    weight = leader.weight if weight is None else weight
    return at(leader.photos, condition, weight, epochs=leader.epochs, network=leader.network, **other)


def _each(leader: Setting, conditions: Iterable[str], others: Iterable[dict[str, Any]]) -> list[Planned]:
    return [(like(leader, name, **each), FEW) for each in others for name in conditions]
