"""WeCLIP, WeCLIP+ and ExCEL themselves: their networks with small CLIPs of random weights, and their training functions
on batches made up here."""

import importlib
import logging
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from acr_reg.integrations import weclip
from tests.support.hosts import Absent, added_lines, check_training, host_on_path, patched_module

WIDTH, LAYERS, CLASSES = 64, 12, 20
NAMES = ["a", "b", "c", "d"]


@dataclass(frozen=True)
class Host:
    """``folder`` within the checkout; ``passes`` of the decoder in one forward; ``batch`` of images of ``size``, those
    of ExCEL as its loop has them in figures."""

    repository: str
    commit: str
    folder: str
    script: str
    build: Callable[[Path], nn.Module]
    passes: int = 1
    batch: int = 2
    size: int = 64


class Dino(nn.Module):
    """In place of DINOv2 from torch.hub: its method and the key that the host reads."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 48, 14, 14)

    def forward_features(self, x):
        return {"x_norm_patchtokens": self.patch_embed(x).flatten(2).transpose(1, 2)}


def clip_of(model_class):
    """Vision: 12 layers, patches of 16 px; text: the tokenizer's vocabulary."""
    return model_class(32, 64, LAYERS, WIDTH, 16, 77, 49408, 64, 1, 1).float().eval()


def build_weclip(root):
    import clip

    clip.load = lambda *_, **__: (clip_of(importlib.import_module("clip.model").CLIP), None)
    network = importlib.import_module("WeCLIP_model.model_attn_aff_voc").WeCLIP
    return network(21, "ViT-B-16.pt", 64, [WIDTH] * 4, str(root), "cpu")


def build_weclip_plus(root):
    import clip

    clip.load = lambda *_, **__: (clip_of(importlib.import_module("clip.model").CLIP), None)
    torch.hub.load = lambda *_, **__: Dino()
    network = importlib.import_module("WeCLIP_Plus.model_attn_aff_voc").WeCLIP_Plus
    return network(21, "ViT-B-16.pt", "dinov2_vits14", 48, 3, 64, [WIDTH] * 4, str(root), 16, "cpu")


def build_excel(root):
    import clip

    clip.load = lambda *_, **__: (clip_of(importlib.import_module("clip.clip_surgery_model").ExCEL_CLIP), None)
    module = importlib.import_module("model.model_excel")
    module.attr_aggregate = lambda text, *_: (F.normalize(text, dim=1).T, None)  # reads its bank of attributes
    return module.ExCEL_model("ExCEL_ViT-B/16", 64, WIDTH, img_size=320, mode="train_aug", device="cpu")


HOSTS = {
    "WeCLIP": Host("zbf1991/WeCLIP", "0f47db4", "WeCLIP", "scripts/dist_clip_voc.py", build_weclip),
    "WeCLIP+": Host("zbf1991/WeCLIP", "0f47db4", "WeCLIP+", "scripts/dist_clip_voc.py", build_weclip_plus, passes=2),
    "ExCEL": Host("zwyang6/ExCEL", "2cd7f51", "", "scripts/train_voc.py", build_excel, batch=4, size=320),
}


def batch(host, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(host.batch, CLASSES)
    labels[:, 3] = labels[0, 7] = 1
    images = torch.randn(host.batch, 3, host.size, host.size, generator=generator)
    boxes = torch.tensor([[0, host.size, 0, host.size]] * host.batch)
    boxes[0, 1] = host.size // 2  # the rest of the first image is padding
    masks = torch.zeros(host.batch, host.size, host.size, dtype=torch.long)
    return NAMES[: host.batch], images, labels, boxes, masks


def data_set(root):
    """What the forward of WeCLIP (masks) and of WeCLIP+ (annotations) reads for the labels of an image."""
    for folder in ("SegmentationClassAug", "JPEGImages", "Annotations"):
        (root / folder).mkdir()
    for index, name in enumerate(NAMES):
        mask = np.zeros((40, 50), np.uint8)
        mask[5:20], mask[30:] = 4, 8 if index == 0 else 0
        Image.fromarray(mask).save(root / "SegmentationClassAug" / f"{name}.png")
        classes = ["boat", "cat"] if index == 0 else ["boat"]
        objects = "".join(f"<object><name>{each}</name></object>" for each in classes)
        size = "<size><width>50</width><height>40</height><depth>3</depth></size>"
        xml = f"<annotation>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(xml)


def resize(image, size):
    width, height = size
    image = torch.as_tensor(image)[None, None].float()
    return F.interpolate(image, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def prepare(host, folder):
    """Stand-ins for packages that a step calls: OpenCV's resize, and lxml by the standard library."""
    import xml.etree.ElementTree

    host_on_path(folder / host.folder, ("imageio.v2", "mmcv", "mmcv.cnn", "omegaconf", "pydensecrf", "ttach"))
    for name in ("texttable", "tensorboard", "torch.utils.tensorboard", "pydensecrf.densecrf", "pydensecrf.utils"):
        sys.modules[name] = Absent(name)
    for name, content in {
        "cv2": {"__version__": "4.0", "resize": resize},
        "lxml": {"etree": xml.etree.ElementTree},
        "imageio": {"__path__": []},
    }.items():
        sys.modules[name] = Absent(name)
        vars(sys.modules[name]).update(content)
    for file, lines in lines_of(host, today=True).items():
        if file != host.script:
            load(folder / host.folder, file, lines)
    os.environ.update(LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device = lambda *_: None
    logging.disable()


def lines_of(host, **options):
    """The lines of the docstring, by file within the host's folder."""
    found = added_lines(weclip, host.repository, host.commit, **options)
    prefix = f"{host.folder}/" if host.folder else ""
    return {file.removeprefix(prefix): lines for file, lines in found.items() if file.startswith(prefix)}


def load(folder, file, lines):
    """The host's file with the lines, as the module that the host then imports."""
    name = file.removesuffix(".py").replace("/", ".")
    package, _, own = name.rpartition(".")
    for_package = types.ModuleType(package)  # clip's own imports the file without the lines
    for_package.__path__ = [str(folder / package)]
    sys.modules.setdefault(package, for_package)
    sys.modules[name] = patched_module(folder, file, lines)
    setattr(sys.modules[package], own, sys.modules[name])
    if package == "clip":
        vars(for_package).update({key: value for key, value in vars(sys.modules[name]).items() if key[0] != "_"})


def configuration(root, data):
    """The fields of the host's yaml file that its training reads."""
    space = types.SimpleNamespace
    data_fields = dict.fromkeys(("name_list_dir", "resize_range", "rescale_range"))
    return space(
        dataset=space(root_dir=str(root), crop_size=64, ignore_index=255, num_classes=21, **data_fields),
        train=space(split="train", samples_per_gpu=2, max_iters=len(data), log_iters=200, eval_iters=2000),
        val=space(split="val"),
        work_dir=space(tb_logger_dir="tb"),
        clip_init=space(clip_pretrain_path="", embedding_dim=64, in_channels=[WIDTH] * 4, clip_flag=16),
        dino_init=space(dino_model="", dino_fts_fuse_dim=48, decoder_layer=3),
        optimizer=space(learning_rate=2e-4, betas=[0.9, 0.999], weight_decay=0.01),
        scheduler=space(warmup_iter=1, warmup_ratio=1e-6, power=1.0),
    )


def run_training(host, folder, root, patched, model, data):
    """Runs the host's train() on these batches. Stubbed: the data set and its loader, the network (given), boxes from
    contours (all of the map), the GPU."""
    lines = lines_of(host, today=True).get(host.script, [])
    if patched:
        lines = lines + lines_of(host)[host.script]
    script = patched_module(folder / host.folder, host.script, lines)
    script.voc = types.SimpleNamespace(VOC12ClsDataset=lambda **_: data, VOC12SegDataset=lambda **_: data)
    script.DataLoader = lambda dataset, **_: dataset
    tool = sys.modules["utils.affutils" if host.folder == "" else "clip.clip_tool"]
    tool.scoremap2bbox = lambda scoremap, **_: ([[0, 0, scoremap.shape[1], scoremap.shape[0]]], 1)
    if host.folder:
        script.WeCLIP = script.WeCLIP_Plus = lambda **_: model
        script.args = types.SimpleNamespace(radius=2)
        script.SummaryWriter = lambda _: None
        data[:] = [each[:4] for each in data]
        script.train(configuration(root, data))
        return
    script.build_network = lambda _: (model, model.get_param_groups())
    script.DistributedDataParallel = lambda module, device_ids, **options: DistributedDataParallel(module, **options)
    script.DistributedSampler = lambda *_, **__: types.SimpleNamespace(set_epoch=lambda _: None)
    args = script.parser.parse_args([])
    args.__dict__.update(local_rank=torch.device("cpu"), backend="gloo", max_iters=len(data), radius=2)
    script.train(args)
    torch.distributed.destroy_process_group()


def is_query_and_key(name):
    return name.startswith("decoder.transformer") and name.endswith("attn.in_proj_weight")


def train_host(name, folder, root):
    host = HOSTS[name]
    prepare(host, folder)
    data_set(root)

    def train(model, patched):
        run_training(host, folder, root, patched, model, [batch(host, 2), batch(host, 3)])

    layers = 3 * host.passes
    terms = frozenset({"affinity", "cam", "entropy"})
    return check_training(lambda: host.build(root), train, layers=layers, watched=is_query_and_key, terms=terms)


def own_and_second_view(name, folder, root):
    """What the model's last forward leaves against what the second view gives for the same images, in eval mode: the
    largest difference of any map (also from the decoder's own) and class map; then the gradients of the second view."""
    host = HOSTS[name]
    prepare(host, folder)
    data_set(root)
    torch.manual_seed(0)
    model = host.build(root).eval()
    importlib.import_module("utils.affutils" if host.folder == "" else "clip.clip_tool").scoremap2bbox = (
        lambda scoremap, **_: ([[0, 0, scoremap.shape[1], scoremap.shape[0]]], 1)
    )
    names, images, *_ = batch(host, 2)
    capture = weclip.capture(model)
    for _ in range(3):
        returned = model(images, names) if host.folder else model(images)
    first = capture.take()
    model.zero_grad()  # the host's GradCAM left some
    second = weclip.second_view(capture, images)
    pairs = list(zip(first.attention.weights(), second.attention.weights(), strict=True))
    returned_maps = [weights for _, of_run in second.output for weights in of_run]
    pairs += zip([weights.mean(1) for weights in second.attention.weights()], returned_maps, strict=True)
    maps = max((a - b).abs().max().item() for a, b in pairs)
    own = torch.stack(returned[: host.passes]).mean(0).softmax(1)[:, 1:]
    cams = max((own - weclip.cams(view)).abs().max().item() for view in (first, second))
    second.attention.weights()[-1].square().sum().backward()
    return maps, cams, {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
