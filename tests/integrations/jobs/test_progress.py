"""Progress of long jobs: lines in pipes and logs, bars on terminals, and nothing of it ends a job."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from acr_reg.integrations.jobs import folder, progress
from acr_reg.integrations.jobs.folder import CamFolder, FolderReport, fill
from acr_reg.integrations.jobs.progress import show_progress
from acr_reg.integrations.jobs.shares import Share
from tests.support.paths import ROOT


@pytest.fixture
def often(monkeypatch):
    """Lines without the wait for ten seconds."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)


def wait_for(read, text, seconds=10.0):
    """Everything read until the text came."""
    found, end = "", time.monotonic() + seconds
    while text not in found:
        assert time.monotonic() < end, f"{text!r} did not come; read: {found!r}"
        time.sleep(0.01)
        found += read()
    return found


# ---------------------------------------------------------------- lines


def test_a_step_that_takes_long_is_not_silent(often, capsys):
    with show_progress() as shown:
        step = shown.begin("training", 4)
        wait_for(lambda: capsys.readouterr().err, "training: 0 of 4, 0 s so far\n")
        step()
        wait_for(lambda: capsys.readouterr().err, "training: 1 of 4, about 0 s left\n")


def test_a_part_without_counted_steps_is_not_silent(often, capsys):
    with show_progress() as shown:
        shown.begin("loading", None)
        wait_for(lambda: capsys.readouterr().err, "loading: 0 s so far\n")


def test_lines_tell_the_part_that_runs(often, capsys):
    with show_progress() as shown:
        shown.begin("pretraining", 1)()
        wait_for(lambda: capsys.readouterr().err, "pretraining: 1 of 1")
        shown.begin("scoring", 5)
        wait_for(lambda: capsys.readouterr().err, "scoring: 0 of 5")
        capsys.readouterr()
        assert "pretraining" not in wait_for(lambda: capsys.readouterr().err, "scoring: 0 of 5")


def test_nothing_is_written_before_the_first_part_nor_by_a_short_job(monkeypatch, often, capsys):
    with show_progress():
        time.sleep(0.1)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 10.0)
    with show_progress() as shown:
        shown.begin("training", 1)()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_no_line_comes_after_the_end_however_it_ends(often, capsys, error):
    threads = threading.active_count()

    def job():
        with show_progress() as shown:
            shown.begin("training", 4)
            wait_for(lambda: capsys.readouterr().err, "training")
            raise error

    with pytest.raises(error):
        job()
    assert threading.active_count() == threads
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (83, "1 min 23 s"), (754, "12 min"), (3599.7, "1 h 0 min"), (90_000, "25 h 0 min")],
)
def test_durations_are_told_in_units_that_people_read(monkeypatch, seconds, text):
    part = progress._Part("training", None, 100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0 + seconds)
    assert str(part) == f"training: {text} so far"


def test_the_time_left_follows_from_the_steps_done(monkeypatch):
    part = progress._Part("training", 40, 100.0, done=10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 130.0)
    assert str(part) == "training: 10 of 40, about 1 min 30 s left"


def test_notes_are_written_without_progress(often, capsys):
    with show_progress(shown=False) as shown:
        shown.begin("training", 1)()
        time.sleep(0.1)
        shown.note("one [bold] note")
    assert capsys.readouterr().err == "one [bold] note\n"


# ---------------------------------------------------------------- several processes


def test_of_the_processes_of_torchrun_the_first_alone_shows_progress(often, monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("RANK", "1")
    with show_progress() as shown:
        shown.begin("training", 1)
        time.sleep(0.1)
        shown.note("2007_000032 skipped")
    assert capsys.readouterr().err == "2007_000032 skipped\n"
    monkeypatch.setenv("RANK", "0")
    with show_progress() as shown:
        shown.begin("training", 1)
        wait_for(lambda: capsys.readouterr().err, "training")


def test_each_task_of_a_slurm_array_shows_progress(often, monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "3")
    with show_progress() as shown:
        shown.begin("training", 1)
        wait_for(lambda: capsys.readouterr().err, "training")


# ---------------------------------------------------------------- a standard error that is closed or breaks


def test_a_job_without_standard_error_runs_and_writes_nothing_elsewhere(often, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    with show_progress() as shown:
        shown.begin("training", 1)()
        time.sleep(0.1)
        shown.note("a note")
    assert capsys.readouterr() == ("", "")


def test_a_closed_standard_error_does_not_end_the_job(often, monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with show_progress() as shown:
            shown.begin("training", 1)
            stream.close()
            time.sleep(0.1)
            shown.note("a note")
    os.close(reader)
    with show_progress() as shown:  # closed from the beginning
        shown.begin("training", 1)()


def test_a_pipe_whose_reader_is_gone_does_not_end_the_job(often, monkeypatch):
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    with show_progress() as shown:
        shown.begin("training", 1)
        os.close(reader)
        time.sleep(0.1)
        shown.note("a note")
    with pytest.raises(BrokenPipeError):
        stream.close()


# ---------------------------------------------------------------- terminals

IMPORT = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "integrations" / "jobs")!r})
import progress  # alone, which takes no torch
"""

JOB = f"""{IMPORT}
progress.SECONDS_BETWEEN_LINES = 0.05
with progress.show_progress() as shown:
    shown.begin("[loading]", None)
    time.sleep(0.3)
    step = shown.begin("training without consistency", 25000)
    for _ in range(25000):
        step()
    shown.note("2007_000032 [1/3] skipped: the file is truncated, and its name is long")
    print("a result", flush=True)
    print("a warning", file=sys.stderr)
    time.sleep(0.2)
"""


def on_a_terminal(code, columns=80, stdout=None, **environment):
    """(exit code, what a terminal of so many columns received)"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        cwd=ROOT,
        env={**kept, "TERM": "xterm", **environment},
    )
    os.close(theirs)
    received = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux tells the end
            break
        if not part:
            break
        received += part
    os.close(ours)
    return process.wait(), received.decode()


def plain(received):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received)


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_shows_name_and_counts_in_its_width(columns):
    pytest.importorskip("rich")
    code, received = on_a_terminal(JOB, columns)
    assert code == 0
    bars = [line for line in plain(received).splitlines() if re.match(r".*(training|loading)", line)]
    assert any("25000/25000" in line and line.startswith("training") for line in bars)
    assert max(map(len, bars)) <= columns
    assert "[loading]" in received


def test_a_part_without_counted_steps_leaves_the_terminal_when_the_next_begins():
    _, received = on_a_terminal(JOB)
    last = plain(received).splitlines()[-1]
    assert "training" in last and "loading" not in plain(received)[-300:]


def test_notes_stand_whole_above_the_bars():
    note = "2007_000032 [1/3] skipped: the file is truncated, and its name is long"
    _, received = on_a_terminal(JOB, 40)
    assert note in plain(received).replace("\r\n", "")


def test_results_for_a_file_do_not_go_to_the_terminal(tmp_path):
    with open(tmp_path / "results.txt", "w") as file:
        code, received = on_a_terminal(JOB, stdout=file)
    assert code == 0
    assert (tmp_path / "results.txt").read_text() == "a result\n"
    assert "a result" not in received and "a warning" in received


@pytest.mark.parametrize(
    ("before", "environment"),
    [("sys.modules['rich.progress'] = None", {}), ("", {"TERM": "dumb"})],
    ids=["without rich", "TERM=dumb"],
)
def test_a_terminal_without_bars_shows_lines(before, environment):
    code, received = on_a_terminal(f"import sys\n{before}\n{JOB}", **environment)
    assert code == 0
    assert "[loading]: 0 s so far\r\n" in received
    assert "\x1b" not in received


def test_lines_are_a_choice_on_a_terminal():
    code, received = on_a_terminal(JOB.replace("show_progress()", "show_progress(bars=False)"))
    assert code == 0
    assert "[loading]: 0 s so far\r\n" in received and "\x1b" not in received


def test_a_terminal_that_goes_away_does_not_end_the_job(tmp_path):
    done = tmp_path / "done"
    job = f"""{IMPORT}
import signal
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup and disown do
with progress.show_progress() as shown:
    step = shown.begin("training", 2)
    print("begun", flush=True)
    time.sleep(0.5)
    step()
    shown.note("a note")
Path({str(done)!r}).touch()
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", job],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    assert process.stdout.readline() == b"begun\n"
    os.close(ours)
    process.stdout.close()
    process.wait(timeout=60)
    assert done.exists()


# ---------------------------------------------------------------- a run that waits


def test_the_wait_for_other_processes_is_not_silent(often, monkeypatch, capsys, tmp_path):
    class SlowMeeting:
        def gather(self, value):
            if isinstance(value, FolderReport):
                wait_for(lambda: capsys.readouterr().err, "Waiting for the other processes: 0 s so far\n")
            return [value]

    @contextmanager
    def share_of_run(shared):
        yield Share(0, 2, SlowMeeting())

    monkeypatch.setattr(folder, "share_of_run", share_of_run)
    target = CamFolder(tmp_path / "cams", "psa")
    report = fill(target, ["a", "b"], lambda name: ({0: np.eye(4)}, None), "Class maps", False, True)
    assert report.written == ["a"]
