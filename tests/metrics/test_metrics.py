"""CamMeanIoU against a literal sweep: one argmax and one confusion matrix for each threshold. LabelMeanIoU against one
confusion matrix, counted pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from acr_reg.metrics import CamMeanIoU, LabelMeanIoU

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


def counts_by_search(images, num_classes, thresholds, background, ignore_index):
    """(predicted, correct, truth) as CamCounts has them: argmax over the stacked maps, and a search of each highest
    value among the thresholds."""
    thresholds = np.asarray(thresholds if background else [])
    predicted = np.zeros((num_classes, thresholds.size + 1), np.int64)
    correct, present = np.zeros_like(predicted), np.zeros(num_classes, np.int64)
    for cam, mask, classes in images:
        counted = np.ones(mask.shape, bool) if ignore_index is None else mask != ignore_index
        order = np.argsort(np.array(classes, dtype=int))
        truth = mask[counted].astype(np.int64)
        maps = cam.astype(np.result_type(cam.dtype, np.float32))[order][:, counted]
        if len(classes):
            best, highest = np.array(classes)[order][maps.argmax(axis=0)], maps.max(axis=0)
        else:
            best, highest = np.zeros_like(truth), np.zeros(truth.size, maps.dtype)
        exceeded = np.searchsorted(thresholds.astype(maps.dtype), highest, side="left")
        right = (best == truth) | (truth == 0) if background else best == truth
        np.add.at(predicted, (best, exceeded), 1)
        np.add.at(correct, (truth[right], exceeded[right]), 1)
        np.add.at(present, truth, 1)
    if not background:
        return predicted, correct, present
    above, hits = (each[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:] for each in (predicted, correct))
    above[0], hits[0] = predicted.sum(axis=0).cumsum()[:-1], correct[0].cumsum()[:-1]
    return above, hits, present


def check_equal_counts(images, num_classes, thresholds, background=True, ignore_index=255):
    metric = CamMeanIoU(num_classes, thresholds, background, ignore_index)
    for image in images:
        metric.update(*image)
    counts = metric.counts()
    wanted = counts_by_search(images, num_classes, thresholds, background, ignore_index)
    for found, expected in zip((counts.predicted, counts.correct, counts.truth), wanted, strict=True):
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)


SPACINGS = {
    "hundredths": THRESHOLDS,
    "one": np.array([0.3]),
    "two": np.array([0.1, 0.9]),
    "thirds": np.arange(3) / 3,
    "up to one": np.linspace(0, 1, 11),
    "from a twentieth": np.arange(0.05, 1, 0.05),
    "sevenths of a part": np.linspace(0.2, 0.9, 50),
    "nearly even": np.arange(20) / 20 + np.resize([0, 0.002, -0.0001], 20) + 0.01,
    "uneven": np.array([0.0, 0.01, 0.5, 0.501, 0.99]),
    "many": np.arange(9_000) / 9_000,
    "more than computed": np.arange(30_000) / 30_000,
    "too near for single precision": 0.3 + np.arange(5) * 1e-9,
    "as near as rounding": 0.7 + np.arange(40) * 3e-8,
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("name", SPACINGS)
def test_a_value_on_or_beside_a_threshold_is_counted_as_a_search_among_the_thresholds_counts_it(name, dtype):
    """Where rounding decides: each threshold in the precision of the maps, the numbers next to it, and the middles."""
    thresholds = SPACINGS[name]
    at = thresholds.astype(dtype)
    values = np.concatenate([at, np.nextafter(at, dtype(2)), np.nextafter(at, dtype(-2)), (at[1:] + at[:-1]) / 2])
    edges = np.array([0, -0.0, 1, 1 + 5e-6, -5e-6], dtype)
    values = np.concatenate([values[(values >= 0) & (values <= 1)], edges])
    cam = np.stack([values, values[::-1]])[:, None]
    mask = np.resize([0, 1, 2, 255, 3], values.size)[None]
    check_equal_counts([(cam, mask, [2, 1])], 4, thresholds)


@pytest.mark.parametrize("ignore_index", [255, None, 0, 2, -1, 1000])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_counts_equal_those_of_argmax_and_search(dtype, background, ignore_index):
    rng = np.random.default_rng(7)
    images = []
    for levels in (None, 10, 100):
        for cam, mask, classes in made_images(rng, 6, background, levels, dtype):
            images.append((cam, np.where(mask == 255, 5 if ignore_index is None else ignore_index, mask), classes))
    if background:
        images.append((np.zeros((0, 2, 3), dtype), np.array([[0, 1, 2], [0, 5, 0]]), []))
    check_equal_counts(images, 6, THRESHOLDS, background, ignore_index)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
def test_whole_numbers_are_counted_like_floats(dtype):
    rng = np.random.default_rng(8)
    images = [(rng.integers(0, 2, (3, 5, 6)).astype(dtype), rng.integers(0, 4, (5, 6)), [3, 1, 2])]
    check_equal_counts(images, 4, THRESHOLDS)
    check_equal_counts(images, 4, THRESHOLDS, background=False)


@pytest.mark.parametrize("num_classes", [171, 255, 256, 257, 300, 70_000])
def test_ids_of_one_byte_and_of_more(num_classes):
    rng = np.random.default_rng(9)
    classes = [num_classes - 1, 1, num_classes // 2]
    mask = rng.choice([0, *classes, num_classes - 2, 255], (8, 9))
    check_equal_counts([(rng.random((3, 8, 9)), mask, classes)], num_classes, [0.25, 0.5, 0.75])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint64])
def test_masks_of_any_whole_type(dtype):
    rng = np.random.default_rng(10)
    mask = rng.choice([0, 1, 2, 100], (6, 7)).astype(dtype)
    check_equal_counts([(rng.random((2, 6, 7)), mask, [1, 2])], 3, THRESHOLDS, ignore_index=100)


@pytest.mark.parametrize("size", [(200, 211), (128, 128), (1, 16385)])
def test_an_image_of_more_pixels_than_are_counted_at_once(size):
    rng = np.random.default_rng(13)
    mask = rng.choice([0, 1, 2, 3, 255], size)
    check_equal_counts([(rng.random((3, *size)), mask, [3, 1, 2])], 4, THRESHOLDS)


def test_views_of_arrays_are_counted_where_they_lie():
    rng = np.random.default_rng(11)
    cam, mask = rng.random((6, 10, 3)).transpose(2, 1, 0)[:, ::2, ::-1], rng.integers(0, 4, (6, 10)).T[::2, ::-1]
    check_equal_counts([(cam, mask, [1, 2, 3])], 4, THRESHOLDS)


@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5, -0.5])
def test_one_bad_value_in_any_map_and_under_an_ignored_pixel_is_refused(where, value):
    cam = np.random.default_rng(12).random((3, 4, 5))
    cam[where, 2, 3] = value
    metric = CamMeanIoU(4)
    with pytest.raises(ValueError, match=r"NaN or infinite|cam has values from"):
        metric.update(cam, np.full((4, 5), 255))
    assert not metric.counts().truth.any()


def test_an_image_without_pixels_counts_nothing():
    metric = CamMeanIoU(4)
    metric.update(np.zeros((2, 0, 5)), np.zeros((0, 5), int), [1, 2])
    assert not metric.counts().predicted.any()


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
        (CAM, MASK, None, "cam has 1 maps for 2 classes: num_classes=3 counts background.*classes="),
        (np.concatenate([CAM, CAM]), MASK, [2, 2], r"classes are \[2, 2\].*each class once"),
        (CAM, MASK + 1, [1], r"mask with ids \[3, 256\].* 0 to 2, or 255"),
        (CAM, MASK - 1, [1], r"mask with ids \[-1, 254\]"),
        (CAM, -MASK % 3 - 1, [1], r"mask with ids \[-1\]"),
        (CAM, MASK / 2, [1], "mask of dtype float64"),
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


def test_without_an_ignored_id_255_is_an_id_like_others():
    metric = CamMeanIoU(256, ignore_index=None)
    metric.update(np.array([[[0.9, 0.1]]]), np.array([[255, 0]]), [255])
    assert metric.compute().per_class_iou[255] == 1
    with pytest.raises(ValueError, match=r"mask with ids \[255\]: only 0 to 1 can"):
        CamMeanIoU(2, ignore_index=None).update(np.array([[[0.9, 0.1]]]), np.array([[255, 0]]), [1])


def test_an_empty_counter_has_the_settings_and_no_counts():
    metric = CamMeanIoU(3, [0.5], ignore_index=7)
    metric.update(CAM, np.array([[0, 1, 2], [0, 0, 7]]), [1])
    empty = metric.empty()
    assert not empty.counts().predicted.any()
    np.testing.assert_array_equal((empty + metric).counts().predicted, metric.counts().predicted)


def label_confusion(images, num_classes, ignore_index):
    """Pixel by pixel: rows truth, columns prediction, the last for pixels predicted as ignored."""
    confusion = np.zeros((num_classes, num_classes + 1), int)
    for labels, mask in images:
        for predicted, truth in zip(labels.ravel().tolist(), mask.ravel().tolist(), strict=True):
            if truth != ignore_index:
                confusion[truth, num_classes if predicted == ignore_index else predicted] += 1
    return confusion


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
@pytest.mark.parametrize("ignore_index", [255, None, 2, 0])
def test_label_maps_equal_a_confusion_matrix_counted_by_hand(ignore_index, dtype):
    rng = np.random.default_rng(0)
    ids = [0, 1, 2, 4, *([] if ignore_index is None else [ignore_index])]  # 3 and 5 are nowhere
    images = [tuple(rng.choice(ids, size).astype(dtype) for _ in range(2)) for size in [(5, 8), (9, 4)]]
    metric = LabelMeanIoU(6, ignore_index)
    for image in images:
        metric.update(*image)
    confusion = label_confusion(images, 6, ignore_index)
    np.testing.assert_array_equal(metric.confusion(), confusion)
    scores = metric.compute()
    for number in range(6):
        hit, truth, predicted = confusion[number, number], confusion[number].sum(), confusion[:, number].sum()
        union = truth + predicted - hit
        rates = [
            each[number] for each in (scores.per_class_iou, scores.false_positive_rate, scores.false_negative_rate)
        ]
        wanted = [np.nan] * 3 if union == 0 else [hit / union, (predicted - hit) / union, (truth - hit) / union]
        np.testing.assert_array_equal(rates, wanted)
        np.testing.assert_array_equal(scores.per_class_accuracy[number], hit / truth if truth else np.nan)
    assert scores.miou == np.nanmean(scores.per_class_iou)
    assert scores.class_accuracy == np.nanmean(scores.per_class_accuracy)
    assert scores.pixel_accuracy == sum(confusion[i, i] for i in range(6)) / confusion.sum()


def test_pixels_predicted_as_ignored_are_missed_and_belong_to_no_class():
    metric = LabelMeanIoU(3)
    metric.update(np.array([[1, 255, 255, 255]]), np.array([[1, 1, 0, 255]]))
    scores = metric.compute()
    np.testing.assert_array_equal(scores.per_class_iou, [0, 0.5, np.nan])
    np.testing.assert_array_equal(scores.false_positive_rate, [0, 0, np.nan])
    assert scores.pixel_accuracy == pytest.approx(1 / 3)
    assert metric.confusion()[:, 3].tolist() == [1, 1, 0]


def test_label_maps_of_an_argmax_have_the_score_of_their_class_maps():
    images = made_images(np.random.default_rng(2), 6, background=False)
    cams, labels = CamMeanIoU(6, background=False), LabelMeanIoU(6)
    for cam, mask, classes in images:
        cams.update(cam, mask, classes)
        labels.update(np.array(classes)[cam.argmax(axis=0)], mask)
    assert labels.compute().miou == cams.compute().best_miou


def test_label_counters_add_up():
    rng = np.random.default_rng(3)
    images = [tuple(rng.integers(0, 4, (2, 5, 6))) for _ in range(3)]
    parts, whole = [LabelMeanIoU(4) for _ in images], LabelMeanIoU(4)
    for part, image in zip(parts, images, strict=True):
        part.update(*image)
        whole.update(*image)
    np.testing.assert_array_equal((parts[0] + parts[1] + parts[2]).confusion(), whole.confusion())
    assert not whole.empty().confusion().any()
    with pytest.raises(ValueError, match=r"\(4, 255\).*\(4, None\)"):
        whole + LabelMeanIoU(4, ignore_index=None)
    with pytest.raises(TypeError):
        whole + 1


@pytest.mark.parametrize(
    ("labels", "mask", "message"),
    [
        (MASK[:, :2], MASK, r"labels have shape \(2, 2\) and mask \(2, 3\)"),
        (MASK[None], MASK[None], r"labels have shape \(1, 2, 3\)"),
        (MASK + 1, MASK, r"labels with ids \[3, 256\].* 0 to 2, or 255"),
        (MASK, MASK + 1, r"mask with ids \[3, 256\]"),
        (MASK / 1, MASK, "labels of dtype float64"),
        (MASK, MASK / 1, "mask of dtype float64"),
        (MASK > 0, MASK, "labels of dtype bool"),
        (np.where(MASK == 255, 9, MASK), MASK, r"labels with ids \[9\]"),  # also under an ignored pixel
    ],
)
def test_bad_label_maps_are_named_and_count_nothing(labels, mask, message):
    metric = LabelMeanIoU(3)
    with pytest.raises(ValueError, match=message):
        metric.update(labels, mask)
    with pytest.raises(ValueError, match="No pixel was counted"):
        metric.compute()


def test_label_counters_need_a_class():
    with pytest.raises(ValueError, match=r"num_classes is 0.*at least 1"):
        LabelMeanIoU(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_counted_as_arrays_are_even_with_a_graph_or_in_half_precision(dtype):
    cam, mask = torch.tensor([[[0.75, 0.25]]], dtype=dtype, requires_grad=True), torch.tensor([[1, 0]])
    metric = CamMeanIoU(num_classes=2)
    metric.update(cam, mask)
    assert metric.compute().best_threshold == 0.25 and metric.compute().best_miou == 1


def test_printed_scores_are_one_line_with_the_best_miou():
    metric = CamMeanIoU(num_classes=3)
    metric.update(np.array([[[0.9, 0.2]]]), np.array([[1, 0]]), classes=[1])
    assert repr(metric.compute()) == "CamScores(best_miou=1.0000, best_threshold=0.2, over 2 of 3 classes)"
    metric = CamMeanIoU(num_classes=2, background=False)
    metric.update(np.array([[[0.9, 0.2]]]), np.array([[1, 1]]), classes=[1])
    assert repr(metric.compute()) == "CamScores(best_miou=1.0000, over 1 of 2 classes)"
