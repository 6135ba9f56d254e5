"""The study's appendix of one photo set, from the JSON of its finished cells. It names the cells that are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.marked_page import wrapped
from benchmarks.study.choice import PRIMARY
from benchmarks.study.page.primary import Contrast, by_seed, primary
from benchmarks.study.page.tables import (
    WEIGHTS_NOTE,
    Group,
    Record,
    baseline_rows,
    cpu_of,
    figure_of,
    groups,
    mean_ap_of,
    number,
    paired_mean,
    propagated_of,
    raw_of,
    reference_of,
    signed_spread,
    spread,
    table,
    tables,
)
from benchmarks.study.plans import plan
from benchmarks.study.scoring import RAW
from benchmarks.study.settings import (
    CLASS_TOKENS,
    CONDITIONS,
    NETWORKS,
    ONE_TOKEN,
    REFERENCE,
    SETS,
    SPLITS,
    Cell,
    Setting,
)
from benchmarks.study.store import frozen_setting

MATCHED = 0.005  # mAP that a condition may lose to be compared at "matched mAP"

SPREAD = {
    "all": "all six trained layers",
    "first": "the first three trained layers",
    "last": "the last three trained layers",
}

Family = tuple[int, int, str, str]  # size, epochs, view, precision: a table compares within one

HOW_TO_READ = """How to read the tables:

- ± is the standard deviation over seeds. An interval in brackets is 95 % of 2000 paired resamples of the photos.
- "to reference" is the difference from two views without ACR at the same size, epochs, view and precision, paired by
  seed. Trust it more than the difference of two means: seeds differ more than settings do.
{maps}
- On test and train photos the threshold is the best one of the dev photos. "oracle" takes the best one of the split.
- FP and FN are false positive and false negative pixels over the union, as means over the classes without background.
- "multi-label" is the mIoU on photos with two or more labels. "entropy" is of the attention rows, over its maximum.
- CPU seconds compare only within one machine and one version ([dates](study_protocol.md)).
"""

PICTURES = {
    "cams": "Class maps of the first dev photos of a seeded shuffle",
    "affinities": "Attention of one patch in both views, before and after training",
    "curves": "mIoU against the background threshold, dev photos",
}


MAPS = {
    ONE_TOKEN: (
        '- "raw" is the class map as the gradient gives it. "propagated" is the map spread over the affinity of the '
        "named layers."
    ),
    CLASS_TOKENS: """\
- "raw" is the fused map: the root of the product of the head's map ("patch") and the class token's attention from the
  named layer on ("attention"). "propagated" is the fused map spread over the affinity of the named layers.
- "gradient" is the gradient of a class token's logit to its attention, from layer -3 on.
- "agreement" is the correlation of a photo's map with the flip's map, flipped back: mean over classes and photos.""",
}


def appendix(results: Path, photos: str, pictures: Path | None = None, network: str = ONE_TOKEN) -> str:
    """All tables of one set and network, whose own folder is ``results``. ``pictures`` is the folder of PNGs beside the
    page; the page of the network with one class token shows those that exist."""
    found = groups(results)
    title, about = SETS[photos].title, NETWORKS[network]
    heading = title if network == ONE_TOKEN else f"{title}, {about.title}"
    folder = "/".join(("benchmarks/study/results", *filter(None, (about.folder, photos))))
    parts = [
        f"# Study: every table of {heading}\n",
        wrapped(
            f"Every figure of the [study](study.md) on {heading}. `python -m benchmarks.study report` writes this page "
            f"from `{folder}/`. Backbone: {WEIGHTS_NOTE}. So compare rows, not with a paper."
        )
        + "\n",
        HOW_TO_READ.format(maps=MAPS[network]),
        *(_pictures(pictures, photos) if network == ONE_TOKEN else []),
        f"## Primary contrast, test photos ({WEIGHTS_NOTE})\n",
        primary(results, found, photos) + "\n",
        *_missing(found, plan("dev", photos, results, network), title),
    ]
    for split in reversed(SPLITS):
        own = [g for g in found if (g.setting.photos, g.split) == (photos, split)]
        if own:
            parts.append(f"## {split.capitalize()} photos\n")
            parts += _split(results, photos, split, own)
    return "\n".join(parts).rstrip() + "\n"


def _missing(found: Sequence[Group], planned: Sequence[Cell], title: str) -> list[str]:
    """The planned dev cells that are not done yet."""
    done = {(group.setting, seed) for group in found if group.split == "dev" for seed in group.records}
    wanted = Counter(cell.setting.condition for cell in planned)
    there = Counter(cell.setting.condition for cell in planned if (cell.setting, cell.seed) in done)
    lacking = [f"{CONDITIONS[c].title} {there[c]} of {wanted[c]}" for c in wanted if there[c] < wanted[c]]
    if not lacking:
        return []
    return [f"Dev cells of {title} are still to be run. Done so far: {'; '.join(lacking)}.\n"]


def _pictures(folder: Path | None, photos: str) -> list[str]:
    if folder is None:
        return []
    shown = [name for name in PICTURES if (folder / f"{photos}_{name}.png").exists()]
    return [
        f"![{PICTURES[name]}: {SETS[photos].title}; {WEIGHTS_NOTE}]({folder.name}/{photos}_{name}.png)\n"
        for name in shown
    ]


# ------------------------------------------------------------ one split


def _split(results: Path, photos: str, split: str, own: Sequence[Group]) -> list[str]:
    """A table for each size, epochs, view and precision; that of the primary contrast comes first, then its details."""
    parts = []
    families: dict[Family, list[Group]] = {}
    for group in own:
        families.setdefault(_family(group.setting), []).append(group)
    frozen = frozen_setting(results, photos, REFERENCE)
    chosen = None if frozen is None else _family(frozen)
    ordered = sorted(families.items(), key=lambda item: (item[0] != chosen, item[0][-1] == "float32", -len(item[1])))
    for family, members in ordered:
        parts.append(f"### {split.capitalize()} photos, {_named(family)}\n")
        parts.append(_read(members) + "\n")
        parts += [_scores(baseline_rows(results, photos, split), members) + "\n", _details(members) + "\n"]
        if kinds := kinds_of_maps(members):
            parts.append(kinds + "\n")
        if split == "dev":
            parts.append(_matched(members) + "\n")
        if split == "test" and (others := _others(members)):
            parts += [f"### Other conditions by seed, {_named(family)}\n", by_seed(others) + "\n"]
    first, members = ordered[0]
    of_first = f"{split} photos, {_named(first)}"
    if split == "dev":
        parts += [f"### How maps are read, {of_first}\n", _readings(members) + "\n"]
    parts += [f"### Classes, {of_first}\n", _classes(members) + "\n"]
    curves = _curves(members)
    return [*parts, f"### Thresholds, {of_first}\n", curves + "\n"] if curves else parts


def _family(setting: Setting) -> Family:
    return setting.size, setting.epochs, setting.view, setting.precision


def _named(family: Family) -> str:
    size, epochs, view, precision = family
    return f"{size} px, {epochs} epochs, view {view}, {precision}"


def _read(members: Sequence[Group]) -> str:
    """How the maps of a table were read; rows with another reading are named."""
    ways: dict[str, list[str]] = {}
    for group in members:
        read = {
            f"from layer {r['reading']['start']} on, spread over {SPREAD[r['reading']['propagation']]}"
            for r in group.records.values()
        }
        for way in sorted(read):
            ways.setdefault(way, []).append(group.title)
    if len(ways) == 1:
        return f"Maps are read {next(iter(ways))}."
    return "\n".join(["Maps are read", "", *(f"- {way}: {'; '.join(titles)}" for way, titles in ways.items())])


def _scores(baselines: Sequence[Record], members: Sequence[Group]) -> str:
    """The baselines without training, then every condition with its paired difference to the reference."""
    maps = NETWORKS[members[0].setting.network].maps
    header = ["", "seeds", "mAP", f"{maps['raw']} mIoU", "to reference", maps["propagated"], "to reference"]
    rows = [[row["name"], "", "", number(row["miou"]), "", "", ""] for row in baselines]
    for group in members:
        reference = reference_of(group, members)
        differences = []
        for figure in (raw_of, propagated_of):
            paired = None if reference is None or reference is group else paired_mean(reference, group, figure)
            differences.append("" if paired is None else signed_spread(paired))
        raw, propagated = spread(group.mean(raw_of)), spread(group.mean(propagated_of))
        head = [group.title, str(len(group.records)), spread(group.mean(mean_ap_of))]
        rows.append([*head, raw, differences[0], propagated, differences[1]])
    return table(header, rows)


def _details(members: Sequence[Group]) -> str:
    """What else was measured of every condition."""
    header = ["", "oracle raw, propagated", "FP, FN", "multi-label raw", "entropy class, patch rows", "CPU s", "GiB"]
    rows = []
    for group in members:
        oracles = [group.mean(figure_of(maps, "oracle"))[0] for maps in ("raw", "propagated")]
        rates = [group.mean(figure_of("raw", name))[0] for name in ("false_positive", "false_negative")]
        entropies = np.mean([np.mean(record["entropies"], axis=0) for record in group.records.values()], axis=0)
        memory = group.mean(lambda r: (r["training"]["peak_memory"] or np.nan) / 2**30)[0]
        rows.append(
            [
                group.title,
                ", ".join(number(value) for value in oracles),
                ", ".join(number(value, 2) for value in rates),
                number(group.mean(figure_of("raw", "multi_label"))[0]),
                ", ".join(number(value) for value in entropies),
                number(group.mean(cpu_of)[0], 0),
                number(memory, 2),
            ]
        )
    return table(header, rows)


def kinds_of_maps(members: Sequence[Group]) -> str | None:
    """mIoU and agreement of every kind of map; None for the network with one class token, whose two stand above."""
    names = NETWORKS[members[0].setting.network].maps
    if members[0].setting.network == ONE_TOKEN:
        return None
    rows = []
    for group in members:
        found = (
            [spread(group.mean(figure_of(name, "miou"))), number(group.mean(figure_of(name, "agreement"))[0], 2)]
            for name in names
        )
        rows.append([group.title, *(", ".join(pair) for pair in found)])
    return table(["mIoU, agreement", *names.values()], rows)


def _others(members: Sequence[Group]) -> list[Contrast]:
    """The contrasts with the reference that the primary contrast's section does not show."""
    own = [(reference_of(group, members), group) for group in members if group.setting.condition not in PRIMARY]
    return [Contrast(reference, group) for reference, group in own if reference is not None]


def _matched(members: Sequence[Group]) -> str:
    """The best raw maps of each condition among the weights that keep the reference's mAP, over the seeds of both."""
    reference = next((g for g in members if reference_of(g, members) is g), None)
    if reference is None:
        return "Two views without ACR were not run here, so there is no comparison at matched mAP."
    kept: dict[str, tuple[float, Group]] = {}
    for group in members:
        name = group.setting.condition
        gain = paired_mean(reference, group, raw_of)
        mean_ap = paired_mean(reference, group, mean_ap_of)
        if group is reference or gain is None or mean_ap is None or mean_ap[0] < -MATCHED:
            continue
        if name not in kept or gain[0] > kept[name][0]:
            kept[name] = gain[0], group
    if not kept:
        return f"At matched mAP: every condition loses more than {MATCHED} of mAP."
    lines = [f"- {group.title}: raw {group.mean(raw_of)[0]:.3f} ({gain:+.3f})" for gain, group in kept.values()]
    head = f"At matched mAP, the best of each condition that loses at most {MATCHED} of mAP (paired by seed):"
    return "\n".join([head, "", *lines])


def _readings(members: Sequence[Group]) -> str:
    """mIoU by start layer and by the layers of propagation: the same choices for every condition."""
    network = NETWORKS[members[0].setting.network]
    header = ["", *[f"from {start}" for start in network.starts]]
    rows = []
    for group in members:
        for name in (RAW, *network.spread):
            values = [_reading(group, start, name) for start in network.starts]
            rows.append([f"{group.title}: {name}", *[number(value) for value in values]])
    return table(header, rows)


def _reading(group: Group, start: int, name: str) -> float:
    values = [
        each["miou"]
        for record in group.records.values()
        for each in record["readings"]
        if (each["start"], each["propagation"]) == (start, name)
    ]
    return float(np.mean(values)) if values else float("nan")


def _classes(members: Sequence[Group]) -> str:
    """The raw IoU of each id, averaged over seeds."""
    count = len(next(iter(members[0].records.values()))["raw"]["per_class_iou"])
    rows = []
    for group in members:
        found = [record["raw"]["per_class_iou"] for record in group.records.values()]
        values = np.array([[np.nan if value is None else value for value in row] for row in found])
        seen = [values[~np.isnan(values[:, i]), i] for i in range(count)]
        rows.append([group.title, *[number(float(v.mean()) if len(v) else None, 2) for v in seen]])
    names = next(iter(members[0].records.values()))["names"]
    return tables(["raw IoU", *names], rows)


def _curves(members: Sequence[Group]) -> str | None:
    """mIoU at every tenth threshold; None for a set without a background."""
    first = next(iter(members[0].records.values()))["raw"]["curve"]
    if len(first) == 1:
        return None
    shown = range(0, len(first), 10)
    rows = []
    for group in members:
        for maps in ("raw", "propagated"):
            curve = np.mean([record[maps]["curve"] for record in group.records.values()], axis=0)
            held = group.mean(figure_of(maps, "threshold"))[0]
            rows.append([f"{group.title}: {maps}", number(held, 2), *[number(float(curve[i])) for i in shown]])
    return tables(["", "threshold used", *[f"{i / len(first):.1f}" for i in shown]], rows)
