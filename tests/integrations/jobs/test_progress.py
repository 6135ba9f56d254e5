"""Progress where no terminal is: lines at most every few seconds, however many parts a run has."""

from acr_reg.integrations.jobs import progress
from acr_reg.integrations.jobs.progress import show_progress


def test_parts_of_a_run_share_the_seconds_between_lines(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with show_progress() as shown:
        for what in ("pretraining", "training", "scoring"):
            step = shown.begin(what, 4)
            for _ in range(4):
                now[0] += 2
                step()
    assert capsys.readouterr().err.splitlines() == [
        "training: 1 of 4, about 6 s left",
        "scoring: 2 of 4, about 4 s left",
    ]


def test_notes_are_written_without_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with show_progress(shown=False) as shown:
        shown.begin("training", 1)()
        shown.note("one [bold] note")
    assert capsys.readouterr().err == "one [bold] note\n"
