"""Files are told from their content, and refused where two formats look the same."""

import numpy as np
import pytest

from acr_reg.integrations.formats import FORMATS, load_cams, save_cams, save_crf_pair
from tests.support.class_maps import in_every_format


@pytest.mark.parametrize("claimed", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_not_read_as_another_format(tmp_path, maps, format, claimed):
    """But for the two that look the same, where the caller's word counts."""
    path = in_every_format(tmp_path, maps)[format]
    if {format, claimed} == {"psa", "psa_crf"} and format == "psa_crf":
        assert load_cams(path, claimed).keys() == {0, 3, 15}
    elif format != claimed:
        with pytest.raises(
            ValueError, match=rf"psa_crf\.npy|the format {format}, not {claimed}|keys .*\[14, 2\].* 0 .*\bpsa\b"
        ):
            load_cams(path, claimed)
    else:
        assert load_cams(path, claimed).keys() == maps.keys()


def test_a_psa_dict_with_a_class_0_is_told_from_a_crf_file(tmp_path, maps):
    for others in ({}, {2: maps[2]}, {2: maps[2], 14: maps[14]}, {2: np.zeros((5, 8))}):
        for first in (maps[14] ** 2, np.zeros((5, 8)), 1 - maps[2] / 2):
            save_cams(tmp_path / "image.npy", {0: first, **others})
            assert load_cams(tmp_path / "image.npy").keys() == {0, *others}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("alphas", [(1, 12), (4, 24), (4, 32)])
def test_files_of_a_crf_pair_are_not_taken_for_psa_dicts(tmp_path, maps, alphas, half):
    """With the background as written, and after a CRF, whose scores of a pixel sum to 1; in half precision too."""
    for cams in (maps, {2: maps[2]}, {2: (maps[2] > 0.5).astype(np.float32)}, {}):
        for refine in (None, lambda scores: scores / scores.sum(0)):
            save_crf_pair(tmp_path / "low.npy", tmp_path / "high.npy", cams, alphas, (5, 8), refine)
            for name in ("low.npy", "high.npy"):
                content = np.load(tmp_path / name, allow_pickle=True).item()
                np.save(tmp_path / name, {k: v.astype(np.float16) for k, v in content.items()} if half else content)
                with pytest.raises(ValueError, match=rf"{name}: .*CRF pair.*psa_crf"):
                    load_cams(tmp_path / name)
                assert load_cams(tmp_path / name, "psa_crf").keys() == cams.keys()
