"""The command `python -m acr_reg demo` around its runs; tests/demo has the runs themselves."""

import threading

import pytest

from acr_reg.__main__ import main
from acr_reg.commands import demo
from acr_reg.demo import comparison
from acr_reg.errors import CommandError
from acr_reg.integrations.jobs import progress


def test_progress_in_a_pipe_is_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    def run_seed(plan, seed, split, report):
        step = report("training", 2)
        step()
        while "training: 1 of 2" not in (said := capsys.readouterr().err):
            threading.Event().wait(0.01)
        raise CommandError(said)

    monkeypatch.setattr(demo, "run_seed", run_seed)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert "training: 1 of 2, about 0 s left" in capsys.readouterr().err


def test_whatever_a_seed_does_is_announced_before_it_begins(monkeypatch):
    """Composing thousands of scenes takes longer than the seconds between two lines."""

    class Stop(Exception):
        pass

    said = []

    def report(what, total):
        said.append(what)
        return lambda: None

    class Task:
        steps = 1

        def baselines(self, split):
            assert said == ["preparing images and model", "baselines"]
            return []

        def truths(self, split):
            assert said[2:] == ["preparing the scored images"]
            raise Stop

    def start(seed, report):
        assert said == ["preparing images and model"]
        return Task()

    plan = comparison.Plan("", "", (), (), True, None, {}, start)
    with pytest.raises(Stop):
        comparison.run_seed(plan, 0, "test", report)
    assert len(said) == 3


def test_packages_that_load_for_long_are_not_silent(monkeypatch, capsys):
    def slow(name):
        while "loading packages: 0 s so far\n" not in capsys.readouterr().err:
            threading.Event().wait(0.01)
        raise CommandError("loaded")

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr("acr_reg.__main__.import_module", slow)
    assert main(["demo"]) == 2
    assert "loaded" in capsys.readouterr().err
