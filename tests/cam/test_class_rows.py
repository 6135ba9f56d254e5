"""GradientCam computes the gradient at the class token alone where the model treats its other tokens apart from it, and
the whole gradient elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from acr_reg import GradientCam, Identity, capture_attention, class_token_gradient_cam
from acr_reg.cam.class_rows import ClassRows

WIDTH, HEADS, CLASSES = 16, 2, 3
PATCHES = 4 * 6


class Block(nn.Module):
    """A block on (B, N, d) that is fused, and options in which others differ."""

    def __init__(self, explicit=False, mix=None, tokens_first=False, masked=False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.explicit, self.mix, self.tokens_first, self.masked = explicit, mix, tokens_first, masked

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 1, 3, 0, 4) if self.tokens_first else qkv.permute(2, 0, 3, 1, 4)
        if self.explicit:
            out = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        else:
            mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(3) if self.masked else None
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        x = x + self.proj((out.permute(2, 0, 1, 3) if self.tokens_first else out.transpose(1, 2)).flatten(2))
        mixed = self.norm2(x)
        return x + self.mlp(mixed if self.mix is None else self.mix(mixed))


class Vit(nn.Module):
    """``before`` and ``behind`` count the tokens beside the patches."""

    def __init__(self, before=1, behind=0, pool=None, depth=3, tokens_first=False, **block):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.before = nn.Parameter(torch.randn(1, before, WIDTH))
        self.behind = nn.Parameter(torch.randn(1, behind, WIDTH))
        self.blocks = nn.ModuleList([Block(tokens_first=tokens_first, **block) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.checkpoints = False
        self.pool, self.tokens_first = pool or (lambda x: x[:, 0] if before else x[:, -1]), tokens_first

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        count = len(patches)
        x = torch.cat([self.before.expand(count, -1, -1), patches, self.behind.expand(count, -1, -1)], 1)
        x = x.transpose(0, 1) if self.tokens_first else x
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        x = x.transpose(0, 1) if self.tokens_first else x
        return self.head(self.pool(self.norm(x)))


def expected_maps(model, images, labels=None, start_layer=-2, method="grad", **hints):
    """By the capture of an ordinary forward."""
    model.eval()
    with capture_attention(model, **hints) as attention:
        logits = model(images)
        return class_token_gradient_cam(logits, attention.take(), labels, start_layer, method)


def rows_of_gradient(model, cam, images, labels=None):
    """The maps, and the number of tokens whose gradient within the last but one block is known and not 0."""
    found = []
    cam(images, labels)  # which shows whether the model is like this

    def count(gradient):
        found.append(int((gradient.isfinite() & (gradient != 0)).any(-1).sum()))

    hook = model.blocks[-2].norm2.register_forward_hook(lambda _, __, result: result.register_hook(count) and None)
    maps = cam(images, labels)
    hook.remove()
    return maps, found[0] // len(images)


SPARED = {
    "class token first": ({}, {}, 1),
    "class token behind": ({"before": 0, "behind": 1}, {}, 1),
    "a class token and registers": ({"before": 3}, {"class_tokens": 1}, 3),
    "a class token for each class": ({"before": 3, "pool": lambda x: x[:, :3].mean(1)}, {"class_tokens": 3}, 3),
    "distilled": ({"before": 2, "pool": lambda x: x[:, :2].mean(1)}, {"class_tokens": 1}, 2),
    "explicit": ({"explicit": True}, {}, 1),
    "masked": ({"masked": True}, {}, 1),
}


@pytest.mark.parametrize(("options", "hints", "rows"), SPARED.values(), ids=SPARED)
def test_tokens_that_are_apart_have_no_gradient_and_the_maps_are_the_same(options, hints, rows):
    model, images = Vit(**options), torch.randn(2, 3, 32, 48)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    expected = expected_maps(model, images, labels, **hints)
    assert expected.any()
    with GradientCam(model, steps=0, views=[Identity()], **hints) as cam:
        maps, found = rows_of_gradient(model, cam, images, labels)
    torch.testing.assert_close(maps, expected)
    assert found == rows


def neighbours(x):
    return x + x.roll(1, 1)


def mean_of_all(x):
    return x + 0.1 * x.mean(1, keepdim=True)


def along_the_tokens(x):
    return F.conv1d(x.mT, torch.ones(WIDTH, 1, 3) / 3, padding=1, groups=WIDTH).mT


NOT_SPARED = {
    "neighbours are mixed": ({"mix": neighbours}, {}),
    "the mean is added": ({"mix": mean_of_all}, {}),
    "a convolution along the tokens": ({"mix": along_the_tokens}, {}),
    "pooled patches": ({"pool": lambda x: x.mean(1)}, {}),
    "class token and pooled patches": ({"pool": lambda x: x[:, 0] + x[:, 1:].mean(1)}, {}),
    "tokens at both ends": ({"before": 1, "behind": 1}, {"class_tokens": 1}),
}


@pytest.mark.parametrize(("options", "hints"), NOT_SPARED.values(), ids=NOT_SPARED)
def test_the_whole_gradient_is_computed_if_the_class_token_needs_it(options, hints):
    model, images = Vit(**options), torch.randn(2, 3, 32, 48)
    expected = expected_maps(model, images, **hints)
    with GradientCam(model, steps=0, views=[Identity()], **hints) as cam:
        maps, found = rows_of_gradient(model, cam, images)
    torch.testing.assert_close(maps, expected)
    assert found == PATCHES + model.before.shape[1] + model.behind.shape[1]


def test_the_last_layer_alone_has_the_same_maps():
    model, images = Vit(depth=2), torch.randn(2, 3, 32, 48)
    expected = expected_maps(model, images, start_layer=-1)
    with GradientCam(model, -1, steps=0, views=[Identity()]) as cam:
        torch.testing.assert_close(cam(images), expected)


def test_more_than_two_layers_need_the_whole_gradient():
    model, images = Vit(depth=4), torch.randn(1, 3, 32, 48)
    expected = expected_maps(model, images, start_layer=-3)
    with GradientCam(model, -3, steps=0, views=[Identity()]) as cam:
        maps, found = rows_of_gradient(model, cam, images)
    torch.testing.assert_close(maps, expected)
    assert found == 1 + PATCHES


@pytest.mark.parametrize("count", [1, 2, 1 + PATCHES])
def test_as_many_images_as_tokens_are_not_taken_for_tokens(count):
    model, images = Vit(tokens_first=True), torch.randn(count, 3, 32, 48)
    expected = expected_maps(model, images)
    with GradientCam(model, steps=0, views=[Identity()]) as cam:
        torch.testing.assert_close(cam(images), expected)


@pytest.mark.parametrize("method", ["grad_s", "cam_grad", "cam_grad_s"])
def test_each_method_has_the_same_maps(method):
    model, images = Vit(), torch.randn(2, 3, 32, 48)
    expected = expected_maps(model, images, method=method)
    with GradientCam(model, method=method, steps=0, views=[Identity()]) as cam:
        torch.testing.assert_close(cam(images), expected)


def test_a_checkpointed_layer_runs_alike_both_times():
    model, images = Vit(), torch.randn(2, 3, 32, 48)
    expected = expected_maps(model, images)
    model.checkpoints = True
    with GradientCam(model, steps=0, views=[Identity()]) as cam:
        torch.testing.assert_close(cam(images), expected)


def test_autocast_may_begin_after_the_first_call():
    model, images = Vit(), torch.randn(2, 3, 32, 48)
    with GradientCam(model, steps=0, views=[Identity()]) as cam:
        expected = cam(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = cam(images)
        torch.testing.assert_close(cam(images), expected)
    torch.testing.assert_close(rough, expected, rtol=0.1, atol=0.05 * expected.max().item())
    with torch.autocast("cpu", torch.bfloat16), GradientCam(model, steps=0, views=[Identity()]) as cam:
        torch.testing.assert_close(cam(images), rough, rtol=0.1, atol=0.05 * expected.max().item())


class Gated(nn.Module):
    """Adds what ``mix`` gives, times a weight that is 0 at first, as in ReZero and LayerScale."""

    def __init__(self, mix):
        super().__init__()
        self.mix, self.weight, self.only_in_batches = mix, nn.Parameter(torch.zeros(())), False

    def forward(self, x):
        return x if self.only_in_batches and len(x) == 1 else x + self.weight * self.mix(x)


class GatedPool(Gated):
    def forward(self, x):
        return super().forward(x)[:, 0]


def learned(value):
    def change(model):
        for module in model.modules():
            if isinstance(module, Gated):
                nn.init.constant_(module.weight, value)

    return change


def pool_patches(model):
    model.pool = lambda x: x.mean(1)


def mix_batches(model):
    learned(1.0)(model)
    for block in model.blocks:
        block.mix.only_in_batches = True


CHANGES = {
    "neighbours are mixed": (lambda: {"mix": Gated(neighbours)}, learned(1.0)),
    "the mean is added a little": (lambda: {"mix": Gated(mean_of_all)}, learned(1e-7)),
    "patches are pooled": (lambda: {"pool": GatedPool(mean_of_all)}, learned(1.0)),
    "patches are pooled by another rule": (dict, pool_patches),
    "batches alone are mixed": (lambda: {"mix": Gated(neighbours)}, mix_batches),
}


@pytest.mark.parametrize(("options", "change"), CHANGES.values(), ids=CHANGES)
def test_a_model_that_needs_other_tokens_only_later_has_the_right_maps(options, change):
    model, images = Vit(**options()).double(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    with GradientCam(model, steps=0, views=[Identity()]) as cam:
        torch.testing.assert_close(cam(images), expected_maps(model, images))
        change(model)
        torch.testing.assert_close(cam(images), expected_maps(model, images), rtol=1e-12, atol=1e-12)


def test_a_linear_layers_output_may_be_written_into():
    model, images = Vit(), torch.randn(2, 3, 32, 48)
    for block in model.blocks:
        block.mlp[1] = nn.ReLU(inplace=True)
    expected = expected_maps(model, images)
    with GradientCam(model, steps=0, views=[Identity()]) as cam:
        maps, found = rows_of_gradient(model, cam, images)
    torch.testing.assert_close(maps, expected)
    assert found == 1


@pytest.mark.parametrize("rows", [slice(0, 2), slice(-1, None)], ids=str)
def test_attention_knows_no_gradient_if_other_rows_of_its_output_have_one(rows):
    query, key, value = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))

    def gradients(attend, of):
        return torch.autograd.grad(attend(query, key, value)[:, :, of].square().sum(), (query, key, value))

    def of_rows(*tensors):
        with ClassRows(rows):
            return F.scaled_dot_product_attention(*tensors)

    for ours, theirs in zip(gradients(of_rows, rows), gradients(F.scaled_dot_product_attention, rows), strict=True):
        torch.testing.assert_close(ours, theirs)
    of_query, of_key, of_value = gradients(of_rows, slice(1, None))
    unknown = torch.ones(5, dtype=torch.bool)
    unknown[rows] = False
    unknown[0] = False  # the first row of the output has no gradient
    assert torch.equal(of_query.isnan().all(-1), unknown.expand(2, 3, 5))
    assert of_key.isnan().all() and of_value.isnan().all()


class TokensFirst(nn.Module):
    """A linear layer within attention that runs on (N, B, d), as in torch's multi-head attention."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


def test_linear_layers_on_tokens_before_images_spoil_nothing_for_the_others():
    model, images = Vit(), torch.randn(2, 3, 32, 48)
    expected = expected_maps(model, images)
    for block in model.blocks:
        block.qkv = TokensFirst(block.qkv)
    with GradientCam(model, steps=0, views=[Identity()]) as cam:
        maps, found = rows_of_gradient(model, cam, images)
    torch.testing.assert_close(maps, expected)
    assert found == 1


def test_anomaly_detection_finds_none():
    model, images = Vit(), torch.randn(2, 3, 32, 48)
    expected = expected_maps(model, images)
    with GradientCam(model, steps=0, views=[Identity()]) as cam:
        with torch.autograd.set_detect_anomaly(True):
            torch.testing.assert_close(cam(images), expected)
        assert rows_of_gradient(model, cam, images)[1] == 1


def test_a_head_of_zeros_tells_nothing_and_the_whole_gradient_is_computed_once_it_learned():
    model, images = Vit(mix=mean_of_all), torch.randn(2, 3, 32, 48)
    nn.init.zeros_(model.head.weight)
    with GradientCam(model, steps=0, views=[Identity()]) as cam:
        with pytest.warns(UserWarning, match="is 0"):
            assert not cam(images).any()
        nn.init.normal_(model.head.weight)
        torch.testing.assert_close(cam(images), expected_maps(model, images))
