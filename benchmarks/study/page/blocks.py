"""The study's tables in README.md and docs/guides/weights.md, which stand between markers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.marked_page import begin
from benchmarks.study.page.tables import (
    WEIGHTS_NOTE,
    Group,
    baseline_rows,
    cpu_of,
    groups,
    mean_ap_of,
    number,
    paired_mean,
    propagated_of,
    raw_of,
    signed_spread,
    spread,
    table,
)
from benchmarks.study.plans import FEW
from benchmarks.study.settings import CAM_WEIGHTS, REFERENCE, SETS, Setting
from benchmarks.study.store import frozen_setting

ROOT = Path(__file__).resolve().parents[3]
README, WEIGHTS = ROOT / "README.md", ROOT / "docs" / "guides" / "weights.md"

ROW_WEIGHT, CAM_WEIGHT = 0.17, 0.1  # the defaults of AllPairsConsistencyLoss
BASELINES = {  # photos -> the row's label, the beginnings of the names of the baselines in it
    "msrc": ("attention of the backbone as it was (best row without our training)", ("untrained",)),
    "voc": ("attention of the backbone as it was; best centred ellipse", ("untrained", "best centred")),
}
ROWS = {
    "plain": "one view, as most loops train",
    "activation": "activation alone",
    "affinity": "affinity alone",
    "both": "both",
    "cam": "class maps alone",
    "both_cam": "all three",
    "smoothing": "attention held at the entropy of both, no consistency",
}
SHOWN_VIEWS = {
    "flip": "flip",
    "scale": "flip and scale (0.75 or 1.25)",
    "crop": "flip and random crop",
    "turn": "flip, random crop and quarter turns",
}
SEEDS = {1: "one seed", 2: "two seeds", 3: "three seeds", 4: "four seeds", 5: "five seeds"}
NOT_RUN = "not run"


def blocks(results: Path) -> dict[Path, dict[str, str]]:
    """Page -> marker -> the block behind it."""
    found = groups(results)
    tested = {photos: _tested(found, photos) for photos in SETS}
    readme = {photos: _contrast(results, photos, tested[photos]) for photos in SETS}
    readme |= {"conditions": _conditions(tested), "views": _views(results, found)}
    weights = {"cam_weight": _cam_weights(results, found)}
    pages = {README: readme, WEIGHTS: weights}
    return {page: {begin("study report", name): block for name, block in of.items()} for page, of in pages.items()}


def _tested(found: Sequence[Group], photos: str) -> dict[str, Group]:
    """The test cells by condition: one setting of each is frozen, and no other may be scored."""
    return {g.setting.condition: g for g in found if (g.setting.photos, g.split) == (photos, "test")}


def _contrast(results: Path, photos: str, own: dict[str, Group]) -> str:
    """The conditions of the primary contrast on test photos, below the best baselines."""
    if not {REFERENCE, "both", "misreported"} <= own.keys():
        return NOT_RUN
    setting, label, names = own["both"].setting, *BASELINES[photos]
    known = baseline_rows(results, photos, "test")
    scores = [number(row["miou"]) for name in names for row in known if row["name"].startswith(name)]
    rows = [[label, "", "; ".join(scores), "", ""]]
    for condition, title in (
        (REFERENCE, "two views, without ACR"),
        ("both", f"with ACR, weight {_weight(setting.weight, ROW_WEIGHT)}"),
        ("misreported", "ACR, flip not undone (control)"),
    ):
        mean = own[condition].mean
        figures = [number(mean(mean_ap_of)[0]), spread(mean(raw_of)), spread(mean(propagated_of))]
        rows.append([title, *figures, number(mean(cpu_of)[0], 0)])
    seeds = SEEDS[len(own["both"].records)]
    about = f"{_about(setting)}; test photos, {seeds}; {WEIGHTS_NOTE}"
    return _compact(table([about, "mAP", "raw CAM mIoU", "propagated", "CPU s"], rows))


def _conditions(tested: dict[str, dict[str, Group]]) -> str:
    """What each condition gains in raw mIoU on test photos over two views, in a column for each set."""
    header, columns = [f"test photos; {WEIGHTS_NOTE}"], []
    for photos, own in tested.items():
        if not {REFERENCE, "both"} <= own.keys():
            return NOT_RUN
        weight = own["both"].setting.weight
        single = {name: own[name].setting.weight for name in ("activation", "affinity") if name in own}
        others = [f"{name} alone {other:g}" for name, other in single.items() if other != weight]
        header.append(f"{SETS[photos].title}, weight {weight:g}" + (f" ({', '.join(others)})" if others else ""))
        columns.append({name: _gain(own[REFERENCE], own.get(name)) for name in ROWS})
    maps = next((own["cam"].setting.cam_weight for own in tested.values() if "cam" in own), CAM_WEIGHT)
    titles = ROWS | {"cam": f"{ROWS['cam']}, weight {_weight(maps, CAM_WEIGHT)}"}
    return table(header, [[titles[name], *(column[name] for column in columns)] for name in ROWS])


def _gain(reference: Group, group: Group | None) -> str:
    gain = None if group is None else paired_mean(reference, group, raw_of)
    if gain is None:
        return NOT_RUN
    return signed_spread(gain) + ("" if gain[2] == 3 else f" ({SEEDS[gain[2]]})")


def _views(results: Path, found: Sequence[Group]) -> str:
    """What both terms and their control gain on dev photos of MSRC by each view, over two views without ACR."""
    leader = frozen_setting(results, "msrc", "both")
    if leader is None:
        return NOT_RUN
    dev = _dev(found)
    rows = []
    for view, title in SHOWN_VIEWS.items():
        setting = replace(leader, view=view)
        every = dev.get(setting.with_condition(REFERENCE))
        if every is None:
            rows.append([title, NOT_RUN, NOT_RUN, NOT_RUN])
            continue
        reference = replace(every, records={seed: every.records[seed] for seed in FEW if seed in every.records})
        others = (dev.get(setting.with_condition(name, leader.weight)) for name in ("both", "misreported"))
        gains = [None if other is None else paired_mean(reference, other, raw_of) for other in others]
        shown = [NOT_RUN if gain is None else signed_spread(gain) for gain in gains]
        rows.append([title, spread(reference.mean(raw_of)), *shown])
    note = WEIGHTS_NOTE.partition(",")[0]
    about = f"{_about(leader)}; dev photos, {SEEDS[len(FEW)]}; {note}"
    return table([about, "two views, raw", f"ACR, weight {leader.weight:g}", "ACR, flip not undone"], rows)


def _cam_weights(results: Path, found: Sequence[Group]) -> str:
    """What the class maps' term alone gains on dev photos of MSRC by its weight."""
    leader = frozen_setting(results, "msrc", REFERENCE)
    dev = _dev(found)
    if leader is None or leader not in dev:
        return NOT_RUN
    rows = []
    for weight in CAM_WEIGHTS:
        group = dev.get(leader.with_condition("cam", cam_weight=weight))
        gain = None if group is None else paired_mean(dev[leader], group, raw_of)
        shown = [NOT_RUN, ""] if gain is None else [signed_spread(gain), str(gain[2])]
        rows.append([f"{weight:g}", *shown])
    return table(["`cam_weight`", "raw CAM mIoU, less two views without ACR", "seeds"], rows)


def _dev(found: Sequence[Group]) -> dict[Setting, Group]:
    return {group.setting: group for group in found if group.split == "dev"}


def _about(setting: Setting) -> str:
    return f"{SETS[setting.photos].title}, {setting.size} px, {setting.epochs} epochs"


def _weight(value: float, default: float) -> str:
    return f"{value:g}, the default" if value == default else f"{value:g}"


def _compact(markdown: str) -> str:
    """Empty cells of one space."""
    return markdown.replace("|  ", "| ")
