"""Pseudo labels score as their maps, and each rule gives the labels of the codebases that use it."""

import itertools
import re

import numpy as np
import pytest

from acr_reg.integrations.formats import pseudo_labels, save_crf_pair
from acr_reg.metrics import CamMeanIoU

THRESHOLDS = np.arange(20) / 20


def maps_with_ties(dtype, seed=0, shape=(30, 40)):
    """Class -> map, descending classes; many values tie with a threshold or with another map."""
    rng = np.random.default_rng(seed)
    values = rng.choice(np.concatenate([THRESHOLDS, rng.random(20), [1.0, 1 + 5e-6, -5e-6]]), (3, *shape))
    if np.dtype(dtype).kind in "iub":
        values = (values > 0.5).astype(dtype)
    return {number: each.astype(dtype) for number, each in zip((4, 2, 0), values, strict=True)}


def confusion(labels, mask, classes):
    counts = np.zeros((classes, classes), int)
    for truth, label in itertools.product(range(classes), repeat=2):
        counts[truth, label] = ((mask == truth) & (labels == label)).sum()
    return counts


def mean_iou(counts):
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    return (np.diag(counts)[union > 0] / union[union > 0]).mean()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, bool])
def test_labels_score_exactly_as_their_maps_at_every_threshold(dtype):
    metric, counts = CamMeanIoU(7, THRESHOLDS), np.zeros((len(THRESHOLDS), 7, 7), int)
    for seed in range(3):
        maps = maps_with_ties(dtype, seed)
        mask = np.random.default_rng(seed + 10).choice([*range(6), 255], (30, 40))
        metric.update(np.stack(list(maps.values())), mask, [number + 1 for number in maps])
        for at, threshold in enumerate(THRESHOLDS):
            counts[at] += confusion(pseudo_labels(maps, threshold), mask, 7)
    assert metric.compute().miou.tolist() == [mean_iou(each) for each in counts]
    predicted = metric.counts().predicted
    assert (predicted == counts[:, :, :].sum(1).T).all()


def test_a_float32_value_just_above_its_threshold_ties_with_it():
    """0.3 in float32 is above 0.3 in float64. Both are compared in the maps' precision, as scripts compare them."""
    assert pseudo_labels({0: np.float32([[0.3]])}, 0.3).tolist() == [[0]]
    assert pseudo_labels({0: np.array([[np.float64(np.float32(0.3))]])}, 0.3).tolist() == [[1]]
    assert pseudo_labels({0: np.float32([[0.3]])}, ignore_between=(0.1, 0.3)).tolist() == [[255]]


def test_without_background_labels_score_exactly_as_their_maps():
    metric, counts = CamMeanIoU(6, background=False), np.zeros((6, 6), int)
    for seed in range(3):
        maps = {number: 50 * values - 20 for number, values in maps_with_ties(np.float32, seed).items()}
        mask = np.random.default_rng(seed + 10).choice([*range(6), 255], (30, 40))
        metric.update(np.stack(list(maps.values())), mask, list(maps))
        counts += confusion(pseudo_labels(maps, background=False), mask, 6)
    assert metric.compute().best_miou == mean_iou(counts)


def test_a_band_of_thresholds_is_that_of_toco_and_afa():
    maps, (low, high) = maps_with_ties(np.float64), (0.25, 0.7)
    labels = pseudo_labels(maps, ignore_between=(low, high))
    for row, column in np.ndindex(labels.shape):
        values = {number: maps[number][row, column] for number in sorted(maps)}
        number = max(values, key=values.get)  # the first of equals
        expected = 0 if values[number] <= low else 255 if values[number] <= high else number + 1
        assert labels[row, column] == expected
    assert set(np.unique(labels)) == {0, 1, 3, 5, 255}


@pytest.mark.parametrize("alphas", [(4.0, 32.0), (1, 12), (4, 24)])
def test_a_band_of_alphas_is_what_psa_reads_from_its_two_files(tmp_path, alphas):
    maps = {number: values.clip(0, 1) for number, values in sorted(maps_with_ties(np.float32).items())}
    save_crf_pair(tmp_path / "low.npy", tmp_path / "high.npy", maps, alphas)
    won = []  # PSA: the argmax over the values of each dict, background first
    for name in ("low.npy", "high.npy"):
        content = np.load(tmp_path / name, allow_pickle=True).item()
        won.append(np.array(list(content))[np.argmax(np.array(list(content.values())), axis=0)])
    expected = np.where(won[1] == 0, 0, np.where(won[0] == 0, 255, won[0]))
    labels = pseudo_labels(maps, alphas=alphas)
    np.testing.assert_array_equal(labels, expected)
    assert {0, 255} < set(np.unique(labels))


def test_alphas_of_numpy_decide_as_plain_ones():
    """At this value the float32 power ties with the map, as in PSA's files, and the float64 power does not."""
    cams = {0: np.array([[0.27550805]], np.float32)}
    assert pseudo_labels(cams, alphas=(4, 32)).tolist() == [[255]]
    assert pseudo_labels(cams, alphas=(np.float64(4), np.float64(32))).tolist() == [[255]]


def test_alphas_of_psa_mean_the_thresholds_that_the_docstring_names():
    values = np.linspace(0, 1, 10001)[None]
    ignored = values[pseudo_labels({0: values}, alphas=(4, 32)) == 255]
    assert (round(ignored.min(), 2), round(ignored.max(), 2)) == (0.08, 0.28)


def test_an_image_without_a_class_is_all_background():
    labels = pseudo_labels({}, 0.0, size=(3, 5))
    assert (labels.shape, labels.dtype, labels.any()) == ((3, 5), np.uint8, False)


def test_the_largest_ids_leave_255_free():
    one = np.ones((2, 2))
    assert pseudo_labels({253: one}, 0.5).tolist() == [[254, 254]] * 2
    assert pseudo_labels({254: one}, background=False).tolist() == [[254, 254]] * 2
    with pytest.raises(ValueError, match=r"class 254\b.*up to 253\b.*255"):
        pseudo_labels({254: one}, 0.5)
    with pytest.raises(ValueError, match=r"class 255\b.*up to 254\b.*255"):
        pseudo_labels({255: one}, background=False)


@pytest.mark.parametrize(
    ("cams", "rule", "fact"),
    [
        ({0: [[0.5]]}, {}, r"^No rule .*threshold, ignore_between and alphas.*background=False"),
        ({0: [[0.5]]}, {"threshold": 0.5, "alphas": (4, 32)}, r"^threshold and alphas given.* exactly one"),
        ({0: [[0.5]]}, {"threshold": 0.0, "background": False}, r"^threshold given without background"),
        ({0: [[0.5]]}, {"threshold": 1.1}, r"threshold=1\.1 .*\[0, 1\]"),
        ({0: [[0.5]]}, {"threshold": np.nan}, r"threshold=nan .*\[0, 1\]"),
        ({0: [[0.5]]}, {"ignore_between": (0.5, 0.5)}, r"ignore_between=\(0\.5, 0\.5\).* 0 <= low < high <= 1"),
        ({0: [[0.5]]}, {"alphas": (32, 4)}, r"alphas=\(32, 4\).* 0 < low < high"),
        ({0: [[np.nan]]}, {"threshold": 0.5}, "NaN"),
        ({0: [[np.inf]]}, {"background": False}, "infinite"),
        ({0: [[0.1, 2.5]]}, {"threshold": 0.5}, r"from 0\.1 to 2\.5.*\[0, 1\]"),
        ({0: [[0.1]], 1: [[0.1, 0.2]]}, {"threshold": 0.5}, "differ in size"),
        ({-1: [[0.1]]}, {"threshold": 0.5}, "0-based"),
        ({0: [[0.1]]}, {"threshold": 0.5, "size": (2, 1)}, r"\(1, 1\).*size=\(2, 1\).*Resize"),
        ({}, {"threshold": 0.5}, r"no maps .*size=\(H, W\).*--images"),
        ({}, {"background": False, "size": (2, 2)}, "no map.*Without background"),
    ],
)
def test_what_gives_no_labels_is_refused(cams, rule, fact):
    with pytest.raises(ValueError, match=re.compile(fact)):
        pseudo_labels({number: np.array(values) for number, values in cams.items()}, **rule)
