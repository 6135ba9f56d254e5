"""Files of class maps: what is written can be read by their users, what is read can do no harm."""

import io
import os
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from acr_reg.integrations.formats import load_cams, save_cams


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
    }


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("name", list(hostile_files("")))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, name, protocol):
    mark = tmp_path / "mark"
    content = hostile_files(mark)[name]
    path = write_npy(tmp_path / "image.npy", pickle.dumps(np.array([content, None])[:1].reshape(()), protocol=protocol))
    with pytest.raises(ValueError, match=r"image.npy: the file asks for .*not read"):
        load_cams(path)
    assert not mark.exists()


def test_the_hostile_pickles_are_hostile(tmp_path):
    """The test above means something: np.load runs the same file."""
    mark = tmp_path / "mark"
    np.save(tmp_path / "image.npy", hostile_files(mark)["system"], allow_pickle=True)
    np.load(tmp_path / "image.npy", allow_pickle=True)
    assert mark.exists()


def test_code_inside_a_torch_storage_is_not_run(tmp_path):
    """torch unpickles the bytes of a storage without restriction; here they go through the same reader."""
    mark = tmp_path / "mark"
    inner = pickle.dumps(Call(os.system, f"touch {mark}"))
    np.save(tmp_path / "image.npy", {"keys": np.array([1]), "high_res": Call(torch.storage._load_from_bytes, inner)})
    with pytest.raises(ValueError, match=r"the file asks for (posix|nt)\.system"):
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
        with pytest.raises(ValueError, match=r"found (an array of objects|numbers of type)"):
            load_cams(write_npy(tmp_path / "image.npy", pickle_of_array(state, code, b"A" * 8)))
    with pytest.raises(ValueError, match=r"class 0 holds a float64 array of shape \(1,\)"):
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
        with pytest.raises(ValueError, match=r"storage of 6 numbers|out of bounds"):
            load_cams(tmp_path / "image.npy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((20, 4, 5), dtype=np.float32), r"found a float32 array of shape \(20, 4, 5\), expected a dict"),
        ([np.zeros((4, 5))], "expected a dict"),
        ({"keys": np.array([1]), "attn_highres": np.zeros((1, 4, 5))}, r"found keys \['keys', 'attn_highres'\]"),
        ({"keys": np.array([1, 2]), "high_res": np.zeros((1, 4, 5))}, r"expected \(n,\) and \(n, H, W\)"),
        ({-1: np.zeros((4, 5))}, r"found keys \[-1\]"),
        ({True: np.zeros((4, 5))}, r"found keys \[True\]"),
        ({0: np.zeros((1, 4, 5))}, r"class 0 holds a float64 array of shape \(1, 4, 5\)"),
        ({0: np.zeros((4, 5)), 1: np.zeros((5, 4))}, "maps differ in size"),
        ({0: "text"}, "class 0 holds"),
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
    with pytest.raises(ValueError, match=r"ends in '\.txt'"):
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
        ({0: np.full((4, 5), 2.0)}, "from 2 to 2, expected"),
        ({0: np.full((4, 5), np.nan)}, "from nan to nan, expected"),
        ({0: np.full((4, 5), -0.5)}, "from -0.5 to -0.5, expected"),
        ({"0": np.zeros((4, 5))}, r"found keys \['0'\]"),
        ({0: np.zeros(4)}, "class 0 holds"),
        ({0: np.zeros((4, 5)), 1: np.zeros((5, 4))}, "maps differ in size"),
        ([np.zeros((4, 5))], "found a list"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_save_refuses_bad_maps_and_leaves_nothing(tmp_path, cams, message, suffix):
    with pytest.raises(ValueError, match=message):
        save_cams(tmp_path / f"image{suffix}", cams)
    assert os.listdir(tmp_path) == []


def test_save_refuses_other_endings(tmp_path, maps):
    with pytest.raises(ValueError, match=r"ends in '\.png', expected"):
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
