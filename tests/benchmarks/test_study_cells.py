"""Cells of the study are computed once, also after an interruption, and test.txt is kept for last."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm

from acr_reg.demo.record import write_json
from benchmarks.study import __main__ as study
from benchmarks.study import cells as study_cells
from benchmarks.study.cells import Bench
from benchmarks.study.counts import ImageCounts
from benchmarks.study.photos import Places
from benchmarks.study.scoring import RAW
from benchmarks.study.settings import CLASS_TOKENS, NETWORKS, SETS, Cell, Reading, Setting, StudyError, base
from benchmarks.study.store import claimed, load
from tests.support.study import SIZE, freeze, git, made_record, make_places, tiny, tiny_vit


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return make_places(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", tiny_vit)


@pytest.fixture
def bench(places: Places, tmp_path: Path) -> Bench:
    return Bench(places, tmp_path / "results", say=lambda _: None)


def test_a_cell_that_is_done_is_not_computed_again(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    cell = Cell(tiny("two"), seed=11)
    first = bench.run(cell)
    path = bench.results / cell.file
    text = path.read_text(encoding="utf-8")
    assert first["raw"]["miou"] == pytest.approx(ImageCounts.unpack(first["raw"]["counts"]).miou())
    assert len(text.splitlines()) == len(first) + 2  # one for each entry
    assert 0 < first["mean_ap"] <= 1
    monkeypatch.setattr(study_cells, "trained", lambda *_: pytest.fail("trained again"))
    assert bench.run(cell)["raw"] == first["raw"]
    assert path.read_text(encoding="utf-8") == text


def test_a_cell_of_class_tokens_scores_every_kind_of_map(bench: Bench):
    record = bench.run(Cell(tiny("both", 0.5, network=CLASS_TOKENS), seed=0))
    for name in NETWORKS[CLASS_TOKENS].maps:
        assert 0 < record[name]["miou"] <= 1 and -1 <= record[name]["agreement"] <= 1
        assert ImageCounts.unpack(record[name]["counts"]).miou() == pytest.approx(record[name]["miou"])
    assert Setting(**record["setting"]).network == CLASS_TOKENS


def test_results_of_before_there_were_two_networks_are_read(tmp_path: Path):
    cell = Cell(base("voc", "two"), 0)
    record = made_record(cell, 0.5)
    del record["setting"]["network"]
    write_json(tmp_path / cell.file, record)
    assert load(tmp_path, cell) is not None


def test_an_interrupted_cell_leaves_no_result_and_keeps_its_network(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    cell = Cell(tiny("two"), seed=12)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_cells, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.run(cell)
    assert load(bench.results, cell) is None
    path = bench.results / cell.file
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.99").write_text("{")  # what a kill in the middle of writing leaves
    assert load(bench.results, cell) is None
    monkeypatch.setattr("benchmarks.study.training.train.train", lambda *_: pytest.fail("trained again"))
    assert bench.run(cell)["seed"] == 12


def options_of_run(bench: Bench, places: Places) -> list[str]:
    options = ["run", "--set", "voc", "--plan", "dev", "--data", str(places.data), "--weights", str(places.weights)]
    return [*options, "--cache", str(places.cache), "--results", str(bench.results)]


def test_a_plan_goes_on_where_it_was_interrupted(bench: Bench, places: Places, monkeypatch: pytest.MonkeyPatch, capsys):
    cells = [Cell(tiny("two", epochs=1), seed) for seed in (21, 22)]
    monkeypatch.setattr(study, "plan", lambda *_: cells)
    monkeypatch.setattr(study, "SETS", {"voc": replace(SETS["voc"], size=SIZE)})
    options = options_of_run(bench, places)
    bench.run(cells[0])
    ran = []
    whole = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, cell: ran.append(cell) or whole(self, cell))
    assert study.main(options) == 0
    assert ran == cells[1:]
    assert (bench.results / "voc" / "dev" / "baselines.json").exists()
    assert study.main([*options, "--list"]) == 0
    assert "2 of 2 cells are done" in capsys.readouterr().out


def test_processes_share_a_plan(bench: Bench, places: Places, monkeypatch: pytest.MonkeyPatch):
    cells = [Cell(tiny("two", epochs=1), seed) for seed in (23, 24, 25)]
    monkeypatch.setattr(study, "plan", lambda *_: [cells[0], cells[0].on("train"), *cells[1:]])
    options = options_of_run(bench, places)
    write_json(bench.results / "voc" / "dev" / "baselines.json", {"rows": []})
    ran = []

    def run(self: Bench, cell: Cell) -> None:
        ran.append(cell)
        write_json(bench.results / cells[2].file, made_record(cells[2], 0.5))  # meanwhile, by another process

    monkeypatch.setattr(Bench, "run", run)
    with claimed(places.cache, cells[0]) as mine:  # its network is being trained, for any split
        assert mine
        assert study.main(options) == 0
    assert ran == cells[1:2]
    with claimed(places.cache, cells[0]) as mine:
        assert mine


def test_test_photos_are_refused_until_settings_are_frozen_and_committed(bench: Bench):
    bench.results.mkdir()
    cell = Cell(tiny("two", epochs=1), 31, "test")
    git(bench.results, "init")
    with pytest.raises(StudyError, match=r"frozen\.json does not exist"):
        bench.run(cell)
    freeze(bench.results, [cell], commit=False)
    with pytest.raises(StudyError, match=r"frozen\.json is not committed"):
        bench.run(cell)
    git(bench.results, "add", "frozen.json")
    git(bench.results, "commit", "-m", "frozen")
    freeze(bench.results, [cell, replace(cell, seed=32)], commit=False)
    with pytest.raises(StudyError, match=r"frozen\.json has changed since it was committed"):
        bench.run(cell)
    git(bench.results, "checkout", "frozen.json")
    for other in (replace(cell, seed=32), replace(cell, reading=Reading(-1)), replace(cell, setting=tiny("two"))):
        with pytest.raises(StudyError, match=r"frozen\.json does not name .*voc/test/"):
            bench.run(other)
    assert not list(bench.results.glob("voc/test/*"))


def test_test_photos_are_scored_once_by_the_threshold_of_dev(bench: Bench):
    bench.results.mkdir()
    cell = Cell(tiny("two", epochs=1), 31, "test", Reading(-2, "last"))
    freeze(bench.results, [cell])
    found = bench.run(cell)
    dev = load(bench.results, cell.on("dev"))
    assert dev["reading"] == asdict(Reading())  # as every dev cell, so that their tables compare
    chosen = {(each["start"], each["propagation"]): each["threshold"] for each in dev["readings"]}
    assert found["raw"]["threshold"] == chosen[-2, RAW]
    assert found["propagated"]["threshold"] == chosen[-2, "last"]
    assert found["raw"]["oracle"] >= found["raw"]["miou"]
    with pytest.raises(StudyError, match=r"voc/test/.* has been scored.* test\.txt is scored once"):
        bench.run(cell)
    bench.run(cell.on("train"))  # the seeds on training photos are no secret


def test_a_file_of_another_setting_is_not_taken_for_the_cell(tmp_path: Path):
    cell = Cell(tiny("two"), 0)
    write_json(tmp_path / cell.file, made_record(Cell(tiny("two", rate=1e-3), 0), 0.5))
    with pytest.raises(StudyError, match=r"holds seed 0 of .*'rate': 0\.001,.* not seed 0 of .*'rate': 0\.0001,"):
        load(tmp_path, cell)


def test_the_command_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.delenv("ACR_REG_DATA", raising=False)
    assert study.main(["cell", "--set", "msrc", "--condition", "two"]) == 2
    missing = capsys.readouterr().err
    assert "--data" in missing and "ACR_REG_DATA" in missing
    assert study.main(["cell", "--set", "msrc", "--condition", "two", "--data", str(tmp_path)]) == 2
    missing = capsys.readouterr().err
    assert f"{tmp_path / study.WEIGHTS}. Pass --weights" in missing
