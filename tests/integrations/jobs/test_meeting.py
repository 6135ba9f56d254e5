"""Processes of a run meet through a store, whatever earlier runs left in it, and hear of each other's end."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from acr_reg.integrations.jobs import meeting
from acr_reg.integrations.jobs.meeting import Meeting


@pytest.fixture
def store(monkeypatch):
    """One store for two threads that stand for processes, each with a connection of its own."""
    server = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=20))
    clients = [dist.TCPStore("127.0.0.1", server.port, 1, False, timedelta(seconds=20)) for _ in range(3)]
    monkeypatch.setattr(meeting, "_store", lambda rank, world: clients[rank])
    monkeypatch.setattr(meeting, "WAIT_FOR_START", timedelta(seconds=20))
    return server


def together(*works):
    """What each work returns, or the error it raised, given the meeting of its rank."""

    def attend(rank, work):
        met = Meeting(rank, len(works))
        try:
            return work(met)
        except RuntimeError as error:
            return error
        finally:
            met.left.set()  # no thread outlives the store

    with ThreadPoolExecutor(len(works)) as threads:
        return [each.result(timeout=60) for each in [threads.submit(attend, *one) for one in enumerate(works)]]


def test_values_come_by_rank_whenever_they_are_ready(store):
    def work(rank):
        def attend(found):
            time.sleep(0.2 * rank)
            values = [found.gather((rank, number)) for number in range(3)]
            found.leave(failed=False)
            return values

        return attend

    assert together(work(0), work(1), work(2)) == [[[(rank, number) for rank in range(3)] for number in range(3)]] * 3


def test_values_may_be_longer_than_a_store_takes(store):
    values = [os.urandom(9 * 2**20), b""]
    found = together(*(lambda met, value=value: (met.gather(value), met.leave(False))[0] for value in values))
    assert found[0] == found[1] == values


def test_what_earlier_runs_and_dead_processes_left_is_no_answer(store):
    """torchrun may keep the store when it starts the processes again, on each machine at another time."""

    def work(met):
        return met.run, met.gather(met.rank), met.leave(False)

    runs = []
    for number in range(3):
        store.set("acr_reg/word/1", f"dead{number}")
        first, second = together(work, work)
        assert first == second == (first[0], [0, 1], None)
        runs.append(first[0])
        found = together(lambda met: met.gather(1), lambda met: met.leave(failed=True))
        assert "ended early" in str(found[0])
    assert len(set(runs)) == 3


def test_a_process_that_starts_again_is_met_anew(store):
    """It was killed before all had come, and the others have read its word."""
    for rank in (1, 2):
        store.set(f"acr_reg/word/{rank}", "killed")

    def work(rank):
        time.sleep(0.3 * rank)
        met = Meeting(rank, 3)
        values = met.gather(rank)
        met.leave(failed=False)
        return values

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(work, range(3), timeout=60)) == [[0, 1, 2]] * 3


def test_a_process_that_fails_at_once_may_start_the_next_run_at_once(store):
    """Others that have not seen yet that all have met stay in the run of which they are."""

    def work(rank):
        runs = []
        for _ in range(4):
            met = Meeting(rank, 3)
            met.left.set()
            runs.append(met.run)
        return runs

    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(work, range(3), timeout=60)
    assert others == [first, first]
    assert len(set(first)) == 4


def test_who_does_not_come_is_not_waited_for(store, monkeypatch):
    monkeypatch.setattr(meeting, "WAIT_FOR_START", timedelta(seconds=0.5))
    Meeting(0, 1).leave(False)
    for rank in (0, 1):
        with pytest.raises(RuntimeError, match=r"Not all of the 2 processes"):
            Meeting(rank, 2)


def test_a_failure_ends_the_wait_of_the_others(store):
    found = together(lambda met: met.gather(1), lambda met: met.leave(failed=True))
    assert "Another process of this run ended early" in str(found[0])


def test_a_process_without_a_sign_of_life_ends_the_wait(store, monkeypatch):
    monkeypatch.setattr(meeting, "SECONDS_OF_SILENCE", 1.0)
    monkeypatch.setattr(meeting, "SECONDS_BETWEEN_SIGNS", 0.1)

    def slow(met):
        time.sleep(2)
        return met.gather(1)

    assert together(lambda met: met.gather(1), slow) == [[1, 1]] * 2
    found = together(lambda met: met.gather(1), lambda met: met.left.set())  # as a killed process is silent
    assert "ended early" in str(found[0])
    assert "Process 1 has shown no sign of life" in str(found[0].__cause__)
