"""Which cells are run, in which order: the plan of tuning on dev, its cells written down before the first of them ran
(their order was changed since), and the test cells, which frozen.json names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from study_settings import CAM_WEIGHTS, CONDITIONS, WEIGHTS, Cell, Setting, StudyError, base
from study_store import frozen_cells
from study_views import VIEWS

PLANS = ("dev", "primary", "main")

WEIGHT, CAM_WEIGHT = 0.5, 0.1  # of the five of each, those in the middle: where nothing else varies
# Added when tuning had shown that 16 epochs serve the reference best, and at 8 that 0.5 is the worst of three weights:
# else "both" would be tested at more epochs by that weight alone. No test photo had been scored.
LIGHT = (0.06, 0.17)
FROZEN_WEIGHT, FROZEN_EPOCHS = 0.17, 16  # of MSRC
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


def _tuning(photos: str, epochs: Iterable[int]) -> list[Setting]:
    """What the primary contrast is chosen from: weights of both, and the same epochs for it and the reference."""
    settings = [at(photos, name) for name in ("two", "both", "misreported")]
    settings += [at(photos, "both", weight) for weight in WEIGHTS]
    return settings + [at(photos, name, epochs=each) for each in epochs for name in ("two", "both")]


def _msrc() -> list[Planned]:
    """Full grid: what the primary contrast is chosen from; then, at the epochs and the weight that were frozen,
    conditions, what may keep mAP, weights, views, tokens. Planned at 8 epochs and 0.5 until the primary contrast had
    been scored: there it would have shown conditions where the reference itself is not at its best."""
    planned: list[Planned] = [(setting, FEW) for setting in _tuning("msrc", (4, 16))]
    planned += [(_frozen("both", weight), FEW) for weight in LIGHT]
    planned += [(_frozen(name), MORE) for name in CONDITIONS]
    keeping: list[dict[str, object]] = [
        {"distance": "js"},
        {"stop_gradient": True},
        {"layers": "upper"},
        {"layers": "lower"},
        {"warmup": 0.5},
    ]
    planned += _each(("both",), keeping)
    weighted = ("affinity", "activation", "misreported")
    planned += [(_frozen(name, weight), FEW) for weight in WEIGHTS for name in weighted]
    planned += [(_frozen("cam", cam_weight=weight), FEW) for weight in CAM_WEIGHTS]
    planned += _each(("two", "both", "misreported"), [{"view": view} for view in VIEWS if view != "flip"])
    return planned + _each(("two", "both", "misreported", "affinity"), [{"size": 168}])


def _frozen(condition: str, weight: float = FROZEN_WEIGHT, **other: Any) -> Setting:
    """MSRC's, at the epochs that were frozen."""
    return at("msrc", condition, weight, epochs=FROZEN_EPOCHS, **other)


def _each(conditions: Iterable[str], others: Iterable[dict[str, object]]) -> list[Planned]:
    return [(_frozen(name, **each), FEW) for each in others for name in conditions]


def _voc() -> list[Planned]:
    """What the primary contrast is chosen from, then the main conditions."""
    planned: list[Planned] = [(setting, (0,)) for setting in _tuning("voc", (4,))]
    planned += [(at("voc", name), FEW) for name in ("two", "both", "misreported", "affinity")]
    return planned + [(at("voc", name), (0,)) for name in ("smoothing", "activation", "plain")]
