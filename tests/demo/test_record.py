"""The record of a run: complete JSON files, and the peak memory of a block."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch

from acr_reg.demo.record import Meter, peak_memory, run_details, write_json
from acr_reg.integrations.formats.write import replacing


@dataclass(frozen=True)
class Figure:
    name: str
    value: float


def test_dataclasses_are_written_as_plain_values(tmp_path: Path):
    path = tmp_path / "new" / "run.json"
    write_json(path, {"figures": [Figure("mIoU", 0.5)], "size": (2, 3)})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"figures": [{"name": "mIoU", "value": 0.5}], "size": [2, 3]}
    assert text.startswith('{\n "figures"') and text.endswith("}\n")


def test_one_line_for_each_entry(tmp_path: Path):
    path = tmp_path / "run.json"
    write_json(path, {"figure": Figure("mIoU", 0.5), "curve": [0.1, 0.2]}, lines=True)
    assert path.read_text(encoding="utf-8") == '{\n"figure": {"name": "mIoU", "value": 0.5},\n"curve": [0.1, 0.2]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"figure": float("nan")}, lines=True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("value", "error"), [(float("nan"), "not JSON compliant"), (Path("x"), "hold a PosixPath")])
def test_what_json_cannot_hold_leaves_the_file_as_it_was(tmp_path: Path, value: object, error: str):
    path = tmp_path / "run.json"
    write_json(path, [1])
    with pytest.raises((ValueError, TypeError), match=error):
        write_json(path, [2, value])
    assert json.loads(path.read_text(encoding="utf-8")) == [1]


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "run.json"
    path.write_text("whole")

    def interrupted() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_details_name_the_versions_and_the_machine():
    details = run_details()
    assert set(details) == {"command", "versions", "machine"}
    assert details["versions"]["torch"] == metadata.version("torch")
    assert details["machine"]["torch_threads"] == torch.get_num_threads()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot forget a peak")
def test_the_meter_sees_the_peak_of_its_block():
    with Meter() as before:
        pass
    with Meter() as during:
        torch.ones(2**26).sum()  # 256 MiB
    assert during.peak_memory - before.peak_memory > 200 * 2**20
    assert peak_memory() >= during.peak_memory
    assert during.seconds > 0 and during.cpu_seconds > 0
