"""Files of class maps: what is written can be read by their users, what is read can do no harm."""

import io
import os
import pickle
import pickletools
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from acr_reg.integrations.formats import FORMATS, cam_format, load_cams, resize_map, save_cams, save_crf_pair


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    return {14: rng.random((5, 8), dtype=np.float32), 2: rng.random((5, 8), dtype=np.float32)}


def assert_same_maps(found, expected):
    assert found.keys() == expected.keys()
    for number, values in found.items():
        assert type(number) is int
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, np.asarray(expected[number], dtype=np.float32))


def write_npy(path: Path, pickled: bytes) -> Path:
    """A .npy file with this pickle, as np.save writes it around objects."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(pickled)
    return path


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


def test_evaluation_scripts_can_read_it(tmp_path, maps):
    """They call np.load(..., allow_pickle=True).item(), some of them with numpy 1, which knows no numpy._core."""
    save_cams(tmp_path / "image.npy", {np.int64(14): maps[14], 2: torch.from_numpy(maps[2]).double()})
    assert_same_maps(np.load(tmp_path / "image.npy", allow_pickle=True).item(), maps)
    content = (tmp_path / "image.npy").read_bytes()
    assert b"numpy.core.multiarray" in content
    assert b"numpy._core" not in content


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


def test_reads_tensors_in_place_of_maps(tmp_path, maps):
    tensors = {number: torch.from_numpy(values.T.copy()).T for number, values in maps.items()}
    tensors[5] = torch.from_numpy(np.stack([maps[2], maps[14]]))[1]  # starts inside its storage
    np.save(tmp_path / "image.npy", tensors)
    assert_same_maps(load_cams(tmp_path / "image.npy"), {**maps, 5: maps[14]})


class Call:
    """Pickles to the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def in_every_format(folder, maps, **options):
    """A file of each format with these maps: {format: path}; of the CRF pair the low one."""
    paths = {format: folder / f"{format}{'.npz' if format == 'npz' else '.npy'}" for format in FORMATS}
    for format, path in paths.items():
        if format == "psa_crf":
            save_crf_pair(path, folder / "high.npy", maps, **options)
        else:
            save_cams(path, maps, format, **options)
    return paths


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
    expected = ratio[0, 0] if format == "irn" else 1  # of the maximum
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


def test_an_image_without_classes_in_every_format(tmp_path):
    paths = in_every_format(tmp_path, {}, size=(6, 9))
    for format, path in paths.items():
        assert load_cams(path, format) == {}
    assert np.load(paths["irn"], allow_pickle=True).item()["cam"].shape == (0, 2, 3)
    assert np.load(paths["clip_es"], allow_pickle=True).item()["attn_highres"].shape == (0, 6, 9)
    assert np.load(paths["psa_crf"], allow_pickle=True).item()[0].tolist() == np.ones((6, 9)).tolist()
    for format in ("irn", "clip_es"):
        with pytest.raises(ValueError, match=r"no maps .*size=\(H, W\)"):
            save_cams(tmp_path / "image.npy", {}, format)


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


def test_unknown_format_and_size_are_refused(tmp_path, maps):
    save_cams(tmp_path / "image.npy", maps)
    with pytest.raises(ValueError, match=r"'voc'.* psa, psa_crf, irn, clip_es, npz"):
        load_cams(tmp_path / "image.npy", "voc")
    with pytest.raises(ValueError, match=r"size=\(0, 5\).*height.*width"):
        save_cams(tmp_path / "image.npy", maps, size=(0, 5))


def hostile_files(mark):
    """Pickles that would touch the file `mark` or call something else if they were believed."""
    good = np.zeros((2, 3), dtype=np.float32)
    return {
        "system": {0: good, 1: Call(os.system, f"touch {mark}")},
        "eval": Call(eval, f"open({str(mark)!r}, 'w')"),
        "open": {Call(open, str(mark), "w"): good},
        "getattr": {0: Call(getattr, good, "tofile")},
        "numpy": {0: Call(np.memmap, str(mark), "uint8", "w+", 0, (4,))},
        "torch": {0: Call(torch.load, str(mark))},
        "irn": {"keys": np.array([0]), "cam": Call(os.system, f"touch {mark}"), "high_res": good[None]},
        "clip_es": {"keys": Call(os.system, f"touch {mark}"), "attn_highres": good[None].astype(np.float16)},
    }


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("name", list(hostile_files("")))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, name, protocol, format):
    mark = tmp_path / "mark"
    content = hostile_files(mark)[name]
    path = write_npy(tmp_path / "image.npy", pickle.dumps(np.array([content, None])[:1].reshape(()), protocol=protocol))
    with pytest.raises(ValueError, match=r"image.npy: The file asks for .*not read"):
        load_cams(path, format)
    assert not mark.exists()


def test_the_hostile_pickles_are_hostile(tmp_path):
    """The test above means something: np.load runs the same file."""
    mark = tmp_path / "mark"
    for name in ("system", "irn", "clip_es"):
        np.save(tmp_path / "image.npy", hostile_files(mark)[name], allow_pickle=True)
        np.load(tmp_path / "image.npy", allow_pickle=True)
        assert mark.exists()
        mark.unlink()


def test_code_inside_a_torch_storage_is_not_run(tmp_path):
    """torch unpickles the bytes of a storage without restriction; here they go through the same reader."""
    mark = tmp_path / "mark"
    inner = pickle.dumps(Call(os.system, f"touch {mark}"))
    np.save(tmp_path / "image.npy", {"keys": np.array([1]), "high_res": Call(torch.storage._load_from_bytes, inner)})
    with pytest.raises(ValueError, match=r"(posix|nt)\.system.*not read"):
        load_cams(tmp_path / "image.npy")
    assert not mark.exists()


def pickle_of_array(dtype_state: bytes, code: str, raw: bytes) -> bytes:
    """{0: an array of one number} with the dtype's state and the array's bytes chosen freely, opcode by opcode."""
    dtype = b"cnumpy\ndtype\n(V" + code.encode() + b"\nI00\nI01\ntR" + dtype_state + b"b"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
    return b"\x80\x03}I0\n" + array + b"(I1\n(I1\nt" + dtype + b"I00\nC" + bytes([len(raw)]) + raw + b"tbs."


def test_forged_dtypes_do_not_make_numpy_read_pointers(tmp_path):
    """An object dtype whose flags deny it: numpy itself would take the bytes for addresses and crash."""
    state = b"(I3\nV|\nNNNI-1\nI-1\nI0\nt"
    pickletools.dis(pickle_of_array(state, "O8", b"A" * 8), io.StringIO())  # well formed
    for code in ["O8", "V8", "M8", "U2", "O"]:
        with pytest.raises(ValueError, match=rf"array of objects of shape \(1,\)|numbers of type '{code}'"):
            load_cams(write_npy(tmp_path / "image.npy", pickle_of_array(state, code, b"A" * 8)))
    with pytest.raises(ValueError, match=r"[Cc]lass 0 .*float64 array of shape \(1,\)"):
        load_cams(write_npy(tmp_path / "image.npy", pickle_of_array(state, "f8", struct.pack("<d", 1))))


def test_a_file_cannot_change_a_dtype_of_this_process(tmp_path):
    """State set on whatever a torch storage type resolves to must not reach numpy's own float32."""
    pickled = b"\x80\x03}I0\nctorch\nFloatStorage\n(I3\nV|\nNNNI-1\nI-1\nI63\ntbs."
    with pytest.raises(ValueError, match=r"image\.npy"):
        load_cams(write_npy(tmp_path / "image.npy", pickled))
    assert np.dtype(np.float32).flags == 0


def test_torch_tensors_stay_inside_their_storage(tmp_path):
    storage = torch.arange(6.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    beyond = [(0, (2, 4), (4, 1)), (4, (1, 3), (3, 1)), (0, (2, 3), (9, 1)), (0, (10**9, 9), (0, 0))]
    for offset, size, stride in beyond:
        tensor = Call(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, {})
        np.save(tmp_path / "image.npy", {0: tensor})
        with pytest.raises(ValueError, match=rf"{re.escape(str(size))}.*storage of 6 numbers|out of bounds"):
            load_cams(tmp_path / "image.npy")


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
    with pytest.raises(ValueError, match="allow_pickle"):
        load_cams(tmp_path / "image.npz")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("cams", "message"),
    [
        ({0: np.full((4, 5), 2.0)}, r"class 0 .*from 2 to 2\b.*\[0, 1\]"),
        ({0: np.full((4, 5), np.nan)}, r"class 0 .*from nan to nan\b.*\[0, 1\]"),
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


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, maps, monkeypatch, step):
    path = tmp_path / "image.npy"
    save_cams(path, maps)
    before = path.read_bytes()

    def full_disk(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError("No space left on device")

    def no_rename(source, target):
        assert Path(source).stat().st_size > 100  # the new file is whole by then
        raise OSError("No space left on device")

    if step == "write":
        monkeypatch.setattr(Path, "write_bytes", full_disk)
    else:
        monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="No space left"):
        save_cams(path, {0: maps[2]})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["image.npy"]
