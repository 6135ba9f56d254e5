"""The study of photos: what a cell computes, in every condition, and how it is scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    HorizontalFlip,
    Identity,
    capture_attention,
    class_token_gradient_cam,
    propagate_cam,
)
from acr_reg.demo import scoring as demo_scoring
from acr_reg.demo.train import with_grid
from acr_reg.metrics import CamMeanIoU
from benchmarks.study.baselines import attention_maps, baselines
from benchmarks.study.counts import ImageCounts, paired_bootstrap
from benchmarks.study.photos import Batch, Photos, Places
from benchmarks.study.scoring import RAW, class_maps, figures, score
from benchmarks.study.settings import CLASS_TOKENS, ONE_TOKEN, SETS, Reading, StudyError, base, readings
from benchmarks.study.training.networks import Run, made
from benchmarks.study.training.objective import Objective, entropies
from benchmarks.study.training.train import checkpoint_path, train, trained
from benchmarks.study.views import VIEWS, draws_views, misreported
from tests.support.study import SIZE, made_counts, make_places, tiny, tiny_vit

VIEWED = ("flip", "scale", "turn")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return make_places(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", tiny_vit)


@pytest.fixture(scope="module")
def voc(places: Places) -> Photos:
    return Photos("voc", SIZE, 6, places)


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
        shown = [Reading(-2, "all"), Reading(-4, "all")]
        found = class_maps(model, attention, tokens, labels, voc.grid, shown)

        def read(view: torch.Tensor, present: torch.Tensor) -> demo_scoring.Reading:
            logits, seen = model(voc.encode(view)), with_grid(attention.take(), voc.grid)
            cam = class_token_gradient_cam(logits, seen, present, start)
            return demo_scoring.Reading(logits, seen, {RAW: cam, "all": propagate_cam(cam, seen).detach()})

        for start in (-2, -4):
            expected, readings = demo_scoring.class_maps(read, images, labels)
            for key, maps in expected.items():
                assert maps.amax() > 0
                torch.testing.assert_close(found.merged[start, key], maps, rtol=1e-4, atol=1e-4 * maps.amax().item())
    torch.testing.assert_close(found.logits, readings[0].logits, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ class tokens


def test_class_token_maps_are_those_of_the_explicit_attention(voc: Photos):
    """Against the formulas on dense attention, for the photo alone."""
    torch.manual_seed(0)
    model = made(CLASS_TOKENS, voc.upper(0), 6).eval()
    tokens = torch.from_numpy(np.array(voc.tokens("dev"))).float()
    with capture_attention(model) as attention:
        found = class_maps(model, attention, tokens, voc.labels("dev"), voc.grid, [Reading(-3, "last")])
        output = model(tokens[0])
        weights = torch.stack(
            [layer.weights().mean(1) for layer in with_grid(attention.take(), voc.grid, model.num_prefix_tokens)]
        )
    rows = weights[-3:, :, :6, 6:].mean(0).unflatten(2, voc.grid)
    head = output.maps.relu()
    fused = (head * rows).sqrt()
    spread = torch.einsum("bnm,bcm->bcn", weights[3:, :, 6:, 6:].sum(0), fused.flatten(2)).unflatten(2, voc.grid)
    expected = {(0, "patch"): head, (-3, "attention"): rows, (-3, RAW): fused, (-3, "last"): spread}
    for key, maps in expected.items():
        assert maps.amax() > 0
        torch.testing.assert_close(found.views[key][0], maps, rtol=1e-4, atol=1e-5)
    assert found.views[-3, "gradient"][0].amax() > 0


@pytest.mark.parametrize(
    ("name", "weight", "cam_weight"), [("two", 0, 0), ("both_cam", 0.5, 0.1), ("misreported", 0.5, 0)]
)
def test_the_network_with_class_tokens_trains_in_every_part(voc: Photos, name: str, weight: float, cam_weight: float):
    setting = tiny(name, weight, cam_weight, network=CLASS_TOKENS, epochs=1)
    torch.manual_seed(0)
    before = dict(made(CLASS_TOKENS, voc.upper(0), 6).named_parameters())
    result = train(voc, setting, 0, None, lambda: None)
    assert all(not torch.equal(p, before[n]) for n, p in result.model.named_parameters() if not n.endswith("bias"))
    assert set(result.record.epochs[0]) >= ({"activation", "affinity", "cam"} if cam_weight else {"classification"})


def test_class_rows_count_only_where_the_class_is_present(voc: Photos):
    setting = tiny("activation", 0.5, network=CLASS_TOKENS)
    batch = next(iter(voc.batches(setting, seed=0)))
    model = made(CLASS_TOKENS, voc.upper(0), 6)
    with capture_attention(model) as attention:
        runs = []
        for tokens in (batch.tokens, batch.viewed):
            output = model(tokens)
            runs.append(Run.of(output, with_grid(attention.take(), voc.grid, model.num_prefix_tokens)))
    gap = torch.zeros(())
    for a, b in zip(runs[0].maps, runs[1].maps, strict=True):
        one, other = (layer.weights().mean(1)[:, :6, 6:].unflatten(2, voc.grid) for layer in (a, b))
        distances = (one - other.flip(-1)).abs().sum((2, 3))
        gap = gap + (distances * batch.labels).sum() / batch.labels.sum() / len(runs[0].maps)
    assert Objective(setting, 1, 0)(runs, batch, 0)[1]["activation"] == pytest.approx(gap.item(), rel=1e-4)


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
    with pytest.raises(StudyError, match=r"150 steps to follow .*needs those of 3\. .*'both'"):
        Objective(tiny("smoothing", 0.5), 3, 0, targets)


def test_smoothing_follows_the_cell_both_of_its_own_seed(voc: Photos, monkeypatch: pytest.MonkeyPatch):
    setting = tiny("smoothing", 0.5)
    leader = replace(setting, condition="both")
    followed = []
    monkeypatch.setattr("benchmarks.study.training.train.train", lambda *args: followed.append(args[3]) or train(*args))
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
    with pytest.raises(StudyError, match=r"--weight is 0\.5.* condition two has no"):
        tiny("two", 0.5)
    with pytest.raises(StudyError, match=r"--cam-weight is 0\.0.* condition cam needs .*above 0"):
        tiny("cam")
    with pytest.raises(StudyError, match=r"condition 'ours'.* plain, two"):
        tiny("ours")
    with pytest.raises(StudyError, match=r"start -9 .*-1, -2, -3, -4"):
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
    with pytest.raises(ValueError, match=r"\(12, 3\) and \(12, 3\) differ.* same images"):
        paired_bootstrap(first, made_counts(1, 0.5))


def test_a_class_that_a_resample_lacks_is_left_out_of_its_mean():
    counts = ImageCounts(*(np.array([[4, 0], [0, 4]]) for _ in range(3)))
    assert counts.miou(np.array([2, 0])) == 1
    assert counts.miou() == 1


def test_scores_do_not_depend_on_the_order_of_the_photos(voc: Photos, monkeypatch: pytest.MonkeyPatch):
    """Photos are batched by their number of labels; counts stay in the order of the list."""
    model = voc.upper(0)
    one = score(voc, model, "dev", ONE_TOKEN, Reading(), every_reading=True)
    monkeypatch.setattr("benchmarks.study.scoring._AT_ONCE", 1)
    other = score(voc, model, "dev", ONE_TOKEN, Reading(), every_reading=True)
    assert set(one.totals) == {(r.start, name) for r in readings(ONE_TOKEN) for name in (RAW, r.propagation)}
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


def test_photos_are_found_by_option_only(places: Places):
    assert Photos("voc", SIZE, 6, places).folder.root == places.data / SETS["voc"].folder
    with pytest.raises(StudyError, match=r"elsewhere.* --data or ACR_REG_DATA"):
        Photos("voc", SIZE, 6, replace(places, data=places.data / "elsewhere"))
