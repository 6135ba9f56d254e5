"""The command `python -m acr_reg demo` around its runs; tests/demo has the runs themselves."""

import argparse
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


def test_each_part_is_announced_at_once_in_a_pipe(tmp_path, monkeypatch, capsys):
    def run_seed(plan, seed, split, report):
        report("training", 2)
        raise CommandError(capsys.readouterr().err)

    monkeypatch.setattr(demo, "run_seed", run_seed)
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert "training\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "threads"), [([], 1), (["--threads", "3"], 3), (["--voc", "photos"], None), (["--threads", "1"], 1)]
)
def test_the_scenes_run_on_one_thread_unless_told_otherwise(options, threads):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.threads_of(parser.parse_args(options)) == threads


@pytest.mark.parametrize(
    ("package", "advice"), [("timm", "pip install timm."), ("skimage", 'pip install -e ".[demo]" in a checkout')]
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(package, advice, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("acr_reg.__main__.import_module", missing)
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert package in said
    assert advice in said
