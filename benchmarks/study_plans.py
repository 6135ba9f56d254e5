"""Which cells are run, in which order: the plan of tuning on dev, written down before its first cell ran, and the test
cells, which frozen.json names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from study_settings import CAM_WEIGHTS, CONDITIONS, WEIGHTS, Cell, Setting, StudyError, base
from study_store import frozen_cells
from study_views import VIEWS

PLANS = ("dev", "primary", "main")

WEIGHT, CAM_WEIGHT = 0.5, 0.1  # of the five of each, those in the middle: where nothing else varies
FEW, MORE = (0, 1), (0, 1, 2)

Planned = tuple[Setting, tuple[int, ...]]


def plan(name: str, photos: str, results: Path) -> list[Cell]:
    """The cells of a plan, in order. Seed 0 of everything comes first: an interrupted plan is a whole picture."""
    if name not in PLANS:
        raise StudyError(f"found the plan {name!r}; expected one of {', '.join(PLANS)}; choose among those")
    if name != "dev":
        shown = [cell for cell in frozen_cells(results, name) if cell.setting.photos == photos]
        return [each for cell in shown for each in (cell, cell.on("train"))]  # the seeds that WSSS papers report, too
    planned = _msrc() if photos == "msrc" else _voc()
    cells = [Cell(setting, seed) for seed in MORE for setting, seeds in planned if seed in seeds]
    return list(dict.fromkeys(cells))


def at(photos: str, condition: str, weight: float = WEIGHT, cam_weight: float = CAM_WEIGHT, **other: object) -> Setting:
    """A setting with the weights that its condition has."""
    kind = CONDITIONS[condition]
    weighted = kind.activation or kind.affinity or kind.entropy_of_both
    return base(photos, condition, weight if weighted else 0.0, cam_weight if kind.cam else 0.0, **other)


def _msrc() -> list[Planned]:
    """Full grid: conditions, weights, what may keep mAP, views, epochs of the reference and of both, tokens."""
    planned = [(at("msrc", name), MORE) for name in ("two", "both", "misreported", "affinity", "activation")]
    planned += [(at("msrc", name), MORE) for name in ("plain", "smoothing", "cam", "both_cam")]
    weighted = ("both", "affinity", "activation", "misreported")
    planned += [(at("msrc", name, weight), FEW) for weight in WEIGHTS for name in weighted]
    planned += [(at("msrc", "cam", cam_weight=weight), FEW) for weight in CAM_WEIGHTS]
    planned += _each("msrc", ("two", "both"), FEW, [{"epochs": 4}, {"epochs": 16}])
    keeping: list[dict[str, object]] = [
        {"distance": "js"},
        {"stop_gradient": True},
        {"layers": "upper"},
        {"layers": "lower"},
        {"warmup": 0.5},
    ]
    planned += _each("msrc", ("both",), FEW, keeping)
    planned += _each("msrc", ("two", "both", "misreported"), FEW, [{"view": view} for view in VIEWS if view != "flip"])
    planned += _each("msrc", ("two", "both", "misreported", "affinity"), FEW, [{"size": 168}])
    return planned


def _voc() -> list[Planned]:
    """What the primary contrast needs: weights and epochs of both, the reference's epochs, the controls."""
    planned: list[Planned] = [(at("voc", name), FEW) for name in ("two", "both", "misreported", "affinity")]
    planned += [(at("voc", "both", weight), (0,)) for weight in WEIGHTS]
    planned += [(at("voc", name), (0,)) for name in ("smoothing", "activation", "plain")]
    return planned + _each("voc", ("two", "both"), (0,), [{"epochs": 2}])


def _each(
    photos: str, conditions: Iterable[str], seeds: tuple[int, ...], others: Iterable[dict[str, object]]
) -> list[Planned]:
    return [(at(photos, name, **other), seeds) for other in others for name in conditions]
