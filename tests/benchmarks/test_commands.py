"""python -m benchmarks.cost and benchmarks.pictures list their commands, run them, and refuse others."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import time
from types import ModuleType

import pytest
import timm  # noqa: F401  # this file is left out where the extras are not installed

from acr_reg.integrations.jobs import progress
from benchmarks.cost import __main__ as cost
from benchmarks.coverage import __main__ as coverage
from benchmarks.pictures import __main__ as pictures
from benchmarks.recipe import __main__ as recipe
from benchmarks.study import __main__ as study

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


class Slow:
    """Stands for minutes of work: waits until progress was written."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.said = capsys, ""

    def __call__(self, *args: object, **options: object) -> int:
        for _ in range(1000):
            time.sleep(0.01)
            self.said += self.capsys.readouterr().err
            if "\n" in self.said:
                break
        return 0


@pytest.fixture
def slow(monkeypatch, capsys: pytest.CaptureFixture[str]) -> Slow:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)
    return Slow(capsys)


def test_the_study_says_that_it_runs(slow: Slow, monkeypatch):
    monkeypatch.setattr("benchmarks.study.__main__.run_report", slow)
    study.main(["report"])
    assert slow.said.startswith("benchmarks.study report: 0 s so far\n")


def test_the_coverage_tells_how_many_models_are_done(slow: Slow, monkeypatch):
    class Stop(Exception):
        pass

    def measure(candidate: object) -> None:
        slow()
        raise Stop

    monkeypatch.setattr(coverage, "measure", measure)
    with pytest.raises(RuntimeError, match="deit") as raised:
        coverage.main(["--only", "deit_tiny_patch16"])
    assert isinstance(raised.value.__cause__, Stop)
    assert slow.said.startswith("models: 0 of ")


def test_the_recipe_names_the_stage_that_runs(slow: Slow, monkeypatch, tmp_path):
    def host(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], slow())

    monkeypatch.setattr(recipe.subprocess, "run", host)
    place = recipe.Place(tmp_path, tmp_path, tmp_path / "out")
    recipe.run_stage(place, recipe.Settings(), "with", 0, "train")
    assert re.match(r"with\S*0: train: 0 s so far\n", slow.said)
