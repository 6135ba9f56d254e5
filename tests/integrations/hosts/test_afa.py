"""AFA: its own training function with the added lines, on one rank and on two, and a small network like it."""

import functools
import logging
import os
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import acr_reg
from acr_reg.integrations import afa
from acr_reg.integrations.added_lines import with_added_lines
from tests.support.hosts import (
    added_lines,
    check_mean_of_ranks,
    check_training,
    checkout,
    gradients_of_two_ranks,
    host_on_path,
    in_fresh_process,
    patched_module,
)

CLASSES, SIZE = 20, 64
TERMS = frozenset({"affinity", "cam", "entropy"})
SCRIPTS = ("voc", "coco")


def batch(seed, size=SIZE):
    """Names, images, labels and boxes; the second image is padded."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    images = torch.randn(2, 3, size, size, generator=generator)
    boxes = torch.tensor([[0, size, 0, size], [0, size - 16, 16, size]], dtype=torch.int16)
    for image, (top, bottom, left, right) in zip(images, boxes.tolist(), strict=True):
        shown = image[:, top:bottom, left:right].clone()
        image.zero_()[:, top:bottom, left:right] = shown
    return ["a", "b"], images, labels, boxes


def is_query_and_key(name):
    return ".attn.q.weight" in name or ".attn.kv.weight" in name


# ---------------------------------------------------------------- a small network of the interface


class ReducedAttention(nn.Module):
    def __init__(self, width, reduction):
        super().__init__()
        self.num_heads = 2
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


class DropPath(nn.Module):
    drop_prob = 0.1

    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1) > self.drop_prob) / (1 - self.drop_prob) if self.training else x


class Block(nn.Module):
    def __init__(self, width, reduction):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = ReducedAttention(width, reduction)
        self.drop_path = DropPath()

    def forward(self, x, height, width):
        return x + self.drop_path(self.attn(self.norm(x), height, width))


class Encoder(nn.Module):
    WIDTHS, KERNELS, STRIDES, REDUCTIONS = (8, 12, 16, 24), (7, 3, 3, 3), (4, 2, 2, 1), (8, 4, 2, 1)

    def __init__(self):
        super().__init__()
        channels = 3
        for i, width in enumerate(self.WIDTHS):
            kernel = self.KERNELS[i]
            setattr(self, f"patch_embed{i + 1}", nn.Conv2d(channels, width, kernel, self.STRIDES[i], kernel // 2))
            setattr(self, f"block{i + 1}", nn.ModuleList([Block(width, self.REDUCTIONS[i])]))
            channels = width

    def forward(self, x):
        found = []
        for i in range(1, 5):
            x = getattr(self, f"patch_embed{i}")(x)
            height, width = x.shape[2:]
            tokens = x.flatten(2).transpose(1, 2)
            for block in getattr(self, f"block{i}"):
                tokens = block(tokens, height, width)
            x = tokens.transpose(1, 2).unflatten(2, (height, width))
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
            return F.conv2d(features[-1], self.classifier.weight).detach(), "the host's affinity"
        return self.classifier(F.adaptive_max_pool2d(features[-1], 1)).flatten(1), segmentation


def small_step(model, acr, host, data):
    _, images, labels, boxes = data
    logits, segmentation = model(images)
    first = second = None
    if host is not None:
        first = host.take()
        second = afa.second_view(host, acr.view(images))
    with torch.no_grad():
        model(images, cam_only=True)  # pseudo labels
    loss = F.multilabel_soft_margin_loss(logits, labels) + segmentation.square().mean()
    if host is not None:
        maps = afa.cams(first), afa.cams(second)
        loss = loss + acr(first.attention, second.attention, *maps, labels=labels, valid=afa.inside(boxes, images))
    return loss


def small_capture(model, view=None):
    view = view or acr_reg.HorizontalFlip()
    return acr_reg.AllPairsConsistencyLoss(view, activation_weight=0), afa.capture(model)


def train_small(model, patched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    acr, host = small_capture(model) if patched else (None, None)
    for seed in (2, 3):
        optimizer.zero_grad()
        small_step(model, acr, host, batch(seed)).backward()
        optimizer.step()


def small_gradients(data):
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = Network().eval()  # without drop_path, whose draws depend on the rank
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    acr, host = small_capture(wrapped)
    small_step(wrapped, acr, host, batch(data)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- what is checked of the small network and the host


def terms_under(model, view, size=SIZE):
    acr, host = small_capture(model, view)
    _, images, labels, boxes = batch(5, size)
    with host:
        model(images)
        first, second = host.take(), afa.second_view(host, view(images))
    maps = afa.cams(first), afa.cams(second)
    valid = afa.inside(boxes, images)
    loss, terms = acr(first.attention, second.attention, *maps, labels=labels, valid=valid, return_terms=True)
    return loss, {name: value.item() for name, value in terms.items()}


def noise_floor(model):
    """The terms under an identity view in train and eval mode, each summed over eight pairs of passes."""
    floors = {}
    for mode in ("train", "eval"):
        model.train(mode == "train")
        found = [terms_under(model, acr_reg.Identity())[1] for _ in range(8)]
        floors[mode] = {name: sum(terms[name] for terms in found) for name in ("affinity", "cam")}
    return floors


def assert_noise_floor(floors):
    assert all(value > 1e-4 for value in floors["train"].values()), floors
    assert all(value == 0 for value in floors["eval"].values()), floors


def without_noise(model):
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def attention_by_hand(model, images):
    """softmax(q k / sqrt(d)) of all blocks, from what the projections of the encoder alone return."""
    seen = []
    modules = dict(model.named_modules())
    projections = [m for name, m in modules.items() if name.endswith((".attn.q", ".attn.kv"))]
    hooks = [m.register_forward_hook(lambda *call: seen.append(call[-1])) for m in projections]
    heads = [m.num_heads for name, m in modules.items() if name.endswith(".attn")]
    with torch.no_grad():
        modules["encoder"](images)
    for hook in hooks:
        hook.remove()
    maps = []
    for query, both, count in zip(seen[::2], seen[1::2], heads, strict=True):
        query = query.unflatten(2, (count, -1)).transpose(1, 2)
        key = both.chunk(2, -1)[0].unflatten(2, (count, -1)).transpose(1, 2)
        maps.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
    return maps


def check_first_pass(model, train):
    """What the first loss of ``train`` is given are the images and their flip, in all blocks, and no other pass."""
    model = without_noise(model)
    images = batch(2)[1]
    expected = [attention_by_hand(model, each) for each in (images, images.flip(-1))]
    taken = []

    class Noting(acr_reg.AllPairsConsistencyLoss):
        def forward(self, attn_a, attn_b, *rest, **options):
            taken.append([[layer.weights().detach() for layer in attn] for attn in (attn_a, attn_b)])
            return super().forward(attn_a, attn_b, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acr_reg, "AllPairsConsistencyLoss", Noting)
        train(model, True)
    torch.testing.assert_close(taken[0], expected, rtol=1e-4, atol=1e-7)
    assert (taken[0][0][-1] - expected[1][-1]).abs().max() > 1e-5


VIEWS = (
    acr_reg.HorizontalFlip(),
    acr_reg.Rotate90(1),
    acr_reg.Scale(0.75, keep_size=True),
    acr_reg.Scale(0.5),
    acr_reg.Crop(0, 32, 64, 32, image_size=(SIZE, SIZE)),
)
REFUSED = acr_reg.Scale(0.75)


# ---------------------------------------------------------------- the small network


def test_small_network_trains():
    steps = check_training(Network, train_small, layers=4, watched=is_query_and_key, terms=TERMS)
    assert [tokens[2:] for tokens in steps[0].tokens] == [(256, 4), (64, 4), (16, 4), (16, 16)]


def test_first_pass_of_the_small_network_is_regularised():
    torch.manual_seed(0)
    check_first_pass(Network(), train_small)


def test_noise_floor_of_the_small_network(monkeypatch):
    monkeypatch.setattr(DropPath, "drop_prob", 0.5)
    torch.manual_seed(0)
    assert_noise_floor(noise_floor(Network()))


@pytest.mark.parametrize("view", VIEWS, ids=repr)
def test_views_of_the_small_network(view):
    loss, _ = terms_under(Network(), view)
    assert 0 < loss.item() < float("inf")


def test_other_sizes_and_families_are_refused():
    with pytest.raises(ValueError, match=r"48 x 48 px.*multiples of 32"):
        terms_under(Network(), REFUSED)
    vit = nn.ModuleDict({"encoder": nn.ModuleDict({"blocks": nn.ModuleList()}), "classifier": nn.Conv2d(8, 20, 1)})
    with pytest.raises(ValueError, match=r"'encoder.block4'.*AFA"):
        afa.capture(vit)


def test_passes_without_a_graph_are_not_recorded_wherever_they_stand():
    model = Network().eval()
    _, images, _, _ = batch(2)
    with afa.capture(model) as host:
        for _ in range(2):
            with torch.no_grad():
                model(images.flip(2), cam_only=True)
            model(images)
            with torch.no_grad():
                model(images[:, :, :32, :32], cam_only=True)
            first = host.take()
            expected = attention_by_hand(model, images)
            torch.testing.assert_close([layer.weights() for layer in first.attention], expected)
            torch.testing.assert_close(afa.cams(first), model(images, cam_only=True)[0])
            host.clear()


def test_the_class_map_and_the_grids_are_the_hosts():
    model = Network().eval()
    _, images, _, _ = batch(2)
    with afa.capture(model) as host:
        model(images)
        model(images, cam_only=True)  # with a graph this time, and later than the pass that counts
        with pytest.raises(acr_reg.CaptureError, match="2 encoder runs"):
            host.take()
        second = afa.second_view(host, images)
    torch.testing.assert_close(afa.cams(second), model(images, cam_only=True)[0])
    check_layouts([layer.layout for layer in second.attention])


def check_layouts(layouts):
    """Offsets from the middle of a token's pixels: half the kernel less the padding, carried on from stage to stage;
    reduction averages whole blocks of tokens."""
    assert all(each.num_prefix_tokens == 0 for each in layouts)
    assert [each.query.offset[0] for each in layouts] == [-1.5, -3.5, -7.5, -7.5]
    assert [each.key.offset[0] for each in layouts] == [-1.5, -3.5, -7.5, -7.5]
    assert [each.query.stride[0] for each in layouts] == [4, 8, 16, 16]
    assert [each.key.stride[0] for each in layouts] == [32, 32, 32, 16]
    assert all(each.query.offset_known and each.key.offset_known for each in layouts)


def test_padding_is_outside_of_the_box():
    held = afa.inside(torch.tensor([[0, 3, 0, 4], [1, 9, 2, 4]], dtype=torch.int16), torch.zeros(2, 3, 3, 4))
    expected = torch.ones(2, 3, 4, dtype=torch.bool)
    expected[1, 0] = expected[1, :, :2] = False
    assert torch.equal(held, expected)


# ---------------------------------------------------------------- the host itself

STUBS = ("bilateralfilter", "cv2", "omegaconf", "pydensecrf", "pydensecrf.densecrf", "pydensecrf.utils")
STUBS += ("tensorboard", "torch.utils.tensorboard")


def config():
    """The host's configs/voc_attn_reg.yaml, for images of 64 px, and one step on either side of cam_iters."""
    space = types.SimpleNamespace
    data = space(root_dir="", name_list_dir="", num_classes=21, crop_size=SIZE, ignore_index=255)
    data.__dict__.update(resize_range=None, rescale_range=None)
    return space(
        backbone=space(config="mit_b1", stride=[4, 2, 2, 1]),
        dataset=data,
        work_dir=space(dir="", ckpt_dir="", pred_dir=os.devnull),
        train=space(split="", samples_per_gpu=2, max_iters=2, cam_iters=0, eval_iters=2000, log_iters=200),
        cam=space(bkg_score=0.45, high_thre=0.55, low_thre=0.35, aff_thre=0.4, scales=[1, 0.5, 1.5]),
        val=space(split=""),
        optimizer=space(learning_rate=6e-5, betas=[0.9, 0.999], weight_decay=0.01),
        scheduler=space(warmup_iter=1, warmup_ratio=1e-6, power=1.0),
    )


def afa_training(folder, dataset, model, patched, data, settings=None):
    """Runs the host's train() on these batches. Stubbed: the dataset, the configuration file, mmcv, the GPU."""
    file = f"scripts/dist_train_{dataset}.py"
    today = added_lines(afa, "rulixiang/afa", "adcfa29", today=True)[file]
    script = patched_module(folder, file, added_lines(afa, "rulixiang/afa", "adcfa29")[file] * patched + today)
    script.WeTr = lambda **_: model
    _, images, labels, _ = data[0]
    validation = [("a", images[:1], torch.zeros(1, SIZE, SIZE, dtype=torch.long), labels[:1])]
    sets = {"ClsDataset": lambda **_: data, "SegDataset": lambda **_: validation}
    names = {"voc": "VOC12", "coco": "Coco"}
    setattr(script, dataset, types.SimpleNamespace(**{names[dataset] + name: made for name, made in sets.items()}))
    script.DataLoader = lambda dataset, **_: dataset
    script.DistributedDataParallel = lambda module, device_ids, **options: DistributedDataParallel(module, **options)
    script.args = script.parser.parse_args(["--local-rank", "0"])
    assert script.args.local_rank == 0
    script.args.__dict__.update(local_rank=torch.device("cpu"), backend="gloo")
    settings = settings or config()
    settings.train.max_iters = len(data)
    script.train(settings)


class ConvModule(nn.Sequential):
    """In place of mmcv's: the decoder's fusing convolution, without SyncBN, which refuses a CPU."""

    def __init__(self, in_channels, out_channels, kernel_size, norm_cfg):
        convolution = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def prepare_afa(folder):
    host_on_path(folder, STUBS)
    sys.modules["mmcv"] = sys.modules["mmcv.cnn"] = types.SimpleNamespace(ConvModule=ConvModule)
    torch.cuda.set_device = lambda *_: None
    logging.disable()
    for dataset in SCRIPTS:  # as the edits for today's numpy leave them
        file = f"datasets/{dataset}.py"
        lines = added_lines(afa, "rulixiang/afa", "adcfa29", today=True)[file]
        module = sys.modules[f"datasets.{dataset}"] = patched_module(folder, file, lines)
        setattr(sys.modules["datasets"], dataset, module)
    from wetr.model_attn_aff import WeTr

    return lambda: WeTr("mit_b1", 21, embedding_dim=256, stride=[4, 2, 2, 1], pretrained=False, pooling="gmp")


def run_afa(folder):
    """All that is checked of the host, in one process: its import and its models take longer than the checks."""
    build = prepare_afa(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")

    def train(dataset, settings, model, patched):
        afa_training(folder, dataset, model, patched, [batch(2), batch(3)], settings)
        torch.distributed.destroy_process_group()

    found = {"steps": {}}
    for dataset in SCRIPTS:
        step = functools.partial(train, dataset, None)
        found["steps"][dataset] = check_training(build, step, layers=8, watched=is_query_and_key, terms=TERMS)
    torch.manual_seed(0)
    settings = config()
    settings.train.log_iters = settings.train.eval_iters = 1
    check_first_pass(build(), functools.partial(train, "voc", settings))
    warnings.simplefilter("error")  # the loss warns of offsets that it does not know
    model = build()
    found["floor"] = noise_floor(model)
    found["views"] = [terms_under(model, view)[0].item() for view in VIEWS]
    with pytest.raises(ValueError, match=r"48 x 48 px.*multiples of 32"):
        terms_under(model, REFUSED)
    images = batch(4)[1]
    with afa.capture(model) as host:
        second = afa.second_view(host, images)
    torch.testing.assert_close(afa.cams(second), model(images, cam_only=True)[0])
    found["layouts"] = [layer.layout for layer in second.attention]
    return found


def afa_gradients(data, folder):
    build = prepare_afa(folder)
    torch.manual_seed(0)
    model = build().eval()
    model.train = lambda mode=True: model  # drop_path draws other numbers on each rank
    found = {}

    def note(*_):
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(note)
    afa_training(folder, "voc", model, True, [batch(data)])
    hook.remove()
    return found


@functools.cache
def host_report():
    report = in_fresh_process(run_afa, checkout("rulixiang/afa", "adcfa29"))
    print("AFA", {name: steps[0].terms for name, steps in report["steps"].items()}, report["floor"], report["views"])
    return report


@pytest.mark.parametrize("dataset", SCRIPTS)
def test_host_trains(dataset):
    steps = host_report()["steps"][dataset]
    shapes = [tokens[2:] for tokens in steps[0].tokens]
    assert shapes == [(256, 4)] * 2 + [(64, 4)] * 2 + [(16, 4)] * 2 + [(16, 16)] * 2


def test_grids_of_the_host():
    check_layouts(host_report()["layouts"][::2])


def test_noise_floor_of_the_host():
    assert_noise_floor(host_report()["floor"])


def test_views_of_the_host():
    assert all(0 < value < float("inf") for value in host_report()["views"])


def test_host_has_the_mean_gradient_on_two_ranks():
    folder = checkout("rulixiang/afa", "adcfa29")
    check_mean_of_ranks(*gradients_of_two_ranks((afa_gradients, folder)))


def test_edits_for_today_apply_to_the_hosts_files():
    folder = checkout("rulixiang/afa", "adcfa29")
    for file, lines in added_lines(afa, "rulixiang/afa", "adcfa29", today=True).items():
        changed = with_added_lines((folder / file).read_text(encoding="utf-8"), lines)
        assert "numpy.lib.utils import" not in changed
        assert file.startswith("datasets") or '"--local-rank"' in changed
