"""A small model of MCTformer's interface, and what is checked of it and of the hosts alike."""

import contextlib
import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

import acr_reg
from acr_reg.integrations import mctformer
from tests.support.hosts import maps_of_first_loss

CLASSES, SIZE = 20, 64


def batches():
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        labels = torch.zeros(2, CLASSES)
        labels[0, [3, 7]] = labels[1, 14] = 1
        yield torch.rand(2, 3, SIZE, SIZE, generator=generator), labels


def is_query_and_key(name):
    return ".attn.qkv.weight" in name


# ---------------------------------------------------------------- a small model of the interface


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2)), weights


class Block(nn.Module):
    """Returns tokens and map, as the hosts' blocks do; drops a sample's branch at random in training."""

    drop = 0.1

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads)

    def forward(self, x):
        y, weights = self.attn(self.norm(x))
        keep = (torch.rand(len(x), 1, 1, device=x.device) > self.drop) / (1 - self.drop) if self.training else 1.0
        return x + keep * y, weights


class Small(nn.Module):
    """V2 by default. "Plus" and "CTI" have positions of a fixed size; "V1" has no head."""

    def __init__(self, kind="V2", width=24, depth=3):
        super().__init__()
        self.num_classes = CLASSES
        self.kind = kind
        count = CLASSES
        if kind == "CTI":
            count = self.num_classes_with_fg = CLASSES + 1
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, count, width))
        positions = nn.Parameter(0.5 * torch.randn(1, (SIZE // 16) ** 2, width))
        self.register_parameter("pos_embed_pat" if kind in ("Plus", "CTI") else "pos", positions)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(depth))
        self.head = nn.Identity() if kind == "V1" else nn.Conv2d(width, count, 3, padding=1)
        self.count = count

    def forward_features(self, x):
        grid = self.patch_embed(x)
        if self.kind in ("Plus", "CTI"):
            position = self.pos_embed_pat
        else:
            square = self.pos.transpose(1, 2).unflatten(2, (SIZE // 16, SIZE // 16))
            position = F.interpolate(square, grid.shape[2:], mode="bilinear").flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), grid.flatten(2).transpose(1, 2) + position], 1)
        maps = []
        for block in self.blocks:
            x, weights = block(x)
            maps.append(weights)
        return x, grid.shape[2:], maps

    def forward(self, x, return_att=False):
        x, size, maps = self.forward_features(x)
        logits = x[:, self.count - CLASSES : self.count].mean(-1)
        if self.kind == "V1":
            return logits
        patches = self.head(x[:, self.count :].transpose(1, 2).unflatten(2, size))[:, self.count - CLASSES :]
        if return_att:
            attention = torch.stack(maps).mean((0, 2))[:, :CLASSES, self.count :].unflatten(2, size)
            return logits, torch.sqrt(attention * F.relu(patches)), maps
        return logits, patches.mean((2, 3))


def train_small(model, patched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if patched:
        host = mctformer.capture(model)
        acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip())
    for samples, targets in batches():
        if patched:
            host.clear()
        outputs = model(samples)
        if patched:
            first = host.take()
            second = mctformer.second_view(host, acr.view(samples))
        if model.kind == "CTI":
            model(samples.roll(1, 0))
        loss = sum(
            F.multilabel_soft_margin_loss(out, targets)
            for out in (outputs if isinstance(outputs, tuple) else (outputs,))
        )
        if patched:
            loss = loss + acr(
                first.attention, second.attention, mctformer.cams(first), mctformer.cams(second), labels=targets
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


KINDS = ("V1", "V2", "Plus", "CTI")
images = functools.partial(torch.rand, 2, 3, SIZE, SIZE)


# ---------------------------------------------------------------- what is checked of small models and of the hosts


def pair(model, view, samples):
    """Both views of the images, as the added lines make them."""
    with mctformer.capture(model) as host:
        model(samples)
        first = host.take()
        return first, mctformer.second_view(host, view(samples))


def terms_under(model, view, samples):
    first, second = pair(model, view, samples)
    acr = acr_reg.AllPairsConsistencyLoss(view)
    return acr(first.attention, second.attention, mctformer.cams(first), mctformer.cams(second), return_terms=True)


def noise_floor(model, samples):
    """The terms under an identity view in train and in eval mode."""
    floors = {}
    for mode in ("train", "eval"):
        model.train(mode == "train")
        _, terms = terms_under(model, acr_reg.Identity(), samples)
        floors[mode] = {name: terms[name].item() for name in ("activation", "affinity", "cam")}
    model.train()
    return floors


def assert_noise_floor(floors):
    assert all(value > 1e-5 for value in floors["train"].values()), floors
    assert all(value == 0 for value in floors["eval"].values()), floors


def first_maps(model, train, images_of_step):
    """(taken, expected): the maps of all layers that the first loss of ``train`` was given for each view, and those of
    the encoder alone on the same images. The model drops nothing."""
    expected = []
    original = copy.deepcopy(model).train()
    with torch.no_grad():
        for view in (acr_reg.Identity(), acr_reg.HorizontalFlip()):
            maps = next(part for part in original.forward_features(view(images_of_step))[1:] if isinstance(part, list))
            expected.append(torch.stack(maps))
    return maps_of_first_loss(model, train), expected


def assert_right_pass(taken, expected):
    for each, right in zip(taken, expected, strict=True):
        torch.testing.assert_close(each, right, rtol=1e-4, atol=1e-7)
    assert (taken[0] - expected[1]).abs().max() > 100 * (taken[0] - expected[0]).abs().max()


def query_and_key_gradient(model, samples, dtype, scale):
    """Of the loss alone, unscaled after the fact in float32; autocast as in the hosts' loops."""
    model.zero_grad()
    with contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
        first, second = pair(model, acr_reg.HorizontalFlip(), samples)
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip())
    loss = acr(first.attention, second.attention, mctformer.cams(first), mctformer.cams(second))
    (scale * loss).backward()
    found = [p.grad[: 2 * p.shape[0] // 3].flatten() for n, p in model.named_parameters() if is_query_and_key(n)]
    return torch.cat(found) / scale


def mixed_precision(model, samples):
    """Of the query and key gradient under autocast: cosine with that of float32, share of zeros."""
    model.eval()  # no noise between the two
    torch_version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    half = torch_version >= (2, 3)  # CPU autocast knows float16 only from there on
    exact = query_and_key_gradient(model, samples, torch.float32, 1.0)
    found = {}
    for name, dtype, scale in (
        ("bfloat16", torch.bfloat16, 1.0),
        ("float16 scaled", torch.float16, 65536.0),
        ("float16", torch.float16, 1.0),
    )[: 3 if half else 1]:
        gradient = query_and_key_gradient(model, samples, dtype, scale)
        zeros = (gradient == 0).float().mean().item()
        found[name] = F.cosine_similarity(gradient.double(), exact.double(), dim=0).item(), zeros
    model.train()
    return found


def assert_mixed_precision(found):
    """At random weights attention is close to uniform, and rounding turns the sign of small differences: hence the
    lower bound for bfloat16, which WeakTr comes closest to."""
    least = {"bfloat16": 0.5, "float16 scaled": 0.99, "float16": -1.0}
    for name, (cosine, zeros) in found.items():
        assert cosine > least[name], found
        assert zeros < 0.01 or name == "float16", found


FIXED = (
    acr_reg.HorizontalFlip(),
    acr_reg.Rotate90(1),
    acr_reg.Scale(0.75, keep_size=True),
    acr_reg.Crop(8, 0, 48, 48, SIZE, image_size=(SIZE, SIZE)),
)
RESIZED = (acr_reg.Scale(0.5), acr_reg.Crop(0, 16, SIZE, SIZE - 16, image_size=(SIZE, SIZE)))


def assert_own_maps_are_not_differentiable(model, own, ours):
    weights = [p for name, p in model.named_parameters() if is_query_and_key(name)]
    (of_own,) = torch.autograd.grad(own.sum(), weights[-1:], retain_graph=True)
    (of_ours,) = torch.autograd.grad(ours.pow(2).sum(), weights[:1])
    assert not torch.isfinite(of_own).all()
    assert torch.isfinite(of_ours).all()
    assert of_ours.norm() > 0
