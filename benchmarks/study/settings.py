"""The cells of the study: how a network is trained, how its class maps are read, and on which photos it is scored.

Every name here is in the JSON of a cell and, if it differs between cells, in its file name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal

Split = Literal["train", "dev", "test"]
SPLITS = ("train", "dev", "test")
SEEDS = (0, 1, 2, 3, 4)

WEIGHTS = (0.06, 0.17, 0.5, 1.5, 4.5)  # per query row; 0.17 is the paper's 100 at 576 tokens; steps of 3
CAM_WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)  # per pixel of maps in [0, 1]

PROPAGATIONS = {"all": None, "first": (0, 1, 2), "last": (3, 4, 5)}
"""The layers over whose affinity a class map is spread, of the six that train; the paper uses all of a network."""

LAYERS = {"all": None, "lower": (0, 1, 2), "upper": (3, 4, 5)}
"""The layers that the consistency terms compare, of the six that train."""


@dataclass(frozen=True)
class Network:
    """A kind of network and the class maps read off it.

    ``starts`` are the first layers that may count (negative, counted from the end). ``maps`` are what a cell scores,
    and how pages name them: "raw" is the map that the primary contrast compares, "propagated" is that map spread over
    the affinity. ``spread`` names the :data:`PROPAGATIONS` to choose from.
    """

    title: str
    starts: tuple[int, ...]
    spread: tuple[str, ...]
    maps: Mapping[str, str]
    folder: str = ""  # of its results


NETWORKS = {
    "one_token": Network(
        "one class token",
        (-1, -2, -3, -4),
        ("all", "first", "last"),
        {"raw": "raw CAM", "propagated": "propagated"},
    ),
    "class_tokens": Network(
        "class tokens and patch head",
        (-1, -3, -6),
        ("all", "last"),
        {
            "raw": "fused",
            "propagated": "fused, spread",
            "patch": "patch",
            "attention": "attention",
            "gradient": "gradient",
        },
        "class_tokens",
    ),
}
ONE_TOKEN, CLASS_TOKENS = NETWORKS


class StudyError(Exception):
    """A mistake that the user of the study can correct; the message says how."""


@dataclass(frozen=True)
class PhotoSet:
    """``folder`` is in the data folder. ``classes`` None keeps all classes."""

    folder: str
    title: str
    classes: tuple[str, ...] | None
    size: int
    epochs: int


SETS = {
    "msrc": PhotoSet("msrc21", "MSRC", None, 112, 8),
    "voc": PhotoSet("voc2012-animals", "VOC animals", ("cat", "cow", "dog", "horse", "person", "sheep"), 168, 2),
}


@dataclass(frozen=True)
class Condition:
    """The terms added to classification. With ``reported`` False the loss is told a view with one flip too many.
    ``blur_alike`` is that of the loss. With ``blurred`` the second maps are carried to another grid and back first."""

    title: str
    views: int = 2
    activation: bool = False
    affinity: bool = False
    cam: bool = False
    reported: bool = True
    entropy_of_both: bool = False
    blur_alike: bool = False
    blurred: bool = False


CONDITIONS = {
    "plain": Condition("one view", views=1),
    "two": Condition("two views, without ACR"),
    "activation": Condition("activation alone", activation=True),
    "affinity": Condition("affinity alone", affinity=True),
    "both": Condition("ACR (activation and affinity)", activation=True, affinity=True),
    "cam": Condition("class maps alone", cam=True),
    "both_cam": Condition("ACR and class maps", activation=True, affinity=True, cam=True),
    "misreported": Condition("control: flip not undone", activation=True, affinity=True, reported=False),
    "smoothing": Condition("control: attention held at ACR's entropy", entropy_of_both=True),
    "alike": Condition("ACR, both maps blurred alike", activation=True, affinity=True, blur_alike=True),
    "blurred": Condition("ACR, the second map blurred", activation=True, affinity=True, blurred=True),
}
REFERENCE = "two"


@dataclass(frozen=True)
class Setting:
    """How a cell is trained.

    ``weight`` is that of the activation and affinity terms per query row; for "smoothing" it names the cell whose
    entropy is followed. ``stop_gradient`` holds the second view fixed in the consistency terms. ``warmup`` is the share
    of the steps in which the weights rise from 0. ``precision`` is that of the forward passes in training (autocast),
    except attention, which runs in float32 (in the cells up to commit ec7066f in bfloat16 too). The consistency terms
    and the scores are computed in float32.
    """

    photos: str
    condition: str
    size: int
    epochs: int
    weight: float = 0.0
    cam_weight: float = 0.0
    view: str = "flip"
    distance: Literal["l1", "l2", "js"] = "l1"
    layers: str = "all"
    stop_gradient: bool = False
    warmup: float = 0.0
    frozen: int = 6
    batch_size: int = 32
    rate: float = 1e-4
    head_rate: float = 1e-3
    cam_start: int = -3
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    network: str = ONE_TOKEN

    def __post_init__(self) -> None:
        for what, name, known in (
            ("set", self.photos, SETS),
            ("condition", self.condition, CONDITIONS),
            ("choice of layers", self.layers, LAYERS),
            ("network", self.network, NETWORKS),
        ):
            if name not in known:
                raise StudyError(f"There is no {what} {name!r}. Choose one of {', '.join(known)}.")
        condition = CONDITIONS[self.condition]
        needed = {
            "weight": condition.activation or condition.affinity or condition.entropy_of_both,
            "cam_weight": condition.cam,
        }
        for name, used in needed.items():
            if bool(getattr(self, name)) != used:
                needs = "needs a weight above 0" if used else "has no such term"
                option = f"--{name.replace('_', '-')}"
                raise StudyError(
                    f"{option} is {getattr(self, name)}, but the condition {self.condition} {needs}. Correct {option}."
                )

    @property
    def slug(self) -> str:
        """A file name: the fields that every name has, then those that differ from their defaults. Each network has a
        folder of its own."""
        parts = [self.condition]
        parts += [f"w{self.weight:g}"] if self.weight else []
        parts += [f"c{self.cam_weight:g}"] if self.cam_weight else []
        parts += [self.view, f"{self.size}px", f"{self.epochs}ep"]
        shown = {"photos", "condition", "size", "epochs", "weight", "cam_weight", "view", "network"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in shown and field.default is not MISSING and value != field.default:
                shown_value = "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
                parts.append(field.name.replace("_", "") + shown_value)
        return "-".join(parts)

    @property
    def digest(self) -> str:
        """Tells settings apart even if their slugs are equal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]

    def with_condition(self, condition: str, weight: float = 0.0, cam_weight: float = 0.0) -> Setting:
        return replace(self, condition=condition, weight=weight, cam_weight=cam_weight)


@dataclass(frozen=True)
class Reading:
    """How class maps are read off a trained network: the first layer that counts (negative, counted from the end), by
    its gradient or by its class tokens' attention, and the layers over whose affinity the map is spread."""

    start: int = -3
    propagation: str = "all"

    def __post_init__(self) -> None:
        starts = sorted({start for network in NETWORKS.values() for start in network.starts}, reverse=True)
        if self.start not in starts or self.propagation not in PROPAGATIONS:
            raise StudyError(
                f"There is no reading with start {self.start} and propagation {self.propagation!r}. Choose a start of "
                f"{', '.join(map(str, starts))} and one of {', '.join(PROPAGATIONS)}."
            )


def readings(network: str) -> tuple[Reading, ...]:
    """All readings of a network."""
    return tuple(Reading(start, name) for start in NETWORKS[network].starts for name in NETWORKS[network].spread)


@dataclass(frozen=True)
class Cell:
    setting: Setting
    seed: int
    split: Split = "dev"
    reading: Reading = Reading()

    @property
    def file(self) -> str:
        """The path in the folder of results."""
        return f"{self.setting.photos}/{self.split}/{self.setting.slug}-s{self.seed}.json"

    def on(self, split: Split) -> Cell:
        return replace(self, split=split)


def base(
    photos: str,
    condition: str = REFERENCE,
    weight: float = 0.0,
    cam_weight: float = 0.0,
    network: str = ONE_TOKEN,
    **other: Any,
) -> Setting:
    """The setting with the set's own size and epochs, and the given options."""
    for what, name, known in (("set", photos, SETS), ("network", network, NETWORKS)):
        if name not in known:
            raise StudyError(f"There is no {what} {name!r}. Choose one of {', '.join(known)}.")
    given = {"size": SETS[photos].size, "epochs": SETS[photos].epochs, **other}
    return Setting(photos, condition, weight=weight, cam_weight=cam_weight, network=network, **given)
