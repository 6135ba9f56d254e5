"""TransCAM: its own training script with the added lines, its model on two ranks, and a small model like it."""

import os
import sys
import tempfile
import types

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

import acr_reg
from acr_reg.integrations import transcam

CLASSES, SIZE = 20, 64


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    return torch.randn(2, 3, SIZE, SIZE, generator=generator), labels


def is_query_and_key(name):
    return ".attn.qkv.weight" in name


# ---------------------------------------------------------------- a small model of the interface


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


class Small(nn.Module):
    """A convolutional branch with BatchNorm that is fed by a transformer branch."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3), nn.BatchNorm2d(width), nn.MaxPool2d(3, 2, 1))
        self.trans_patch_conv = nn.Conv2d(width, width, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.trans_1 = Block(width)
        self.conv_trans_2 = nn.Module()
        self.conv_trans_2.trans_block = Block(width)
        self.trans_cls_head = nn.Linear(width, CLASSES + 1)
        self.conv_cls_head = nn.Conv2d(width, CLASSES + 1, 3, padding=1)

    def forward(self, method, x):
        grid = self.trans_patch_conv(self.stem(x))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), grid.flatten(2).transpose(1, 2)], 1)
        x = self.conv_trans_2.trans_block(self.trans_1(x))
        maps = self.conv_cls_head(grid + x[:, 1:].transpose(1, 2).unflatten(2, grid.shape[2:]))
        return maps.mean((2, 3)), self.trans_cls_head(x[:, 0]), maps


def small_step(model, acr, host, data):
    images, labels = data
    conv, trans, _ = model("transcam", images)
    loss = F.multilabel_soft_margin_loss((conv + trans)[:, 1:], labels)
    if host is not None:
        first = host.take()
        second = transcam.second_view(host, acr.view(images))
        loss = loss + acr(
            first.attention, second.attention, transcam.cams(first), transcam.cams(second), labels=labels
        )
    return loss


def train_small(model, patched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    host = transcam.capture(model) if patched else None
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip()) if patched else None
    for seed in (2, 3):
        optimizer.zero_grad()
        small_step(model, acr, host, batch(seed)).backward()
        optimizer.step()


def test_small_model_trains():
    steps = check_training(Small, train_small, layers=2, watched=is_query_and_key)
    assert steps[0].tokens == ((2, 2, 1 + 16, 1 + 16),) * 2


def test_the_class_map_is_the_convolutional_heads():
    model = Small().eval()
    images, _ = batch(2)
    with transcam.capture(model) as host:
        *_, maps = model("transcam", images)
        first = host.take()
    torch.testing.assert_close(transcam.cams(first), maps[:, 1:])
    query = first.attention[0].layout.query
    assert (query.offset, query.offset_known) == ((-1.5, -1.5), True)  # 0.5 px of the stem, 2 * 0.5 of the pooling


def gradients_of(build, data):
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = build().eval()  # without drop_path, whose draws depend on the rank
    # In eval mode backward needs BatchNorm's buffers, which DDP would write anew before the second view.
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip())
    small_step(wrapped, acr, transcam.capture(wrapped), batch(data)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def small_gradients(data):
    return gradients_of(Small, data)


# ---------------------------------------------------------------- the host itself


def prepare_host(folder):
    host_on_path(folder, ("cv2", "tensorboard", "torch.utils.tensorboard"))
    import network.conformer_CAM

    return network.conformer_CAM.Net_sm


def run_host(folder):
    """Runs the host's script. Stubbed: the data set, the checkpoint (the model's own weights), the GPU, saving."""
    build = prepare_host(folder)
    import network.conformer_CAM
    import torch.utils.data
    import voc12.data

    torch.save = lambda *_: None
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=lambda *_: None)
    voc12.data.VOC12ClsDataset = lambda *_, **__: None
    torch.utils.data.DataLoader = lambda *_, **__: [("ab", *batch(2)), ("ab", *batch(3))]
    os.chdir(tempfile.mkdtemp())  # for the script's log
    sys.argv = ["train_TransCAM.py", "--weights", "none", "--max_epoches", "1", "--arch", "built"]

    def train(model, patched):
        network.conformer_CAM.Net_built = lambda: model
        torch.load = lambda *_, **__: dict(model.state_dict())
        lines = added_lines(transcam, "liruiwen/TransCAM", "4ffe693")["train_TransCAM.py"] if patched else None
        patched_module(folder, "train_TransCAM.py", lines, "__main__")

    steps = check_training(build, train, layers=12, watched=is_query_and_key)
    model = build().eval()
    with transcam.capture(model) as host:
        *_, maps = model("convcam", batch(2)[0])
        first = host.take()
    torch.testing.assert_close(transcam.cams(first), maps[:, 1:])
    return steps, [layer.layout.query for layer in first.attention]


def host_gradients(data, folder):
    return gradients_of(prepare_host(folder), data)


@pytest.fixture
def host_folder():
    return checkout("liruiwen/TransCAM", "4ffe693")


def test_host_trains(host_folder):
    steps, lattices = in_fresh_process(run_host, host_folder)
    print("TransCAM", steps[0].terms, lattices[0].offset, lattices[0].offset_known)
    assert steps[0].tokens == ((2, 6, 1 + 16, 1 + 16),) * 12
    places = [(lattice.offset[0], lattice.offset_known) for lattice in lattices]
    assert places[:4] == [(-1.5, True)] * 4
    assert not any(known for _, known in places[4:]), "the docstring says that the loss warns of them"


def test_two_ranks_of_the_hosts_model_have_the_mean_gradient(host_folder):
    check_mean_of_ranks(*gradients_of_two_ranks((host_gradients, host_folder)))
