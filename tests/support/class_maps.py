"""Files of class maps made for tests, in every format or forged, and the comparison of their maps."""

from pathlib import Path

import numpy as np

from acr_reg.integrations.formats import FORMATS, save_cams, save_crf_pair


def assert_same_maps(found, expected):
    assert found.keys() == expected.keys()
    for number, values in found.items():
        assert type(number) is int
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, np.asarray(expected[number], dtype=np.float32))


def in_every_format(folder, maps, **options):
    """A file of each format with these maps: {format: path}; of the CRF pair the low one."""
    paths = {format: folder / f"{format}{'.npz' if format == 'npz' else '.npy'}" for format in FORMATS}
    for format, path in paths.items():
        if format == "psa_crf":
            save_crf_pair(path, folder / "high.npy", maps, **options)
        else:
            save_cams(path, maps, format, **options)
    return paths


def write_npy(path: Path, pickled: bytes) -> Path:
    """A .npy file with this pickle, as np.save writes it around objects."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(pickled)
    return path


class Call:
    """Pickles to the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
