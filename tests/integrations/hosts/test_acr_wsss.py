"""ACR_WSSS: its own training function with the added lines has its gradients, its getam the library's class maps."""

import os
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import acr_reg
from acr_reg.integrations import acr_wsss
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
    patched_module,
)

CLASSES = 20
TERMS = frozenset({"activation", "affinity", "entropy"})


def batch(seed, height=64, width=64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    return torch.randn(2, 3, height, width, generator=generator), labels


# ---------------------------------------------------------------- a small model of the interface


class Small(nn.Module):
    """Twelve blocks, like every backbone of the host; ``prefix=2`` is the distilled one."""

    def __init__(self, prefix=1, width=16):
        super().__init__()
        self.pretrained = nn.Module()
        self.pretrained.model = vit = nn.Module()
        vit.num_tokens = prefix
        vit.patch_embed = nn.Conv2d(3, width, 16, 16)
        vit.prefix = nn.Parameter(torch.randn(1, prefix, width))
        vit.blocks = nn.ModuleList(Block(width) for _ in range(12))
        self.cls_head = nn.Linear(width, CLASSES)

    def forward_cls(self, x):
        vit = self.pretrained.model
        x = torch.cat([vit.prefix.expand(len(x), -1, -1), vit.patch_embed(x).flatten(2).transpose(1, 2)], 1)
        for block in vit.blocks:
            x = block(x)
        return self.cls_head(x[:, 0]), self.cls_head(x[:, 1:].mean(1)), None, None


def small_step(model, acr, host, data, cams=False):
    images, labels = data
    x1, *_ = model(images)
    if host is None:
        x2 = model(images.flip(-1))[0] if not model.training else x1  # the plain step draws no second view
        return F.multilabel_soft_margin_loss(x1, labels) + 0 * x2.sum()
    first = host.take()
    second = acr_wsss.second_view(host, acr.view(images))
    maps = (acr_wsss.cams(first), acr_wsss.cams(second)) if cams else ()
    loss = acr(first.attention, second.attention, *maps, labels=labels if cams else None)
    return F.multilabel_soft_margin_loss(x1, labels) + loss


@pytest.mark.parametrize("cams", [False, True])
def test_small_model_trains(cams):
    def build():
        model = Small()
        model.forward = model.forward_cls
        return model

    def train(model, patched):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        host = acr_wsss.capture(model) if patched else None
        acr = acr_reg.AllPairsConsistencyLoss.paper(acr_reg.HorizontalFlip()) if patched else None
        for seed in (2, 3):
            optimizer.zero_grad()
            small_step(model, acr, host, batch(seed, 64, 96), cams).backward()
            optimizer.step()

    steps = check_training(build, train, layers=12, watched=is_query_and_key, terms=TERMS | {"cam"} if cams else TERMS)
    assert steps[0].tokens == ((2, 2, 1 + 24, 1 + 24),) * 12


@pytest.mark.parametrize("prefix", [1, 2])
def test_the_class_map_is_the_head_on_the_patches(prefix):
    model = Small(prefix).eval()
    images, _ = batch(2, 64, 96)
    with acr_wsss.capture(model) as host:
        _, _, *_ = model.forward_cls(images)
        view = host.take()
    maps = acr_wsss.cams(view)
    assert maps.shape == (2, CLASSES, 4, 6)
    assert view.attention[0].layout.class_tokens == (0,)
    tokens = view.features[:, prefix:]
    torch.testing.assert_close(maps[:, :, 1, 2], model.cls_head(tokens[:, 6 + 2]))


def small_gradients(data):
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = Small().eval()
    model.forward = model.forward_cls
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    acr = acr_reg.AllPairsConsistencyLoss.paper(acr_reg.HorizontalFlip())
    small_step(wrapped, acr, acr_wsss.capture(wrapped), batch(data), cams=True).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the host itself


class OnCpu(DistributedDataParallel):
    def __init__(self, module, device_ids, output_device, **options):
        super().__init__(module, **options)


def prepare_host(folder):
    host_on_path(folder, ("cv2", "pydensecrf", "pydensecrf.densecrf", "pydensecrf.utils"))
    torch.cuda.set_device = lambda *_: None
    torch.nn.parallel.DistributedDataParallel = OnCpu
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = lambda model: model
    torch.save = lambda *_: None
    from DPT.ACR import ACR

    return lambda backbone="vitb_hybrid": ACR(CLASSES, backbone, use_pretrain=False)


def host_training(folder, patched, model, data, alpha=100, file="train_acr.py"):
    """Runs the host's train() on these batches. Stubbed: the images, nccl, SyncBatchNorm, the GPU, saving."""
    lines = added_lines(acr_wsss, "OpenNLPLab/ACR_WSSS", "530a59d")[file] if patched else None
    script = patched_module(folder, file, lines)
    begin = torch.distributed.init_process_group
    script.dist = types.SimpleNamespace(init_process_group=lambda **_: begin("gloo"))
    script.ACR = lambda **_: model
    script.setup = lambda _: None
    batches = iter(data)

    def next_batch(*_):
        images, labels = next(batches)
        return images, None, labels, *names[file == "train_acr.py" :]

    names = None, ["a", "b"]
    photos = ["a", "b"] * (len(data) - 1)  # the loop takes one batch more than it fills
    script.os = types.SimpleNamespace(listdir=lambda _: photos, path=os.path)
    script.mytool = types.SimpleNamespace(
        read_file=lambda _: photos,
        chunker=script.mytool.chunker,
        get_data_from_chunk_v2=next_batch,
        get_data_from_chunk_coco=next_batch,
    )
    ranks = int(os.environ["WORLD_SIZE"])
    options = types.SimpleNamespace(
        nr=0,
        gpus=1,
        nodes=1,
        world_size=ranks,
        backbone="",
        LISTpath="",
        IMpath="",
        batch_size=2,
        max_epoches=1,
        lr=0.01,
        wt_dec=5e-4,
        alpha=alpha,
        session_name="",
    )
    script.train(int(os.environ["RANK"]), options)


def noted_gradients(folder, patched, data, alpha=100, backbone="vitb_hybrid", build=None, file="train_acr.py"):
    """Of the first step."""
    build = build or prepare_host(folder)
    torch.manual_seed(0)
    model = build(backbone)
    found = {}

    def note(*_):
        if not found:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(note)
    host_training(folder, patched, model, [data, data], alpha, file)
    hook.remove()
    return found


def one_rank():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")


def run_host(folder):
    build = prepare_host(folder)
    one_rank()

    def train(model, patched):
        host_training(folder, patched, model, [batch(2), batch(3)], alpha=100 if patched else 0)

    return check_training(build, train, layers=12, watched=is_query_and_key, terms=TERMS)


def compare_gradients(folder, backbone, height, width):
    """The largest relative difference over parameters between the host's own loop and the patched one."""
    build = prepare_host(folder)
    one_rank()
    data = batch(2, height, width)
    own, ours = (noted_gradients(folder, patched, data, 100, backbone, build) for patched in (False, True))
    assert own.keys() == ours.keys() != set()
    return max(((own[name] - ours[name]).norm() / own[name].norm()).item() for name in own)


def compare_maps(folder, backbone, method):
    build = prepare_host(folder)
    torch.manual_seed(0)
    model = build(backbone).eval()
    images, labels = batch(2)
    # By another method than forward the parts run one by one, so the first run does not show where tokens stand.
    attention = acr_reg.capture_attention(model, num_prefix_tokens=2 if "distilled" in backbone else 1)
    logits, _, host_attention, _ = model.forward_cls(images)
    maps = attention.take()
    ours = acr_reg.class_token_gradient_cam(logits, maps, labels, start_layer=9, method=method)
    spread = acr_reg.propagate_cam(ours, maps)
    prefix = maps[0].layout.num_prefix_tokens
    errors = []
    for image, label in labels.nonzero().tolist():
        model.zero_grad()
        logits[image, label].backward(retain_graph=True)
        theirs, *_ = model.getam(image, start_layer=9, func=method)
        theirs = theirs[image if len(theirs) > 1 else 0]
        affinity = host_attention[image, :, prefix:, prefix:].sum(0)
        for one, other in ((ours, theirs), (spread, affinity @ theirs)):
            errors.append(((one[image, label].flatten() - other).abs().max() / other.max()).item())
    return max(errors)


@pytest.fixture
def host_folder():
    return checkout("OpenNLPLab/ACR_WSSS", "530a59d")


def test_host_trains(host_folder):
    steps = in_fresh_process(run_host, host_folder)
    print("ACR_WSSS", steps[0].terms)
    assert steps[0].tokens == ((2, 12, 1 + 16, 1 + 16),) * 12


@pytest.mark.parametrize("backbone", ["vitb_hybrid", "deit"])
def test_gradients_are_those_of_the_hosts_own_loop(host_folder, backbone):
    assert in_fresh_process(compare_gradients, host_folder, backbone, 64, 64) < 1e-3


def test_the_hosts_own_loop_is_another_on_images_that_are_not_square(host_folder):
    assert in_fresh_process(compare_gradients, host_folder, "deit", 64, 96) > 0.03


@pytest.mark.parametrize("method", ["grad", "grad_s", "cam_grad", "cam_grad_s"])
def test_class_maps_are_those_of_getam_and_its_propagation(host_folder, method):
    assert in_fresh_process(compare_maps, host_folder, "vitb_hybrid", method) < 1e-4


def test_class_maps_of_the_distilled_backbone(host_folder):
    assert in_fresh_process(compare_maps, host_folder, "deit_distilled", "grad") < 1e-4


def ranks_of_the_patched_host(data, folder):
    return noted_gradients(folder, True, batch(data), backbone="deit")


def ranks_of_the_host(data, folder):
    return noted_gradients(folder, False, batch(data), backbone="deit")


def test_two_ranks_of_the_patched_host_have_the_mean_gradient(host_folder):
    check_mean_of_ranks(*gradients_of_two_ranks((ranks_of_the_patched_host, host_folder)))


def test_two_ranks_of_the_host_itself_differ(host_folder):
    with pytest.raises(AssertionError, match="differs between ranks"):
        check_mean_of_ranks(*gradients_of_two_ranks((ranks_of_the_host, host_folder)))
