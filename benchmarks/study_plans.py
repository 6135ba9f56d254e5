"""Which cells are run, in which order: the plan of tuning on dev, its cells written down before the first of them ran
(their order was changed since), and the test cells, which frozen.json names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study_settings import CAM_WEIGHTS, CONDITIONS, WEIGHTS, Cell, Setting, StudyError, base
from study_store import frozen_cells
from study_views import VIEWS

PLANS = ("dev", "primary", "main")

WEIGHT, CAM_WEIGHT = 0.5, 0.1  # of the five of each, those in the middle: where nothing else varies
# Added at the most epochs when tuning had shown that 0.5 is the worst of these weights at fewer: else "both" would be
# tested at more epochs by that weight alone. No test photo of the set had been scored.
LIGHT = (0.06, 0.17)
FROZEN = {"msrc": (0.17, 16), "voc": (0.06, 4)}  # weight and epochs that the primary contrast took
FEW, MORE = (0, 1), (0, 1, 2)

Planned = tuple[Setting, tuple[int, ...]]


def plan(name: str, photos: str, results: Path) -> list[Cell]:
    """The cells of a plan, in order: of dev, those come first from which the primary contrast's settings are chosen."""
    if name not in PLANS:
        raise StudyError(f"found the plan {name!r}; expected one of {', '.join(PLANS)}; choose among those")
    if name != "dev":
        shown = [cell for cell in frozen_cells(results, name) if cell.setting.photos == photos]
        return [each for cell in shown for each in (cell, cell.on("train"))]  # the seeds that WSSS papers report, too
    planned = _msrc() if photos == "msrc" else _voc()
    return list(dict.fromkeys(Cell(setting, seed) for setting, seeds in planned for seed in seeds))


def at(photos: str, condition: str, weight: float = WEIGHT, cam_weight: float = CAM_WEIGHT, **other: object) -> Setting:
    """A setting with the weights that its condition has."""
    kind = CONDITIONS[condition]
    weighted = kind.activation or kind.affinity or kind.entropy_of_both
    return base(photos, condition, weight if weighted else 0.0, cam_weight if kind.cam else 0.0, **other)


def _tuning(photos: str, epochs: Sequence[int]) -> list[Setting]:
    """What the primary contrast is chosen from: weights of both, and the same epochs for it and the reference."""
    settings = [at(photos, name) for name in ("two", "both", "misreported")]
    settings += [at(photos, "both", weight) for weight in WEIGHTS]
    settings += [at(photos, name, epochs=each) for each in epochs for name in ("two", "both")]
    return settings + [at(photos, "both", weight, epochs=max(epochs)) for weight in LIGHT]


def _msrc() -> list[Planned]:
    """Full grid: what the primary contrast is chosen from; then, at the epochs and the weight that were frozen,
    conditions, what may keep mAP, weights, views, tokens. Planned at 8 epochs and 0.5 until the primary contrast had
    been scored: there it would have shown conditions where the reference itself is not at its best."""
    planned: list[Planned] = [(setting, FEW) for setting in _tuning("msrc", (4, 16))]
    planned += [(_frozen("msrc", name), MORE) for name in CONDITIONS]
    keeping: list[dict[str, object]] = [
        {"distance": "js"},
        {"stop_gradient": True},
        {"layers": "upper"},
        {"layers": "lower"},
        {"warmup": 0.5},
    ]
    planned += _each(("both",), keeping)
    weighted = ("affinity", "activation", "misreported")
    planned += [(_frozen("msrc", name, weight), FEW) for weight in WEIGHTS for name in weighted]
    planned += [(_frozen("msrc", "cam", cam_weight=weight), FEW) for weight in CAM_WEIGHTS]
    planned += _each(("two", "both", "misreported"), [{"view": view} for view in VIEWS if view != "flip"])
    return planned + _each(("two", "both", "misreported", "affinity"), [{"size": 168}])


def _frozen(photos: str, condition: str, weight: float | None = None, **other: Any) -> Setting:
    """A condition at the epochs of the set's primary contrast, and at its weight if no other is given."""
    chosen, epochs = FROZEN[photos]
    return at(photos, condition, chosen if weight is None else weight, epochs=epochs, **other)


def _each(conditions: Iterable[str], others: Iterable[dict[str, object]]) -> list[Planned]:
    return [(_frozen("msrc", name, **each), FEW) for each in others for name in conditions]


def _voc() -> list[Planned]:
    """What the primary contrast is chosen from; then, as for MSRC, the main conditions where it was frozen."""
    planned: list[Planned] = [(setting, (0,)) for setting in _tuning("voc", (4,))]
    planned += [(_frozen("voc", "affinity"), FEW), (_frozen("voc", "both", 0.17), FEW)]
    return planned + [(_frozen("voc", name), (0,)) for name in ("smoothing", "activation", "plain")]
