"""What is read can do no harm: forged pickles run nothing and read nothing beyond their own numbers."""

import io
import os
import pickle
import pickletools
import re
import struct

import numpy as np
import pytest
import torch

from acr_reg.integrations.formats import FORMATS, load_cams
from tests.support.class_maps import Call, write_npy


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
