"""The study of photos: what its cells compute, that they are computed once, and that test.txt is kept for last."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, HorizontalFlip, Identity, capture_attention
from acr_reg.demo import scoring as demo_scoring
from acr_reg.demo.train import with_grid
from acr_reg.metrics import CamMeanIoU
from benchmarks.study import __main__ as study
from benchmarks.study import cells as study_cells
from benchmarks.study import photos as study_photos
from benchmarks.study.baselines import attention_maps, baselines
from benchmarks.study.cells import Bench
from benchmarks.study.choice import PRIMARY, choose
from benchmarks.study.counts import Difference, ImageCounts, paired_bootstrap
from benchmarks.study.objective import Objective, Run, entropies
from benchmarks.study.page.primary import HARMS, HELPS, UNCLEAR, judged
from benchmarks.study.page.report import report
from benchmarks.study.page.tables import (
    WEIGHTS_NOTE,
    Group,
    groups,
    mean_ap_of,
    paired_mean,
    raw_of,
    reference_of,
    signed_spread,
    spread,
)
from benchmarks.study.photos import Batch, Photos, Places
from benchmarks.study.plans import FEW, plan
from benchmarks.study.scoring import RAW, class_maps, figures, score
from benchmarks.study.settings import (
    CAM_WEIGHTS,
    CONDITIONS,
    READINGS,
    SEEDS,
    SETS,
    WEIGHTS,
    Cell,
    Reading,
    StudyError,
    base,
)
from benchmarks.study.store import FROZEN, claimed, frozen_entries, load, write_json
from benchmarks.study.train import checkpoint_path, train, trained
from benchmarks.study.views import VIEWS, draws_views, misreported
from tests.support.study import SIZE, freeze, git, made_counts, made_record, make_photos, tiny_vit

VIEWED = ("flip", "scale", "turn")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """VOC's folder has a background, MSRC's has none."""
    root = tmp_path_factory.mktemp("study")
    make_photos(root / "data" / SETS["voc"].folder)
    make_photos(root / "data" / SETS["msrc"].folder, background=False)
    torch.manual_seed(0)
    state = tiny_vit("", False, SIZE, 0).state_dict()
    # First weights attend to all alike; larger ones make maps that differ.
    larger = {name: value * (3 if "qkv.weight" in name else 1) for name, value in state.items()}
    np.savez(root / "weights.npz", **{name: value.numpy() for name, value in larger.items()})
    return Places(root / "data", root / "weights.npz", root / "cache")


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", tiny_vit)


@pytest.fixture(scope="module")
def voc(places: Places) -> Photos:
    return Photos("voc", SIZE, 6, places)


def tiny(condition: str, weight: float = 0.0, cam_weight: float = 0.0, **other: object):
    return base("voc", condition, weight, cam_weight, **{"size": SIZE, "epochs": 2, "batch_size": 2, **other})


# ------------------------------------------------------------ tokens


def test_tokens_are_those_of_photos_and_flips_and_are_computed_once(voc: Photos, monkeypatch: pytest.MonkeyPatch):
    images = voc.images("dev", torch.arange(4))
    tokens = torch.from_numpy(np.array(voc.tokens("dev"))).float()
    expected = torch.stack([voc.encode(images), voc.encode(images.flip(-1))])
    torch.testing.assert_close(tokens, expected, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(tokens[0], tokens[1], atol=0.1)

    def again(*_: object) -> None:
        raise AssertionError("computed twice")

    monkeypatch.setattr(Photos, "encode", again)
    assert voc.tokens("dev").shape == (2, 4, 17, 24)


def test_tokens_of_other_blocks_sizes_photos_and_weights_are_others(voc: Photos, places: Places, tmp_path: Path):
    other_weights = tmp_path / "w.npz"
    other_weights.write_bytes(places.weights.read_bytes() + b" ")
    keys = [voc.token_key("train"), voc.token_key("dev"), Photos("voc", 28, 6, places).token_key("train")]
    keys += [Photos("voc", SIZE, 4, places).token_key("train")]
    keys += [Photos("voc", SIZE, 6, replace(places, weights=other_weights)).token_key("train")]
    assert len({str(key) for key in keys}) == len(keys)


def test_gradients_from_cached_tokens_are_those_of_the_uncached_model(voc: Photos):
    """The whole model on images, float32 throughout, against the upper half on tokens from disk."""
    setting = tiny("both", 0.5)
    batch = next(iter(voc.batches(setting, seed=0)))
    rows = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:2]
    images = voc.images("train", rows)
    objective = Objective(setting, 1, 0)
    gradients = []
    for inputs in ((batch.tokens, batch.viewed), (voc.encode(images), voc.encode(HorizontalFlip()(images)))):
        model = voc.upper(0)
        with capture_attention(model) as attention:
            runs = [Run(model(tokens), with_grid(attention.take(), voc.grid)) for tokens in inputs]
            loss = sum(F.multilabel_soft_margin_loss(run.logits, batch.labels) for run in runs)
            (loss + objective(runs, batch, 0)[0]).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    cached, whole = gradients
    assert (cached - whole).norm() / whole.norm() < 0.01
    assert F.cosine_similarity(cached, whole, dim=0) > 0.9999


def test_class_maps_from_tokens_are_those_of_the_images(voc: Photos):
    """Against the demo's, which runs the frozen blocks and merges the flip by multi_view_cam."""
    images, labels = voc.images("dev", torch.arange(4)), voc.labels("dev")
    model = voc.upper(0).eval()
    tokens = torch.stack([voc.encode(images), voc.encode(HorizontalFlip()(images))])
    with capture_attention(model) as attention:
        readings = [Reading(-2, "all"), Reading(-4, "all")]
        found, logits, _ = class_maps(model, attention, tokens, labels, voc.grid, readings)

        def predict(view: torch.Tensor) -> tuple[torch.Tensor, AttentionMaps]:
            return model(voc.encode(view)), with_grid(attention.take(), voc.grid)

        for start in (-2, -4):
            expected, runs = demo_scoring.class_maps(predict, images, labels, demo_scoring.Maps(start))
            for key, maps in zip([(start, RAW), (start, "all")], expected, strict=True):
                assert maps.amax() > 0
                torch.testing.assert_close(found[key], maps, rtol=1e-4, atol=1e-4 * maps.amax().item())
    torch.testing.assert_close(logits, runs[0][0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ conditions


def consistent_pair(grid: tuple[int, int] = (3, 4)) -> tuple[list[Run], Batch]:
    """Attention of images and of their flips that agrees to the bit."""
    torch.manual_seed(0)
    patches = torch.arange(grid[0] * grid[1]).view(grid).flip(1).flatten() + 1
    order = torch.cat([torch.zeros(1, dtype=torch.long), patches])
    scores = (3 * torch.randn(2, 2, 13, 13)).requires_grad_()
    own = AttentionMaps.from_tensors([scores.softmax(-1)] * 6, 1, grid)
    other = AttentionMaps.from_tensors([scores[:, :, order][..., order].softmax(-1)] * 6, 1, grid)
    logits = torch.zeros(2, 3)
    batch = Batch(torch.zeros(0), torch.zeros(0), HorizontalFlip(), torch.eye(3)[:2], grid, grid)
    return [Run(logits, own), Run(logits, other)], batch


def test_the_misreported_control_compares_what_does_not_show_the_same():
    runs, batch = consistent_pair()
    both, wrong = (Objective(tiny(name, 0.5), 1, 0) for name in ("both", "misreported"))
    assert both(runs, batch, 0)[0].item() == pytest.approx(0, abs=1e-6)
    assert wrong(runs, batch, 0)[0].item() > 0.1
    assert misreported(HorizontalFlip()) == Identity()
    not_undone = AllPairsConsistencyLoss(Identity(), 0.5, 0.5)(runs[0].maps, runs[1].maps)
    assert wrong(runs, batch, 0)[0].item() == pytest.approx(not_undone.item())


@pytest.mark.parametrize("name", sorted(set(VIEWS) - {"flip"}))
def test_random_views_are_misreported_by_a_flip(name: str):
    images = torch.rand(2, 3, SIZE, SIZE)
    view = draws_views(name, SIZE)(images, torch.Generator().manual_seed(0))
    told = misreported(view)
    torch.testing.assert_close(told(images), view(images).flip(-1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(told(images), view(images), atol=0.1)


def test_conditions_differ_in_their_terms_only(voc: Photos):
    runs, batch = consistent_pair()
    swapped = [runs[0], Run(runs[1].logits, runs[0].maps)]
    total = {}
    for name in ("activation", "affinity", "both", "two"):
        total[name] = Objective(tiny(name, 0.5 if name != "two" else 0), 1, 0)(swapped, batch, 0)[0].item()
    assert total["two"] == 0
    assert min(total["activation"], total["affinity"]) > 0
    assert total["both"] == pytest.approx(total["activation"] + total["affinity"])
    for name in ("two", "both", "misreported"):
        setting = tiny(name, 0.5 if name != "two" else 0, view="crop")
        found = [(b.view, b.labels, b.viewed) for b in voc.batches(setting, 1)]
        expected = [(b.view, b.labels, b.viewed) for b in voc.batches(tiny("plain", view="crop"), 1)]
        assert [f[0] for f in found] == [e[0] for e in expected]
        assert all(torch.equal(f[i], e[i]) for f, e in zip(found, expected, strict=True) for i in (1, 2))


def test_stopped_gradient_and_warm_up():
    runs, batch = consistent_pair()
    other = torch.randn(2, 2, 13, 13, requires_grad=True)
    runs[1] = Run(runs[1].logits, AttentionMaps.from_tensors([other.softmax(-1)] * 6, 1, (3, 4)))
    Objective(tiny("both", 0.5, stop_gradient=True), 4, 0)(runs, batch, 0)[0].backward()
    assert other.grad is None
    rising = Objective(tiny("both", 0.5, warmup=0.5), 4, 0)
    runs = [Run(run.logits, run.maps.detach()) for run in runs]
    with torch.no_grad():
        values = [rising(runs, batch, step)[0].item() for step in range(4)]
    assert values == pytest.approx([values[3] / 2, values[3], values[3], values[3]])


def test_entropies_are_those_of_the_rows():
    maps = torch.rand(1, 2, 7, 7).softmax(-1)
    found = entropies(AttentionMaps.from_tensors([maps], 1, (2, 3)))
    literal = [[-sum(p * np.log(p) for p in row) / np.log(7) for row in head] for head in maps[0].double().tolist()]
    expected = [np.mean([head[0] for head in literal]), np.mean([head[1:] for head in literal])]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_smoothing_penalty_leads_to_the_entropies_it_is_given():
    """Sharper in one layer, smoother in the other, step by step: the penalty follows the target's change too."""
    torch.manual_seed(0)
    scores = [(2 * torch.randn(2, 2, 13, 13)).requires_grad_() for _ in range(2)]
    batch = consistent_pair()[1]
    targets = torch.tensor([[[0.5, 0.6], [0.95, 0.9]]]).repeat(150, 1, 1)
    targets[75:, 0] += 0.2
    objective = Objective(tiny("smoothing", 0.5), 150, 0, targets)
    optimizer = torch.optim.Adam(scores, lr=0.05)
    gaps = []
    for step in range(150):
        maps = AttentionMaps.from_tensors([each.softmax(-1) for each in scores], 1, (3, 4))
        loss, terms = objective([Run(torch.zeros(2, 3), maps)] * 2, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append(terms["entropy_gap"])
    assert gaps[0] > 0.08
    assert gaps[75] > 0.08
    assert max(gaps[74], gaps[149]) < 0.01
    with pytest.raises(StudyError, match=r"entropies of 150 steps to follow .*expected those of the 3 steps"):
        Objective(tiny("smoothing", 0.5), 3, 0, targets)


def test_smoothing_follows_the_cell_both_of_its_own_seed(voc: Photos, monkeypatch: pytest.MonkeyPatch):
    setting = tiny("smoothing", 0.5)
    leader = replace(setting, condition="both")
    followed = []
    monkeypatch.setattr("benchmarks.study.train.train", lambda *args: followed.append(args[3]) or train(*args))
    result = trained(voc, setting, seed=3)
    assert checkpoint_path(voc.places.cache, leader, 3).exists()
    assert followed[0] is None
    assert torch.equal(followed[1], trained(voc, leader, 3).entropies)
    assert followed[1].shape == (4, 6, 2)
    assert result.entropies.shape == (4, 6, 2)
    assert set(result.record.epochs[0]) == {"classification", "entropy_gap", "entropy"}


@pytest.mark.parametrize(
    ("name", "view"),
    [("plain", "flip"), *((name, view) for name in ("two", "both_cam", "misreported") for view in VIEWED)],
)
def test_every_condition_trains_by_every_view(voc: Photos, name: str, view: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.study.views._FACTORS", (0.5, 1.5))  # whole tokens at 56 px
    weight = 0.5 if name in ("both_cam", "misreported") else 0.0
    setting = tiny(name, weight, 0.1 if name == "both_cam" else 0.0, view=view, epochs=1)
    before = dict(voc.upper(0).named_parameters())
    result = train(voc, setting, 0, None, lambda: None)
    changed = {n: not torch.equal(p, before[n]) for n, p in result.model.named_parameters()}
    assert all(changed.values())
    assert ("cam" in result.record.epochs[0]) == (name == "both_cam")


def test_half_precision_reaches_the_blocks_and_nothing_that_is_kept(voc: Photos, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Photos, "steps", lambda self, setting: 2)
    seen: dict[str, set[torch.dtype]] = {"float32": set(), "bfloat16": set()}
    attended: set[torch.dtype] = set()
    found = {}
    for precision, types in seen.items():

        def upper(self: Photos, seed: int, types=types, original=Photos.upper) -> torch.nn.Module:
            model = original(self, seed)
            model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
            model.blocks[0].attn.proj.register_forward_pre_hook(lambda module, inputs: attended.add(inputs[0].dtype))
            return model

        with monkeypatch.context() as patch:
            patch.setattr(Photos, "upper", upper)
            setting = base("voc", "both", 0.5, size=SIZE, precision=precision)
            found[precision] = train(voc, setting, 0, None, lambda: None)
    assert seen == {"float32": {torch.float32}, "bfloat16": {torch.bfloat16}}
    assert attended == {torch.float32}  # its bfloat16 kernel is the slower one
    (single,), (half,) = (found[precision].record.epochs[:1] for precision in seen)
    for name in single:
        assert half[name] == pytest.approx(single[name], rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in found["bfloat16"].model.parameters())


def test_settings_that_no_condition_has_are_refused():
    with pytest.raises(StudyError, match=r"weight=0.5 for the condition two; expected 0"):
        tiny("two", 0.5)
    with pytest.raises(StudyError, match=r"cam_weight=0.0 for the condition cam; expected a weight above 0"):
        tiny("cam")
    with pytest.raises(StudyError, match=r"found the condition 'ours'; expected one of plain"):
        tiny("ours")
    with pytest.raises(StudyError, match=r"found the reading start -9"):
        Reading(-9)


# ------------------------------------------------------------ scores and counts


def literal_miou(counts: ImageCounts, images: np.ndarray) -> float:
    ious = []
    for label in range(counts.truth.shape[1]):
        hit, guess, truth = (
            sum(int(part[i, label]) for i in images) for part in (counts.correct, counts.predicted, counts.truth)
        )
        if guess + truth - hit:
            ious.append(hit / (guess + truth - hit))
    return float(np.mean(ious))


def test_counts_give_the_metrics_miou_and_survive_packing():
    rng = np.random.default_rng(0)
    total, counters = CamMeanIoU(3), []
    for _ in range(4):
        counter = CamMeanIoU(3)
        counter.update(rng.random((2, 6, 5)).astype(np.float32), rng.integers(0, 3, (6, 5)))
        counters.append(counter)
        total = total + counter
    scores = total.compute()
    found = figures(total, counters, [[1], [1, 2], [2], [1, 2]], threshold=None)
    assert found.miou == pytest.approx(scores.best_miou)
    assert found.threshold == scores.best_threshold
    assert found.false_positive == pytest.approx(scores.false_positive_rate[1:].mean())
    held = figures(total, counters, [[1], [1, 2], [2], [1, 2]], threshold=0.05)
    assert held.miou == pytest.approx(scores.miou[5])
    assert held.oracle == scores.best_miou > held.miou
    counts = ImageCounts.unpack(found.counts)
    assert counts.miou() == pytest.approx(scores.best_miou)
    assert found.multi_label == pytest.approx(literal_miou(counts, np.array([1, 3])))


def test_the_bootstrap_is_that_of_resampled_images():
    first, second = made_counts(0, 0.5), made_counts(0, 0.7)
    noise = np.random.default_rng(1).integers(0, 15, first.correct.shape)
    second = ImageCounts(second.predicted - noise, second.correct - noise, second.truth)
    found = paired_bootstrap(first, second, resamples=400, seed=7)
    weights = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=400)
    literal = []
    for row in weights:
        images = np.repeat(np.arange(12), row)
        literal.append(literal_miou(second, images) - literal_miou(first, images))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(literal, [0.025, 0.975])))
    assert found.value == pytest.approx(literal_miou(second, np.arange(12)) - literal_miou(first, np.arange(12)))
    assert found.low < found.value < found.high


def test_the_bootstrap_pairs_images():
    """Of the same maps it leaves nothing, however much images differ; of other images it is refused."""
    first = made_counts(0, 0.5)
    found = paired_bootstrap(first, first)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="whose masks differ"):
        paired_bootstrap(first, made_counts(1, 0.5))


def test_a_class_that_a_resample_lacks_is_left_out_of_its_mean():
    counts = ImageCounts(*(np.array([[4, 0], [0, 4]]) for _ in range(3)))
    assert counts.miou(np.array([2, 0])) == 1
    assert counts.miou() == 1


def test_scores_do_not_depend_on_the_order_of_the_photos(voc: Photos, monkeypatch: pytest.MonkeyPatch):
    """Photos are batched by their number of labels; counts stay in the order of the list."""
    model = voc.upper(0)
    one = score(voc, model, "dev", Reading(), every_reading=True)
    monkeypatch.setattr("benchmarks.study.scoring._AT_ONCE", 1)
    other = score(voc, model, "dev", Reading(), every_reading=True)
    assert set(one.totals) == {(r.start, name) for r in READINGS for name in (RAW, r.propagation)}
    for key, counters in one.images.items():
        truths = [counter.counts().truth for counter in counters]
        expected = [np.bincount(mask[mask != 255], minlength=7) for mask in voc.masks("dev")]
        assert np.array_equal(truths, expected)
        assert other.totals[key].compute().best_miou == pytest.approx(one.totals[key].compute().best_miou, abs=0.01)
    assert other.mean_ap == pytest.approx(one.mean_ap)


@pytest.mark.parametrize("name", ["voc", "msrc"])
def test_baselines_know_no_training(name: str, places: Places):
    photos = Photos(name, SIZE, 6, places)
    rows = {row["name"]: row for row in baselines(photos, "dev")}
    assert len(rows) == 3
    assert all(0 < row["miou"] == row["dev_miou"] <= 1 for row in rows.values())
    maps = attention_maps(photos, "dev", 1)
    assert len(maps) == 4
    assert all(each.shape == (4, 4) and each.min() >= 0 and each.sum() <= 2 for each in maps)


# ------------------------------------------------------------ resuming, and test.txt


@pytest.fixture
def bench(places: Places, tmp_path: Path) -> Bench:
    return Bench(places, tmp_path / "results", say=lambda _: None)


def test_a_cell_that_is_done_is_not_computed_again(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    cell = Cell(tiny("two"), seed=11)
    first = bench.run(cell)
    path = bench.results / cell.file
    text = path.read_text(encoding="utf-8")
    assert first["raw"]["miou"] == pytest.approx(ImageCounts.unpack(first["raw"]["counts"]).miou())
    assert 0 < first["mean_ap"] <= 1
    monkeypatch.setattr(study_cells, "trained", lambda *_: pytest.fail("trained again"))
    assert bench.run(cell)["raw"] == first["raw"]
    assert path.read_text(encoding="utf-8") == text


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
    path.with_suffix(".99.partial").write_text("{")  # what a kill in the middle of writing leaves
    assert load(bench.results, cell) is None
    monkeypatch.setattr("benchmarks.study.train.train", lambda *_: pytest.fail("trained again"))
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
    with pytest.raises(StudyError, match=r"found no .*frozen.json; expected the settings frozen"):
        bench.run(cell)
    freeze(bench.results, [cell], commit=False)
    with pytest.raises(StudyError, match="which is not committed"):
        bench.run(cell)
    git(bench.results, "add", "frozen.json")
    git(bench.results, "commit", "-m", "frozen")
    freeze(bench.results, [cell, replace(cell, seed=32)], commit=False)
    with pytest.raises(StudyError, match="changed since it was committed"):
        bench.run(cell)
    git(bench.results, "checkout", "frozen.json")
    for other in (replace(cell, seed=32), replace(cell, reading=Reading(-1)), replace(cell, setting=tiny("two"))):
        with pytest.raises(StudyError, match="does not name"):
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
    with pytest.raises(StudyError, match=r"this test cell has been scored; .*test.txt is scored once"):
        bench.run(cell)
    bench.run(cell.on("train"))  # the seeds on training photos are no secret


def test_a_file_of_another_setting_is_not_taken_for_the_cell(tmp_path: Path):
    cell = Cell(tiny("two"), 0)
    write_json(tmp_path / cell.file, made_record(Cell(tiny("two", rate=1e-3), 0), 0.5))
    with pytest.raises(StudyError, match="holds the setting"):
        load(tmp_path, cell)


def test_the_command_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.delenv("ACR_REG_DATA", raising=False)
    assert study.main(["cell", "--set", "msrc", "--condition", "two"]) == 2
    assert "found no --data and no ACR_REG_DATA" in capsys.readouterr().err
    assert study.main(["cell", "--set", "msrc", "--condition", "two", "--data", str(tmp_path)]) == 2
    assert "found no weights at" in capsys.readouterr().err


# ------------------------------------------------------------ plans, choice, report


def test_plans_name_each_cell_once_and_dev_plans_never_test():
    for photos in SETS:
        cells = plan("dev", photos, Path("none"))
        assert len({cell.file for cell in cells}) == len(cells)
        assert {cell.split for cell in cells} == {"dev"}
        own = [cell for cell in cells if cell.seed == 0]  # as a process that takes one seed runs them
        weights = {cell.setting.weight for cell in own[:7] if cell.setting.condition == "both"}
        assert weights == set(WEIGHTS) and {cell.setting.condition for cell in own[:7]} == set(PRIMARY)
    with pytest.raises(StudyError, match="found no none"):
        plan("primary", "msrc", Path("none"))


def test_the_rest_of_the_grid_is_planned_where_the_primary_contrast_was_frozen(tmp_path: Path):
    frozen = [{"plan": "primary", "setting": asdict(base("voc", "both", 1.5, epochs=7)), "seeds": [0]}]
    tuned = {photos: plan("dev", photos, Path("none")) for photos in SETS}
    write_json(tmp_path / FROZEN, {"commit": "none", "cells": frozen})
    added = plan("dev", "voc", tmp_path)
    assert added[: len(tuned["voc"])] == tuned["voc"]
    rest = {(cell.setting.condition, cell.setting.weight, cell.setting.epochs) for cell in added[len(tuned["voc"]) :]}
    assert {("affinity", 1.5, 7), ("both", 0.17, 7), ("smoothing", 1.5, 7), ("plain", 0.0, 7)} < rest
    assert {epochs for *_, epochs in rest} == {7}
    assert plan("dev", "msrc", tmp_path) == tuned["msrc"]


@pytest.mark.parametrize(("name", "splits"), [("primary", {"test", "train"}), ("main", {"test"})])
def test_training_photos_are_scored_for_the_primary_contrast_alone(name: str, splits: set[str]):
    assert {cell.split for cell in plan(name, "voc", study.HERE / "results")} == splits


def made_results(results: Path, split: str = "dev") -> None:
    """Over two seeds "both" is better by 0.1 of the pixels of each class at weight 0.5, and loses mAP at 1.5."""
    for seed in (0, 1):
        for condition, weight, quality, mean_ap in (
            ("two", 0.0, 0.5, 0.8),
            ("both", 0.5, 0.6, 0.799),
            ("both", 1.5, 0.55, 0.7),
            ("misreported", 0.5, 0.45, 0.79),
        ):
            cell = Cell(base("voc", condition, weight), seed, split, Reading())
            readings = {(-2, RAW): 0.9, (-2, "last"): 0.95} if condition == "both" and weight == 0.5 else {}
            write_json(results / cell.file, made_record(cell, quality, mean_ap, readings))


def test_settings_are_chosen_by_one_rule(tmp_path: Path):
    made_results(tmp_path)
    stray = Cell(base("voc", "both", 0.5, view="crop"), 0)  # better, but of another view
    write_json(tmp_path / stray.file, made_record(stray, 0.99))
    chosen = choose(study.all_cells(tmp_path), "voc")
    setting, reading = chosen["both"]
    assert (setting.weight, setting.view, reading) == (0.5, "flip", Reading(-2, "last"))
    assert chosen["misreported"][1] == reading
    assert chosen["two"][1] == Reading(-1, "all")
    with pytest.raises(StudyError, match="found no dev cell of two, both for msrc"):
        choose(study.all_cells(tmp_path), "msrc")


def test_candidates_are_compared_by_the_seeds_and_epochs_that_all_have(tmp_path: Path):
    made_results(tmp_path)
    lucky = {(-1, RAW): 0.99}
    for condition, weight, epochs, seed in (
        ("both", 1.5, 2, 2),  # a seed that no other weight has
        ("affinity", 0.17, 2, 0),
        ("affinity", 0.5, 4, 0),  # epochs that are not the reference's
    ):
        cell = Cell(base("voc", condition, weight, epochs=epochs), seed)
        write_json(tmp_path / cell.file, made_record(cell, 0.5, readings={} if weight == 0.17 else lucky))
    chosen = choose(study.all_cells(tmp_path), "voc")
    assert chosen["both"][0].weight == 0.5
    assert (chosen["affinity"][0].weight, chosen["affinity"][0].epochs) == (0.17, 2)
    other = Cell(base("voc", "both", 0.06), 3)
    write_json(tmp_path / other.file, made_record(other, 0.5))
    with pytest.raises(StudyError, match=r"no seed that all candidates have \(.*both-w0.06.*: \[3\]"):
        choose(study.all_cells(tmp_path), "voc")


def test_the_reference_and_both_are_trained_equally_long(tmp_path: Path):
    made_results(tmp_path)
    lonely = Cell(base("voc", "both", 0.5, epochs=8), 0)  # the best, but the reference has no such epochs
    write_json(tmp_path / lonely.file, made_record(lonely, 0.9))
    for condition, weight, miou in (("two", 0.0, 0.85), ("both", 0.5, 0.1), ("both", 1.5, 0.89)):
        cell = Cell(base("voc", condition, weight, epochs=4), 0)
        write_json(tmp_path / cell.file, made_record(cell, 0.5, readings={(-3, RAW): miou}))
    chosen = choose(study.all_cells(tmp_path), "voc")  # "both" alone would rather have 2 epochs, where it reads 0.9
    assert {name: (s.weight, s.epochs) for name, (s, _) in chosen.items() if name in PRIMARY} == {
        "two": (0.0, 4),
        "both": (1.5, 4),
        "misreported": (1.5, 4),
    }
    fewer = [(cell, record) for cell, record in study.all_cells(tmp_path) if cell.setting != base("voc")]
    kept = [each for each in fewer if each[0].setting.condition != "both" or each[0].setting.epochs == 2]
    with pytest.raises(StudyError, match=r"no epochs that all have \(two: \[4\]; both: \[2\]\)"):
        choose(kept, "voc")


def test_settings_are_frozen_once_a_plan(tmp_path: Path, capsys):
    made_results(tmp_path)
    command = ["freeze", "--set", "voc", "--results", str(tmp_path), "--plan"]
    assert study.main([*command, "main"]) == 2
    assert "found no plan primary of voc" in capsys.readouterr().err
    assert study.main([*command, "primary"]) == 0
    assert study.main([*command, "primary"]) == 2
    assert "settings are frozen once" in capsys.readouterr().err
    primary = frozen_entries(tmp_path)
    assert {entry["setting"]["condition"]: entry["seeds"] for entry in primary} == {
        name: list(SEEDS) for name in PRIMARY
    }
    # Cells that come later are chosen from for the other conditions; what is frozen stays, and its controls follow it.
    for condition, weight, miou in (("both", 0.17, 0.99), ("affinity", 0.17, 0.6), ("affinity", 0.5, 0.5)):
        cell = Cell(base("voc", condition, weight), 0)
        write_json(tmp_path / cell.file, made_record(cell, 0.5, readings={(-1, RAW): miou}))
    assert study.main([*command, "main"]) == 0
    found = frozen_entries(tmp_path)
    assert found[: len(primary)] == primary
    weights = {entry["setting"]["condition"]: entry["setting"]["weight"] for entry in found[len(primary) :]}
    assert weights == {"affinity": 0.17, "smoothing": 0.5}
    assert choose(study.all_cells(tmp_path), "voc", found)["both"][0].weight == 0.5
    assert choose(study.all_cells(tmp_path), "voc")["both"][0].weight == 0.17


def test_the_report_shows_every_seed_and_its_own_origin(tmp_path: Path):
    made_results(tmp_path)
    made_results(tmp_path, "test")
    other = Cell(base("voc", "affinity", 0.5), 0, "test")
    write_json(tmp_path / other.file, made_record(other, 0.5))
    text = ["Both is to be above two."]
    write_json(tmp_path / "primary.json", {"text": text, "contrasts": [["two", "both"], ["misreported", "both"]]})
    baseline = {"rows": [{"name": "best centred ellipse", "miou": 0.359}]}
    write_json(tmp_path / "voc" / "dev" / "baselines.json", baseline)
    page = report(tmp_path)
    assert text[0] in page
    assert "the demo scored test.txt of both\nsets once before" in page
    assert "67.3 mIoU on VOC is not reproduced" in page
    headings = [line for line in page.splitlines() if line.startswith("### ")]
    assert len(headings) > 6
    assert all(WEIGHTS_NOTE in line for line in headings)
    assert "| best centred ellipse |  |  | 0.359 |" in page
    # Every seed of every contrast of VOC, and MSRC said to be missing.
    better = "activation and affinity, weight 0.5"
    rows = [line for line in page.splitlines() if line.startswith(f"| {better} less two views, no consistency |")]
    assert len(rows) == 2
    for seed, row in enumerate(rows):
        gain = made_counts(seed, 0.6).miou() - made_counts(seed, 0.5).miou()
        assert row.split(" | ")[1:3] == [str(seed), "0.800 to 0.799"]
        assert f"| {gain:+.3f} (" in row
    assert page.count(f"| {better} less both, view misreported, weight 0.5 |") == 2
    assert page.count("Not scored yet.") == 1
    frozen = next(line for line in page.splitlines() if line.startswith("- Frozen on dev: "))
    assert better in frozen and CONDITIONS["affinity"].title not in frozen  # another plan's, in the table below
    assert page.count(f"| {CONDITIONS['affinity'].title}, weight 0.5 | 1 |") == 1
    assert page.count(f"| {CONDITIONS['affinity'].title}, weight 0.5 less two views, no consistency | 0 | 0.8") == 1
    # The weight that loses mAP is no candidate at matched mAP; the better one is.
    matched = next(line for line in page.splitlines() if line.startswith("At matched mAP"))
    assert "weight 0.5" in matched
    assert "weight 1.5" not in matched


def test_details_are_of_the_frozen_size_and_epochs_however_few_were_run_there(tmp_path: Path):
    made_results(tmp_path)
    cell = Cell(base("voc", epochs=4), 0)
    write_json(tmp_path / cell.file, made_record(cell, 0.5))

    def detailed() -> set[str]:
        lines = report(tmp_path).splitlines()
        return {line.split(", ", 1)[1] for line in lines if line.startswith(("### How", "### Classes", "### Thresh"))}

    assert [line.split(", view")[0] for line in detailed()] == [f"{SETS['voc'].size} px, 2 epochs"]
    entry = {"plan": "primary", "setting": asdict(cell.setting), "reading": asdict(Reading()), "seeds": [0]}
    write_json(tmp_path / FROZEN, {"commit": "none", "cells": [entry]})
    assert [line.split(", view")[0] for line in detailed()] == [f"{SETS['voc'].size} px, 4 epochs"]


def test_differences_are_paired_with_the_reference_of_the_same_view(tmp_path: Path):
    made_results(tmp_path)
    stray = Cell(base("voc", "two", view="crop"), 0)
    write_json(tmp_path / stray.file, made_record(stray, 0.9))
    found = groups(tmp_path)
    both = next(g for g in found if g.setting.condition == "both")
    reference = reference_of(both, found)
    assert reference.setting == base("voc", "two")
    expected = [made_counts(seed, 0.6).miou() - made_counts(seed, 0.5).miou() for seed in (0, 1)]
    mean, deviation, seeds = paired_mean(reference, both, raw_of)
    assert (mean, deviation) == pytest.approx((np.mean(expected), np.std(expected, ddof=1)))
    assert seeds == 2


def test_the_primary_contrast_is_judged_by_the_rule_that_was_written_down():
    clear, doubtful = Difference(0.02, 0.01, 0.03), Difference(0.01, -0.01, 0.02)
    assert judged([clear] * 3 + [doubtful] * 2) == HELPS
    assert judged([clear] * 2 + [doubtful] * 3) == UNCLEAR
    assert judged([clear] * 4 + [Difference(-0.001, -0.01, 0.01)]) == UNCLEAR
    assert judged([Difference(-d.value, -d.high, -d.low) for d in [clear] * 3 + [doubtful] * 2]) == HARMS


@pytest.mark.parametrize(
    ("quality", "mean_ap", "said"),
    [
        (0.6, 0.80, "**a gain**"),
        (0.4, 0.90, "**a loss**"),
        (0.5, 0.80, "**no clear difference**"),
        (0.6, 0.78, "**a trade, not a gain: mAP falls by 0.020**"),
    ],
)
def test_the_page_says_what_the_rule_says(tmp_path: Path, quality: float, mean_ap: float, said: str):
    write_json(tmp_path / "primary.json", {"text": [], "contrasts": [["two", "both"]]})
    write_json(tmp_path / "voc" / "test" / "baselines.json", {"rows": [{"name": "ellipse", "miou": 0.3}]})

    def page(seeds: tuple[int, ...]) -> str:
        for seed in seeds:
            for condition, weight, found in (("two", 0.0, (0.5, 0.8)), ("both", 0.5, (quality, mean_ap))):
                cell = Cell(base("voc", condition, weight), seed, "test")
                write_json(tmp_path / cell.file, made_record(cell, *found))
        return report(tmp_path)

    assert "1 seeds are missing, so nothing is said yet" in page(SEEDS[:-1])
    whole = page(SEEDS[-1:])
    assert said in whole
    gains = [made_counts(seed, quality).miou() - made_counts(seed, 0.5).miou() for seed in SEEDS]
    interval = np.mean(gains) + np.array((-1, 1)) * 2.776 * np.std(gains, ddof=1) / 5**0.5
    assert "95 % over seeds {:+.3f} to {:+.3f}".format(*interval) in whole
    above = made_counts(0, quality).miou() > 0.3
    assert ("are above it" if above else "**not yet useful**") in whole


@pytest.fixture(scope="module")
def committed() -> list[Group]:
    """The study's own results."""
    return groups(study.HERE / "results")


def on_test(committed: list[Group], photos: str) -> dict[str, Group]:
    """By condition: of each, one setting was frozen, and no other may be scored there."""
    return {g.setting.condition: g for g in committed if (g.setting.photos, g.split) == (photos, "test")}


def test_page_and_readme_say_what_the_results_say(committed: list[Group]):
    page = study.PAGE
    results = study.HERE / "results"
    assert page.read_text(encoding="utf-8") == report(results, page.with_suffix("")), (
        "run python -m benchmarks.study report"
    )
    readme = (study.HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    said = {
        "msrc": ("come from {:.3f} to {:.3f} mIoU", "the raw maps gain, +{}, "),
        "voc": ("difference, {:.3f} and {:.3f}, below", "raw maps differ by +{}, "),
    }
    for photos, (opening, gains) in said.items():
        shown = on_test(committed, photos)
        for condition in PRIMARY:
            mean = shown[condition].mean
            cells = [f"{mean(mean_ap_of)[0]:.3f}"]
            cells += [spread(mean(lambda r, maps=maps: r[maps]["miou"])) for maps in ("raw", "propagated")]
            cells += [f"{mean(lambda r: r['training']['cpu_seconds'])[0]:.0f}"]
            assert f"| {' | '.join(cells)} |" in readme
        assert opening.format(*(shown[name].mean(raw_of)[0] for name in ("two", "both"))) in readme
        assert gains.format(spread(paired_mean(shown["two"], shown["both"], raw_of))) in readme


README_VIEWS = {
    "flip": "flip",
    "scale": "flip and scale (0.75 or 1.25)",
    "crop": "flip and random crop",
    "turn": "flip, random crop and quarter turns",
}
README_ROWS = {
    "plain": "one view, as most loops train",
    "activation": "activation alone",
    "affinity": "affinity alone",
    "both": "both",
    "cam": "class maps alone, weight 0.1, the default",
    "both_cam": "all three",
    "smoothing": "attention held at the entropy of both, no consistency",
}


def test_readme_says_what_the_other_conditions_gain(committed: list[Group]):
    readme = (study.HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    prose = " ".join(readme.split())
    told = {1: " (one seed)", 2: " (two seeds)", 3: "", 5: " (five seeds)"}
    columns: list[dict[str, str]] = []
    for photos in SETS:
        own = on_test(committed, photos)
        gains = {name: paired_mean(own["two"], own[name], raw_of) for name in README_ROWS if name in own}
        columns.append({name: signed_spread(gain) + told[gain[2]] for name, gain in gains.items()})
        first, second = own["two"].records, own["affinity"].records
        assert ", ".join(f"{raw_of(second[seed]) - raw_of(first[seed]):+.3f}" for seed in second) in prose
    for name, label in README_ROWS.items():
        assert f"| {label} | {' | '.join(column.get(name, 'not run') for column in columns)} |" in readme


def test_readme_says_what_dev_shows_of_views_and_of_the_class_maps(committed: list[Group]):
    root = study.HERE.parents[1]
    readme, weights = (" ".join((root / name).read_text("utf-8").split()) for name in ("README.md", "docs/weights.md"))
    dev = {group.setting: group for group in committed if group.split == "dev"}

    def gain(reference: Group, condition: str, weight: float = 0.0, cam_weight: float = 0.0) -> str:
        other = dev[reference.setting.with_condition(condition, weight, cam_weight)]
        return signed_spread(paired_mean(reference, other, raw_of))

    for view, title in README_VIEWS.items():
        every = dev[base("msrc", epochs=16, view=view)]
        reference = replace(every, records={seed: every.records[seed] for seed in FEW})
        gains = (gain(reference, name, 0.17) for name in ("both", "misreported"))
        assert f"| {title} | {spread(reference.mean(raw_of))} | {' | '.join(gains)} |" in readme
    reference = dev[base("msrc", epochs=16)]
    for cam_weight in CAM_WEIGHTS:
        assert gain(reference, "cam", cam_weight=cam_weight) in weights
    assert f"lose {gain(reference, 'cam', cam_weight=1.0)[1:6]} (dev, two seeds)" in readme


def test_an_empty_study_says_so(tmp_path: Path):
    assert "Not written down yet." in report(tmp_path)


def test_photos_are_found_by_option_only(places: Places):
    assert study_photos.Photos("voc", SIZE, 6, places).folder.root == places.data / SETS["voc"].folder
    with pytest.raises(StudyError, match=r"give the folder of photo sets by --data"):
        Photos("voc", SIZE, 6, replace(places, data=places.data / "elsewhere"))


def test_the_demos_scenes_are_taken_over(tmp_path: Path, capsys):
    def row(name: str, raw: float) -> dict[str, object]:
        training = None if "ACR" not in name else {"cpu_seconds": 90.0}
        propagated = {"miou": raw / 2}
        terms = {"entropy": 0.9}
        return {"name": name, "raw": {"miou": raw}, "propagated": propagated, "mean_ap": 0.9, "terms": terms} | {
            "training": training
        }

    def run(rows: list[tuple[str, float]], split: str = "test") -> Path:
        seeds = [{"seed": s, "rows": [row(n, value + s / 100) for n, value in rows]} for s in (3, 4)]
        command = ["demo", "--output", str(tmp_path), "--controls"]
        content = {"command": command, "settings": {}, "split": split, "versions": {}, "machine": {}}
        (tmp_path / "demo.json").write_text(json.dumps(content | {"seeds": seeds}))
        return tmp_path / "demo.json"

    rows = [("best centred ellipse", 0.24), ("without ACR", 0.25), ("with ACR", 0.31)]
    results = ["--results", str(tmp_path)]
    for bad in (run(rows), run([*rows, ("ACR, flip not undone", 0.28)], "dev"), tmp_path / "none.json"):
        assert study.main(["scenes", str(bad), *results]) == 2
    assert "ACR, flip not undone" in capsys.readouterr().err
    assert study.main(["scenes", str(run([*rows, ("ACR, flip not undone", 0.28)])), *results]) == 0
    page = report(tmp_path)
    assert "(`python -m acr_reg demo --controls`)" in page  # not where this machine wrote it
    assert "with ACR less without ACR: raw +0.060 (+0.060 to +0.060, above 0 in 2 of 2), propagated +0.030" in page
    assert "with ACR less ACR, flip not undone: raw +0.030" in page
    assert "| with ACR | 0.900 ± 0.000 | 0.345 ± 0.007 |" in page and "| best centred ellipse |  | 0.275" in page
