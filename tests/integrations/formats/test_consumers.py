"""Files of class maps as those codebases read them that they are written for.

Each reader below does, in words of this project, what the consumer named in its docstring does with a file, and must
find the labels that were drawn. With ACR_REG_HOSTS set, `test_hosts.py` runs the consumers' own code.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional

from acr_reg.integrations.formats import save_cams, save_crf_pair

SIZE = (22, 37)  # neither is a multiple of 4 or 8, and they differ
CLASSES = {0: 1, 14: 15}  # 0-based class -> VOC id; class 0 is where background and classes are confused


def scene():
    """Ids (H, W) and the maps that say so: two classes side by side on 8 x 8 cells, background around."""
    ids = np.zeros(SIZE, dtype=np.int64)
    ids[8:16, 0:16] = CLASSES[0]
    ids[0:16, 24:32] = CLASSES[14]
    return ids, {number: np.where(ids == voc, 0.9, 0.05).astype(np.float32) for number, voc in CLASSES.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "2007_000032.npy"


def dictionary(path):
    """All of them open a file so."""
    return np.load(path, allow_pickle=True).item()


def test_the_scene_tells_a_shift_of_classes_apart():
    ids, maps = scene()
    assert set(np.unique(ids)) == {0, 1, 15}
    assert {number + 1 for number in maps} == set(CLASSES.values())


# ---------------------------------------------------------------- PSA dict


def test_psa_dict_in_the_evaluation_of_acr_mctformer_seam_transcam_and_cti(path):
    """evaluation.py: scores of 21 ids at the size of the first map, the map of class k at id k + 1, a constant at 0."""
    ids, maps = scene()
    save_cams(path, maps, "psa")
    found = dictionary(path)
    scores = np.zeros((21, *next(iter(found.values())).shape), dtype=np.float32)
    for number in found:
        scores[number + 1] = found[number]
    scores[0] = 0.3
    np.testing.assert_array_equal(scores.argmax(0), ids)


def test_psa_dict_in_the_evaluation_of_weaktr(path):
    """evaluation.py: the maps alone under a constant, softmax, and the ids looked up beside them."""
    ids, maps = scene()
    save_cams(path, maps, "psa")
    found = dictionary(path)
    scores = np.pad(np.array(list(found.values())), ((1, 0), (0, 0), (0, 0)), constant_values=0.3)
    numbers = np.pad(np.array([number + 1 for number in found], dtype=np.uint8), (1, 0))
    np.testing.assert_array_equal(numbers[torch.tensor(scores).softmax(0).numpy().argmax(0)], ids)


def test_psa_dict_in_infer_aff(path):
    """infer_aff.py: assigned into an array of the image's own size, padded to a multiple of 8 and pooled by it. A map
    of any other size would not fit the array."""
    ids, maps = scene()
    save_cams(path, {number: values[:11, :18] for number, values in maps.items()}, "psa", size=SIZE)
    scores = np.zeros((21, *SIZE), dtype=np.float32)
    for number, values in dictionary(path).items():
        scores[number + 1] = values
    assert scores.max() > 0.8

    save_cams(path, maps, "psa")
    for number, values in dictionary(path).items():
        scores[number + 1] = values
    scores[0] = 0.2
    padded = np.pad(scores, ((0, 0), (0, -SIZE[0] % 8), (0, -SIZE[1] % 8)))
    pooled = functional.avg_pool2d(torch.from_numpy(padded), 8, 8)
    assert pooled.shape == (21, 3, 5)
    np.testing.assert_array_equal(pooled.argmax(0)[:2, :4].numpy(), ids[:16:8, :32:8])


# ---------------------------------------------------------------- PSA CRF pair


def test_crf_pair_in_the_training_of_affinitynet(tmp_path):
    """voc12/data.py: both files' maps side by side in the order of the keys, background first; foreground only where
    the low alpha says so, background only where the high one does, and 255 in between."""
    ids, maps = scene()
    maps[0][18:20, :8] = 0.15  # neither here nor there: 0.85 ** 4 is above it, 0.85 ** 32 below
    files = [tmp_path / "low.npy", tmp_path / "high.npy"]
    save_crf_pair(*files, maps)
    low, high = (dictionary(file) for file in files)
    assert list(low) == list(high) == [0, 1, 15]
    both = np.transpose(np.array([*low.values(), *high.values()]), (1, 2, 0))
    at_low, at_high = (part.argmax(-1) for part in np.array_split(both, 2, axis=-1))
    label = np.where(at_low == 0, 255, at_low)
    label[at_high == 0] = 0
    label[both.max(-1) < 1e-5] = 255

    expected = np.select([ids == 1, ids == 15], [1, 2], 0)  # places in the file, which is all that this reader compares
    expected[18:20, :8] = 255
    np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_crf_pair_in_the_evaluation_of_cti(tmp_path, which):
    """evaluation.py --task crf: the map under key k is that of id k; no threshold."""
    ids, maps = scene()
    files = [tmp_path / "low.npy", tmp_path / "high.npy"]
    save_crf_pair(*files, maps, alphas=(1, 12))
    scores = np.zeros((21, *SIZE), dtype=np.float32)
    for number, values in dictionary(files[which]).items():
        scores[number] = values
    np.testing.assert_array_equal(scores.argmax(0), ids)


# ---------------------------------------------------------------- IRN dict


@pytest.mark.parametrize("threshold", [0.3, 0.15])
def test_irn_dict_in_eval_cam_and_cam_to_ir_label(path, threshold):
    """A constant over the maps at full size, and the ids of 0 and keys + 1 looked up; in ToCo's tools too."""
    ids, maps = scene()
    save_cams(path, maps, "irn")
    found = dictionary(path)
    scores = np.pad(found["high_res"], ((1, 0), (0, 0), (0, 0)), constant_values=threshold)
    numbers = np.pad(found["keys"] + 1, (1, 0))
    np.testing.assert_array_equal(numbers[scores.argmax(0)], ids)
    np.testing.assert_allclose(found["high_res"].max((1, 2)), 1)  # their thresholds are of the maximum


def test_irn_dict_in_make_sem_seg_labels(path):
    """The tensor at stride 4 (moved by a method of torch's), enlarged 4 times from the corner, cut to the image, over
    its maximum, under a constant. The random walk in between is left out: it changes no place."""
    ids, maps = scene()
    save_cams(path, maps, "irn")
    found = dictionary(path)
    strided = found["cam"].cpu()
    assert strided.shape == (2, (SIZE[0] - 1) // 4 + 1, (SIZE[1] - 1) // 4 + 1)  # of the edges that meet it
    assert strided.dtype == torch.float32
    large = functional.interpolate(strided[:, None], scale_factor=4, mode="bilinear", align_corners=False)
    large = large[:, 0, : SIZE[0], : SIZE[1]]
    scores = functional.pad(large / large.max(), (0, 0, 0, 0, 1, 0), value=0.25)
    labels = np.pad(found["keys"] + 1, (1, 0))[scores.argmax(0).numpy()]
    # Cells of 4 pixels know nothing of an edge within 2 of it.
    around = np.lib.stride_tricks.sliding_window_view(np.pad(ids, 2, mode="edge"), (5, 5))
    inside = around.min((2, 3)) == around.max((2, 3))
    assert inside.mean() > 0.5
    assert set(np.unique(ids[inside])) == {0, 1, 15}
    np.testing.assert_array_equal(labels[inside], ids[inside])


def test_irn_maps_at_stride_4_lie_where_the_reader_puts_them(path):
    """A ramp comes back as it was, on every pixel between the centres of the first and the last whole cell."""
    ramp = (np.arange(SIZE[0])[:, None] + 2.0 * np.arange(SIZE[1])) / (SIZE[0] + 2 * SIZE[1])
    save_cams(path, {3: ramp}, "irn")
    found = dictionary(path)
    large = functional.interpolate(found["cam"][:, None], scale_factor=4, mode="bilinear", align_corners=False)
    large, whole = large[0, 0, : SIZE[0], : SIZE[1]].numpy(), found["high_res"][0]
    part = (slice(2, 17), slice(2, 34))
    ratio = large[part] / whole[part]  # each is over its own maximum
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_irn_dict_in_make_ins_seg_labels(path):
    """Every class as often as there are instances, and maps times masks."""
    _, maps = scene()
    save_cams(path, maps, "irn")
    found = dictionary(path)
    masks = torch.ones(3, *found["cam"].shape[1:])
    assert (found["cam"][:, None] * masks[None]).shape[:2] == (2, 3)
    assert np.repeat(found["keys"], 3).tolist() == [0, 0, 0, 14, 14, 14]


# ---------------------------------------------------------------- CLIP-ES dict


@pytest.mark.parametrize("threshold", [0.3, 1, 2])
def test_clip_es_dict_in_eval_cam(path, threshold):
    """eval_cam.py: below 1 a constant, from 1 up the exponent of 1 minus the largest map, in half precision."""
    ids, maps = scene()
    save_cams(path, maps, "clip_es")
    found = dictionary(path)
    scores = found["attn_highres"]
    assert scores.dtype == np.float16
    if threshold < 1:
        scores = np.pad(scores, ((1, 0), (0, 0), (0, 0)), constant_values=threshold)
    else:
        scores = np.concatenate([(1 - scores.max(0, keepdims=True)) ** threshold, scores])
    np.testing.assert_array_equal(np.pad(found["keys"] + 1, (1, 0))[scores.argmax(0)], ids)


def test_clip_es_dict_before_its_crf(path):
    """eval_cam_with_crf.py takes background and maps for probabilities: none negative, none NaN, also where a map that
    was resized is a little over 1."""
    _, maps = scene()
    maps[14] = np.where(maps[14] > 0.5, 1 + 5e-6, maps[14])
    save_cams(path, maps, "clip_es")
    scores = dictionary(path)["attn_highres"]
    background = np.power(1 - scores.max(0, keepdims=True), 1)
    assert ((background >= 0) & (background <= 1)).all()


# ---------------------------------------------------------------- Puzzle-CAM dict


@pytest.mark.parametrize("threshold", [0.3, 0.15])
def test_puzzle_dict_in_evaluate_and_make_affinity_labels(path, threshold):
    """A constant over the maps at full size, and the ids looked up in keys as they are."""
    ids, maps = scene()
    save_cams(path, maps, "puzzle")
    found = dictionary(path)
    scores = np.pad(found["hr_cam"], ((1, 0), (0, 0), (0, 0)), constant_values=threshold)
    assert found["keys"].shape == (len(scores),)
    np.testing.assert_array_equal(found["keys"][scores.argmax(0)], ids)
    np.testing.assert_allclose(found["hr_cam"].max((1, 2)), 1)


def test_puzzle_dict_in_inference_rw(path):
    """The tensor at stride 4, moved by a method of torch's, as IRN's."""
    _, maps = scene()
    save_cams(path, maps, "puzzle")
    strided = dictionary(path)["cam"].cpu()
    save_cams(path, maps, "irn")
    assert torch.equal(strided, dictionary(path)["cam"])
