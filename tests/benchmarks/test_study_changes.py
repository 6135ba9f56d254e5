"""What ACR changes in class maps: by kind of error, size of object and number of labels; the table and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm  # noqa: F401  # this file is left out where the extras are not installed
from PIL import Image

from acr_reg.demo.record import write_json
from benchmarks.study import __main__ as study
from benchmarks.study.counts import ImageCounts
from benchmarks.study.page.changes import (
    AGREEMENTS,
    FALSE_POSITIVES,
    LABELS,
    LOST,
    MIOU,
    MISSES,
    SIZES,
    changes,
    changes_of,
)
from benchmarks.study.page.tables import NOT_RUN
from benchmarks.study.settings import CLASS_TOKENS, NETWORKS, ONE_TOKEN, Cell, base
from tests.support.study import made_record, made_results

# Four photos of 100 pixels with a background and two classes. The last is labelled with a class that its mask lacks.
TRUTH = np.array([[90, 10, 0], [60, 40, 0], [20, 50, 30], [80, 20, 0]])


def of_photos(correct: list[list[int]], background: bool = True, **figures: float) -> dict[str, Any]:
    """A record in which every pixel that is not correct goes to the photo's first class, in the last to its second."""
    right = np.array(correct)
    predicted = right.copy()
    predicted[[0, 1, 2, 3], [1, 1, 1, 2]] += (TRUTH - right).sum(1)
    known = {"miou": 0.5, "oracle": 0.6, "false_positive": 0.2, "false_negative": 0.3}
    kept = slice(0 if background else 1, None)
    counts = ImageCounts(predicted[:, kept], right[:, kept], TRUTH[:, kept]).pack()
    return {"raw": known | {"threshold": 0.3 if background else None, "counts": counts} | figures}


WITHOUT = [[80, 10, 0], [50, 40, 0], [20, 50, 0], [70, 20, 0]]
BETTER = [[90, 10, 0], [60, 40, 0], [20, 50, 15], [70, 20, 0]]


def test_changes_are_told_apart_by_size_and_number_of_labels():
    found = changes_of({"two": {0: of_photos(WITHOUT)}, "both": {0: of_photos(BETTER)}})
    assert found is not None
    assert found.cuts == pytest.approx(np.quantile([0.1, 0.2, 0.3, 0.4, 0.5], [1 / 3, 2 / 3]))
    change = found.changes["both"]
    small, middling, large = (change[aspect] for aspect in SIZES)
    # The small ones have 10 and 20 pixels of truth, and the large ones 40 and 50.
    assert small == pytest.approx([((1 - 10 / 20) + 0) / 2])
    assert middling == pytest.approx([15 / 30])
    assert large == pytest.approx([((1 - 40 / 50) + (50 / 65 - 50 / 80)) / 2])
    one, two = (change[aspect] for aspect in LABELS[:2])
    assert one == pytest.approx([((1 - 10 / 20) + (1 - 40 / 50)) / 2])
    assert two == pytest.approx([((50 / 65 - 50 / 80) + 15 / 30 + 0) / 3])
    assert LABELS[2] not in change


def test_photos_with_one_label_are_left_out_without_a_background():
    found = changes_of({"two": {0: of_photos(WITHOUT, False)}, "both": {0: of_photos(BETTER, False)}})
    assert found is not None
    assert LABELS[0] not in found.without and LOST not in found.without
    assert found.cuts == pytest.approx(np.quantile([30 / 80, 50 / 80, 1], [1 / 3, 2 / 3]))


def test_errors_the_threshold_and_agreement_are_paired_by_seed():
    without = {seed: of_photos(WITHOUT, miou=0.5 + seed / 10, false_positive=seed / 10) for seed in (0, 1, 2)}
    better = {2: of_photos(BETTER, miou=0.8, false_positive=0.1, false_negative=0.1, oracle=0.85)}
    found = changes_of({"two": without, "both": better})
    assert found is not None
    assert found.without[MIOU] == pytest.approx([0.5, 0.6, 0.7])
    for aspect, change in ((MIOU, 0.1), (FALSE_POSITIVES, -0.1), (MISSES, -0.2), (LOST, 0.05 - -0.1)):
        assert found.changes["both"][aspect] == pytest.approx([change])
    assert not set(AGREEMENTS.values()) & found.without.keys()
    assert found.changes["misreported"] == {}
    assert changes_of({"two": without}) is None and changes_of({"both": better}) is None


def test_the_table_shows_every_network_and_says_what_is_missing(tmp_path: Path):
    assert changes(tmp_path) == NOT_RUN
    made_results(tmp_path, "test")
    text = changes(tmp_path)
    assert "change with ACR (2 of 5 seeds)" in text and "| MSRC" not in text
    assert f"{NETWORKS[CLASS_TOKENS].title.capitalize()}: {NOT_RUN}." in text
    agreements = (("two", 0.0, 0.6), ("both", 0.5, 0.9))
    for condition, weight, agreement in agreements:
        cell = Cell(base("msrc", condition, weight, network=CLASS_TOKENS), 0, "test")
        record = made_record(cell, 0.5)
        record["attention"] = record["raw"] | {"agreement": agreement}
        write_json(tmp_path / NETWORKS[CLASS_TOKENS].folder / cell.file, record)
    first, second = changes(tmp_path).split("\n\n")[:2]
    assert first.startswith(f"| {NETWORKS[ONE_TOKEN].title}") and "| MSRC: without ACR |" in second
    assert f"| {AGREEMENTS['attention'].title} | 0.600 | +0.300 | - |" in second
    assert "change with the control (0 of 5 seeds)" in second


def test_in_the_picture_better_is_to_the_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = tmp_path / "results"
    options = ["--results", str(results), "--output", str(tmp_path)]
    assert study.main(["changes", *options]) == 2
    assert "Run the plan primary" in capsys.readouterr().err
    for condition, weight, false_positive in (("two", 0.0, 0.3), ("both", 0.5, 0.2), ("misreported", 0.5, 0.4)):
        cell = Cell(base("voc", condition, weight), 0, "test")
        record = made_record(cell, 0.5)
        record["raw"] = record["raw"] | {"false_positive": false_positive}  # all else is equal
        write_json(results / cell.file, record)
    assert study.main(["changes", *options]) == 0
    with Image.open(tmp_path / "changes.png") as picture:
        assert picture.info["Description"] == changes(results)
        pixels = np.asarray(picture.convert("RGB"))[80:]  # below the legend
    blue, orange = (
        np.nonzero((pixels == colour).all(2))[1].mean() for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00))
    )
    assert blue > orange + 1


def test_the_picture_on_the_page_is_of_today():
    with Image.open(study.PAGE.with_suffix("") / "changes.png") as picture:
        today = changes(study.HERE / "results")
        assert picture.info["Description"] == today, "run python -m benchmarks.study changes"
