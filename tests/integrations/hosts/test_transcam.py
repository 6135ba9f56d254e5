"""TransCAM: its own training script with the added lines, its model on two ranks, and a small model like it."""

import copy
import os
import sys
import tempfile
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import acr_reg
from acr_reg.integrations import transcam
from tests.support.hosts import (
    Block,
    added_lines,
    check_mean_of_ranks,
    check_training,
    checkout,
    gradients_of_two_ranks,
    host_on_path,
    in_fresh_process,
    is_query_and_key,
    maps_of_first_loss,
    patched_module,
)
from tests.support.models.replicas import replica_of

CLASSES, SIZE = 20, 64


def batch(seed):
    """One image is padded with zeros, as the host's crops are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    images = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    images[0, :, :, 48:] = 0
    return images, labels


# ---------------------------------------------------------------- a small model of the interface


class TwoBranches(nn.Module):
    """Strided convolutions, which put their own grid elsewhere, are added to the tokens."""

    def __init__(self, width):
        super().__init__()
        self.cnn_block = nn.Sequential(
            nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1)
        )
        self.trans_block = Block(width)

    def forward(self, base, tokens):
        grid = self.cnn_block(base)
        tokens = self.trans_block(tokens + F.pad(grid.flatten(2).transpose(1, 2), (0, 0, 1, 0)))
        return grid + tokens[:, 1:].transpose(1, 2).unflatten(2, grid.shape[2:]), tokens


class Small(nn.Module):
    """A convolutional branch with BatchNorm, and a transformer branch; each feeds the other."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3), nn.BatchNorm2d(width), nn.MaxPool2d(3, 2, 1))
        self.trans_patch_conv = nn.Conv2d(width, width, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.trans_1 = Block(width)
        self.conv_trans_2 = TwoBranches(width)
        self.trans_cls_head = nn.Linear(width, CLASSES + 1)
        self.conv_cls_head = nn.Conv2d(width, CLASSES + 1, 3, padding=1)

    def forward(self, method, x):
        base = self.stem(x)
        tokens = self.trans_patch_conv(base).flatten(2).transpose(1, 2)
        tokens = self.trans_1(torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1))
        grid, tokens = self.conv_trans_2(base, tokens)
        maps = self.conv_cls_head(grid)
        return maps.mean((2, 3)), self.trans_cls_head(tokens[:, 0]), maps


def small_step(model, acr, host, data):
    images, labels = data
    conv, trans, _ = model("transcam", images)
    loss = F.multilabel_soft_margin_loss((conv + trans)[:, 1:], labels)
    if host is not None:
        first = host.take()
        second = transcam.second_view(host, acr.view(images))
        maps = transcam.cams(first), transcam.cams(second)
        loss = loss + acr(first.attention, second.attention, *maps, labels=labels, valid=(images != 0).any(1))
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
    with transcam.capture(model) as host:
        *_, maps = model("transcam", batch(2)[0])
        torch.testing.assert_close(transcam.cams(host.take()), maps[:, 1:])


def lattices(model, images):
    """Of every block, as the model alone tells and as capture takes it to be."""
    with acr_reg.capture_attention(model) as attention:
        model("convcam", images)
        alone = [layer.layout.query for layer in attention.take()]
    with transcam.capture(model) as host:
        model("convcam", images)
        return alone, [layer.layout.query for layer in host.take().attention]


def check_lattices(alone, placed, known):
    """0.5 px of the stem and 2 * 0.5 of the pooling before the middle; the host's file says which blocks lack it."""
    assert [lattice.offset_known for lattice in alone] == [True] * known + [False] * (len(alone) - known)
    assert {(lattice.offset, lattice.offset_known) for lattice in placed} == {((-1.5, -1.5), True)}


def test_all_blocks_are_where_the_first_is():
    check_lattices(*lattices(Small(), batch(2)[0]), known=1)


@pytest.mark.parametrize(
    "view",
    [
        acr_reg.HorizontalFlip(),
        acr_reg.Rotate90(1),
        acr_reg.Scale(0.75),
        acr_reg.Scale(1.5),
        acr_reg.Crop(8, 0, 48, 48, SIZE, image_size=(SIZE, SIZE)),
    ],
    ids=repr,
)
def test_views_that_the_model_takes(view):
    model = Small()
    with transcam.capture(model) as host:
        loss = small_step(model, acr_reg.AllPairsConsistencyLoss(view), host, batch(2))
    assert 0 < loss.item() < float("inf")


@pytest.mark.parametrize("size", [(64, 32), (40, 40)])
def test_views_that_the_branches_do_not_fit_together_on_are_refused(size):
    facts = rf"{size[0]} x {size[1]} px.*square.* 16 "
    with transcam.capture(Small()) as host, pytest.raises(ValueError, match=facts):
        transcam.second_view(host, torch.rand(2, 3, *size))


def buffers_after(model, train, patched):
    model = copy.deepcopy(model)
    torch.manual_seed(4)
    train(model, patched)
    return dict(model.named_buffers())


def check_running_statistics(model, train):
    """At weights 0: what BatchNorm remembers for inference is as if the second view had not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acr_reg.losses.all_pairs.DEFAULT_WEIGHT", 0.0)
        patch.setattr("acr_reg.losses.all_pairs.DEFAULT_CAM_WEIGHT", 0.0)
        with_lines = buffers_after(model, train, True)
    without = buffers_after(model, train, False)
    assert without
    assert [name for name in without if not torch.equal(without[name], with_lines[name])] == []


def test_running_statistics_stay_the_hosts():
    model = Small()
    check_running_statistics(model, train_small)
    momenta = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.1}


def test_replicas_of_data_parallel_are_refused_by_name():
    model = Small()
    with transcam.capture(nn.DataParallel(model)) as host:
        model("transcam", batch(2)[0])  # one device: the module itself
        host.take()
        with pytest.raises(
            acr_reg.CaptureError, match=r"DataParallel runs replicas of a captured.*DistributedDataParallel"
        ):
            replica_of(model)("transcam", batch(2)[0])


def gradients_of(build, data):
    """In training mode: the numbers of each rank's drop_path are the same together and alone."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = build()
    wrapped = DistributedDataParallel(model)
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip())
    torch.manual_seed(100 + data - torch.distributed.get_rank())  # the capture adds the rank
    host = transcam.capture(wrapped)
    torch.manual_seed(200 + data)
    small_step(wrapped, acr, host, batch(data)).backward()
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad for name, p in model.named_parameters()}


def small_gradients(data):
    return gradients_of(Small, data)


# ---------------------------------------------------------------- the host itself


def prepare_host(folder):
    host_on_path(folder, ("cv2", "tensorboard", "torch.utils.tensorboard"))
    import network.conformer_CAM

    return network.conformer_CAM.Net_sm


def without_drop_path(model):
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    return model


def first_maps(model, train, images):
    """The maps of all blocks that the first loss was given for each view, and those of the encoder alone."""
    alone, seen = copy.deepcopy(model).train(), []
    for name, block in alone.named_modules():
        if name.endswith(".attn"):
            block.register_forward_hook(lambda _module, _given, result: seen.append(result[1]))
    with torch.no_grad():
        for view in (acr_reg.Identity(), acr_reg.HorizontalFlip()):
            alone("convcam", view(images))
    return maps_of_first_loss(model, train), torch.stack(seen).chunk(2)


def noise_floor(model, images):
    found = {}
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.Identity())
    for training in (True, False):
        model.train(training)
        with transcam.capture(model) as host:
            model("convcam", images)
            first, second = host.take(), transcam.second_view(host, images)
            maps = transcam.cams(first), transcam.cams(second)
            _, terms = acr(first.attention, second.attention, *maps, return_terms=True)
        found[training] = [terms[name].item() for name in ("activation", "affinity", "cam")]
    return found


def affinity_by_place(build):
    """Of blocks 5 to 12 on smooth images, taken for the middle of their pixels, and where capture takes them to be.
    Kernels favour no side, attention is sharpened: that of freshly drawn weights is uniform."""
    torch.manual_seed(0)
    model = without_drop_path(build())
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = (module.weight.data + module.weight.data.flip(-1)) / 2
        elif name.endswith("attn.qkv"):
            module.weight.data[: 2 * module.in_features] *= 30**0.5
    view, images = acr_reg.HorizontalFlip(), F.interpolate(torch.randn(2, 3, 12, 12), size=(192, 192), mode="bicubic")
    with transcam.capture(model) as host:
        model("convcam", images)
        first, second = host.take().attention, transcam.second_view(host, view(images)).attention
    grid = first[0].layout.query
    middle = acr_reg.Lattice(grid.height, grid.width, grid.stride)
    acr = acr_reg.AllPairsConsistencyLoss(view, 0.0, 1.0, layers=range(4, 12))
    with torch.no_grad():
        return acr(*(maps.with_layout(middle, 1, 1) for maps in (first, second))).item(), acr(first, second).item()


def run_host(folder):
    """Runs the host's script. Stubbed: data set, loader, checkpoint (the model's own weights), GPU, TensorBoard,
    saving; the log goes to a folder of its own."""
    build = prepare_host(folder)
    import network.conformer_CAM
    import torch.utils.data
    import voc12.data
    from PIL import Image

    torch.save = lambda *_: None
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=lambda *_: None)
    voc12.data.VOC12ClsDataset = lambda *_, **__: None
    torch.utils.data.DataLoader = lambda *_, **__: [("ab", *batch(2)), ("ab", *batch(3))]
    sys.argv = ["train_TransCAM.py", "--weights", "none", "--max_epoches", "1", "--arch", "built"]

    def train(model, patched):
        network.conformer_CAM.Net_built = lambda: model
        torch.load = lambda *_, **__: dict(model.state_dict())
        lines = added_lines(transcam, "liruiwen/TransCAM", "4ffe693")["train_TransCAM.py"] if patched else None
        patched_module(folder, "train_TransCAM.py", lines, "__main__")

    today = added_lines(transcam, "liruiwen/TransCAM", "4ffe693", today=True)["tool/imutils.py"]
    resize = patched_module(folder, "tool/imutils.py", today).RandomResizeLong(64, 64)
    assert resize(Image.new("RGB", (50, 100))).size == (32, 64)

    console, back = sys.stdout, os.getcwd()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        warnings.filterwarnings("error", "found a stem")  # that the loss would say of tokens in unknown places
        found["steps"] = check_training(build, train, layers=12, watched=is_query_and_key)
        model = build()
        check_running_statistics(model, train)
        found["maps"] = first_maps(without_drop_path(copy.deepcopy(model)), train, batch(2)[0])
        sys.stdout = console
        os.chdir(back)
    found["floor"] = noise_floor(model, batch(2)[0])
    model.eval()
    with transcam.capture(model) as host:
        *_, own = model("transcam", batch(2)[0])
        first = host.take()
    propagated = acr_reg.propagate_cam(transcam.cams(first), first.attention)
    torch.testing.assert_close(propagated, own[:, 1:], rtol=1e-4, atol=1e-4 * own.abs().max().item())
    found["lattices"] = lattices(model, batch(2)[0])
    found["affinity"] = affinity_by_place(build)
    return found


def host_gradients(data, folder):
    return gradients_of(prepare_host(folder), data)


@pytest.fixture(scope="module")
def host_folder():
    return checkout("liruiwen/TransCAM", "4ffe693")


@pytest.fixture(scope="module")
def found(host_folder):
    return in_fresh_process(run_host, host_folder)


def test_host_trains(found):
    print("TransCAM", found["steps"][0].terms, found["floor"], found["affinity"])
    assert found["steps"][0].tokens == ((2, 6, 1 + 16, 1 + 16),) * 12


def test_the_images_pass_of_the_host_is_regularised(found):
    taken, expected = found["maps"]
    for each, right in zip(taken, expected, strict=True):
        torch.testing.assert_close(each, right, rtol=1e-4, atol=1e-7)
    assert (taken[0] - expected[1]).abs().max() > 100 * (taken[0] - expected[0]).abs().max()


def test_noise_floor_of_the_host_is_that_of_drop_path(found):
    assert min(found["floor"][True]) > 1e-5
    assert found["floor"][False] == [0, 0, 0]


def test_all_blocks_of_the_host_are_where_the_first_is(found):
    check_lattices(*found["lattices"], known=4)
    middle, placed = found["affinity"]
    assert placed < middle


def test_two_ranks_of_the_hosts_model_have_the_mean_gradient(host_folder):
    check_mean_of_ranks(*gradients_of_two_ranks((host_gradients, host_folder)))
