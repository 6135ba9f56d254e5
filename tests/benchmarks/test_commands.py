"""python -m benchmarks.cost and benchmarks.pictures list their commands, run them, and refuse others."""

from __future__ import annotations

import importlib
import inspect
import time
from types import ModuleType

import pytest
import timm  # noqa: F401  # this file is left out where the extras are not installed

from acr_reg.integrations.jobs import progress
from benchmarks.cost import __main__ as cost
from benchmarks.pictures import __main__ as pictures

PACKAGES = pytest.mark.parametrize("package", [cost, pictures], ids=lambda module: module.__package__)


@PACKAGES
def test_help_lists_every_command(package: ModuleType, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        package.main(["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(
        any(line.split()[:1] == [name] and what in line for line in lines) for name, what in package.COMMANDS.items()
    )


@PACKAGES
def test_an_unknown_command_is_refused_with_the_list(package: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert package.main(["nope", "--write"]) == 2
    said = capsys.readouterr().err
    assert "no command nope" in said
    assert all(f"\n  {name} " in said for name in package.COMMANDS)
    assert package.main([]) == 2


@PACKAGES
def test_every_command_is_a_file_whose_main_takes_the_other_arguments(package: ModuleType, monkeypatch):
    for name in package.COMMANDS:
        module = importlib.import_module(f"{package.__package__}.{name}")
        assert list(inspect.signature(module.main).parameters) == ["arguments"]
        monkeypatch.setattr(module, "main", lambda arguments: len(arguments))
        assert package.main([name, "--size", "64"]) == 2
        assert package.main([name]) == 0


@PACKAGES
def test_a_long_command_says_that_it_runs(package: ModuleType, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)
    name = next(iter(package.COMMANDS))
    said: list[str] = []

    def main(arguments: list[str]) -> int:
        for _ in range(50 if "--child" in arguments else 1000):
            time.sleep(0.01)
            said.append(capsys.readouterr().err)
            if said[-1]:
                break
        return 0

    monkeypatch.setattr(importlib.import_module(f"{package.__package__}.{name}"), "main", main)
    package.main([name])
    assert said[-1] == f"{package.__package__} {name}: 0 s so far\n"
    package.main([name, "--child", "{}"])  # a process whose parent says so
    assert said[-1] == ""
