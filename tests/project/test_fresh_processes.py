"""tests/support/processes.py: a program that is forked is as one that is started, and its server may end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.support.processes import METHOD, Program

SAYS = """
import multiprocessing, os, sys
print(os.getcwd(), os.environ.get("GIVEN"), os.environ.get("TAKEN"), multiprocessing.get_start_method(), *sys.argv[1:])
print("aside", file=sys.stderr)
sys.exit(3)
"""


def test_a_program_has_the_folder_variables_and_arguments_given_and_its_output_and_code_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAKEN", "left over")
    (tmp_path / "says.py").write_text(SAYS)
    usual = multiprocessing.get_start_method()
    for way in (["-c", SAYS], ["says.py"]):
        program = Program(*way, "a", 1, cwd=tmp_path, GIVEN="here", TAKEN=None)
        assert program.communicate() == program.communicate() == (f"{tmp_path} here None {usual} a 1\n", "aside\n")
        assert program.returncode == 3


WARNS = "import warnings; warnings.warn('a warning')"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-c", WARNS], 0, "UserWarning: a warning"),
        (["-W", "error", "-c", WARNS], 1, "UserWarning: a warning"),
        (["-c", "1 / 0"], 1, "ZeroDivisionError"),
        (["-c", DIES], -signal.SIGKILL, ""),
        (["-m", "no_such_module"], 1, "No module named no_such_module"),
    ],
)
def test_what_goes_wrong_is_told(arguments: list[str], code: int, said: str) -> None:
    program = Program(*arguments)
    assert said in program.communicate()[1]
    assert program.returncode == code


@pytest.mark.skipif(METHOD != "forkserver", reason="there is no server")
def test_a_program_whose_server_is_killed_has_ended_and_the_next_one_has_another_server() -> None:
    server = forkserver._forkserver
    usual = server.__dict__.copy()
    server.__dict__.update(forkserver.ForkServer().__dict__)  # of its own, without torch
    try:
        program = Program("-c", "import time; time.sleep(1)")
        os.kill(server._forkserver_pid, signal.SIGKILL)
        program.communicate(20)
        assert program.returncode is not None
        time.sleep(0.1)
        assert Program("-c", "print(1)").communicate()[0] == "1\n"
    finally:
        os.close(server._forkserver_alive_fd)
        server.__dict__.update(usual)
