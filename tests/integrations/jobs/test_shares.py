"""Shares of a run: by the environment, disjoint and whole; the device of a process."""

import threading

import pytest
import torch

from acr_reg.integrations.jobs import meeting
from acr_reg.integrations.jobs.shares import Share, process_device, share_of_run
from tests.support.processes import free_port


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def set_to(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize("count", [0, 1, 5, 24])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_shares_are_disjoint_and_whole(count, world):
    shares = [Share(rank, world).of(range(count)) for rank in range(world)]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_has_everything(environment):
    with share_of_run() as share:
        assert share.of("abc") == ["a", "b", "c"]
        assert share.gather(7) == [7]
        assert share.speaks
        assert not share.is_apart


def test_a_process_of_an_array_has_its_share_and_hears_nothing(environment):
    environment(RANK="2", WORLD_SIZE="8")
    with share_of_run() as share:
        assert share.of(range(20)) == [2, 10, 18]
        assert share.gather(7) == [7]
        assert share.speaks
        assert share.is_apart
        assert str(share) == "share 3 of 8"
    with share_of_run(shared=False) as share:
        assert share.of("abc") == ["a", "b", "c"]
        assert not share.is_apart


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"RANK": "8", "WORLD_SIZE": "8"}, r"RANK='8' and WORLD_SIZE='8'.*0 to WORLD_SIZE - 1"),
        ({"RANK": "-1", "WORLD_SIZE": "8"}, r"RANK='-1'"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, r"RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"WORLD_SIZE='0'"),
        ({"RANK": "0", "WORLD_SIZE": "1.5"}, r"WORLD_SIZE='1\.5'"),
        ({"RANK": "", "WORLD_SIZE": ""}, r"RANK=''"),  # a variable of SLURM that is not set
        ({"RANK": "3"}, r"RANK is set .*WORLD_SIZE is not"),
        ({"WORLD_SIZE": "3"}, r"WORLD_SIZE is set .*RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, r"MASTER_PORT"),
    ],
)
def test_an_environment_that_names_no_process_is_refused(environment, values, facts):
    environment(**values)
    with pytest.raises(ValueError, match=facts), share_of_run():
        pass
    with share_of_run(shared=False) as share:
        assert share == Share()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_starts_a_run_alone_ends_soon(environment, monkeypatch, capsys, rank):
    """As where only the first process of a training script calls it."""
    monkeypatch.setattr(meeting, "WAIT_FOR_START", meeting.timedelta(seconds=1))
    monkeypatch.setattr(meeting, "SECONDS_BEFORE_NOTICE", 0.1)
    environment(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with pytest.raises(RuntimeError, match=r"Not all of the 2 processes .*0:00:01.*share=False"), share_of_run():
        pass
    if rank == "0":  # torch 2.1 connects to rank 0 without letting a thread write this
        assert "Waiting for all 2 processes to start this run." in capsys.readouterr().err
    for notice in [thread for thread in threading.enumerate() if type(thread) is threading.Timer]:
        notice.join(5)  # it was cancelled, or is at its last line
        assert not notice.is_alive()


def test_the_device_of_a_process(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environment(LOCAL_RANK="1")
    assert process_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process_device() == torch.device("cuda", 1)
    environment(LOCAL_RANK="2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2 .*has 2\. .*--nproc-per-node"):
        process_device()
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert process_device() == torch.device("cuda", 1)
