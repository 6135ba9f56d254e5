"""ToCo, DuPL, SeCo, MoRe, MCC, CTFA and CoSA themselves: their networks, and their training functions on batches made
up here."""

import contextlib
import copy
import logging
import os
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import acr_reg
from acr_reg.integrations import toco
from acr_reg.integrations.host import HostCapture
from tests.support.hosts import added_lines, check_training, host_on_path, patched_module

CLASSES, REGISTERS = 20, 4
SIZE, LOCAL = 96, 32


def batch(seed, size=SIZE):
    """Images, labels and three crops at their size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    images = torch.randn(2, 3, size, size, generator=generator)
    return images, labels, [torch.randn(2, 3, size, size, generator=generator) for _ in range(3)]


def is_query_and_key(name):
    return "encoder.blocks" in name and ".attn.qkv.weight" in name


ABSENT = ("bilateralfilter", "cv2", "mmcv", "mmcv.cnn", "omegaconf", "pydensecrf", "tensorboardX", "texttable")
ABSENT += ("pydensecrf.densecrf", "pydensecrf.utils")
BACKBONE = "deit_small_patch16_224"


@dataclass(frozen=True)
class Host:
    """``data(seed)`` is a batch of the host's loader, ``images`` the place of its images; ``options`` are arguments of
    its command; ``phases`` are those of training that differ in how the network is called; ``ranks``: may be several.
    """

    repository: str
    commit: str
    script: str
    build: Callable[[], nn.Module]
    data: Callable[[int], tuple]
    options: dict
    phases: dict = field(default_factory=dict)
    prefix: int = 1
    size: int = SIZE
    branches: int = 1
    ranks: bool = True
    images: int = 1


def boxes(size):
    """Of the images within their padding: all of them."""
    return torch.tensor([[0, size, 0, size]] * 2)


def build_toco():
    from model.model_seg_neg import network

    return network(BACKBONE, num_classes=21, pretrained=False, init_momentum=0.9, aux_layer=-3)


def toco_batch(seed):
    images, labels, crops = batch(seed)
    return ["a", "b"], images, labels, boxes(SIZE), crops


def build_dupl():
    from model.model_dupl import siamese_network

    return siamese_network(BACKBONE, num_classes=21, pretrained=False, aux_layer=-3)


def build_seco():
    from model.model_seco import network

    args = types.SimpleNamespace(
        num_classes=21, ctc_dim=768, moco_queue=4608, ncrops=12, proto_m=0.9, update_prototype=600
    )
    return network(args, "vit_base_patch16_224", num_classes=21, pretrained=False, init_momentum=0.999, aux_layer=-3)


def seco_batch(seed):
    images, labels, crops = batch(seed)
    return ["a", "b"], images, labels, torch.tensor([4, 15]), boxes(SIZE), *crops


def build_more():
    from model.model_mal import network

    args = types.SimpleNamespace(num_attri=REGISTERS + CLASSES, finetune=None, model="MATformer")
    return network(args, "matvit_base_patch16_224", num_classes=21, pretrained=False, aux_layer=-3)


def more_batch(seed):
    images, labels, crops = batch(seed, MORE_SIZE)
    return ["a", "b"], images, labels, crops


def build_mcc():
    from model.model_seg_neg import network

    return network(BACKBONE, num_classes=21, pretrained=False, init_momentum=0.9, aux_layer=-3)


def mcc_batch(seed):
    images, labels, views = batch(seed, MORE_SIZE)
    return ["a", "b"], images, labels, boxes(MORE_SIZE), views


def build_ctfa():
    from model.model_seg_neg_fp import network

    return network(BACKBONE, num_classes=6, pretrained=False, init_momentum=0.9, aux_layer=-3)


def ctfa_batch(seed):
    images, labels, crops = batch(seed)
    return ["a", "b"], images, labels[:, 3:8], boxes(SIZE), crops


def build_cosa():
    from models import VITNetwork

    return VITNetwork(BACKBONE, 21, pretrained=False, decoder="LargeFOV")


def cosa_batch(seed):
    weak, labels, crops = batch(seed)
    return ["a", "b"], weak, crops[0], labels, boxes(SIZE)


MORE_SIZE = 128  # MoRe's loss on tokens takes windows of six of them, MCC masks blocks of four by four
# Both steps of DuPL that train here run after its first phase: the images alone, then with the augmented ones.
HOSTS = {
    "ToCo": Host(
        "rulixiang/ToCo",
        "e13514d",
        "scripts/dist_train_voc_seg_neg.py",
        build_toco,
        toco_batch,
        {"local_crop_size": LOCAL},
    ),
    "DuPL": Host(
        "Wu0409/DuPL",
        "b21990f",
        "train_final_voc.py",
        build_dupl,
        toco_batch,
        {"cam_iters": 0, "gmm_iters": 1},
        {"cam_iters": 1, "gmm_iters": 2},
        branches=2,
    ),
    "SeCo": Host("zwyang6/SeCo", "202357f", "scripts/train_voc.py", build_seco, seco_batch, {"local_crop_size": LOCAL}),
    "MoRe": Host(
        "zwyang6/MoRe",
        "d733d34",
        "scripts/train_voc.py",
        build_more,
        more_batch,
        {},
        prefix=REGISTERS + CLASSES,
        size=MORE_SIZE,
    ),
    "MCC": Host("fwu11/MCC", "0731ecc", "scripts/dist_train_voc_seg_neg.py", build_mcc, mcc_batch, {}, size=MORE_SIZE),
    "CTFA": Host(
        "ZaiyiHu/CTFA",
        "ff0bb03",
        "scripts/dist_train_potsdam_seg_neg_fp.py",
        build_ctfa,
        ctfa_batch,
        {"local_crop_size": LOCAL},
        ranks=False,  # it starts its process group of one rank itself
    ),
    "CoSA": Host("youshyee/CoSA", "01d3467", "main.py", build_cosa, cosa_batch, {}, images=2),
}


def prepare(folder):
    host_on_path(folder, ABSENT)
    os.environ.update(LOCAL_RANK="0")
    torch.cuda.set_device = lambda *_: None
    ones = torch.ones  # DuPL asks for some on "cuda"
    torch.ones = lambda *size, device=None, **more: ones(*size, device=None if device == "cuda" else device, **more)
    logging.disable()


@contextlib.contextmanager
def without_nccl():
    """CTFA starts its process group, of one rank, where the module begins; here it starts before train()."""
    start, port = torch.distributed.init_process_group, os.environ.get("MASTER_PORT")
    torch.distributed.init_process_group = lambda *_, **__: None
    yield
    torch.distributed.init_process_group = start
    if port is not None:
        os.environ["MASTER_PORT"] = port


@contextlib.contextmanager
def without_pandas():
    """CoSA imports it for a table of losses; scikit-learn must not find the stand-in."""
    import sklearn.metrics
    import sklearn.mixture  # noqa: F401

    absent = "pandas" not in sys.modules
    if absent:
        sys.modules["pandas"] = types.ModuleType("pandas")
    yield
    if absent:
        del sys.modules["pandas"]


class OnCpu(DistributedDataParallel):
    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)


class Loader(list):
    """A loader and its data set; the host shuffles by its sampler."""

    sampler = types.SimpleNamespace(set_epoch=lambda _: None)
    dataset = ()


def run_cosa(script, model, data):
    """Its main() builds the trained network and then the teacher."""
    networks = iter([model, copy.deepcopy(model)])
    script.build_model = lambda _: next(networks)
    script.build_dataloader = lambda *_, **__: (Loader(data), Loader())
    script.utils.init_distributed_mode = lambda args: torch.distributed.init_process_group("gloo")
    torch.nn.parallel.DistributedDataParallel = OnCpu
    parser = script.argparse.ArgumentParser(parents=[script.get_parser_voc()])
    args, _ = script.handle_defaults_voc(parser.parse_args(["name"]))
    with tempfile.TemporaryDirectory() as scratch:
        args.__dict__.update(output_dir=scratch, device="cpu", gpu=0, rank=0, finalval=False, crop_size=SIZE)
        args.__dict__.update(max_iters=len(data))
        script.seg_helper.get_energy_loss = lambda **_: torch.zeros(())
        script.pd = types.SimpleNamespace(DataFrame=dict)
        script.main(args)


def run_training(host, folder, patched, model, data, **options):
    """Runs the host's train() on these batches. Stubbed: the dataset and its loader, the network (given), the compiled
    CRF loss (weight 0 up to iteration 2000), the GPU."""
    today = added_lines(toco, host.repository, host.commit, today=True)
    for file in today:
        if file.startswith("datasets/"):
            name = file.removesuffix(".py").replace("/", ".")
            sys.modules[name] = patched_module(folder, file, today[file])
            setattr(sys.modules["datasets"], name.removeprefix("datasets."), sys.modules[name])
    lines = today.get(host.script, [])
    if patched:
        lines = lines + added_lines(toco, host.repository, host.commit)[host.script]
    with without_nccl(), without_pandas():
        script = patched_module(folder, host.script, lines)
    if host.script == "main.py":
        run_cosa(script, model, data)
        return
    if hasattr(script, "build_network"):
        script.build_network = lambda args: (model, model.get_param_groups())
    else:
        script.network = script.siamese_network = lambda **_: model
    script.voc = types.SimpleNamespace(VOC12ClsDataset=lambda **_: data, VOC12SegDataset=lambda **_: data)
    script.potsdam = types.SimpleNamespace(potsdamClsDataset=lambda **_: data, potsdamSegDataset=lambda **_: data)
    script.DataLoader = lambda dataset, **_: dataset
    script.DistributedDataParallel = lambda module, device_ids, **options: DistributedDataParallel(module, **options)
    script.get_energy_loss = lambda **_: torch.zeros(())
    script.local_rank = torch.device("cpu")
    args = script.parser.parse_args([])
    args.__dict__.update(local_rank=torch.device("cpu"), backend="gloo", max_iters=len(data), warmup_iters=1)
    args.__dict__.update(host.options, **options)
    if not host.ranks:
        torch.distributed.init_process_group("gloo")
    script.train(args)


def train_host(name, folder):
    host = HOSTS[name]
    prepare(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")

    def train(model, patched):
        run_training(host, folder, patched, model, [host.data(2), host.data(3)])
        torch.distributed.destroy_process_group()

    return check_training(host.build, train, layers=12, watched=is_query_and_key, calls=host.branches)


def taken_and_alone(name, folder):
    """What train() takes against what the images alone give, at every take of a run through all phases: the largest
    difference of any map, of any class map, and the terms under an identity view, which are the noise floor."""
    host = HOSTS[name]
    prepare(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    data = [host.data(seed) for seed in range(3 if host.phases else 1)]
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.Identity())
    take = HostCapture.take
    found = []

    def observed(capture, run=None):
        first = take(capture, run)
        assert capture.network.training
        alone = toco.second_view(capture, data[len(found) // host.branches][host.images])
        pairs = zip(first.attention.weights(), alone.attention.weights(), strict=True)
        maps = toco.cams(first), toco.cams(alone)
        _, terms = acr(first.attention, alone.attention, *maps, return_terms=True)
        floor = {term: terms[term].item() for term in ("activation", "affinity", "cam")}
        found.append((max((a - b).abs().max().item() for a, b in pairs), (maps[0] - maps[1]).abs().max().item(), floor))
        return first

    HostCapture.take = observed
    torch.manual_seed(0)
    run_training(host, folder, True, host.build(), data, **host.phases)
    return found


def host_gradients(data, name, folder):
    host = HOSTS[name]
    prepare(folder)
    torch.manual_seed(0)
    model = host.build()
    found = {}

    def note(*_):
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(note)
    torch.manual_seed(1)
    run_training(host, folder, True, model, [host.data(data)], **host.phases)
    hook.remove()
    return found
