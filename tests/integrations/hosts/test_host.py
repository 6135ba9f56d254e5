"""What all host files share: integrations/host.py, and the lines that their docstrings add."""

import copy
import pickle
import queue
import random
import re
import types
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import acr_reg
from acr_reg.integrations import mctformer
from acr_reg.integrations.added_lines import Added, add_lines, added_lines, with_added_lines
from acr_reg.integrations.host import FeatureRecorder, HostCapture, part, unwrap
from tests.support.mctformer import Block, Small, batches, images
from tests.support.processes import FRESH


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(Block, "drop", 0.5)
    torch.manual_seed(0)
    return Small()


# ---------------------------------------------------------------- random numbers


def test_second_view_leaves_the_host_its_random_numbers(model):
    samples = images()
    with mctformer.capture(model) as host:
        torch.manual_seed(1)
        model(samples)
        expected = torch.rand(3)
        torch.manual_seed(1)
        model(samples)
        mctformer.second_view(host, samples)
        assert torch.equal(torch.rand(3), expected)


def second_maps(host, samples):
    torch.manual_seed(1)  # whatever the host's own numbers are at this step
    return mctformer.second_view(host, samples).attention[-1].weights()


def test_noise_of_the_second_view_differs_from_step_to_step(model):
    samples = images()
    with mctformer.capture(model) as host:
        first, second = second_maps(host, samples), second_maps(host, samples)
    assert not torch.equal(first, second)
    torch.testing.assert_close(*(second_maps(mctformer.capture(model.eval()), samples) for _ in range(2)))


def test_noise_of_the_second_view_repeats_with_the_seed(model):
    samples = images()
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        with mctformer.capture(model) as host:
            runs.append(second_maps(host, samples))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def draw():
    return random.random(), np.random.rand()  # noqa: NPY002 (the generator that hosts draw from)


def test_second_view_leaves_numpy_and_python_their_random_numbers(model):
    def forward():
        drawn.append(draw())
        return model(images())

    drawn = []
    with mctformer.capture(model) as host:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        expected = draw()
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        host.run(forward)
        host.run(forward)
    assert draw() == expected
    assert len({expected, *drawn}) == 3, "each second view has numbers of its own"


# ---------------------------------------------------------------- what the host's modules remember


class Queue(nn.Module):
    """Keys of earlier images beside these, as MoCo's heirs keep them: written in place, or anew."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("queue", torch.randn(4, 3))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        keys = x.mean((2, 3)).detach()
        if self.in_place:
            self.queue[int(self.pointer) : int(self.pointer) + len(keys)] = keys
            self.pointer[0] = (self.pointer + len(keys)) % len(self.queue)
        else:
            self.queue = torch.cat([self.queue, keys])[-4:]
        return x + self.queue.mean(0)[:, None, None]


class Average(nn.Module):
    """Normalises by a moving average that is on the graph, so that backward refuses where it was written since."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(3, 1, 1))
        self.register_buffer("twin", self.mean)
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3))[:, None, None])
        assert self.twin is self.mean
        return x * self.gain * self.mean


class Table(nn.Module):
    """A table for the size seen last, a flag of which size that is, and a count of calls."""

    size, calls = 0, 0

    def forward(self, x):
        self.calls += 1
        if self.size != x.shape[-1]:
            self.size = x.shape[-1]
            self.register_buffer("table", torch.linspace(0, 1, self.size))
            self.found = x.mean()
        return x + self.table


REMEMBERING = {
    "BatchNorm": lambda: nn.BatchNorm2d(3),
    "BatchNorm without momentum": lambda: nn.BatchNorm2d(3, momentum=None),
    "BatchNorm without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "InstanceNorm": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)),
    "spectral norm by hooks": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 3, 1)),
    "queue": lambda: Queue(True),
    "queue written anew": lambda: Queue(False),
    "average": Average,
    "table": Table,
}


class Remembering(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.first, self.vit = REMEMBERING[name](), Small()

    def forward(self, x):
        return self.vit(self.first(x))


def remembered(model):
    """All that the modules hold, by name; tensors by value."""
    found = {}
    for module_name, module in model.named_modules():
        own = {**vars(module), **dict(module.named_buffers(recurse=False))}
        for name, value in own.items():
            if name.startswith("_") and not isinstance(value, bool | int | float):
                continue
            found[f"{module_name}.{name}"] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    return found


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", REMEMBERING)
def test_second_view_leaves_modules_what_they_remember(name, training):
    torch.manual_seed(0)
    model = Remembering(name).train(training)
    with HostCapture(model, acr_reg.capture_attention(model, modules=[model.vit])) as host:
        outputs = model(images())
        host.take()
        objects = {name: id(buffer) for name, buffer in model.named_buffers()}
        before = remembered(model)
        second = host.run(lambda: model(torch.nn.functional.interpolate(2 * images(), scale_factor=0.5)))
        after = remembered(model)
    assert before.keys() == after.keys()
    assert [each for each in before if not same(before[each], after[each])] == []
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == objects
    (outputs[0].sum() + second.attention[0].weights().square().sum()).backward()
    assert all(p.grad is not None for p in model.first.parameters())


@pytest.mark.parametrize("name", ["BatchNorm", "average", "queue", "table"])
def test_a_second_view_that_fails_leaves_modules_what_they_remember(name):
    model = Remembering(name)

    def forward():
        model(2 * images())
        raise KeyboardInterrupt

    with HostCapture(model, acr_reg.capture_attention(model, modules=[model.vit])) as host:
        model(images())
        before = remembered(model)
        with pytest.raises(KeyboardInterrupt):
            host.run(forward)
        after = remembered(model)
    assert all(same(before[each], after[each]) for each in before | after)


@pytest.mark.parametrize("name", ["BatchNorm", "spectral norm by hooks", "average", "queue"])
def test_weight_0_is_the_run_without_the_lines_in_eval_mode_too(name):
    def trained(patched):
        torch.manual_seed(0)
        model = Remembering(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip(), 0.0, 0.0)
        with HostCapture(model, acr_reg.capture_attention(model, modules=[model.vit])) as host:
            for samples, targets in batches():
                loss = sum(F.multilabel_soft_margin_loss(out, targets) for out in model(samples))
                if patched:
                    first = host.take()
                    loss = loss + acr(first.attention, host.run(lambda x=samples: model(acr.view(x))).attention)
                host.clear()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.eval()(images())[0]

    assert torch.equal(trained(True), trained(False))


# ---------------------------------------------------------------- two ranks


def on_rank(rank, address):
    """Noise of the second view on equal images and seeds, then the gradients of a step on the rank's own images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    Block.drop = 0.5
    torch.manual_seed(0)
    model = Small()
    samples = images()
    with mctformer.capture(model) as host:
        noisy = second_maps(host, samples).detach()
    Block.drop = 0.0
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    step(wrapped, rank)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    statistics = [broadcast(rank, second_views) for second_views in (0, 1)]
    dist.destroy_process_group()
    return noisy.numpy(), {name: g.numpy() for name, g in gradients.items()}, statistics


def broadcast(rank, second_views):
    """Two forwards under DDP with a second view between them, for which DDP broadcasts as well."""
    torch.manual_seed(rank)
    model = Remembering("average")
    model.norm = nn.BatchNorm2d(3)
    model.forward = lambda x: model.vit(model.norm(model.first(x)))
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    found = []
    with HostCapture(wrapped, acr_reg.capture_attention(wrapped, modules=[model.vit])) as host:
        for samples, _ in batches():
            outputs = wrapped(samples * (1 + rank))
            for _ in range(second_views):
                host.run(lambda x=samples: wrapped(x * (1 + rank)))
            host.clear()
            found.append({name: buffer.clone().numpy() for name, buffer in model.named_buffers()})
            outputs[0].sum().backward()
    return found


def step(model, rank):
    samples, targets = list(batches())[rank]
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip())
    with mctformer.capture(model) as host:
        outputs = model(samples)
        first = host.take()
        second = mctformer.second_view(host, acr.view(samples))
        loss = sum(F.multilabel_soft_margin_loss(out, targets) for out in outputs)
        loss = loss + acr(
            first.attention, second.attention, mctformer.cams(first), mctformer.cams(second), labels=targets
        )
        loss.backward()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    address = f"file://{tmp_path_factory.mktemp('gloo') / 'store'}"
    with ProcessPoolExecutor(2, FRESH) as pool:
        return [done.result() for done in [pool.submit(on_rank, rank, address) for rank in range(2)]]


def test_noise_of_the_second_view_differs_between_ranks(ranks):
    (first, *_), (second, *_) = ranks
    assert (first != second).any()


def test_what_ddp_broadcasts_for_the_second_view_stays_out_of_the_buffers(ranks):
    for *_, (without, with_second) in ranks:
        for before, after in zip(without, with_second, strict=True):
            assert before.keys() == after.keys()
            assert all((before[name] == after[name]).all() for name in before)
    (*_, (one, _)), (*_, (other, _)) = ranks
    assert (one[0]["first.mean"] != other[0]["first.mean"]).any()


def test_gradients_of_two_ranks_are_the_mean_of_both(ranks, monkeypatch):
    monkeypatch.setattr(Block, "drop", 0.0)
    alone = []
    for rank in range(2):
        torch.manual_seed(0)
        model = Small()
        step(model, rank)
        alone.append({name: p.grad for name, p in model.named_parameters()})
    (_, first, _), (_, second, _) = ranks
    assert first.keys() == alone[0].keys()
    for name, gradient in first.items():
        assert (gradient == second[name]).all(), name
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(torch.from_numpy(gradient), mean, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(mean, alone[0][name], rtol=1e-3, atol=0), name  # the ranks' images differ


# ---------------------------------------------------------------- the recorder of features


def test_recorder_holds_the_last_output_on_its_graph():
    layer = nn.Linear(3, 3)
    recorder = FeatureRecorder(layer)
    layer(torch.zeros(1, 3))
    output = layer(torch.ones(1, 3))
    assert recorder.take() is output
    with pytest.raises(acr_reg.CaptureError, match="did not reach the output of its Linear"):
        recorder.take()


def test_recorder_of_the_input():
    layer = nn.Linear(3, 3)
    recorder = FeatureRecorder(layer, "input")
    given = torch.ones(1, 3, requires_grad=True)
    layer(given)
    assert recorder.take() is given


def test_recorder_keeps_the_first_until_it_is_taken():
    layer = nn.Linear(3, 3)
    recorder = FeatureRecorder(layer, keep="first")
    first = layer(torch.ones(1, 3))
    layer(torch.ones(1, 3))
    assert recorder.take() is first
    again = layer(torch.ones(1, 3))
    assert recorder.take() is again


def test_recorder_passes_over_what_has_no_graph():
    layer = nn.Linear(3, 3)
    recorder = FeatureRecorder(layer)
    kept = layer(torch.ones(1, 3))
    with torch.no_grad():
        layer(torch.ones(1, 3))
    assert recorder.take() is kept


@pytest.mark.parametrize("reentrant", [False, True])
def test_recorder_passes_over_what_checkpointing_repeats(reentrant):
    layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    recorder = FeatureRecorder(layer)
    output = checkpoint(layer, torch.ones(1, 3, requires_grad=True), use_reentrant=reentrant)
    recorder.clear()
    output.sum().backward()
    with pytest.raises(acr_reg.CaptureError):
        recorder.take()


def test_recorder_passes_over_a_pass_that_failed():
    class Failing(nn.Module):
        def forward(self, x):
            raise queue.Empty

    layer = Failing()
    recorder = FeatureRecorder(layer)
    with pytest.raises(queue.Empty):
        layer(torch.ones(1))
    with pytest.raises(acr_reg.CaptureError):
        recorder.take()


# ---------------------------------------------------------------- life of a capture


def test_take_without_a_pass(model):
    with mctformer.capture(model) as host:
        with pytest.raises(acr_reg.CaptureError):
            host.take()
        with torch.no_grad():
            model(images())
        with pytest.raises(acr_reg.CaptureError):
            host.take()


def test_take_of_a_pass_that_did_not_reach_the_head(model):
    with mctformer.capture(model) as host:
        model.forward_features(images())
        with pytest.raises(acr_reg.CaptureError, match="did not reach the output of its Conv2d"):
            host.take()
        model(images())
        assert host.take().features is not None


def test_second_view_forgets_what_was_not_taken(model):
    samples = images()
    with mctformer.capture(model.eval()) as host:
        model(torch.zeros_like(samples))
        view = mctformer.second_view(host, samples)
        model(samples)
        torch.testing.assert_close(view.features, host.take().features)


def test_clear_after_an_exception(model):
    samples = images()
    with mctformer.capture(model) as host:
        model(samples)
        host.clear()
        with pytest.raises(acr_reg.CaptureError):
            host.take()


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_remove_takes_every_hook_away(model):
    before = hooks(model)
    host = mctformer.capture(model)
    assert hooks(model) != before
    host.remove()
    assert hooks(model) == before
    host.remove()
    with pytest.raises(acr_reg.CaptureError, match="removed"):
        host.take()


def test_a_dropped_capture_takes_its_hooks_along(model):
    before = hooks(model)
    host = mctformer.capture(model)
    model(images())
    del host
    assert hooks(model) == before


def test_an_exception_in_the_block_removes_the_hooks(model):
    before = hooks(model)
    with pytest.raises(KeyError), mctformer.capture(model):
        raise KeyError
    assert hooks(model) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_captured_model_are_models_of_their_own(model, duplicate):
    samples = images()
    with mctformer.capture(model.eval()) as host:
        model(samples)
        twin = duplicate(model)
        twin(samples)  # would be a second run
        view = host.take()
    torch.testing.assert_close(twin(samples)[0], model(samples)[0])
    assert view.features is not None
    assert sorted(twin.state_dict()) == sorted(Small().state_dict())


def test_unwrap_and_part(model):
    assert unwrap(nn.DataParallel(nn.DataParallel(model))) is model
    assert part(model, "blocks.1", "MCTformer") is model.blocks[1]
    with pytest.raises(ValueError, match=r"^Small .*'encoder'.*ToCo"):
        part(model, "encoder", "ToCo")
    with HostCapture(model, acr_reg.capture_attention(model)) as host:
        assert host.network is model


# ---------------------------------------------------------------- the lines to add

SOURCE = "def f(x):\n    y = x\n\n    return y\n"
DOCSTRING = """Of two hosts.

    owner/name at 0123abc (first)
        a/f.py, before line 4:
            if y:

                y += 1
        g.py, in place of lines 1 to 2:
            import os

    owner/name at 0123abc, on today's torch and timm
        a/f.py, before line 2:
            x = x + 10

Words between.

    owner/other at 0123abc
        f.py, before line 1:
            pass
"""


@pytest.fixture
def family():
    module = types.ModuleType("family")
    module.__doc__ = DOCSTRING
    return module


def test_added_lines_are_those_of_one_host_and_purpose(family):
    code = "if y:\n    y += 1"
    of_host = {"a/f.py": [Added(4, 4, code)], "g.py": [Added(1, 3, "import os")]}
    assert added_lines(family, "owner/name", "0123abc") == of_host
    assert added_lines(family, "owner/name", "0123abc", today=True) == {"a/f.py": [Added(2, 2, "x = x + 10")]}
    assert added_lines(family, "owner/other", "0123abc", today=True) == {}
    with pytest.raises(ValueError, match=r"^family .*owner/name at 9999999"):
        added_lines(family, "owner/name", "9999999")


def test_lines_stand_where_the_source_says(family, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f.py").write_text(SOURCE)
    (tmp_path / "g.py").write_text("x = 1\ny = 2\nz = 3\n")
    lines = added_lines(family, "owner/name", "0123abc")
    add_lines(tmp_path, lines, added_lines(family, "owner/name", "0123abc", today=True))
    text = (tmp_path / "a" / "f.py").read_text()
    assert text == "def f(x):\n    x = x + 10\n    y = x\n\n    if y:\n        y += 1\n    return y\n"
    assert (tmp_path / "g.py").read_text() == "import os\nz = 3\n"


def test_lines_are_added_to_all_files_or_to_none(family, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f.py").write_text(SOURCE)
    lines = added_lines(family, "owner/name", "0123abc")
    with pytest.raises(ValueError, match=rf"g\.py in {re.escape(str(tmp_path))}\."):
        add_lines(tmp_path, lines)
    assert (tmp_path / "a" / "f.py").read_text() == SOURCE


@pytest.mark.parametrize("number", [0, 3, 5])
def test_lines_need_a_line_with_code(number):
    with pytest.raises(ValueError, match=rf"[Ll]ine {number} of 4 .*no code"):
        with_added_lines(SOURCE, [Added(number, number, "pass")])


def test_lines_are_replaced_within_the_source_only():
    assert with_added_lines(SOURCE, [Added(4, 5, "pass")]) == "def f(x):\n    y = x\n\n    pass\n"
    with pytest.raises(ValueError, match=r"[Ll]ine 4 of 4 .*no code"):
        with_added_lines(SOURCE, [Added(4, 6, "pass")])
