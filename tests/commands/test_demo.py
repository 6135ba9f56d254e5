"""The command `python -m acr_reg demo` around its runs; tests/demo has the runs themselves."""

from acr_reg.__main__ import main
from acr_reg.commands import demo
from acr_reg.errors import CommandError
from acr_reg.integrations.jobs import progress


def test_progress_in_a_pipe_is_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    def run_seed(plan, seed, split, report):
        step = report("training", 2)
        step()
        step()
        raise CommandError("no more")

    monkeypatch.setattr(demo, "run_seed", run_seed)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == ["training: 1 of 2", "training: 2 of 2"]
