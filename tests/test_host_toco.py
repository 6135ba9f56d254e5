"""ToCo: its own training function with the added lines, on one rank and on two, and a small network like it."""

import logging
import os
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from host_checks import (
    added_lines,
    check_mean_of_ranks,
    check_training,
    checkout,
    gradients_of_two_ranks,
    host_on_path,
    in_fresh_process,
    patched_module,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import acr_reg
from acr_reg.integrations import toco

CLASSES = 20
SIZE, LOCAL = 96, 32


def batch(seed, size=SIZE):
    """Images, labels, boxes of the images within their padding, and the three crops of ToCo's loader."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    images = torch.randn(2, 3, size, size, generator=generator)
    crops = [torch.randn(2, 3, size, size, generator=generator) for _ in range(3)]
    return ["a", "b"], images, labels, torch.tensor([[0, size, 0, size]] * 2), crops


def is_query_and_key(name):
    return "encoder.blocks" in name and ".attn.qkv.weight" in name


# ---------------------------------------------------------------- a small network of the interface


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        query, key, value = self.attn.qkv(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        keep = (torch.rand(len(x), 1, 1) > 0.1) / 0.9 if self.training else 1.0
        return x + keep * (weights @ value).transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    """Never called itself: the network calls ``forward_features``."""

    patch_size = 16

    def __init__(self, width, depth):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward_features(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x).flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0], x[:, 1:], x[:, 1:]


class Network(nn.Module):
    def __init__(self, width=24, depth=3):
        super().__init__()
        self.encoder = Encoder(width, depth)
        self.decoder = nn.Conv2d(width, CLASSES + 1, 3, padding=1)
        self.classifier = nn.Conv2d(width, CLASSES, 1, bias=False)

    def forward(self, x, crops=(), cam_only=False):
        _, patches, _ = self.encoder.forward_features(x)
        local = [self.encoder.forward_features(crop)[0] for crop in crops]
        grid = patches.transpose(1, 2).unflatten(2, (x.shape[2] // 16, x.shape[3] // 16))
        segmentation = self.decoder(grid)
        if cam_only:
            return F.conv2d(grid, self.classifier.weight).detach()
        return self.classifier(F.adaptive_max_pool2d(grid, 1)).flatten(1), segmentation, local


def small_step(model, acr, host, data):
    _, images, labels, _, crops = data
    with torch.no_grad():
        model(images, cam_only=True)  # pseudo labels
    logits, segmentation, local = model(images, crops=[crop[..., :LOCAL, :LOCAL] for crop in crops])
    loss = F.multilabel_soft_margin_loss(logits, labels) + segmentation.square().mean()
    loss = loss + sum(token.square().mean() for token in local)
    if host is not None:
        first = host.take()
        second = toco.second_view(host, acr.view(images))
        loss = loss + acr(first.attention, second.attention, toco.cams(first), toco.cams(second), labels=labels)
    return loss


def train_small(model, patched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    host = toco.capture(model) if patched else None
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip()) if patched else None
    for seed in (2, 3):
        optimizer.zero_grad()
        small_step(model, acr, host, batch(seed)).backward()
        optimizer.step()


def test_small_network_trains():
    steps = check_training(Network, train_small, layers=3, watched=is_query_and_key)
    assert steps[0].tokens == ((2, 2, 1 + 36, 1 + 36),) * 3, "the pass on the images, not one on crops"


def test_the_images_pass_is_taken_and_the_class_map_is_its_own():
    model = Network().eval()
    _, images, _, _, crops = batch(2)
    with toco.capture(model) as host:
        model(images, crops=crops)
        first = host.take()
        again = toco.second_view(host, images)
    for one, other in zip(first.attention.weights(), again.attention.weights(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(toco.cams(first), model(images, cam_only=True))
    torch.testing.assert_close(toco.cams(again), model(images, cam_only=True))


def small_gradients(data):
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = Network().eval()  # without drop_path, whose draws depend on the number of ranks
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    host = toco.capture(wrapped)
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip())
    small_step(wrapped, acr, host, batch(data)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the host itself

STUBS = ("bilateralfilter", "cv2", "omegaconf", "pydensecrf", "texttable")


def toco_training(folder, patched, model, data):
    """Runs the host's train() on these batches. Stubbed: the dataset, the compiled CRF loss (weight 0 up to iteration
    2000), the GPU."""
    file = "scripts/dist_train_voc_seg_neg.py"
    lines = added_lines(toco, "rulixiang/ToCo", "e13514d")[file] if patched else None
    script = patched_module(folder, file, lines)
    script.network = lambda **_: model
    script.voc = types.SimpleNamespace(VOC12ClsDataset=lambda **_: data, VOC12SegDataset=lambda **_: data)
    script.DataLoader = lambda dataset, **_: dataset
    script.DistributedDataParallel = lambda module, device_ids, **options: DistributedDataParallel(module, **options)
    script.get_energy_loss = lambda **_: torch.zeros(())
    score = script.evaluate.multilabel_score  # the sklearn of its day returned numpy's float, which has an .item()
    script.evaluate = types.SimpleNamespace(multilabel_score=lambda *given: np.float64(score(*given)))
    args = script.parser.parse_args([])
    args.__dict__.update(
        local_rank=torch.device("cpu"), backend="gloo", max_iters=len(data), local_crop_size=LOCAL, warmup_iters=1
    )
    script.train(args)


def prepare_toco(folder):
    host_on_path(folder, STUBS)
    torch.cuda.set_device = lambda *_: None
    setattr(np, "float", float)  # noqa: B010  # gone since numpy 1.24
    logging.disable()
    from model.model_seg_neg import network

    return lambda: network("deit_small_patch16_224", num_classes=21, pretrained=False, init_momentum=0.9, aux_layer=-3)


def run_toco(folder):
    build = prepare_toco(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")

    def train(model, patched):
        toco_training(folder, patched, model, [batch(2), batch(3)])
        torch.distributed.destroy_process_group()

    return check_training(build, train, layers=12, watched=is_query_and_key)


def toco_gradients(data, folder):
    build = prepare_toco(folder)
    torch.manual_seed(0)
    model = build()
    found = {}

    def note(*_):
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(note)
    torch.manual_seed(1)
    toco_training(folder, True, model, [batch(data)])
    hook.remove()
    return found


@pytest.fixture
def toco_folder():
    return checkout("rulixiang/ToCo", "e13514d")


def test_toco_trains(toco_folder):
    steps = in_fresh_process(run_toco, toco_folder)
    print("ToCo", steps[0].terms)
    assert steps[0].tokens == ((2, 6, 1 + 36, 1 + 36),) * 12


def test_toco_has_the_mean_gradient_on_two_ranks(toco_folder):
    check_mean_of_ranks(*gradients_of_two_ranks((toco_gradients, toco_folder)))
