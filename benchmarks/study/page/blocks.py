"""The study's blocks in pages written by hand: README.md, the summary, the protocol and the guide on weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.marked_page import begin, wrapped
from benchmarks.study.page.changes import changes
from benchmarks.study.page.floor import causes, distances
from benchmarks.study.page.primary import HARMS, HELPS, best_of, contrasts, rule, useful, verdicts
from benchmarks.study.page.report import kinds_of_maps
from benchmarks.study.page.scenes import differences
from benchmarks.study.page.tables import (
    NOT_RUN,
    WEIGHTS_NOTE,
    Group,
    baseline_rows,
    cpu_of,
    figure_of,
    groups,
    mean_ap_of,
    number,
    on_dev,
    paired_mean,
    propagated_of,
    raw_of,
    signed_spread,
    spread,
    table,
    tested,
)
from benchmarks.study.plans import FEW, FINER_SIZE, like
from benchmarks.study.settings import CAM_WEIGHTS, CLASS_TOKENS, NETWORKS, REFERENCE, SETS, WEIGHTS, Setting
from benchmarks.study.store import frozen_setting

ROOT = Path(__file__).resolve().parents[3]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guides" / "weights.md"
STUDY, PROTOCOL = (ROOT / "docs" / "explanation" / name for name in ("study.md", "study_protocol.md"))

ROW_WEIGHT, CAM_WEIGHT = 0.17, 0.1  # the defaults of AllPairsConsistencyLoss
CONTROL = "misreported"
ROWS = {
    "plain": "one view, as most loops train",
    "activation": "activation alone",
    "affinity": "affinity alone",
    "both": "ACR: both",
    "cam": "class maps alone",
    "both_cam": "ACR and class maps",
    "smoothing": "control: attention held at ACR's entropy, no consistency",
}
SHOWN_VIEWS = {
    "flip": "flip",
    "scale": "flip and scale (0.75 or 1.25)",
    "crop": "flip and random crop",
    "turn": "flip, random crop and quarter turns",
}
SEEDS = {1: "one seed", 2: "two seeds", 3: "three seeds", 4: "four seeds", 5: "five seeds"}
NOT_SCORED = "Test photos are not scored yet."


def blocks(results: Path) -> dict[Path, dict[str, str]]:
    """Page -> marker -> the block behind it."""
    found = groups(results)
    scored = {photos: tested(found, photos) for photos in SETS}
    study: dict[str, str] = {}
    for photos, own in scored.items():
        study |= {photos: _contrast(results, photos, own), f"{photos} verdict": verdicts(results, found, photos)}
    study |= {"conditions": _conditions(scored), "views": _views(results, found), "scenes": differences(results)}
    study |= _class_tokens(results / NETWORKS[CLASS_TOKENS].folder)
    study["changes"] = changes(results)
    study |= {"distances": distances(results), "causes": causes(results, found)}
    pages = {
        README: {"evidence": _evidence(results, found, scored)},
        STUDY: study,
        PROTOCOL: {"rule": rule(results), "class tokens rule": rule(results / NETWORKS[CLASS_TOKENS].folder)},
        GUIDE: {"weight": _weights(results, found), "cam_weight": _cam_weights(results, found)},
    }
    return {page: {begin("study report", name): block for name, block in of.items()} for page, of in pages.items()}


def _evidence(results: Path, found: Sequence[Group], scored: dict[str, dict[str, Group]]) -> str:
    """README's table of the primary contrast, a row for each set, and what it says in words."""
    rows, said = [], []
    for photos, own in scored.items():
        known = baseline_rows(results, photos, "test")
        made = contrasts(results, found, photos)
        if not {REFERENCE, "both", CONTROL} <= own.keys() or not known or not made:
            rows.append([SETS[photos].title, *[NOT_RUN] * 4])
            continue
        shown = [spread(own[name].mean(raw_of)) for name in (REFERENCE, "both", CONTROL)]
        rows.append([f"[{SETS[photos].title}](docs/explanation/study.md)", *shown, number(best_of(known)["miou"])])
        gain = paired_mean(own[REFERENCE], own["both"], raw_of)
        seeds = SEEDS[len(made[0].seeds)]
        verb = {HELPS: "improves raw class maps", HARMS: "makes raw class maps worse"}.get(
            made[0].decided or "", "makes no clear difference"
        )
        below = "" if useful(own["both"], known) else "; they stay below the best row without training: not yet useful"
        said.append(f"On {SETS[photos].title} ACR {verb} ({signed_spread(gain) if gain else NOT_RUN}, {seeds}){below}.")
    said.append(f"Backbone: {WEIGHTS_NOTE}. Compare rows, not with a paper.")
    header = ["raw CAM mIoU, test", "two views, without ACR", "with ACR", "control: flip not undone"]
    return table([*header, "best row without training"], rows) + "\n\n" + wrapped(" ".join(said))


def _contrast(results: Path, photos: str, own: dict[str, Group]) -> str:
    """The conditions of the primary contrast on test photos, below the baselines."""
    if not {REFERENCE, "both", CONTROL} <= own.keys():
        return NOT_RUN
    setting = own["both"].setting
    rows = [
        [f"without training: {row['name']}", "", number(row["miou"]), "", ""]
        for row in baseline_rows(results, photos, "test")
    ]
    for condition, title in (
        (REFERENCE, "two views, without ACR"),
        ("both", f"with ACR, weight {_weight(setting.weight, ROW_WEIGHT)}"),
        (CONTROL, "control: flip not undone"),
    ):
        mean = own[condition].mean
        figures = [number(mean(mean_ap_of)[0]), spread(mean(raw_of)), spread(mean(propagated_of))]
        rows.append([title, *figures, number(mean(cpu_of)[0], 0)])
    about = f"{_about(setting)}; test photos, {SEEDS[len(own['both'].records)]}"
    maps = NETWORKS[setting.network].maps
    return _compact(table([about, "mAP", f"{maps['raw']} mIoU", maps["propagated"], "CPU s"], rows))


def _class_tokens(results: Path) -> dict[str, str]:
    """For the network with class tokens: a block for each set, with its kinds of maps, and one of the terms."""
    found = groups(results)
    scored = {photos: tested(found, photos) for photos in SETS}
    made: dict[str, str] = {}
    for photos, own in scored.items():
        shown = [own[name] for name in (REFERENCE, "both", CONTROL) if name in own]
        kinds = kinds_of_maps(shown) if len(shown) == 3 else None
        parts = [_contrast(results, photos, own), verdicts(results, found, photos), kinds or NOT_RUN]
        made[f"class tokens {photos}"] = "\n\n".join(parts) if kinds else NOT_SCORED
    terms = [block for block in (_conditions(scored), _changes_on_dev(results, found)) if block != NOT_RUN]
    made["class tokens class maps"] = _by_cam_weight(results, found)
    return made | {"class tokens terms": "\n\n".join(terms) or NOT_SCORED}


def _by_cam_weight(results: Path, found: Sequence[Group]) -> str:
    """What the term on class maps changes on dev photos, by its weight: the fused map, and how far two views agree."""
    dev, rows = on_dev(found), []
    for leader in _leaders(results):
        for without, having, weight, title in (
            (REFERENCE, "cam", 0.0, "alone"),
            ("both", "both_cam", leader.weight, "ACR"),
        ):
            before = dev.get(leader.with_condition(without, weight))
            for cam_weight in sorted({setting.cam_weight for setting in dev if setting.condition == having}):
                changes = _cam_changes(before, dev.get(leader.with_condition(having, weight, cam_weight)))
                if changes:
                    rows.append([f"{SETS[leader.photos].title}, {title}", f"{cam_weight:g}", *changes])
    header = ["dev photos", "`cam_weight`", "change of fused mIoU", "agreement of two views", "seeds"]
    return table(header, rows) if rows else NOT_RUN


def _leaders(results: Path) -> list[Setting]:
    """The frozen settings of ACR, of the sets that have one."""
    frozen = (frozen_setting(results, photos, "both") for photos in SETS)
    return [leader for leader in frozen if leader is not None]


def _cam_changes(before: Group | None, after: Group | None) -> list[str]:
    """The change of mIoU, the agreements and the number of seeds, over those that both have; empty without any."""
    if before is None or after is None:
        return []
    gain = paired_mean(before, after, raw_of)
    if gain is None:
        return []
    agreement = figure_of("raw", "agreement")
    agreed = (one.of_seeds(other.records).mean(agreement)[0] for one, other in ((before, after), (after, before)))
    return [signed_spread(gain), " to ".join(number(each, 2) for each in agreed), str(gain[2])]


def _changes_on_dev(results: Path, found: Sequence[Group]) -> str:
    """The change of the fused map on dev photos from two views to each condition, by set and grid of tokens."""
    columns = _leaders(results)
    columns += [replace(leader, size=FINER_SIZE) for leader in columns if leader.photos == "msrc"]
    dev, rows = on_dev(found), []
    for name in (*ROWS, CONTROL):
        gains = [_gain_on_dev(leader, dev, name) for leader in columns]
        if any(gains):
            rows.append([ROWS.get(name, "control: flip not undone"), *(gain or NOT_RUN for gain in gains)])
    titles = [f"{SETS[leader.photos].title}, {leader.size} px" for leader in columns]
    header = [f"dev photos, {SEEDS[len(FEW)]}; change of fused mIoU from two views", *titles]
    return table(header, rows) if rows else NOT_RUN


def _gain_on_dev(leader: Setting, dev: dict[Setting, Group], name: str) -> str | None:
    reference, other = (dev.get(like(leader, each, size=leader.size)) for each in (REFERENCE, name))
    if reference is None or other is None:
        return None
    gain = paired_mean(reference.of_seeds(FEW), other, raw_of)
    return None if gain is None else signed_spread(gain)


def _conditions(scored: dict[str, dict[str, Group]]) -> str:
    """The change of mIoU on test photos from two views to each condition, in a column for each set."""
    if not all({REFERENCE, "both"} <= own.keys() for own in scored.values()):
        return NOT_RUN
    (network,) = {own["both"].setting.network for own in scored.values()}
    maps = NETWORKS[network].maps["raw"]
    header, columns = [f"test photos; change of {maps} mIoU from two views without ACR"], []
    for photos, own in scored.items():
        weight = own["both"].setting.weight
        single = {name: own[name].setting.weight for name in ("activation", "affinity") if name in own}
        others = [f"{name} alone {other:g}" for name, other in single.items() if other != weight]
        header.append(f"{SETS[photos].title}, weight {weight:g}" + (f" ({', '.join(others)})" if others else ""))
        columns.append({name: _gain(own[REFERENCE], own.get(name)) for name in ROWS})
    cam_weight = next((own["cam"].setting.cam_weight for own in scored.values() if "cam" in own), CAM_WEIGHT)
    titles = ROWS | {"cam": f"{ROWS['cam']}, weight {_weight(cam_weight, CAM_WEIGHT)}"}
    shown = [name for name in ROWS if any(column[name] != NOT_RUN for column in columns)]
    return table(header, [[titles[name], *(column[name] for column in columns)] for name in shown])


def _gain(reference: Group, group: Group | None) -> str:
    gain = None if group is None else paired_mean(reference, group, raw_of)
    if gain is None:
        return NOT_RUN
    return signed_spread(gain) + ("" if gain[2] == 3 else f" ({SEEDS[gain[2]]})")


def _views(results: Path, found: Sequence[Group]) -> str:
    """The change of raw mIoU on dev photos of MSRC by view, from two such views without ACR to ACR and the control."""
    leader = frozen_setting(results, "msrc", "both")
    if leader is None:
        return NOT_RUN
    dev = on_dev(found)
    rows = []
    for view, title in SHOWN_VIEWS.items():
        setting = replace(leader, view=view)
        every = dev.get(setting.with_condition(REFERENCE))
        if every is None:
            rows.append([title, NOT_RUN, NOT_RUN, NOT_RUN])
            continue
        reference = every.of_seeds(FEW)
        others = (dev.get(setting.with_condition(name, leader.weight)) for name in ("both", CONTROL))
        gains = [None if other is None else paired_mean(reference, other, raw_of) for other in others]
        shown = [NOT_RUN if gain is None else signed_spread(gain) for gain in gains]
        rows.append([title, spread(reference.mean(raw_of)), *shown])
    about = f"{_about(leader)}; dev photos, {SEEDS[len(FEW)]}"
    return table([about, "two views, raw mIoU", f"change with ACR, weight {leader.weight:g}", "with the control"], rows)


def _cam_weights(results: Path, found: Sequence[Group]) -> str:
    """The change of raw mIoU on dev photos of MSRC by the weight of the class maps' term alone."""
    leader = frozen_setting(results, "msrc", REFERENCE)
    dev = on_dev(found)
    if leader is None or leader not in dev:
        return NOT_RUN
    rows = []
    for weight in CAM_WEIGHTS:
        group = dev.get(leader.with_condition("cam", cam_weight=weight))
        gain = None if group is None else paired_mean(dev[leader], group, raw_of)
        shown = [NOT_RUN, ""] if gain is None else [signed_spread(gain), str(gain[2])]
        rows.append([f"{weight:g}", *shown])
    return table(["`cam_weight`", "change of raw CAM mIoU", "seeds"], rows)


def _weights(results: Path, found: Sequence[Group]) -> str:
    """The change of mAP and raw mIoU on dev photos by the weight of both terms, in columns for each set."""
    dev, header, columns = on_dev(found), ["weight of both terms"], []
    for photos, about in SETS.items():
        leader = frozen_setting(results, photos, REFERENCE)
        reference = None if leader is None else dev.get(leader)
        header += [f"{about.title}: mAP", "raw CAM mIoU", "seeds"]
        columns.append({weight: _changes(reference, dev, weight) for weight in WEIGHTS})
    rows = [[f"{weight:g}", *(cell for column in columns for cell in column[weight])] for weight in WEIGHTS]
    run = [row for row in rows if any(cell != NOT_RUN for cell in row[1::3])]
    return table(header, run) if run else NOT_RUN


def _changes(reference: Group | None, dev: dict[Setting, Group], weight: float) -> list[str]:
    group = None if reference is None else dev.get(reference.setting.with_condition("both", weight))
    if reference is None or group is None:
        return [NOT_RUN, NOT_RUN, "0"]
    found = [paired_mean(reference, group, figure) for figure in (mean_ap_of, raw_of)]
    shown = [NOT_RUN if each is None else signed_spread(each) for each in found]
    return [*shown, "" if found[1] is None else str(found[1][2])]


def _about(setting: Setting) -> str:
    return f"{SETS[setting.photos].title}, {setting.size} px, {setting.epochs} epochs"


def _weight(value: float, default: float) -> str:
    return f"{value:g}, the default" if value == default else f"{value:g}"


def _compact(markdown: str) -> str:
    """Empty cells of one space."""
    return markdown.replace("|  ", "| ")
