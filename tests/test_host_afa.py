"""AFA: its own training function with the added lines, on one rank and on two, and a small network like it."""

import logging
import os
import sys
import types
import warnings

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
from acr_reg.integrations import afa

CLASSES, SIZE = 20, 64
TERMS = frozenset({"affinity", "cam", "entropy"})


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    images = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    return ["a", "b"], images, labels, torch.tensor([[0, SIZE, 0, SIZE]] * 2)


def is_query_and_key(name):
    return ".attn.q.weight" in name or ".attn.kv.weight" in name


# ---------------------------------------------------------------- a small network of the interface


class ReducedAttention(nn.Module):
    def __init__(self, width, reduction):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.sr = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None

    def forward(self, x, height, width):
        context = x
        if self.sr is not None:
            grid = x.transpose(1, 2).unflatten(2, (height, width))
            context = self.sr(grid).flatten(2).transpose(1, 2)
        query = self.q(x).unflatten(2, (2, -1)).transpose(1, 2)
        key, value = self.kv(context).unflatten(2, (2, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2)


class Stage(nn.Module):
    def __init__(self, channels, width, stride, reduction):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 2 * stride - 1, stride, stride - 1)
        self.norm = nn.LayerNorm(width)
        self.attn = ReducedAttention(width, reduction)

    def forward(self, x):
        grid = self.embed(x)
        tokens = grid.flatten(2).transpose(1, 2)
        keep = (torch.rand(len(x), 1, 1) > 0.1) / 0.9 if self.training else 1.0
        tokens = tokens + keep * self.attn(self.norm(tokens), *grid.shape[2:])
        return tokens.transpose(1, 2).unflatten(2, grid.shape[2:])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Stage(3, 16, 4, 4), Stage(16, 24, 4, 1)])

    def forward(self, x):
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found, ["the host's own attns"]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = nn.Conv2d(24, CLASSES + 1, 1)
        self.classifier = nn.Conv2d(24, CLASSES, 1, bias=False)

    def forward(self, x, cam_only=False):
        features, _ = self.encoder(x)
        segmentation = self.decoder(features[-1])
        if cam_only:
            return F.conv2d(features[-1], self.classifier.weight).detach()
        return self.classifier(F.adaptive_max_pool2d(features[-1], 1)).flatten(1), segmentation


def small_step(model, acr, host, data):
    _, images, labels, _ = data
    logits, segmentation = model(images)
    first = second = None
    if host is not None:
        first = host.take()
        second = afa.second_view(host, acr.view(images))
    with torch.no_grad():
        model(images, cam_only=True)  # pseudo labels
    loss = F.multilabel_soft_margin_loss(logits, labels) + segmentation.square().mean()
    if host is not None:
        loss = loss + acr(first.attention, second.attention, afa.cams(first), afa.cams(second), labels=labels)
    return loss


def small_capture(model):
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip(), activation_weight=0)
    return acr, afa.capture(model)


def train_small(model, patched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    acr, host = small_capture(model) if patched else (None, None)
    for seed in (2, 3):
        optimizer.zero_grad()
        small_step(model, acr, host, batch(seed)).backward()
        optimizer.step()


def test_small_network_trains():
    steps = check_training(Network, train_small, layers=2, watched=is_query_and_key, terms=TERMS)
    assert steps[0].tokens == ((2, 2, 256, 16), (2, 2, 16, 16))


def test_the_class_map_and_the_grids_are_the_hosts():
    model = Network().eval()
    _, images, _, _ = batch(2)
    with afa.capture(model) as host:
        model(images)
        model(images, cam_only=True)  # with a graph this time, and later than the pass that counts
        with pytest.raises(acr_reg.CaptureError, match="2 encoder runs"):
            host.take()
        second = afa.second_view(host, images)
    torch.testing.assert_close(afa.cams(second), model(images, cam_only=True))
    layout = second.attention[0].layout
    assert (layout.query.height, layout.key.height, layout.num_prefix_tokens) == (16, 4, 0)
    assert layout.query.offset == (-1.5, -1.5)  # 7 x 7, stride 4, padding 3: 1.5 px before the middle of 4 px
    assert layout.query.offset_known


def small_gradients(data):
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = Network().eval()  # without drop_path, whose draws depend on the rank
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    acr, host = small_capture(wrapped)
    small_step(wrapped, acr, host, batch(data)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the host itself

STUBS = ("bilateralfilter", "cv2", "numpy.lib.utils", "omegaconf", "pydensecrf")
STUBS += ("pydensecrf.densecrf", "pydensecrf.utils", "tensorboard", "torch.utils.tensorboard")


def config():
    """The host's configs/voc_attn_reg.yaml, for images of 64 px."""
    space = types.SimpleNamespace
    return space(
        backbone=space(config="mit_b1", stride=[4, 2, 2, 1]),
        dataset=space(
            root_dir="",
            name_list_dir="",
            num_classes=21,
            crop_size=SIZE,
            resize_range=None,
            rescale_range=None,
            ignore_index=255,
        ),
        work_dir=space(dir=""),
        train=space(split="", samples_per_gpu=2, max_iters=2, cam_iters=2000, eval_iters=2000, log_iters=200),
        cam=space(bkg_score=0.45, high_thre=0.55, low_thre=0.35, aff_thre=0.4, scales=[1, 0.5, 1.5]),
        val=space(split=""),
        optimizer=space(learning_rate=6e-5, betas=[0.9, 0.999], weight_decay=0.01),
        scheduler=space(warmup_iter=1, warmup_ratio=1e-6, power=1.0),
    )


def afa_training(folder, patched, model, data):
    """Runs the host's train() on these batches. Stubbed: the dataset, the configuration file, mmcv, the GPU."""
    file = "scripts/dist_train_voc.py"
    lines = added_lines(afa, "rulixiang/afa", "adcfa29")[file] if patched else None
    script = patched_module(folder, file, lines)
    script.WeTr = lambda **_: model
    script.voc = types.SimpleNamespace(VOC12ClsDataset=lambda **_: data, VOC12SegDataset=lambda **_: data)
    script.DataLoader = lambda dataset, **_: dataset
    script.DistributedDataParallel = lambda module, device_ids, **options: DistributedDataParallel(module, **options)
    script.args = script.parser.parse_args([])
    script.args.__dict__.update(local_rank=torch.device("cpu"), backend="gloo")
    settings = config()
    settings.train.max_iters = len(data)
    script.train(settings)


class ConvModule(nn.Sequential):
    """In place of mmcv's: the decoder's fusing convolution. mmcv 1.7 does not build on Python 3.11."""

    def __init__(self, in_channels, out_channels, kernel_size, norm_cfg):
        convolution = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def prepare_afa(folder):
    host_on_path(folder, STUBS)
    sys.modules["mmcv"] = sys.modules["mmcv.cnn"] = types.SimpleNamespace(ConvModule=ConvModule)
    torch.cuda.set_device = lambda *_: None
    logging.disable()
    from wetr.model_attn_aff import WeTr

    return lambda: WeTr("mit_b1", 21, embedding_dim=256, stride=[4, 2, 2, 1], pretrained=False, pooling="gmp")


def run_afa(folder):
    build = prepare_afa(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")

    def train(model, patched):
        afa_training(folder, patched, model, [batch(2), batch(3)])
        torch.distributed.destroy_process_group()

    steps = check_training(build, train, layers=8, watched=is_query_and_key, terms=TERMS)
    warnings.simplefilter("error")  # the loss warns of offsets that it does not know
    model = build().eval()
    acr, host = small_capture(model)
    images = batch(4)[1]
    model(images)
    first, second = host.take(), afa.second_view(host, acr.view(images))
    acr(first.attention, second.attention, afa.cams(first), afa.cams(second))
    torch.testing.assert_close(afa.cams(first), model(images, cam_only=True)[0])
    return steps, [layer.layout for layer in first.attention]


def afa_gradients(data, folder):
    build = prepare_afa(folder)
    torch.manual_seed(0)
    model = build().eval()
    model.train = lambda mode=True: model  # drop_path draws other numbers on each rank
    found = {}

    def note(*_):
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(note)
    afa_training(folder, True, model, [batch(data)])
    hook.remove()
    return found


@pytest.fixture
def afa_folder():
    return checkout("rulixiang/afa", "adcfa29")


def test_afa_trains(afa_folder):
    steps, layouts = in_fresh_process(run_afa, afa_folder)
    print("AFA", steps[0].terms)
    shapes = [tokens[2:] for tokens in steps[0].tokens]
    assert shapes == [(256, 4)] * 2 + [(64, 4)] * 2 + [(16, 4)] * 2 + [(16, 16)] * 2
    assert [layout.query.offset for layout in layouts[::2]] == [(-1.5, -1.5), (-3.5, -3.5), (-7.5, -7.5), (-7.5, -7.5)]


def test_afa_has_the_mean_gradient_on_two_ranks(afa_folder):
    check_mean_of_ranks(*gradients_of_two_ranks((afa_gradients, afa_folder)))
