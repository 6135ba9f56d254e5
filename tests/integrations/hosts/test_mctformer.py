"""MCTformer, WeakTr and CTI: their own training functions with the added lines, and a small model of that interface."""

import functools
import importlib
import types
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn

import acr_reg
from acr_reg.integrations import mctformer
from tests.support.hosts import added_lines, check_training, checkout, host_on_path, in_fresh_process, patched_module
from tests.support.mctformer import (
    CLASSES,
    FIXED,
    KINDS,
    RESIZED,
    Block,
    Small,
    assert_mixed_precision,
    assert_noise_floor,
    assert_own_maps_are_not_differentiable,
    assert_right_pass,
    batches,
    first_maps,
    images,
    is_query_and_key,
    mixed_precision,
    noise_floor,
    terms_under,
    train_small,
)
from tests.support.processes import FRESH

# ---------------------------------------------------------------- the small model


@pytest.mark.parametrize("kind", KINDS)
def test_small_model_trains(kind):
    steps = check_training(lambda: Small(kind), train_small, layers=3, watched=is_query_and_key)
    prefix = CLASSES + (kind == "CTI")
    assert steps[0].tokens[0] == (2, 2, prefix + 16, prefix + 16)


@pytest.mark.parametrize("kind", KINDS)
def test_class_maps_and_class_tokens_leave_the_background_out(kind):
    model = Small(kind).eval()
    with mctformer.capture(model) as host:
        output = model(images())
        view = host.take()
    maps = mctformer.cams(view)
    assert maps.shape == (2, CLASSES, 4, 4)
    first = int(kind == "CTI")
    assert view.attention[0].layout.class_tokens == tuple(range(first, CLASSES + first))
    if kind == "V1":
        rows = sum(layer.weights().mean(1)[:, :CLASSES, CLASSES:] for layer in view.attention)
        torch.testing.assert_close(maps.flatten(2), rows)
    else:
        torch.testing.assert_close(maps.mean((2, 3)), output[1])


@pytest.mark.parametrize("kind", KINDS)
def test_noise_floor_is_that_of_drop_path(kind, monkeypatch):
    monkeypatch.setattr(Block, "drop", 0.5)  # of six branches at 0.1, often none is dropped
    torch.manual_seed(3)
    assert_noise_floor(noise_floor(Small(kind), images()))


@pytest.mark.parametrize("kind", KINDS)
def test_first_pass_on_the_images_is_regularised(kind, monkeypatch):
    monkeypatch.setattr(Block, "drop", 0.0)
    torch.manual_seed(3)
    assert_right_pass(*first_maps(Small(kind), train_small, next(batches())[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_survives_mixed_precision(kind):
    torch.manual_seed(3)
    assert_mixed_precision(mixed_precision(Small(kind), images()))


@pytest.mark.parametrize("view", [*FIXED, *RESIZED], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_views_that_the_model_takes(kind, view):
    torch.manual_seed(3)
    model = Small(kind)
    if kind in ("Plus", "CTI") and view in RESIZED:
        with pytest.raises(ValueError, match=r"\d+ x \d+ px.* 64 x 64 .*keep_size=True"):
            terms_under(model, view, images())
    else:
        loss, _ = terms_under(model, view, images())
        assert 0 < loss.item() < float("inf")


def test_fixed_size_is_that_of_training_alone():
    model = Small("Plus")
    with mctformer.capture(model) as host:
        with pytest.raises(ValueError, match="32 x 128"):  # as many patches, which the host would take
            mctformer.second_view(host, torch.rand(2, 3, 32, 128))
        mctformer.second_view(host.__class__(model.eval(), host._attention), torch.rand(2, 3, 32, 128))


def test_class_map_of_the_host_has_no_gradient_where_it_is_0():
    """Why cams() is the head's output: the square root that MCTformer+ returns."""
    torch.manual_seed(3)
    model = Small("Plus")
    with mctformer.capture(model) as host:
        _, own, _ = model(images(), return_att=True)
        view = host.take()
    assert_own_maps_are_not_differentiable(model, own, mctformer.cams(view))


def test_forgotten_take_is_refused():
    model = Small()
    with mctformer.capture(model) as host:
        model(images())
        model(images())
        with pytest.raises(acr_reg.CaptureError, match="2 encoder runs"):
            host.take()


def test_take_below_another_pass_is_refused():
    """In CTI's step: four passes, of which the first alone is on the images as they are."""
    model = Small("CTI")
    with mctformer.capture(model) as host:
        host.clear()
        for _ in range(4):
            model(images())
        with pytest.raises(acr_reg.CaptureError, match="4 encoder runs"):
            host.take()


class PlainViT(Small):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 24))
        self.num_classes = 1000


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "^Sequential .*'blocks'.*MCTformer.*docs/hosts"),
        (PlainViT(), "^PlainViT .*1 class tokens for 1000 classes.*MCTformer.*docs/hosts"),
    ],
)
def test_other_families_are_refused(model, facts):
    with pytest.raises(ValueError, match=facts):
        mctformer.capture(model)


# ---------------------------------------------------------------- the hosts themselves

HOSTS = {
    "MCTformerPlus": ("xulianuwa/MCTformer", "0acc27a", "deit_small_MCTformerPlus", {"input_size": 64}),
    "MCTformerV2": ("xulianuwa/MCTformer", "9606597", "deit_small_MCTformerV2_patch16_224", {}),
    "MCTformerV1": ("xulianuwa/MCTformer", "9606597", "deit_small_MCTformerV1_patch16_224", {}),
    "WeakTr": ("hustvl/WeakTr", "3457ad3", "deit_small_WeakTr_patch16_224", {"feat_reduction": 4, "reduction": 8}),
    "CTI": ("yoon307/CTI", "1c6fdb4", "deit_small_MCTformerV2_CTI", {}),
}


def built(name, drop_path=0.1):
    models = importlib.import_module("networks.mctformer" if name == "CTI" else "models")
    _, _, function, options = HOSTS[name]
    return getattr(models, function)(
        num_classes=CLASSES, img_size=64, drop_rate=0.0, drop_path_rate=drop_path, **options
    )


def train_engine(name, folder, model, patched, data=None):
    """The host's train_one_epoch on two batches, or on those given."""
    from timm.utils import NativeScaler

    repository, commit, _, _ = HOSTS[name]
    engine = patched_module(folder, "engine.py", added_lines(mctformer, repository, commit)["engine.py"] * patched)
    extra = {"args": types.SimpleNamespace(num_cct=12, loss_weight=1.0)} if name == "MCTformerPlus" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    engine.train_one_epoch(
        model, data or list(batches()), optimizer, torch.device("cpu"), 0, NativeScaler(), max_norm=None, **extra
    )


def train_cti(folder, model, patched):
    """CTI's train_setup, unpack and update; its __init__, which loads weights, is left out."""
    lines = added_lines(mctformer, "yoon307/CTI", "1c6fdb4")["models/model_CTI.py"]
    module = patched_module(folder, "models/model_CTI.py", lines * patched)
    step = object.__new__(module.model_WSSS)
    args = types.SimpleNamespace(
        lr=5e-4, batch_size=64, W=[0.1, 1.0, 1.0], opt="adamw", weight_decay=0.05, momentum=0.9
    )
    args.__dict__.update(sched="cosine", epochs=60, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=5, cooldown_epochs=10)
    loss_names = ["loss_cls", "loss_bg", "loss_ctk_swap_intra", "loss_ctk_swap_cross"]
    step.__dict__.update(args=args, net_trm=model, dev="cpu", nets=[], num_class=CLASSES, loss_names=loss_names)
    step.__dict__.update(running_loss=[0.0] * 4, right_count=[0] * 4, wrong_count=[0] * 4, count=0, global_step=0)
    step.ctk_global = [[] for _ in range(CLASSES)]
    step.logger = types.SimpleNamespace(info=lambda *_: None)
    step.phase = "train"
    step.train_setup()
    for samples, targets in batches():
        step.unpack((samples, samples.flip(0), targets, ["a", "b"]))
        step.update(0)


def run_host(name, folder):
    """All that is checked of a host, in one process: its import and its models take longer than the checks."""
    host_on_path(folder, absent=("cv2", "turtle"))
    train = functools.partial(train_cti, folder) if name == "CTI" else functools.partial(train_engine, name, folder)
    found = {"steps": check_training(lambda: built(name), train, layers=12, watched=is_query_and_key)}
    torch.manual_seed(3)
    samples = next(batches())[0]
    found["pass"] = first_maps(built(name, drop_path=0.0), train, samples)
    model = built(name)
    found["floor"] = noise_floor(model, samples)
    found["precision"] = mixed_precision(model, samples)
    found["views"] = {}
    for view in (*FIXED, *RESIZED):
        try:
            loss, _ = terms_under(model, view, samples)
            loss.backward()
            found["views"][repr(view)] = loss.item()
        except ValueError as error:
            found["views"][repr(view)] = str(error)
    if name == "MCTformerPlus":
        with mctformer.capture(model) as host:
            _, own, _ = model(samples, return_att=True)
            assert_own_maps_are_not_differentiable(model, own, mctformer.cams(host.take()))
        found["bfloat16 steps"] = bfloat16_steps(built(name), train)
    return found


def bfloat16_steps(model, train):
    """The host's own loop under autocast, which is off without CUDA: names of query and key weights that moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.cuda.amp.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    train(model, True)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    moved = [
        name for name, p in model.named_parameters() if is_query_and_key(name) and not torch.equal(p, before[name])
    ]
    return len(moved)


@functools.cache
def host_report(name):
    repository, commit, _, _ = HOSTS[name]
    report = in_fresh_process(run_host, name, checkout(repository, commit))
    print(name, report["steps"][0].terms, report["floor"], report["precision"], report["views"])
    return report


@pytest.mark.parametrize("name", HOSTS)
def test_host_trains(name):
    report = host_report(name)
    prefix = CLASSES + (name == "CTI")
    assert report["steps"][0].tokens == ((2, 6, prefix + 16, prefix + 16),) * 12
    assert report.get("bfloat16 steps", 12) == 12


@pytest.mark.parametrize("name", HOSTS)
def test_first_pass_of_the_host_is_regularised(name):
    assert_right_pass(*host_report(name)["pass"])


@pytest.mark.parametrize("name", HOSTS)
def test_noise_floor_of_the_host_is_that_of_drop_path(name):
    assert_noise_floor(host_report(name)["floor"])


@pytest.mark.parametrize("name", HOSTS)
def test_gradient_survives_mixed_precision_in_the_host(name):
    assert_mixed_precision(host_report(name)["precision"])


@pytest.mark.parametrize("name", HOSTS)
def test_views_that_the_host_takes(name):
    views = host_report(name)["views"]
    for view in (*FIXED, *RESIZED):
        found = views[repr(view)]
        if name in ("MCTformerPlus", "CTI") and view in RESIZED:
            assert "trains at 64 x 64 only" in found
        else:
            assert 0 < found < float("inf")


def weaktr_on_rank(rank, folder, address):
    """Gradients of one step of WeakTr's loop on the rank's own batch; of both batches in turn where it is alone."""
    host_on_path(folder, absent=("cv2",))
    if address is None:
        return [weaktr_gradients(folder, lambda model: model, batch) for batch in batches()]
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    importlib.import_module("utils").is_dist_avail_and_initialized = lambda: False  # its meters want CUDA
    wrap = functools.partial(nn.parallel.DistributedDataParallel, find_unused_parameters=True)  # as its main.py does
    gradients = weaktr_gradients(folder, wrap, list(batches())[rank])
    torch.distributed.destroy_process_group()
    return gradients


def weaktr_gradients(folder, wrap, batch):
    torch.manual_seed(0)
    model = built("WeakTr", drop_path=0.0)
    train_engine("WeakTr", folder, wrap(model), True, [batch])
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_two_ranks_of_weaktr_are_the_mean_of_both(tmp_path):
    folder = checkout("hustvl/WeakTr", "3457ad3")
    alone = in_fresh_process(weaktr_on_rank, 0, folder, None)
    with ProcessPoolExecutor(2, FRESH) as pool:
        waiting = [pool.submit(weaktr_on_rank, rank, folder, f"file://{tmp_path / 'store'}") for rank in range(2)]
        first, second = (done.result() for done in waiting)
    assert sum(is_query_and_key(name) for name in alone[0]) == 12
    for name, gradient in alone[0].items():
        assert (first[name] == second[name]).all(), name
        mean = (gradient + alone[1][name]) / 2
        assert abs(first[name] - mean).max() <= 1e-4 * abs(mean).max() + 1e-8, name
        assert abs(gradient - mean).max() > 1e-3 * abs(mean).max() or name.endswith("pos_embed"), name
