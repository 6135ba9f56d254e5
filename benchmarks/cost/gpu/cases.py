"""What is measured on a GPU, in order of value, and on the CPU that stands in for one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cost.models import Setting
from benchmarks.cost.variants import CAMS, GRAD_CAM, HOOKS, STEPS, UNPROPAGATED

STEP, CLASS_MAPS, LARGEST, PROFILE = "step", "class maps", "largest batch", "profile"
ALL_CAMS = (*CAMS, UNPROPAGATED, HOOKS, GRAD_CAM)
FULL, BRAIN, HALF = "float32", "bfloat16", "float16"


@dataclass(frozen=True)
class Case:
    """One variant of one setting: what becomes a row of the results."""

    what: str
    setting: Setting
    precision: str
    variant: str

    @property
    def key(self) -> dict[str, object]:
        s = self.setting
        present = s.present if self.what == CLASS_MAPS else None
        about = {"model": s.model, "size": s.size, "batch": s.batch, "present": present}
        return {"what": self.what, **about, "precision": self.precision, "variant": self.variant}


KEYS = tuple(Case(STEP, Setting(), FULL, "plain").key)


def _steps(model: str, size: int, batch: int, *precisions: str) -> Iterator[Case]:
    for precision in precisions:
        yield from (Case(STEP, Setting(model, size, batch), precision, variant) for variant in STEPS)


def _class_maps(model: str, size: int, batch: int, *precisions: str, present: tuple[int, ...] = (2,)) -> Iterator[Case]:
    for number in present:
        for precision in precisions:
            setting = Setting(model, size, batch, present=number)
            yield from (Case(CLASS_MAPS, setting, precision, variant) for variant in ALL_CAMS)


def _largest(model: str, size: int) -> Iterator[Case]:
    return (Case(LARGEST, Setting(model, size, 4), BRAIN, variant) for variant in STEPS)


def _profile(model: str, size: int, batch: int) -> Iterator[Case]:
    return (Case(PROFILE, Setting(model, size, batch), BRAIN, variant) for variant in ("plain", "blockwise"))


def on_gpu() -> list[Case]:
    """The whole list is longer than one call: the first cases answer most."""
    return [
        *_steps("small", 384, 8, BRAIN, FULL, HALF),
        *_class_maps("small", 384, 8, FULL, BRAIN),
        *_profile("small", 384, 8),
        *_steps("base", 448, 8, BRAIN),
        *_steps("small", 224, 2, BRAIN),
        *_steps("small", 768, 4, BRAIN),
        *_largest("small", 384),
        *_class_maps("small", 384, 8, FULL, present=(1, 5)),
        *_steps("base", 224, 16, BRAIN, HALF),
        *_steps("large", 384, 4, BRAIN),
        *_largest("base", 384),
        *_class_maps("base", 384, 8, BRAIN),
        *_steps("base", 768, 2, BRAIN, FULL),
        *_steps("small", 224, 32, BRAIN, FULL),
        *_steps("large", 224, 8, BRAIN, FULL),
        *_steps("small", 512, 4, BRAIN, FULL),
        *_steps("large", 768, 1, BRAIN, HALF),
        *_class_maps("base", 768, 1, FULL),
        *_largest("base", 768),
        *_class_maps("large", 384, 2, FULL),
        *_steps("base", 512, 4, FULL),
    ]


def stand_in() -> list[Case]:
    """Every kind of case, small enough for a test on a CPU, where float16 is slow."""
    tiny = Setting("tiny", size=32, batch=2, depth=2)
    chosen: dict[str, dict[str, tuple[str, ...]]] = {
        STEP: {FULL: STEPS, BRAIN: STEPS, HALF: ("published", "blockwise")},
        CLASS_MAPS: {FULL: ALL_CAMS, BRAIN: ("published", "library")},
        LARGEST: {BRAIN: ("blockwise",)},
        PROFILE: {BRAIN: ("blockwise",)},
    }
    return [
        Case(what, tiny, precision, variant)
        for what, by_precision in chosen.items()
        for precision, variants in by_precision.items()
        for variant in variants
    ]
