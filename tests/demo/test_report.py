"""The table and the verdict of a run, from the rows of its seeds."""

from io import StringIO

import pytest
from rich.console import Console

from acr_reg.demo.comparison import CONTROL, WITH, WITHOUT, MapScore, Row
from acr_reg.demo.report import alignment, gains_of, judgement, remarks, table, verdict
from acr_reg.demo.scene_task import QUICK, plan_scenes
from acr_reg.demo.train import Training


@pytest.mark.parametrize(
    ("gains", "predicate", "facts"),
    [
        ([0.02], "changes", ("raw CAM mIoU by +0.020", "One seed is not evidence", "--seeds 5")),
        ([-0.01], "changes", ("raw CAM mIoU by -0.010", "One seed is not evidence", "--seeds 5")),
        ([0.02, 0.03, 0.025], "helps", ("raw CAM mIoU +0.025", "standard deviation 0.005", "3 seeds")),
        ([0.02, -0.03, 0.025], "makes no clear difference", ("raw CAM mIoU +0.005", "3 seeds")),
        ([-0.02, -0.03, -0.025], "does not help", ("raw CAM mIoU -0.025", "3 seeds")),
    ],
)
def test_the_verdict_follows_the_paired_gain(gains: list[float], predicate: str, facts: tuple[str, ...]) -> None:
    said = judgement(gains, "raw CAM", "on scenes")
    assert said.startswith(f"ACR {predicate} ")
    assert not [fact for fact in facts if fact not in said]


def scored(name: str, miou: float) -> Row:
    return Row(name, {"raw CAM": MapScore(miou, 0.5, [0.5], [miou], [miou])})


@pytest.mark.parametrize(
    ("control", "facts"),
    [
        (None, ("Smoothing", "--controls")),
        (0.31, (CONTROL, "raw CAM mIoU by +0.010", "undoing the flip adds +0.040")),
        (0.36, (CONTROL, "raw CAM mIoU by +0.060", "smoothing explains the change of +0.050")),
    ],
)
def test_the_verdict_tells_alignment_from_smoothing(control: float | None, facts: tuple[str, ...]) -> None:
    rows = [scored(WITHOUT, 0.30), scored(WITH, 0.35), *([scored(CONTROL, control)] if control else [])]
    said = alignment(gains_of([rows], WITH), gains_of([rows], CONTROL), "raw CAM")
    assert not [fact for fact in facts if fact not in said]


def test_only_the_two_networks_compared_can_void_the_verdict() -> None:
    plan = plan_scenes(QUICK, controls=True, quick=False)
    score = MapScore(0.3, 0.5, [0.5], [0.3], [0.3])
    terms = {"entropy": 0.5, "activation": 0.1, "affinity": 0.1}

    def said(without: float, with_acr: float, control: float) -> str:
        found = {WITHOUT: without, WITH: with_acr, CONTROL: control}
        networks = [Row(name, {"raw CAM": score}, mean_ap, terms) for name, mean_ap in found.items()]
        return " ".join(verdict([[Row("all background", {"raw CAM": score}), *networks]], plan))

    assert "mean nothing" not in said(0.9, 0.9, 0.5)
    assert "mean nothing" in said(0.84, 0.9, 0.9)
    assert "mean nothing" in said(0.9, 0.84, 0.9)


def test_the_table_fits_a_terminal_of_80_columns_and_the_verdict_100() -> None:
    """With the longest name, hours of training and much memory."""
    scores = {"fused map": 0.3, "patch map": 0.2, "class attention": 0.4}
    maps = {kind: MapScore(miou, 0.51, [], [], []) for kind, miou in scores.items()}
    training = Training([], seconds=9998, cpu_seconds=9999, peak_memory=10 * 2**30)
    rows = [scored("all background", 0.4)]
    for name, miou in ((WITHOUT, 0.9), (WITH, 0.8), (CONTROL, 0.7)):
        terms = {"entropy": miou / 2, "activation": miou / 4, "affinity": miou / 8}
        rows.append(Row(name, maps, miou, terms, training))
    lines = verdict([rows], plan_scenes(QUICK, controls=True, quick=False))
    assert max(map(len, lines)) <= 100
    assert [" ".join(line.split()) for line in lines if "->" in line] == [
        "mAP 0.900 -> 0.800",
        "fused map mIoU 0.300 -> 0.300",
        "patch map mIoU 0.200 -> 0.200",
        "class attention mIoU 0.400 -> 0.400",
        "attention entropy 0.450 -> 0.400",
        "view distance, class rows 0.225 -> 0.200",
        "view distance, patch rows 0.113 -> 0.100",
    ]
    console = Console(width=80, file=StringIO())
    console.print(table("A title", rows))
    printed = console.file.getvalue().splitlines()
    (control,) = (line.split() for line in printed if CONTROL in line)
    assert control[-9:] == ["0.700", "0.300", "0.51", "0.200", "0.400", "0.350", "9998", "9999", "10.00"]
    assert not [line for line in printed if "…" in line]
    assert [line.split()[0] for line in printed[-4:]] == ["all", "without", "with", "ACR,"]


@pytest.mark.parametrize(("propagated", "said"), [(0.4, True), (0.399, True), (0.5, False)])
def test_propagated_maps_that_are_all_background_are_told(propagated: float, said: bool) -> None:
    def maps(miou: float) -> dict[str, MapScore]:
        return {"raw CAM": MapScore(0.6, 0.5, [], [], []), "propagated CAM": MapScore(miou, 0.5, [], [], [])}

    rows = [scored("all background", 0.4), Row(WITHOUT, maps(propagated), 0.9), Row(WITH, maps(0.6), 0.9)]
    assert bool(remarks(rows)) == said
    assert not said or ("propagated CAM" in remarks(rows)[0] and remarks(rows)[0].endswith(f": {WITHOUT}."))


def test_the_titles_of_a_quick_run_say_that_it_means_nothing() -> None:
    assert "mean nothing" in plan_scenes(QUICK, controls=False, quick=True).title
    assert "mean nothing" not in plan_scenes(QUICK, controls=False, quick=False).title
