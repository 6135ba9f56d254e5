"""What is written can be read by its users, at the size of the image, and appears whole or not at all."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from acr_reg.integrations.formats import FORMATS, load_cams, resize_map, save_cams, save_crf_pair
from tests.support.class_maps import assert_same_maps, in_every_format


def test_evaluation_scripts_can_read_it(tmp_path, maps):
    """They call np.load(..., allow_pickle=True).item(), some of them with numpy 1, which knows no numpy._core."""
    save_cams(tmp_path / "image.npy", {np.int64(14): maps[14], 2: torch.from_numpy(maps[2]).double()})
    assert_same_maps(np.load(tmp_path / "image.npy", allow_pickle=True).item(), maps)
    content = (tmp_path / "image.npy").read_bytes()
    assert b"numpy.core.multiarray" in content
    assert b"numpy._core" not in content


def test_the_background_of_a_crf_pair(tmp_path, maps):
    save_crf_pair(tmp_path / "low.npy", tmp_path / "high.npy", maps, alphas=(2, 24))
    highest = np.maximum(maps[2], maps[14])
    for name, alpha in (("low.npy", 2), ("high.npy", 24)):
        found = np.load(tmp_path / name, allow_pickle=True).item()
        assert list(found) == [0, 15, 3]
        np.testing.assert_allclose(found[0], (1 - highest.astype(np.float64)) ** alpha, rtol=1e-4, atol=1e-12)
        assert_same_maps({key - 1: values for key, values in found.items() if key}, maps)


def test_a_crf_pair_is_refined_or_not_written(tmp_path, maps):
    files = tmp_path / "low.npy", tmp_path / "high.npy"
    seen = []
    save_crf_pair(*files, maps, refine=lambda scores: seen.append(scores) or scores[::-1])
    assert [scores.shape for scores in seen] == [(3, 5, 8)] * 2
    assert (seen[0][0] >= seen[1][0]).all()
    np.testing.assert_array_equal(np.load(files[0], allow_pickle=True).item()[0], seen[0][2])
    before = [file.read_bytes() for file in files]
    for wrong in (lambda scores: scores[1:], lambda scores: scores * np.nan, lambda scores: -scores):
        with pytest.raises(ValueError, match=r"^refine returned .*\(3, 5, 8\).*finite.*negative"):
            save_crf_pair(*files, maps, refine=wrong)
    for alphas in ((4, 4), (0, 4), (32, 4), (4, np.inf)):
        with pytest.raises(ValueError, match=rf"alphas={re.escape(str(alphas))}.* 0 < low < high"):
            save_crf_pair(*files, maps, alphas)
    with pytest.raises(ValueError, match=r"high\.npz ends in '\.npz'.*\.npy"):
        save_crf_pair(files[0], tmp_path / "high.npz", maps)
    with pytest.raises(ValueError, match=r"psa_crf .*two.*save_crf_pair\(low, high, cams\)"):
        save_cams(files[0], maps, "psa_crf")
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(20, 24), (5, 8), (3, 5)])
def test_maps_are_written_at_the_size_of_the_image(tmp_path, format, size):
    maps = {2: np.full((5, 8), 0.5), 14: np.outer(np.arange(1, 6) / 5, np.ones(8))}
    found = load_cams(in_every_format(tmp_path, maps, size=size)[format], format)
    # Centres of the image's pixels on the map, whose own centres are at 0, 1, 2, ...: bilinear is exact on ramps.
    across = (((np.arange(size[0]) + 0.5) * 5 / size[0] - 0.5).clip(0, 4) + 1) / 5
    assert found[2].shape == found[14].shape == size
    inner = slice(1, -1) if size[0] < 5 else slice(None)  # shrinking averages less than a cell's width at the edges
    ratio = found[14][inner] / across[inner, None]
    expected = ratio[0, 0] if format in ("irn", "puzzle") else 1  # of the maximum
    np.testing.assert_allclose(ratio, np.full_like(ratio, expected), atol=2e-3)


def test_rounding_beyond_0_and_1_is_cut_off(tmp_path):
    """Resized maps leave [0, 1] by a rounding, and a power of a negative background would be NaN."""
    maps = {2: np.array([[-5e-6, 1 + 5e-6]])}
    save_cams(tmp_path / "image.npy", maps)
    assert load_cams(tmp_path / "image.npy")[2].tolist() == [[0, 1]]
    save_crf_pair(tmp_path / "low.npy", tmp_path / "high.npy", maps, alphas=(0.5, 1.5))
    for name in ("low.npy", "high.npy"):
        assert np.load(tmp_path / name, allow_pickle=True).item()[0].tolist() == [[1, 0]]


def test_enlarging_is_bilinear_between_pixel_centres(maps):
    expected = functional.interpolate(torch.from_numpy(maps[2])[None, None], (31, 17), mode="bilinear")[0, 0]
    np.testing.assert_allclose(resize_map(maps[2], (31, 17)), expected.numpy(), atol=1e-6)


def test_an_empty_map_stays_empty_in_an_irn_dict(tmp_path):
    save_cams(tmp_path / "image.npy", {1: np.zeros((6, 9)), 2: np.full((6, 9), 0.25)}, "irn")
    found = np.load(tmp_path / "image.npy", allow_pickle=True).item()
    assert found["high_res"][:, 0, 0].tolist() == found["cam"][:, 0, 0].tolist() == [0, 1]


def test_irn_dicts_open_in_old_numpy_and_torch(tmp_path, maps):
    save_cams(tmp_path / "image.npy", maps, "irn")
    content = (tmp_path / "image.npy").read_bytes()
    assert b"numpy.core.multiarray" in content
    assert b"numpy._core" not in content
    assert b"torch._utils\n_rebuild_tensor_v2" in content
    assert b"PK\x03\x04" not in content  # torch's zip files, which it wrote from 1.6 on


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("image.npy", "voc", r"'voc'.* psa, psa_crf, irn, clip_es, npz"),
        ("image.npy", "npz", r"ends in '\.npy'.*format='npz'.*\.npz"),
        ("image.npz", "irn", r"ends in '\.npz'.*format='irn'.*\.npy"),
    ],
)
def test_formats_that_a_file_cannot_have(tmp_path, maps, name, format, message):
    with pytest.raises(ValueError, match=message):
        save_cams(tmp_path / name, maps, format)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("cams", "message"),
    [
        ({0: np.full((4, 5), 2.0)}, r"class 0 .*from 2 to 2\b.*\[0, 1\]"),
        ({0: np.full((4, 5), np.nan)}, "class 0 has NaN"),
        ({0: np.where(np.eye(4), np.nan, 0.5)}, "class 0 has NaN"),
        ({0: np.full((4, 5), -0.5)}, r"class 0 .*from -0.5 to -0.5\b.*\[0, 1\]"),
        ({"0": np.zeros((4, 5))}, r"keys .*\['0'\].*0-based"),
        ({0: np.zeros(4)}, r"[Cc]lass 0 .*float64 array of shape \(4,\).*\(H, W\)"),
        ({0: np.zeros((4, 5)), 1: np.zeros((5, 4))}, r"size: .*\(4, 5\).*\(5, 4\)"),
        ([np.zeros((4, 5))], r"\{class: \(H, W\) map\}.*a list\b"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_save_refuses_bad_maps_and_leaves_nothing(tmp_path, cams, message, suffix):
    with pytest.raises(ValueError, match=message):
        save_cams(tmp_path / f"image{suffix}", cams)
    assert os.listdir(tmp_path) == []


def test_save_refuses_other_endings(tmp_path, maps):
    with pytest.raises(ValueError, match=r"ends in '\.png'.*\.npy or \.npz"):
        save_cams(tmp_path / "image.png", maps)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, maps, monkeypatch):
    from acr_reg.integrations.formats import save_mask  # needs Pillow

    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append(names[1].name) or replace(*names))
    save_cams(tmp_path / "image.npy", maps)
    save_mask(tmp_path / "image.png", np.eye(3, dtype=int))
    assert done == [
        (tmp_path / name).stat().st_size if size else name for name in ("image.npy", "image.png") for size in (1, 0)
    ]


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, maps, monkeypatch, step):
    path = tmp_path / "image.npy"
    save_cams(path, maps)
    before = path.read_bytes()

    def full_disk(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_rename(source, target):
        assert Path(source).stat().st_size > 100  # the new file is whole by then
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr(Path, "write_bytes", full_disk)
    else:
        monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="No space left"):
        save_cams(path, {0: maps[2]})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["image.npy"]
