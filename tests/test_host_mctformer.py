"""MCTformer, WeakTr and CTI: their own training functions with the added lines, and a small model of that interface."""

import types

import pytest
import torch
import torch.nn.functional as F
from host_checks import added_lines, check_training, checkout, host_on_path, in_fresh_process, patched_module
from torch import nn

import acr_reg
from acr_reg.integrations import mctformer

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

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads)

    def forward(self, x):
        y, weights = self.attn(self.norm(x))
        keep = (torch.rand(len(x), 1, 1) > 0.1) / 0.9 if self.training else 1.0
        return x + keep * y, weights


class Small(nn.Module):
    def __init__(self, kind="V2", width=24, depth=3):
        super().__init__()
        self.num_classes = CLASSES
        self.kind = kind
        count = CLASSES
        if kind == "CTI":
            count = self.num_classes_with_fg = CLASSES + 1
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, count, width))
        self.pos = nn.Parameter(0.5 * torch.randn(1, (SIZE // 16) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(depth))
        self.head = nn.Identity() if kind == "V1" else nn.Conv2d(width, count, 3, padding=1)
        self.count = count

    def forward(self, x):
        grid = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), grid.flatten(2).transpose(1, 2) + self.pos], 1)
        for block in self.blocks:
            x, _ = block(x)
        logits = x[:, self.count - CLASSES : self.count].mean(-1)
        if self.kind == "V1":
            return logits
        patches = self.head(x[:, self.count :].transpose(1, 2).unflatten(2, grid.shape[2:]))
        return logits, patches[:, self.count - CLASSES :].mean((2, 3))


def train_small(model, patched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if patched:
        host = mctformer.capture(model)
        acr = acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip())
    for samples, targets in batches():
        outputs = model(samples)
        if patched:
            first = host.take()
            second = mctformer.second_view(host, acr.view(samples))
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


@pytest.mark.parametrize("kind", ["V1", "V2", "CTI"])
def test_small_model_trains(kind):
    steps = check_training(lambda: Small(kind), train_small, layers=3, watched=is_query_and_key)
    prefix = CLASSES + (kind == "CTI")
    assert steps[0].tokens[0] == (2, 2, prefix + 16, prefix + 16)


@pytest.mark.parametrize("kind", ["V1", "V2", "CTI"])
def test_class_maps_and_class_tokens_leave_the_background_out(kind):
    model = Small(kind).eval()
    with mctformer.capture(model) as host:
        output = model(torch.rand(2, 3, SIZE, SIZE))
        view = host.take()
    maps = mctformer.cams(view)
    assert maps.shape == (2, CLASSES, 4, 4)
    first = int(kind == "CTI")
    assert view.attention[0].layout.class_tokens == tuple(range(first, CLASSES + first))
    if kind == "V1":
        rows = sum(layer.weights().mean(1)[:, :CLASSES, CLASSES:] for layer in view.attention)
        torch.testing.assert_close(maps.flatten(2), rows)
    else:
        torch.testing.assert_close(maps.mean((2, 3)), output[1])


# ---------------------------------------------------------------- the hosts themselves

HOSTS = {
    "MCTformerPlus": ("xulianuwa/MCTformer", "0acc27a", "deit_small_MCTformerPlus", {"input_size": SIZE}),
    "MCTformerV2": ("xulianuwa/MCTformer", "9606597", "deit_small_MCTformerV2_patch16_224", {}),
    "MCTformerV1": ("xulianuwa/MCTformer", "9606597", "deit_small_MCTformerV1_patch16_224", {}),
    "WeakTr": ("hustvl/WeakTr", "3457ad3", "deit_small_WeakTr_patch16_224", {"feat_reduction": 4, "reduction": 8}),
}


def run_host(name, folder):
    host_on_path(folder, absent=("cv2",))
    repository, commit, function, options = HOSTS[name]
    import models
    from timm.utils import NativeScaler

    lines = added_lines(mctformer, repository, commit)["engine.py"]
    args = types.SimpleNamespace(num_cct=12, loss_weight=1.0)

    def build():
        return getattr(models, function)(
            num_classes=CLASSES, img_size=SIZE, drop_rate=0.0, drop_path_rate=0.1, **options
        )

    def train(model, patched):
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        engine = patched_module(folder, "engine.py", lines if patched else None)
        extra = {"args": args} if name == "MCTformerPlus" else {}
        engine.train_one_epoch(
            model, list(batches()), optimizer, torch.device("cpu"), 0, NativeScaler(), max_norm=None, **extra
        )

    return check_training(build, train, layers=12, watched=is_query_and_key)


@pytest.mark.parametrize("name", HOSTS)
def test_host_trains(name):
    repository, commit, _, _ = HOSTS[name]
    steps = in_fresh_process(run_host, name, checkout(repository, commit))
    print(name, steps[0].terms)
    assert steps[0].tokens == ((2, 6, CLASSES + 16, CLASSES + 16),) * 12
