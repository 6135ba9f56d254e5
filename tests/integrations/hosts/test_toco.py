"""ToCo, DuPL, SeCo, MoRe, MCC, CTFA, CoSA: their own training functions with the added lines, on one rank and on two,
and small networks like theirs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import acr_reg
from acr_reg.integrations import toco
from acr_reg.integrations.host import unwrap
from tests.support.hosts import (
    check_mean_of_ranks,
    check_training,
    checkout,
    gradients_of_two_ranks,
    in_fresh_process,
)
from tests.support.toco import (
    CLASSES,
    HOSTS,
    LOCAL,
    REGISTERS,
    batch,
    host_gradients,
    is_query_and_key,
    taken_and_alone,
    train_host,
)


def consistency():
    return acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip())


# ---------------------------------------------------------------- small networks of the interface


class Block(nn.Module):
    def __init__(self, width, drop_path):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width)
        self.drop_path = drop_path

    def forward(self, x):
        query, key, value = self.attn.qkv(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        keep = (torch.rand(len(x), 1, 1) > self.drop_path) / (1 - self.drop_path) if self.training else 1.0
        return x + keep * (weights @ value).transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    """Never called itself: the network calls ``forward_features``."""

    patch_size = 16

    def __init__(self, prefix, drop_path, width=24, depth=3):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.cls_token = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.ModuleList(Block(width, drop_path) for _ in range(depth))

    def forward_features(self, x):
        prefix = self.cls_token.shape[1]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x).flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, prefix - 1], x[:, prefix:], x[:, prefix:]


class Network(nn.Module):
    """With one class token, or registers and one for each class; ``momentum``: with SeCo's second encoder."""

    def __init__(self, prefix=1, momentum=False, drop_path=0.1, width=24):
        super().__init__()
        self.encoder = Encoder(prefix, drop_path)
        self.encoder_k = Encoder(prefix, drop_path).requires_grad_(False) if momentum else None
        self.decoder = nn.Conv2d(width, CLASSES + 1, 3, padding=1)
        self.classifier = nn.Conv2d(width, CLASSES, 1, bias=False)

    def forward(self, x, crops=(), cam_only=False):
        _, patches, _ = self.encoder.forward_features(x)
        grid = patches.transpose(1, 2).unflatten(2, (x.shape[2] // 16, x.shape[3] // 16))
        segmentation = self.decoder(grid)
        local = [self.encoder.forward_features(crop)[0] for crop in crops]
        if self.encoder_k is not None:
            local += [self.encoder_k.forward_features(crop)[0] for crop in crops]
        if cam_only:
            return F.conv2d(grid, self.classifier.weight).detach()
        return self.classifier(F.adaptive_max_pool2d(grid, 1)).flatten(1), segmentation, local


class Pair(nn.Module):
    """DuPL's. Late in training each branch runs on images and augmented ones together, then on each alone."""

    def __init__(self, **options):
        super().__init__()
        self.branch1, self.branch2 = Network(**options), Network(**options)

    def forward(self, x, crops=(), cam_only=False):
        branches = (self.branch1, self.branch2)
        if cam_only or not crops:
            return [branch(x, cam_only=cam_only) for branch in branches]
        for branch in branches:
            branch(torch.cat([x, crops[0]]))
        return [branch(each) for each in (x, F.interpolate(crops[0], size=64)) for branch in branches]


BUILDS = {
    "ToCo": Network,
    "DuPL": Pair,
    "SeCo": lambda **options: Network(momentum=True, **options),
    "MoRe": lambda **options: Network(prefix=REGISTERS + CLASSES, **options),
}
PREFIX = {"ToCo": 1, "DuPL": 1, "SeCo": 1, "MoRe": REGISTERS + CLASSES}


def capture_all(model):
    network = unwrap(model)
    if isinstance(network, Pair):
        return [toco.capture(branch, keep="all") for branch in (network.branch1, network.branch2)]
    return [toco.capture(model)]


def forward_pass(model, data, late):
    """As a training step of the host calls its network. Returns the outputs and the run to take."""
    images, _, crops = data
    with torch.no_grad():
        model(images, cam_only=True)  # pseudo labels
    if isinstance(unwrap(model), Pair):
        return model(images, crops=crops[:1] if late else ()), int(late)
    return [model(images, crops=[crops[0], crops[1][..., :LOCAL, :LOCAL]])], None


def small_step(model, acr, hosts, data, late=True):
    images, labels, _ = data
    outputs, run = forward_pass(model, data, late)
    loss = F.multilabel_soft_margin_loss(outputs[0][0], labels)
    for logits, segmentation, local in outputs:
        loss = loss + logits.square().mean() + segmentation.square().mean()
        loss = loss + sum(token.square().mean() for token in local)
    for host in hosts:
        first = host.take(run)
        second = toco.second_view(host, acr.view(images))
        loss = loss + acr(first.attention, second.attention, toco.cams(first), toco.cams(second), labels=labels)
    return loss


def train_small(model, patched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hosts = capture_all(model) if patched else []
    acr = consistency() if patched else None
    for seed in (2, 3):
        optimizer.zero_grad()
        small_step(model, acr, hosts, batch(seed), late=seed == 3).backward()
        optimizer.step()


@pytest.mark.parametrize("name", BUILDS)
def test_small_network_trains(name):
    calls = 2 if name == "DuPL" else 1
    steps = check_training(BUILDS[name], train_small, layers=3, watched=is_query_and_key, calls=calls)
    tokens = PREFIX[name] + 36
    assert all(step.tokens == ((2, 2, tokens, tokens),) * 3 for step in steps)


@pytest.mark.parametrize("name", BUILDS)
def test_the_images_pass_is_taken_and_the_class_map_is_its_own(name):
    model = BUILDS[name](drop_path=0.0)
    data = batch(2)
    hosts = capture_all(model)
    for late in (False, True):
        _, run = forward_pass(model, data, late)
        for host in hosts:
            first = host.take(run)
            alone = toco.second_view(host, data[0])
            for one, other in zip(first.attention.weights(), alone.attention.weights(), strict=True):
                torch.testing.assert_close(one, other)
            with torch.no_grad():
                expected = host.network(data[0], cam_only=True)
            torch.testing.assert_close(toco.cams(first), expected)
            torch.testing.assert_close(toco.cams(alone), expected)
            for view in (first, alone):
                patch = view.network.encoder.patch_embed.weight
                (gradient,) = torch.autograd.grad(toco.cams(view).sum(), patch)
                assert gradient.norm() > 0, "a class map on the graph, unlike the host's own"


@pytest.mark.parametrize("name", BUILDS)
def test_the_noise_floor_is_that_of_drop_path(name):
    images = torch.cat([batch(seed)[0] for seed in range(4)])  # so many that some are dropped
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.Identity())
    for drop_path, training, is_zero in ((0.5, True, False), (0.5, False, True), (0.0, True, True)):
        model = BUILDS[name](drop_path=drop_path).train(training)
        hosts = capture_all(model)
        model(images)
        for host in hosts:
            first, second = host.take(), toco.second_view(host, images)
            _, terms = acr(first.attention, second.attention, toco.cams(first), toco.cams(second), return_terms=True)
            floor = [terms[term].item() for term in ("activation", "affinity", "cam")]
            assert all((value == 0) == is_zero for value in floor), (drop_path, training, floor)


def test_class_tokens_are_those_of_the_classes():
    for name, expected in (("ToCo", (0,)), ("MoRe", tuple(range(REGISTERS, REGISTERS + CLASSES)))):
        model = BUILDS[name]()
        with toco.capture(model) as host:
            model(batch(2)[0])
            layout = host.take().attention[0].layout
        assert (layout.num_prefix_tokens, layout.class_tokens) == (PREFIX[name], expected)


def test_a_pair_and_a_missing_run_are_refused():
    model = Pair()
    with pytest.raises(ValueError, match=r"two branches.*toco\.capture\(branch, keep='all'\)"):
        toco.capture(model)
    host = toco.capture(model.branch1, keep="all")
    model(batch(2)[0])
    with pytest.raises(acr_reg.CaptureError, match=r"\brun 1\b"):
        host.take(1)


def small_gradients(data):
    torch.distributed.init_process_group("gloo")
    found = {}
    for name in ("ToCo", "DuPL"):
        torch.manual_seed(0)
        model = BUILDS[name](drop_path=0.0)  # its draws depend on the number of ranks
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        small_step(wrapped, consistency(), capture_all(wrapped), batch(data)).backward()
        found.update({f"{name} {parameter}": p.grad for parameter, p in model.named_parameters()})
    return found


# ---------------------------------------------------------------- the hosts themselves


@pytest.fixture(params=HOSTS)
def host_and_folder(request):
    host = HOSTS[request.param]
    return request.param, checkout(host.repository, host.commit)


def test_host_trains(host_and_folder):
    steps = in_fresh_process(train_host, *host_and_folder)
    host = HOSTS[host_and_folder[0]]
    print(host.repository, steps[0].terms)
    tokens = host.prefix + (host.size // 16) ** 2
    assert all({shape[2:] for shape in step.tokens} == {(tokens, tokens)} for step in steps)
    assert all({shape[0] for shape in step.tokens} == {2} for step in steps)


def test_host_regularises_the_images_pass(host_and_folder):
    found = in_fresh_process(taken_and_alone, *host_and_folder)
    print(host_and_folder[0], found)
    host = HOSTS[host_and_folder[0]]
    assert len(found) == host.branches * (3 if host.phases else 1)
    for attention, cams, floor in found:
        assert attention < 1e-6
        assert cams < 1e-5
        assert all(value < 1e-5 for value in floor.values()), "the host has no drop_path, so there is no noise"


def test_host_has_the_mean_gradient_on_two_ranks(host_and_folder):
    if not HOSTS[host_and_folder[0]].ranks:
        pytest.skip(f"{host_and_folder[0]} starts its process group of one rank itself")
    check_mean_of_ranks(*gradients_of_two_ranks((host_gradients, *host_and_folder)))
