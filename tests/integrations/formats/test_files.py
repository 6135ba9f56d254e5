"""What every format of class maps must do: come back as it was written, with classes or without."""

import os

import numpy as np
import pytest

from acr_reg.integrations import formats
from acr_reg.integrations.formats import FORMATS, cam_format, load_cams, save_cams
from tests.support.class_maps import assert_same_maps, in_every_format
from tests.support.processes import Program


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_round_trip(tmp_path, maps, suffix):
    path = tmp_path / f"image{suffix}"
    save_cams(path, maps)
    loaded = load_cams(str(path))
    assert_same_maps(loaded, maps)
    loaded[2] += 1  # the maps belong to the caller
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_image_without_classes(tmp_path, suffix):
    save_cams(tmp_path / f"image{suffix}", {})
    assert load_cams(tmp_path / f"image{suffix}") == {}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_back_and_told(tmp_path, maps, format):
    maps = {number: values / values.max() for number, values in maps.items()}  # as irn holds them
    path = in_every_format(tmp_path, maps)[format]
    found = load_cams(path, format)
    assert list(found) == list(maps)
    for number, values in found.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, maps[number], atol=2**-11 if format == "clip_es" else 1e-6)
    if format == "psa_crf":
        with pytest.raises(ValueError, match=r'psa_crf\.npy: .*format="psa_crf" or "psa"'):
            load_cams(path)
    else:
        assert cam_format(path) == format
        assert_same_maps(load_cams(path), found)


def test_an_image_without_classes_in_every_format(tmp_path):
    paths = in_every_format(tmp_path, {}, size=(6, 9))
    for format, path in paths.items():
        assert load_cams(path, format) == {}
    assert np.load(paths["irn"], allow_pickle=True).item()["cam"].shape == (0, 2, 3)
    assert np.load(paths["clip_es"], allow_pickle=True).item()["attn_highres"].shape == (0, 6, 9)
    assert np.load(paths["puzzle"], allow_pickle=True).item()["hr_cam"].shape == (0, 6, 9)
    assert np.load(paths["puzzle"], allow_pickle=True).item()["keys"].tolist() == [0]
    assert np.load(paths["psa_crf"], allow_pickle=True).item()[0].tolist() == np.ones((6, 9)).tolist()
    for format in ("irn", "clip_es", "puzzle"):
        with pytest.raises(ValueError, match=r"no maps .*size=\(H, W\)"):
            save_cams(tmp_path / "image.npy", {}, format)


def test_unknown_format_and_size_are_refused(tmp_path, maps):
    save_cams(tmp_path / "image.npy", maps)
    with pytest.raises(ValueError, match=r"'voc'.* psa, psa_crf, irn, clip_es, npz"):
        load_cams(tmp_path / "image.npy", "voc")
    with pytest.raises(ValueError, match=r"size=\(0, 5\).*height.*width"):
        save_cams(tmp_path / "image.npy", maps, size=(0, 5))


def test_the_face_needs_pillow_for_photos_and_masks_only():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "import acr_reg.integrations.formats as formats\n"
        "formats.load_cams, formats.load_image_labels\n"
        "try: formats.open_photo\n"
        "except ModuleNotFoundError as error: print(error.name)\n"
        "print(hasattr(formats, 'other'))"
    )
    process = Program("-c", code)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.split() == ["PIL", "False"]


@pytest.mark.parametrize("name", formats.__all__)
def test_the_face_holds_what_it_lists(name):
    assert getattr(formats, name) is not None
