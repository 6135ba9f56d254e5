"""CamMeanIoU against a literal sweep: one argmax and one confusion matrix for each threshold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from acr_reg.metrics import CamMeanIoU

THRESHOLDS = np.arange(100) / 100


def naive_confusion(images, num_classes, threshold):
    """Rows: truth. Columns: prediction. images: (cam, mask, classes) each; threshold None: no background."""
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    for cam, mask, classes in images:
        dense = np.full((num_classes, *mask.shape), -np.inf, dtype=cam.dtype)
        dense[list(classes)] = cam
        if threshold is not None:
            dense[0] = threshold
        prediction = dense.argmax(axis=0)
        for truth, predicted in zip(mask.ravel(), prediction.ravel(), strict=True):
            if truth != 255:
                confusion[truth, predicted] += 1
    return confusion


def naive_iou(confusion):
    """IoU, false positives and false negatives over the union, for each class; NaN where the union is empty."""
    hit, truth, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    union = np.where(truth + predicted == hit, np.nan, truth + predicted - hit)
    return hit / union, (predicted - hit) / union, (truth - hit) / union


def check_against_naive(images, num_classes, thresholds, background=True):
    metric = CamMeanIoU(num_classes, thresholds, background=background)
    for cam, mask, classes in images:
        metric.update(cam, mask, classes)
    scores = metric.compute()

    sweep = [naive_confusion(images, num_classes, t) for t in (thresholds if background else [None])]
    miou = [np.nanmean(naive_iou(confusion)[0]) for confusion in sweep]
    best = int(np.argmax(miou))
    iou, wrong, missed = naive_iou(sweep[best])
    np.testing.assert_allclose(scores.miou, miou, rtol=1e-12)
    np.testing.assert_allclose(scores.per_class_iou, iou, rtol=1e-12)
    np.testing.assert_allclose(scores.false_positive_rate, wrong, rtol=1e-12)
    np.testing.assert_allclose(scores.false_negative_rate, missed, rtol=1e-12)
    assert scores.best_miou == scores.miou[best]
    assert scores.best_threshold == (thresholds[best] if background else None)
    return scores


def made_images(rng, num_classes, background, levels=None, dtype=np.float32):
    """Images of different non-square sizes with one to three classes, in any order, and some ignored pixels."""
    images = []
    for height, width in [(5, 8), (9, 4), (6, 7)]:
        classes = rng.permutation(np.arange(int(background), num_classes))[: rng.integers(1, 4)]
        cam = rng.random((len(classes), height, width))
        if levels:
            cam = np.round(cam * levels) / levels
        mask = rng.choice([*range(num_classes), 255], size=(height, width))
        images.append((cam.astype(dtype), mask, classes.tolist()))
    return images


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_naive_sweep(seed, dtype):
    images = made_images(np.random.default_rng(seed), 6, background=True, dtype=dtype)
    scores = check_against_naive(images, 6, THRESHOLDS)
    assert len(np.unique(scores.miou)) > 20  # the curve is no constant


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [4, 10, 100])
def test_equals_the_naive_sweep_on_ties(levels, dtype):
    """Values on thresholds, and equal values of two classes given in any order."""
    images = made_images(np.random.default_rng(levels), 6, background=True, levels=levels, dtype=dtype)
    check_against_naive(images, 6, THRESHOLDS)


@pytest.mark.parametrize("levels", [None, 4])
def test_equals_naive_argmax_without_background(levels):
    images = made_images(np.random.default_rng(5), 6, background=False, levels=levels)
    scores = check_against_naive(images, 6, None, background=False)
    assert scores.miou.shape == (1,)
    assert scores.thresholds.shape == (0,)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_equals_the_naive_sweep_on_any_input(data):
    background = data.draw(st.booleans(), label="background")
    num_classes = data.draw(st.integers(2, 5), label="num_classes")
    values = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0]) | st.floats(0, 1, width=32)
    thresholds = np.array(sorted(data.draw(st.sets(values, min_size=1, max_size=6), label="thresholds")))
    images = []
    for _ in range(data.draw(st.integers(1, 3), label="images")):
        height, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
        foreground = list(range(int(background), num_classes))
        classes = data.draw(st.lists(st.sampled_from(foreground), unique=True, min_size=0 if background else 1))
        cam = data.draw(hnp.arrays(np.float64, (len(classes), height, width), elements=values))
        ids = st.sampled_from([*range(num_classes), 255])
        images.append((cam, data.draw(hnp.arrays(np.int64, (height, width), elements=ids)), classes))
    images.append((np.full((1, 1, 2), 0.5), np.array([[1, 0]]), [1]))  # something is always counted
    check_against_naive(images, num_classes, thresholds, background)


def test_all_classes_in_order_by_default():
    rng = np.random.default_rng(0)
    cam, mask = rng.random((3, 4, 5)), rng.integers(0, 4, (4, 5))
    check = CamMeanIoU(4)
    check.update(cam, mask)
    check_against_naive([(cam, mask, [1, 2, 3])], 4, THRESHOLDS)
    given_classes = CamMeanIoU(4)
    given_classes.update(cam[::-1], mask, [3, 2, 1])
    np.testing.assert_array_equal(check.compute().miou, given_classes.compute().miou)


def test_a_value_equal_to_the_threshold_is_background():
    metric = CamMeanIoU(2, thresholds=[0.2, 0.3, 0.4])
    metric.update(np.full((1, 1, 2), 0.3, dtype=np.float32), np.array([[1, 1]]))
    np.testing.assert_array_equal(metric.compute().miou, [1, 0, 0])


def test_maps_in_double_precision_are_compared_so():
    metric = CamMeanIoU(3, thresholds=[0.5])
    metric.update(np.array([[[0.75, 0.5]], [[0.75 + 1e-12, 0.5 + 1e-12]]]), np.array([[2, 2]]))
    assert metric.compute().best_miou == 1


def test_the_lowest_of_equal_thresholds_is_best():
    metric = CamMeanIoU(2)
    metric.update(np.array([[[0.25, 0.75]]]), np.array([[0, 1]]))
    scores = metric.compute()
    assert (scores.best_threshold, scores.best_miou) == (0.25, 1.0)
    np.testing.assert_array_equal(np.flatnonzero(scores.miou == 1), np.arange(25, 75))


def test_ignored_pixels_count_nowhere():
    rng = np.random.default_rng(1)
    cam, mask = rng.random((1, 4, 6)), rng.integers(0, 2, (4, 6))
    mask[:, 3:] = 255
    with_ignored, cut = CamMeanIoU(2), CamMeanIoU(2)
    with_ignored.update(cam, mask)
    cut.update(cam[:, :, :3], mask[:, :3])
    np.testing.assert_array_equal(with_ignored.compute().miou, cut.compute().miou)


def test_another_ignore_index():
    metric = CamMeanIoU(2, ignore_index=9)
    metric.update(np.array([[[0.9, 0.9]]]), np.array([[1, 9]]))
    assert metric.compute().best_miou == 1


def test_an_image_without_classes_is_all_background():
    metric = CamMeanIoU(3)
    metric.update(np.zeros((0, 2, 3)), np.array([[0, 0, 0], [0, 1, 255]]), classes=[])
    scores = metric.compute()
    np.testing.assert_array_equal(scores.per_class_iou, [4 / 5, 0, np.nan])
    np.testing.assert_array_equal(scores.false_negative_rate, [0, 1, np.nan])
    assert scores.best_miou == pytest.approx(0.4)


def test_classes_nowhere_are_left_out_of_the_mean():
    metric = CamMeanIoU(21)
    metric.update(np.array([[[1.0, 0.0]]]), np.array([[7, 0]]), classes=[7])
    scores = metric.compute()
    assert scores.best_miou == 1
    assert np.isnan(scores.per_class_iou).sum() == 19


def test_iou_and_the_two_rates_sum_to_one():
    metric = CamMeanIoU(6)
    for cam, mask, classes in made_images(np.random.default_rng(3), 6, background=True):
        metric.update(cam, mask, classes)
    scores = metric.compute()
    total = scores.per_class_iou + scores.false_positive_rate + scores.false_negative_rate
    np.testing.assert_allclose(total, 1)


def test_counters_add_up():
    images = made_images(np.random.default_rng(4), 6, background=True)
    parts = [CamMeanIoU(6) for _ in images]
    whole = CamMeanIoU(6)
    for part, (cam, mask, classes) in zip(parts, images, strict=True):
        part.update(cam, mask, classes)
        whole.update(cam, mask, classes)
    np.testing.assert_array_equal((parts[0] + parts[1] + parts[2]).compute().miou, whole.compute().miou)
    with pytest.raises(ValueError, match=r"True, 255\).*True, 9\)"):
        parts[0] + CamMeanIoU(6, ignore_index=9)
    with pytest.raises(TypeError):
        parts[0] + 1


CAM = np.full((1, 2, 3), 0.5)
MASK = np.array([[0, 1, 2], [0, 0, 255]])
NAN = np.where(np.arange(6).reshape(1, 2, 3) == 4, np.nan, 0.5)


@pytest.mark.parametrize(
    ("cam", "mask", "classes", "message"),
    [
        (NAN, MASK, [1], "NaN"),
        (CAM * np.inf, MASK, [1], "NaN or infinite"),
        (CAM * 3, MASK, [1], r"cam .*from 1\.5 to 1\.5.*\[0, 1\]"),
        (CAM - 1, MASK, [1], r"cam .*from -0\.5 to -0\.5.*\[0, 1\]"),
        (CAM.astype(complex), MASK, [1], "cam .*complex128"),
        (CAM[:, :, :2], MASK, [1], "cam is 2 x 2 and mask 2 x 3"),
        (CAM[0], MASK, [1], r"cam has shape \(2, 3\) .*\(K, H, W\)"),
        (CAM, MASK[None], [1], r"mask \(1, 2, 3\).*\(H, W\)"),
        (CAM, MASK, [0], r"classes are \[0\].* ids 1 to 2 \(0 is background\)"),
        (CAM, MASK, [3], r"classes are \[3\].* ids 1 to 2"),
        (CAM, MASK, [1.0], "classes .*float64.* ids 1 to 2"),
        (CAM, MASK, [1, 2], "cam has 1 maps for 2 classes"),
        (CAM, MASK, None, "cam has 1 maps for 2 classes.*classes="),
        (np.concatenate([CAM, CAM]), MASK, [2, 2], r"classes are \[2, 2\].*each class once"),
        (CAM, MASK + 1, [1], r"mask has ids \[3, 256\].* 0 to 2, or 255"),
        (CAM, MASK - 1, [1], r"mask has ids \[-1, 254\]"),
        (CAM, -MASK % 3 - 1, [1], r"mask has ids \[-1\]"),
        (CAM, MASK / 2, [1], "mask has dtype float64"),
    ],
)
def test_bad_input_is_named_and_counts_nothing(cam, mask, classes, message):
    metric = CamMeanIoU(3)
    with pytest.raises(ValueError, match=message):
        metric.update(cam, mask, classes)
    with pytest.raises(ValueError, match="No pixel was counted"):
        metric.compute()


def test_bad_input_without_background():
    metric = CamMeanIoU(3, background=False)
    with pytest.raises(ValueError, match=r"cam has no map.*at least one"):
        metric.update(np.zeros((0, 2, 3)), MASK, [])
    with pytest.raises(ValueError, match="NaN"):
        metric.update(NAN, MASK, [0])
    metric.update(CAM * 30 - 7, MASK, [0])  # logits do for an argmax
    assert metric.compute().per_class_iou[0] == pytest.approx(3 / 5)


def test_a_data_set_of_ignored_pixels_has_no_score():
    metric = CamMeanIoU(3)
    metric.update(CAM, np.full((2, 3), 255), [1])
    with pytest.raises(ValueError, match="No pixel was counted"):
        metric.compute()


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.4], [0.5, 0.5], [-0.1], [1.1], [[0.1]], [np.nan]])
def test_bad_thresholds(thresholds):
    with pytest.raises(ValueError, match="ascending"):
        CamMeanIoU(3, thresholds)


def test_too_few_classes():
    with pytest.raises(ValueError, match=r"num_classes is 1.*background=True.*at least 2"):
        CamMeanIoU(1)
    with pytest.raises(ValueError, match=r"num_classes is 0.*background=False.*at least 1"):
        CamMeanIoU(0, background=False)


@pytest.mark.parametrize("background", [True, False])
def test_counts_are_those_of_the_literal_sweep_and_add_up_over_images(background):
    images = made_images(np.random.default_rng(6), 6, background)
    counters = []
    for image in images:
        counters.append(CamMeanIoU(6, background=background))
        counters[-1].update(*image)
    counts = [counter.counts() for counter in counters]
    for position, threshold in enumerate(THRESHOLDS if background else [None]):
        confusion = naive_confusion(images, 6, threshold)
        assert (sum(each.predicted[:, position] for each in counts) == confusion.sum(axis=0)).all()
        assert (sum(each.correct[:, position] for each in counts) == np.diag(confusion)).all()
        assert (sum(each.truth for each in counts) == confusion.sum(axis=1)).all()
    counts[0].predicted[:] = 0  # a copy: the counter is not changed by it
    assert counters[0].counts().predicted.any()
