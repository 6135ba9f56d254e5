"""The benchmark of a GPU on small models: on the CPU, and on the GPU where there is one. While it times every variant
of the loss and of class maps, it compares them with the published procedure, and it survives what fails."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm  # this file is left out where the extras are not installed
import torch

from acr_reg import AllPairsConsistencyLoss
from benchmarks.cost.gpu import cases, command, measure, page
from benchmarks.cost.gpu.cases import BRAIN, CLASS_MAPS, FULL, HALF, KEYS, LARGEST, PROFILE, STEP, Case
from benchmarks.cost.gpu.command import STAND_IN, run
from benchmarks.cost.models import Setting
from benchmarks.cost.variants import GRAD_CAM
from tests.support.devices import stand_in_devices

SMALL = Setting("tiny", 32, 2, 2)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _fresh_references():
    measure._consistency.cache_clear()
    measure._published_maps.cache_clear()


@pytest.fixture(scope="module", params=DEVICES)
def rows(request, tmp_path_factory):
    """All rows, which were also written one after another, and the file."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    found = list(run(cases.stand_in(), replace(STAND_IN, device=request.param), out, seconds=600))
    return found, out


def test_every_variant_in_every_precision_is_as_the_published_procedure(rows):
    found = {tuple(row[name] for name in ("what", "precision", "variant")): row for row in rows[0]}
    allowed = {(STEP, FULL): (1e-6, 1e-4), (STEP, BRAIN): (1e-2, 0.1), (STEP, HALF): (1e-3, 1e-2)}
    allowed |= {(CLASS_MAPS, FULL): (1e-5,), (CLASS_MAPS, BRAIN): (0.03,)}
    compared = [key for key in found if key[:2] in allowed and key[2] not in ("plain", "forward", GRAD_CAM)]
    assert len(compared) == 4 + 4 + 2 + 4 + 2
    for key in compared:
        errors = found[key]["errors"]
        assert all(error < most for error, most in zip(errors, allowed[key[:2]], strict=True)), (key, errors)
    assert all(row["milliseconds"][1] > 0 for row in rows[0] if row["variant"] != GRAD_CAM)
    assert not [row for row in rows[0] if row["right"] is False]


def test_the_largest_batch_and_the_profile_are_found(rows):
    found = {row["what"]: row for row in rows[0]}
    assert found[LARGEST]["fits"] == 4
    assert {"aten::mm", "aten::addmm"} & {name for name, *_ in found[PROFILE]["operations"]}
    assert set(found[PROFILE]["counts"]) == set(measure.COUNTED)


def test_each_row_is_in_the_file_and_a_second_call_goes_on(rows, tmp_path):
    found, out = rows
    record = json.loads(out.read_text())
    assert len(record["results"]) == len(found) == len(cases.stand_in())
    begun = tmp_path / "begun.json"
    begun.write_text(json.dumps({**record, "results": record["results"][2:]}))
    limits = replace(STAND_IN, device="cuda" if record["device"] != "CPU" else "cpu")
    again = list(run(cases.stand_in(), limits, begun, seconds=600))
    assert len(again) == 2
    assert not list(run(cases.stand_in(), limits, begun, seconds=0))
    begun.write_text(json.dumps({**record, "torch": "1.0"}))
    with pytest.raises(command.CannotMeasure, match=r"results of .*'torch': '1\.0'.*--out"):
        list(run(cases.stand_in(), limits, begun, seconds=600))
    assert len(list(run(cases.stand_in()[:1], limits, begun, seconds=600, again=True))) == 1
    assert len(json.loads(begun.read_text())["results"]) == 1


def test_the_page_shows_every_row(rows):
    text = page.section(rows[1])
    assert "None of 22 rows is wrong" in text
    assert text.count("| tiny | 32 ") == 3 + 1 + 2
    assert "| float16 | " in text and "4 (" in text and "aten::" in text
    assert "Unmeasured" in page.section(rows[1].parent / "none.json")


def test_no_time_means_no_rows():
    assert list(run(cases.stand_in(), STAND_IN, None, seconds=-1)) == []


def test_a_wrong_loss_is_told(monkeypatch, capsys, tmp_path):
    right = AllPairsConsistencyLoss.paper

    def wrong(view):
        acr = right(view)
        acr.weights["activation"] *= 1.01
        return acr

    monkeypatch.setattr(AllPairsConsistencyLoss, "paper", wrong)
    monkeypatch.setattr(command, "stand_in", lambda: [Case(STEP, SMALL, FULL, "blockwise")])
    out = tmp_path / "gpu.json"
    assert command.main(["--stand-in", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "WRONG" in said and "1 of them wrong" in said
    assert "1 of 1 rows are wrong" in page.section(out)
    assert "blockwise" in page.section(out)


def test_half_precision_may_be_as_far_off_as_the_published_procedure_in_it():
    case = Case(STEP, SMALL, BRAIN, "blockwise")
    assert not measure._right(case, (0.001, 0.5), None)
    assert measure._right(case, (0.001, 0.5), (0.001, 0.4))
    assert not measure._right(case, (0.001, 0.7), (0.001, 0.4))
    assert not measure._right(replace(case, precision=FULL), (1e-7, 0.5), (1e-7, 0.4))


def test_what_fails_is_recorded_and_the_next_case_is_measured(monkeypatch):
    def full(self, *args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    def broken(self, *args):
        raise RuntimeError("no kernel image is available")

    case = Case(STEP, SMALL, BRAIN, "blockwise")
    for failure, note, right in ((full, "out of memory", None), (broken, "RuntimeError: no kernel image", False)):
        with monkeypatch.context() as patched:
            patched.setattr(timm.layers.Mlp, "forward", failure)
            row = measure.measure(case, STAND_IN)
        assert row.note.startswith(note) and row.right is right and row.milliseconds is None
        after = measure.measure(case, STAND_IN)
        assert after.right and after.note is None


def test_where_the_published_procedure_does_not_fit_the_library_is_the_reference(monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("benchmarks.cost.variants.published_consistency", full)
    monkeypatch.setattr("benchmarks.cost.variants.published_cam", full)
    row = measure.measure(Case(STEP, SMALL, BRAIN, "dense"), STAND_IN)
    assert row.right and row.note == "compared with blockwise in float32"
    row = measure.measure(Case(CLASS_MAPS, SMALL, BRAIN, "library"), STAND_IN)
    assert row.right and row.note == "compared with library in float32"
    assert measure.measure(Case(STEP, SMALL, FULL, "published"), STAND_IN).note == "out of memory"


def test_the_largest_batch_is_the_last_that_fitted(monkeypatch):
    made = measure.make_step

    def limited(variant, setting, *args, **kwargs):
        if setting.batch > 8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return made(variant, setting, *args, **kwargs)

    monkeypatch.setattr(measure, "make_step", limited)
    assert measure.measure(Case(LARGEST, SMALL, FULL, "plain"), replace(STAND_IN, most=64)).fits == 8


def test_on_a_device_nothing_of_a_case_is_left_on_the_cpu(monkeypatch):
    cuda = {"max_memory_allocated": 2**20, "reset_peak_memory_stats": None, "set_per_process_memory_fraction": None}
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    monkeypatch.setattr(measure, "_cuda_time", measure._cpu_time)
    monkeypatch.setattr(measure, "_free", lambda device: None)
    monkeypatch.setattr(measure, "device_memory", lambda: 48 * 2**30)
    tiny, limits = replace(SMALL, batch=1), replace(STAND_IN, device="cuda", most=1)
    with stand_in_devices():
        for what, variant in ((STEP, "rows"), (CLASS_MAPS, "library"), (LARGEST, "plain")):
            row = measure.measure(Case(what, tiny, BRAIN, variant), limits)
            assert row.note is None and row.peak_mb == 1, (what, variant, row.note)


def test_the_first_cases_are_one_setting_in_every_precision_and_none_comes_twice():
    keys = [tuple(case.key.values()) for case in cases.on_gpu()]
    assert len(set(keys)) == len(keys) > 100
    assert {case.precision for case in cases.on_gpu()[:15]} == {FULL, BRAIN, HALF}
    assert {case.setting.model for case in cases.on_gpu()} == {"small", "base", "large"}
    assert {224, 384, 512, 768} <= {case.setting.size for case in cases.on_gpu()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so(capsys):
    assert command.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not command.FILE.exists()
    assert tuple(cases.on_gpu()[0].key) == KEYS
