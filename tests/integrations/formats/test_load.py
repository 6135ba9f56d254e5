"""What other codebases and numpy versions wrote is read; damaged files and other contents are named."""

import io
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from acr_reg.integrations.formats import Maps, cam_format, load_cams, numpy_files, save_cams
from tests.support.class_maps import Call, assert_same_maps, write_npy


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_reads_psa_dicts_of_any_numpy(tmp_path, maps, protocol, module, dtype):
    content = {np.int64(number): np.asfortranarray(values.astype(dtype)) for number, values in maps.items()}
    pickled = pickle.dumps(np.array(content, dtype=object), protocol=protocol)
    if protocol < 4:  # names are text without a length
        pickled = pickled.replace(b"cnumpy._core.", b"cnumpy.core.").replace(b"cnumpy.core.", b"c" + module + b".")
        assert module in pickled
    loaded = load_cams(write_npy(tmp_path / "image.npy", pickled))
    assert_same_maps(loaded, {number: values.astype(dtype) for number, values in maps.items()})


def test_reads_what_np_save_writes(tmp_path, maps):
    np.save(tmp_path / "image.npy", maps)
    assert_same_maps(load_cams(tmp_path / "image.npy"), maps)


@pytest.mark.parametrize("tensors", [False, True])
def test_reads_irn_dicts(tmp_path, maps, tensors):
    """IRN's make_cam saves keys and cam as torch tensors, high_res as numpy."""
    keys, high_res = np.array(list(maps)), np.stack(list(maps.values()))
    label = torch.zeros(20)
    label[[2, 14]] = 1
    content = {
        "keys": torch.nonzero(label)[:, 0].flip(0) if tensors else keys,
        "cam": torch.rand(2, 2, 2)[:, :, 1:] if tensors else high_res[:, ::4, ::4],
        "high_res": high_res,
    }
    np.save(tmp_path / "image.npy", content)
    assert_same_maps(load_cams(tmp_path / "image.npy"), maps)


@pytest.mark.parametrize("half", [False, True])
def test_reads_clip_es_dicts_before_and_after_refinement(tmp_path, maps, half):
    """Its authors tell people to save ``highres`` for the maps before refinement; with both, its evaluation reads the
    refined ones."""
    keys, stacked = np.array(list(maps)), np.stack(list(maps.values()))
    stacked = stacked.astype(np.float16) if half else stacked
    expected = dict(zip(maps, stacked, strict=True))
    path = tmp_path / "image.npy"
    for content in ({"highres": stacked}, {"highres": stacked * 0, "attn_highres": stacked}):
        np.save(path, {"keys": keys, **content})
        assert cam_format(path) == "clip_es"
        assert_same_maps(load_cams(path), expected)
        assert_same_maps(load_cams(path, "clip_es"), expected)


def test_reads_puzzle_dicts_before_and_after_the_random_walk(tmp_path, maps):
    """Their keys count the background, which has no map. With both, Puzzle-CAM's evaluation reads hr_cam."""
    keys, stacked = np.array([0, *(number + 1 for number in maps)]), np.stack(list(maps.values()))
    path = tmp_path / "image.npy"
    for content in (
        {"cam": torch.rand(2, 2, 2), "hr_cam": stacked},
        {"rw": stacked},
        {"rw": stacked * 0, "hr_cam": stacked},
    ):
        np.save(path, {"keys": keys, **content})
        assert cam_format(path) == "puzzle"
        assert_same_maps(load_cams(path), maps)
        with pytest.raises(ValueError, match=r"in the format puzzle, not irn"):
            load_cams(path, "irn")


@pytest.mark.parametrize("keys", [[1, 3], [3, 0, 15], [], [0, 3, 15, 16], [0, 3, 3], [[0, 3, 15]], [0, 0, 3]])
@pytest.mark.parametrize("name", ["hr_cam", "rw"])
def test_puzzle_dicts_whose_keys_do_not_fit_their_maps_are_refused(tmp_path, maps, name, keys):
    np.save(tmp_path / "image.npy", {"keys": np.array(keys), name: np.stack(list(maps.values()))})
    with pytest.raises(ValueError, match=r"image\.npy: .*keys.*(0\. Add it|different classes|0-based)"):
        load_cams(tmp_path / "image.npy")


def test_reads_tensors_in_place_of_maps(tmp_path, maps):
    tensors = {number: torch.from_numpy(values.T.copy()).T for number, values in maps.items()}
    tensors[5] = torch.from_numpy(np.stack([maps[2], maps[14]]))[1]  # starts inside its storage
    np.save(tmp_path / "image.npy", tensors)
    assert_same_maps(load_cams(tmp_path / "image.npy"), {**maps, 5: maps[14]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((20, 4, 5), dtype=np.float32), r"float32 array of shape \(20, 4, 5\), not a dict"),
        ([np.zeros((4, 5))], r"float64 array of shape \(1, 4, 5\), not a dict"),
        (
            {"keys": np.array([1]), "valid_cam": np.zeros((1, 4, 5))},
            r"keys .*\['keys', 'valid_cam'\].*keys and high_res",
        ),
        ({"keys": np.array([1, 2]), "high_res": np.zeros((1, 4, 5))}, r"\(2,\).*high_res .*\(1, 4, 5\).*\(n, H, W\)"),
        ({"keys": np.array([1, 1]), "high_res": np.zeros((2, 4, 5))}, r"\(2,\).*high_res .*\(2, 4, 5\).*different"),
        ({"keys": np.array([1]), "attn_highres": np.zeros((4, 5))}, r"\(1,\).*attn_highres .*\(4, 5\).*\(n, H, W\)"),
        ({-1: np.zeros((4, 5))}, r"keys .*\[-1\].*0-based"),
        ({True: np.zeros((4, 5))}, r"keys .*\[True\].*0-based"),
        ({0: np.zeros((1, 4, 5))}, r"[Cc]lass 0 .*float64 array of shape \(1, 4, 5\).*\(H, W\)"),
        ({0: np.zeros((4, 5)), 1: np.zeros((5, 4))}, r"size: .*\(4, 5\).*\(5, 4\)"),
        ({0: "text"}, r"[Cc]lass 0 .*\(H, W\)"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    np.save(tmp_path / "image.npy", np.array(content, dtype=object) if isinstance(content, dict) else content)
    with pytest.raises(ValueError, match=message) as caught:
        load_cams(tmp_path / "image.npy")
    assert "image.npy" in str(caught.value)


def test_damaged_files(tmp_path, maps):
    save_cams(tmp_path / "image.npy", maps)
    save_cams(tmp_path / "image.npz", maps)
    for name in ("image.npy", "image.npz"):
        content = (tmp_path / name).read_bytes()
        for kept in (0, 4, 100, len(content) // 2, len(content) - 1):
            (tmp_path / name).write_bytes(content[:kept])
            with pytest.raises(ValueError, match=name):
                load_cams(tmp_path / name)
    np.savez(tmp_path / "named.npz", cam=np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"named\.npz.*'cam'"):
        load_cams(tmp_path / "named.npz")
    with pytest.raises(FileNotFoundError):
        load_cams(tmp_path / "absent.npy")
    with pytest.raises(ValueError, match=r"image\.txt: .*'\.txt'.*\.npy or \.npz"):
        load_cams(tmp_path / "image.txt")


def test_npz_with_a_pickle_inside_is_refused(tmp_path):
    mark = tmp_path / "mark"
    np.savez(tmp_path / "image.npz", **{"0": np.array([Call(os.system, f"touch {mark}"), None], dtype=object)})
    with pytest.raises(ValueError, match=r"image\.npz: .*object array, and no pickle in it is read"):
        load_cams(tmp_path / "image.npz")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["whole.npy", "whole.npz"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_a_file_that_is_cut_off_says_so(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    save_cams(path, {14: np.random.default_rng(0).random((20, 30))})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=rf"{name}: The file is cut off.*Make it again\."):
        load_cams(path)


def test_the_arrays_of_an_npz_are_named_by_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", cat=np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"named\.npz: The keys are \['cat'\]"):
        load_cams(tmp_path / "named.npz")


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_map_without_a_pixel_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    np.savez(tmp_path / "empty.npz", **{"14": np.ones(shape)})
    with pytest.raises(ValueError, match=r"empty\.npz: Class 14 holds .*one \(H, W\) map"):
        load_cams(tmp_path / "empty.npz")


# ---------------------------------------------------------------- archives


def archive(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as file:
        warnings.simplefilter("ignore")  # of the same name twice
        for name, data in entries:
            file.writestr(name, data)
    return path


def npy(shape: tuple[int, ...], data: bytes, descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


ONE = npy((1, 1), b"\0\0\x80\x3f")


@pytest.mark.parametrize("other", ["014", "+14", "1_4", " 14", "\u0661\u0664", "-0", "14.0"])
def test_names_that_mean_the_same_number_do_not_replace_one_another(tmp_path: Path, other: str) -> None:
    for names in ([other], ["14", other]):
        path = archive(tmp_path / "image.npz", [(f"{name}.npy", ONE) for name in names])
        with pytest.raises(ValueError, match=rf"image\.npz: The keys are .*{re.escape(repr(other))}.*0-based"):
            load_cams(path)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    for names in (["14.npy", "14.npy"], ["14.npy", "14"]):
        with pytest.raises(ValueError, match=r"image\.npz: The file has the array '14' twice"):
            load_cams(archive(tmp_path / "image.npz", [(name, ONE) for name in names]))


@pytest.mark.parametrize("shape", [(2, 2), (10**6, 10**6), (0, 10**12), (2**62, 8), (-1, 1)])
def test_a_shape_that_the_archive_does_not_fill_is_not_believed(tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=r"image\.npz: The file (is cut off|is damaged|holds an array whose)|\.npz: Class 0"
    ):
        load_cams(archive(tmp_path / "image.npz", [("0.npy", npy(shape, b"\0\0\x80\x3f"))]))


def test_what_an_archive_expands_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = npy((1000, 1000), bytes(4_000_000))
    path = archive(tmp_path / "image.npz", [("0.npy", zeros), ("1.npy", zeros)])
    assert path.stat().st_size < 10_000
    assert len(load_cams(path)) == 2
    monkeypatch.setattr(numpy_files, "MOST_BYTES", 8_000_000)
    with pytest.raises(ValueError, match=r"image\.npz: The file expands to 8,000,256 bytes.*8,000,000"):
        load_cams(path)
    flags = npy((1000, 1000), bytes(1_000_000), "|b1")
    assert len(load_cams(archive(path, [("0.npy", flags), ("1.npy", flags)]))) == 2
    with pytest.raises(ValueError, match=r"image\.npz: The file expands to 12,000,000 bytes.*8,000,000"):
        load_cams(archive(path, [(f"{number}.npy", flags) for number in range(3)]))


def test_an_entry_that_expands_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "image.npz", [("0.npy", npy((1000, 1000), bytes(4_000_000)))])
    said = (len(npy((1000, 1000), b"")) + 4_000_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(said, (200).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"image\.npz: The file is cut off"):
        load_cams(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_numpy_does_not_write_is_refused(tmp_path: Path, compression: int) -> None:
    """Python expands these whole, whatever size they say."""
    with pytest.raises(ValueError, match=r"image\.npz: The array '0' is encrypted, or compressed"):
        load_cams(archive(tmp_path / "image.npz", [("0.npy", ONE)], compression))


def test_damage_anywhere_in_an_archive_is_named_or_changes_nothing(tmp_path: Path) -> None:
    maps = {14: np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)}
    save_cams(tmp_path / "image.npz", maps)
    data = (tmp_path / "image.npz").read_bytes()
    for at in range(len(data)):
        (tmp_path / "image.npz").write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        found = maps_or_message(tmp_path / "image.npz")
        if isinstance(found, str):
            assert "image.npz: " in found
        else:  # a field that says nothing of the content, such as a date
            assert_same_maps(found, maps)


def maps_or_message(path: Path) -> Maps | str:
    try:
        return load_cams(path)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["image.npy", "image.npz"])
def test_a_header_of_another_length_is_not_parsed(tmp_path: Path, name: str) -> None:
    header = b"\x93NUMPY\x02\x00" + (2**20).to_bytes(4, "little") + b"(" * 2**20
    path = tmp_path / name
    path.write_bytes(header) if name == "image.npy" else archive(path, [("0.npy", header)])
    with pytest.raises(ValueError, match=rf"{name}: The file is cut off, or no \.npy file"):
        load_cams(path)
