"""What is read can do no harm: forged pickles run nothing and read nothing beyond their own numbers."""

import io
import os
import pickle
import pickletools
import re
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from acr_reg.integrations.formats import FORMATS, image_labels, load_cams, numpy_files, save_cams, unpickle
from tests.support.class_maps import Call, write_npy
from tests.support.paths import ROOT


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


def text(value: bytes) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value


NO_STATE = b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"  # of a dtype
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"


def pickle_of_array(dtype_state: bytes, code: str, raw: bytes) -> bytes:
    """{0: an array of one number} with the dtype's state and the array's bytes chosen freely, opcode by opcode."""
    dtype = b"cnumpy\ndtype\n(" + text(code.encode()) + b"\x89\x88tR" + dtype_state + b"b"
    return b"\x80\x03}K\x00" + ARRAY + b"(K\x01K\x01\x85" + dtype + b"\x89C" + bytes([len(raw)]) + raw + b"tbs."


def test_forged_dtypes_do_not_make_numpy_read_pointers(tmp_path):
    """An object dtype whose flags deny it: numpy itself would take the bytes for addresses and crash."""
    pickletools.dis(pickle_of_array(NO_STATE, "O8", b"A" * 8), io.StringIO())  # well formed
    for code in ["O8", "V8", "M8", "U2", "O"]:
        with pytest.raises(ValueError, match=rf"array of objects of shape \(1,\)|numbers of type '{code}'"):
            load_cams(write_npy(tmp_path / "image.npy", pickle_of_array(NO_STATE, code, b"A" * 8)))
    with pytest.raises(ValueError, match=r"[Cc]lass 0 .*float64 array of shape \(1,\)"):
        load_cams(write_npy(tmp_path / "image.npy", pickle_of_array(NO_STATE, "f8", struct.pack("<d", 1))))


def test_a_file_cannot_change_a_dtype_of_this_process(tmp_path):
    """State set on whatever a torch storage type resolves to must not reach numpy's own float32."""
    pickled = b"\x80\x03}K\x00ctorch\nFloatStorage\n" + NO_STATE + b"bs."
    with pytest.raises(ValueError, match=r"image\.npy: The file asks for torch\.FloatStorage"):
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


# ---------------------------------------------------------------- what a few bytes may cost


def doubled(start: bytes, again: bytes, levels: int) -> bytes:
    """A value that holds itself, one level lower, twice: 2^levels values in a few bytes each."""
    return start + b"".join(b"q" + bytes([level]) + again.replace(b"?", bytes([level])) for level in range(levels))


TUPLES = doubled(b")", b"h?\x86", 100)
LISTS = doubled(b"]", b"](h?h?e", 100)
DICTS = doubled(b"}", b"}(K\x00h?K\x01h?u", 100)
COSTLY = {
    "a tuple of tuples as a key": (b"}" + TUPLES + b"Ns.", "has a tuple as a key"),
    "tuples as a value": (b"}K\x00" + TUPLES + b"s.", "more than 6 levels"),
    "lists as a value": (LISTS + b"q\xff}K\x00h\xffs.", "more than 6 levels"),
    "dicts": (DICTS + b".", "more than 6 levels"),
    "dicts of few levels": (
        doubled(b"}", b"}(" + b"".join(b"K%ch?" % n for n in range(40)) + b"u", 5) + b".",
        "own size",
    ),
    "a dict in itself": (b"}q\x00K\x00h\x00s.", "more than 6 levels"),
    "tuples as the name of a function": (b"X\x05\0\0\0numpy" + TUPLES + b"\x93.", "names a function by a tuple"),
    "tuples as a type": (b"cnumpy\ndtype\n" + TUPLES + b"\x85R.", "damaged: TypeError"),
    "tuples as a shape": (ARRAY + b"(K\x01" + TUPLES + b"NNNtb.", "shape is not one"),
    "tuples as an announcement": (b"(" + TUPLES + b"NNtQ.", "refers to a tuple"),
    "a set of tuples": (b"\x8f(" + TUPLES + b"\x90.", "instruction 0x8f"),
    "tuples in an OrderedDict": (b"ccollections\nOrderedDict\n" + TUPLES + b"\x85R.", "damaged: TypeError"),
    "a memo of 2 GB": (b"}r\xff\xff\xff\x0f0.", "instruction 0x30"),
    "bytes of 2^40": (b"\x8e\0\0\0\0\0\1\0\0.", "cut off"),
    "bytes that may change": (b"\x96\0\0\0\0\0\1\0\0.", "instruction 0x96"),
    "a text of 2^31": (b"X\0\0\0\x80.", "cut off"),
    "a number of 2^31 bytes": (b"\x8b\xff\xff\xff\x7f.", "instruction 0x8b"),
    "a key of 2000 characters": (b"}X\xd0\x07\0\0" + b"a" * 2000 + b"Ns.", "key of 2000 characters"),
    "no end": (b"}" * 1000, "cut off"),
    "nothing to take": (b"R", "damaged: "),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_few_bytes_cannot_ask_for_hours_or_gigabytes(tmp_path, name):
    pickled, message = COSTLY[name]
    path = write_npy(tmp_path / "image.npy", b"\x80\x04" + pickled)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"image\.npy: .*{re.escape(message)}") as caught:
            load_cams(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (b"cnumpy.core.multiarray\nscalar\n", "a function"),
        (b"cnumpy.core.multiarray\n_reconstruct\n", "a type"),
        (b"ccollections\nOrderedDict\n", "a function"),
        (b"cnumpy\nndarray\n", "a str"),
        (b"}", "a dict"),
        (b"]", "a list"),
        (b"K\x01", "a int"),
    ],
)
def test_a_file_sets_no_attribute_of_what_it_did_not_make(tmp_path, target, kind):
    """The reader's own functions would carry them into the next file."""
    pickled = b"\x80\x04}" + target + b"}" + text(b"forged") + b"K\x01sb" + b"Ns."
    with pytest.raises(ValueError, match=rf"image\.npy: The file (sets attributes of {kind}|has)"):
        load_cams(write_npy(tmp_path / "image.npy", pickled))
    assert not any(hasattr(named, "forged") for named in unpickle._NAMES.values())


def test_an_array_that_a_file_holds_many_times_counts_each_time(tmp_path, monkeypatch):
    """Each of them becomes a map of its own."""
    shared = np.ones((10, 10), np.float32)
    np.save(tmp_path / "image.npy", dict.fromkeys(range(100), shared))
    assert len(load_cams(tmp_path / "image.npy")) == 100
    monkeypatch.setattr(unpickle, "MOST_BYTES", 39_999)
    with pytest.raises(ValueError, match=r"image\.npy: The file holds far more than its own size"):
        load_cams(tmp_path / "image.npy")
    np.save(tmp_path / "image.npy", {number: shared + number for number in range(100)})  # more, as the file itself is
    assert len(load_cams(tmp_path / "image.npy")) == 100


def test_a_text_that_a_file_decodes_many_times_counts_each_time(tmp_path, monkeypatch):
    call = b"c_codecs\nencode\nh\x00R"
    pickled = b"\x80\x04(" + text(b"a" * 200) + text(b"latin1") + b"\x86q\x00" + call * 50 + b"t."
    with pytest.raises(ValueError, match="holds a bytes"):
        load_cams(write_npy(tmp_path / "image.npy", pickled))
    monkeypatch.setattr(unpickle, "MOST_BYTES", 9_999)
    with pytest.raises(ValueError, match="far more than its own size"):
        load_cams(write_npy(tmp_path / "image.npy", pickled))


def test_instructions_are_counted_through_the_pickles_of_torch_storages(tmp_path, monkeypatch):
    np.save(tmp_path / "image.npy", {number: torch.ones(2, 2) for number in range(10)})
    assert len(load_cams(tmp_path / "image.npy")) == 10
    monkeypatch.setattr(unpickle, "MOST_INSTRUCTIONS", 500)
    with pytest.raises(ValueError, match="more than 500 pickle instructions"):
        load_cams(tmp_path / "image.npy")


def test_a_tensor_is_no_storage(tmp_path):
    """Its strides are its own: a second one over it would read beyond the file."""
    whole = torch.arange(6.0).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=whole, dtype=torch.float32, _internal=True)
    inner = Call(torch._utils._rebuild_tensor_v2, storage, 5, (6,), (0,), False, {})
    np.save(tmp_path / "image.npy", {0: Call(torch._utils._rebuild_tensor_v2, inner, 0, (2, 3), (3, 1), False, {})})
    with pytest.raises(ValueError, match="damaged: AttributeError"):
        load_cams(tmp_path / "image.npy")


def test_a_key_that_a_file_has_twice_is_refused(tmp_path):
    for keys in (b"K\x01NK\x01N", b"K\x01N\x88N", b"K\x01NG?\xf0\0\0\0\0\0\0N"):
        with pytest.raises(ValueError, match=r"image\.npy: The file has the key .* twice"):
            load_cams(write_npy(tmp_path / "image.npy", b"\x80\x04}(" + keys + b"u."))


def test_a_memory_that_is_too_small_is_said(tmp_path, monkeypatch):
    def full(*arguments):
        raise MemoryError

    for name in ("image.npy", "image.npz"):
        save_cams(tmp_path / name, {0: np.ones((2, 2))})
    monkeypatch.setattr(np, "frombuffer", full)
    for name in ("image.npy", "image.npz"):
        with pytest.raises(ValueError, match=rf"{name}: The memory is too small"):
            load_cams(tmp_path / name)


def test_the_page_states_the_limits():
    page = (ROOT / "docs" / "reference" / "formats.md").read_text()
    assert unpickle.MOST_BYTES == numpy_files.MOST_BYTES == 2 * 2**30
    for value in (
        f"{unpickle.MOST_INSTRUCTIONS // 10**6} million",
        f"{unpickle.DEEPEST} levels",
        f"{unpickle.LONGEST_TEXT:,}",
        f"{image_labels.MOST_LABELS // 10**6} million",
        "2 GiB",
    ):
        assert f" {value}" in page
