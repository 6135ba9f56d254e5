"""A folder filled by several processes: killed in the middle and started again, it holds everything once."""

import functools
import json
import os
import time
from datetime import timedelta

import numpy as np
import pytest

from acr_reg.integrations.formats import load_cams
from acr_reg.integrations.jobs import meeting
from acr_reg.integrations.jobs.folder import CamFolder, fill
from tests.support.processes import Program, free_port, programs
from tests.support.ranks import needs_gloo, on_two_ranks
from tests.support.shared_run import COUNT, NAMES, calls, make_photos

OLD = ".001.npy.0123456789abcdef0123456789abcdef"
YOUNG = ".002.npy.0123456789abcdef0123456789abcdef"


@pytest.fixture
def folder(tmp_path):
    make_photos(tmp_path)
    return tmp_path


@pytest.fixture
def started():
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(folder, processes, world, *arguments, meet=True):
    """``world`` processes, each with its RANK; they meet as under torchrun, or hear nothing of each other."""
    variables = {} if meet else {"MASTER_ADDR": None, "MASTER_PORT": None}
    command = ["-W", "error", "-m", "tests.support.shared_run", folder, *arguments]
    processes += programs(world, *command, port=port(), **variables)
    return processes[-world:]


@functools.cache
def port():
    """One for all processes of this test run."""
    return free_port()


def ended(processes):
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    return errors


def whole(folder):
    return sorted(path.stem for path in (folder / "cams").glob("*.npy"))


def wait_for(number, folder):
    end = time.monotonic() + 100
    while len(whole(folder)) < number:
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_complete(folder):
    assert whole(folder) == NAMES
    for number, name in enumerate(NAMES):
        assert load_cams(folder / "cams" / f"{name}.npy")[0].shape == (6 + number % 3, 8)


def reports(folder, world, target="cams"):
    return [json.loads((folder / f"{target}_report_{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(("killed", "then"), [([0, 1], 2), ([0], 3)])
def test_a_killed_run_is_taken_up_again_with_nothing_lost_and_nothing_twice(folder, started, killed, then):
    first = start(folder, started, 2, "0.5")  # seconds a batch: it is killed before its end
    wait_for(5, folder)
    for rank in killed:
        first[rank].kill()
    if killed == [0]:  # the other one may end its share, and must not wait for ever
        error = first[1].communicate()[1]
        assert first[1].returncode != 0
        assert "Another process of this run ended early" in error
    for process in first:
        process.wait()
    done, made = whole(folder), len(calls(folder))
    assert 5 <= len(done) < COUNT
    for name in (OLD, YOUNG):
        (folder / "cams" / name).touch()
    os.utime(folder / "cams" / OLD, (0, 0))

    errors = ended(start(folder, started, then, "0"))
    assert_complete(folder)
    missing = [name for name in NAMES if name not in done]
    assert sorted(calls(folder)[made:]) == missing
    assert sorted(calls(folder, "more")) == NAMES
    assert reports(folder, then) == [[missing, done, {}]] * then
    assert reports(folder, then, "more") == [[NAMES, [], {}]] * then
    summaries = [line for error in errors for line in error.splitlines() if "written" in line]
    assert len(summaries) == 2  # one a run
    assert summaries[0].endswith(f"cams: {len(missing)} written, {len(done)} already there, 0 failed")
    assert not (folder / "cams" / OLD).exists()
    assert (folder / "cams" / YOUNG).exists()  # another run may be writing it


def test_torchrun_restarts_a_killed_process(folder, started):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--master-port", port()]
    started.append(Program(*torchrun, "-m", "tests.support.shared_run", folder, "0.01", "015"))
    ended(started)
    assert_complete(folder)
    (written, existing, failed), other = reports(folder, 2)
    assert other == [written, existing, failed]
    assert sorted(written + existing) == NAMES
    assert existing
    assert not failed
    assert set(calls(folder)) == set(NAMES)


def test_processes_of_an_array_do_their_shares_and_say_so(folder, started):
    errors = ended(start(folder, started, 2, "0", meet=False))
    assert_complete(folder)
    assert [len(written) for written, _, _ in reports(folder, 2)] == [12, 12]
    for rank, error in enumerate(errors):
        assert f"cams: share {rank + 1} of 2: 12 written, 0 already there, 0 failed" in error


def fill_on(rank, folder, names):
    def read(name):
        if name == "c":
            raise ValueError("no such photo")
        return {0: np.full((2, 2), 0.5)}, None

    try:
        report = fill(CamFolder(folder, "psa"), names, read, "Maps", False, True)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return [report.written, report.existing, report.failed]


def in_group(folder, rank):
    """Runs of two processes that the caller has joined in a group, by name. They start in one folder."""
    runs = {
        "orders": [["d", "a", "c", "b"], ["a", "b", "c", "d"]],
        "other lists": [["a", "b"], ["c", "d"]],
        "other format": [["a", "b"], ["a", "b"]],
    }
    found = {name: fill_on(rank, folder / name, lists[rank]) for name, lists in runs.items()}
    if rank == 0:
        meeting.WAIT_FOR_START = timedelta(seconds=2)
        found["alone"] = fill_on(rank, folder / "alone", ["a"])
    return found  # to a barrier, where rank 1 waits for rank 0 meanwhile, as in a training script


@needs_gloo
def test_a_process_group_of_the_caller_is_used(tmp_path):
    (tmp_path / "ranks").mkdir()
    irn = CamFolder(tmp_path / "other format", "irn")
    fill(irn, ["a"], lambda name: ({0: np.ones((2, 2))}, None), "", False, False)
    first, second = on_two_ranks(functools.partial(in_group, tmp_path), tmp_path / "ranks")

    failed = {"c": "no such photo"}
    assert first["orders"] == [["d", "a", "b"], [], failed]  # each report in the order of its list
    assert second["orders"] == [["a", "b", "d"], [], failed]
    assert sorted(os.listdir(tmp_path / "orders")) == ["a.npy", "b.npy", "d.npy"]

    assert first["other lists"] == second["other lists"]
    assert "2 processes of this run were given different images" in first["other lists"]
    assert os.listdir(tmp_path / "other lists") == []

    assert first["other format"] == second["other format"]  # only one has the file in its share
    assert "a.npy of an earlier run is not in the format psa" in first["other format"]
    assert os.listdir(tmp_path / "other format") == ["a.npy"]

    assert "Not all of the 2 processes started this run within 0:00:02" in first["alone"]
    assert "share=False" in first["alone"]
    assert not (tmp_path / "alone").exists()
