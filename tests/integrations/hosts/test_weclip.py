"""WeCLIP, WeCLIP+ and ExCEL: their own training functions with the added lines, and small networks like theirs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import acr_reg
from acr_reg.integrations import weclip
from tests.support.hosts import (
    Block,
    check_mean_of_ranks,
    check_training,
    checkout,
    gradients_of_two_ranks,
    in_fresh_process,
    is_query_and_key,
)
from tests.support.weclip import HOSTS, Dino, own_and_second_view, train_host

CLASSES, WIDTH, LAYERS = 20, 32, 4
KINDS = ("WeCLIP", "WeCLIP+", "ExCEL")

# ---------------------------------------------------------------- small networks


class Clip(nn.Module):
    """The calls of the hosts' CLIPs and the orders of axes in which they return their layers."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, WIDTH, 16, 16)
        self.visual.blocks = nn.ModuleList(Block(WIDTH) for _ in range(LAYERS))

    @torch.no_grad()
    def layers(self, images):
        tokens = F.pad(self.visual.conv1(images).flatten(2).transpose(1, 2), (0, 0, 1, 0), value=1.0)
        found = []
        for block in self.visual.blocks:
            tokens = block(tokens)
            found.append(tokens)
        return found

    def encode_image(self, images, *arguments, require_all_fts=False, clip_flag=None):
        found = self.layers(images)
        if self.kind == "ExCEL":
            assert arguments == (True, None)
            return tokens_mean(found), [], found
        assert arguments == tuple(images.shape[-2:])
        assert (require_all_fts, clip_flag) == (True, 16 if self.kind == "WeCLIP+" else None)
        return [tokens.transpose(0, 1) for tokens in found], []


def tokens_mean(found):
    return found[-1].mean(1)


class Fuse(nn.Module):
    """(layers, B, C, h, w) to (B, WIDTH, h, w), with the hosts' dropout."""

    def __init__(self, layers, channels=WIDTH):
        super().__init__()
        self.linear_fuse = nn.Conv2d(layers * channels, WIDTH, 1)
        self.dropout = nn.Dropout2d(0.1)

    def forward(self, x):
        return self.dropout(self.linear_fuse(x.transpose(0, 1).flatten(1, 2)))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[Block(WIDTH) for _ in range(3)])
        self.linear_pred = nn.Conv2d(WIDTH, 1 + CLASSES, 1)

    def forward(self, x):
        tokens = self.transformer.resblocks(x.flatten(2).transpose(1, 2))
        return self.linear_pred(tokens.transpose(1, 2).unflatten(2, x.shape[2:])), []


class Network(nn.Module):
    """Reads a file and counts, as the hosts' forward does; ``forward`` is written from theirs and not from the file."""

    def __init__(self, kind="WeCLIP"):
        super().__init__()
        self.encoder = Clip(kind).requires_grad_(False)
        self.decoder_fts_fuse = Fuse(1 if kind == "WeCLIP+" else LAYERS)
        self.decoder = Decoder()
        self.kind, self.iter_num, self.clip_flag = kind, 0, 16
        if kind == "WeCLIP+":
            self.dino_encoder, self.dino_decoder_fts_fuse = Dino().requires_grad_(False), Fuse(1, 48)
        if kind == "ExCEL":
            self.text_attr = torch.zeros(1)

    def forward(self, images, names=("a", "b")):
        assert names is not None
        self.encoder.eval()
        self.iter_num += 1
        batch, _, height, width = images.shape
        layers = torch.stack(self.encoder.layers(images))
        layers = layers[-1:] if self.kind == "WeCLIP+" else layers
        grid = height // 16, width // 16
        maps = layers[:, :, 1:].permute(0, 1, 3, 2).reshape(len(layers), batch, WIDTH, *grid)
        outputs = [self.decoder(self.decoder_fts_fuse(maps))[0]]
        if self.kind == "WeCLIP+":
            small = F.interpolate(images, (height // 14 * 14, width // 14 * 14), mode="bilinear")
            tokens = self.dino_encoder.forward_features(small)["x_norm_patchtokens"]
            maps = tokens.reshape(batch, height // 14, width // 14, 48).permute(0, 3, 1, 2)
            fused = F.interpolate(self.dino_decoder_fts_fuse(maps[None]), grid, mode="bilinear")
            outputs.append(self.decoder(fused)[0])
        return outputs


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    return torch.randn(2, 3, 96, 96, generator=generator), labels


def small_step(model, host, acr, data):
    images, labels = data
    loss = sum(F.multilabel_soft_margin_loss(out.amax((2, 3))[:, 1:], labels) for out in model(images))
    if host is not None:
        first, second = host.take(), weclip.second_view(host, acr.view(images))
        maps = weclip.cams(first), weclip.cams(second)
        loss = loss + acr(first.attention, second.attention, *maps, labels=labels)
    return loss


def consistency():
    return acr_reg.AllPairsConsistencyLoss(acr_reg.HorizontalFlip(), activation_weight=0)


def train_small(model, patched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    host, acr = (weclip.capture(model), consistency()) if patched else (None, None)
    for seed in (2, 3):
        optimizer.zero_grad()
        small_step(model, host, acr, batch(seed)).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_small_network_trains(kind):
    steps = check_training(
        lambda: Network(kind),
        train_small,
        layers=6 if kind == "WeCLIP+" else 3,
        watched=lambda name: name.startswith("decoder.") and is_query_and_key(name),
        terms=frozenset({"affinity", "cam", "entropy"}),
    )
    assert all({shape[2:] for shape in step.tokens} == {(36, 36)} for step in steps)


@pytest.mark.parametrize("kind", KINDS)
def test_second_view_of_the_images_is_the_forward_of_the_model(kind):
    model, (images, _) = Network(kind).eval(), batch(2)
    images = images if kind == "ExCEL" else images[..., :64]
    with weclip.capture(model) as host:
        outputs = model(images)
        first, second = host.take(), weclip.second_view(host, images)
    assert model.iter_num == 1
    own = torch.stack(outputs).mean(0).softmax(1)[:, 1:]
    for view in (first, second):
        torch.testing.assert_close(weclip.cams(view), own)
        assert {layer.layout.query.height * layer.layout.query.width for layer in view.attention} == {
            own.shape[2] * own.shape[3]
        }
    for one, other in zip(first.attention.weights(), second.attention.weights(), strict=True):
        torch.testing.assert_close(one, other)
    (gradient,) = torch.autograd.grad(weclip.cams(second).square().sum(), model.decoder_fts_fuse.linear_fuse.weight)
    assert gradient.norm() > 0


def test_the_next_forward_forgets_the_runs_of_the_last():
    model = Network("WeCLIP+")
    (one, _), (other, _) = batch(2), batch(3)
    with weclip.capture(model.eval()) as host:
        for images in (one, one, other):  # validation with a graph
            model(images)
        first, alone = host.take(), weclip.second_view(host, other)
        torch.testing.assert_close(first.features, alone.features)
        assert first.attention.layers == tuple(range(6))
        with pytest.raises(acr_reg.CaptureError):
            host.take()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(before)


def test_sizes_and_models_of_other_families_are_refused():
    with (
        weclip.capture(Network("ExCEL")) as host,
        pytest.raises(ValueError, match=r"96 x 64 px.* equal multiples of 16"),
    ):
        weclip.second_view(host, torch.zeros(2, 3, 96, 64))
    with weclip.capture(Network("WeCLIP")) as host, pytest.raises(ValueError, match=r"90 x 64 px.*multiples of 16"):
        weclip.second_view(host, torch.zeros(2, 3, 90, 64))
    with pytest.raises(ValueError, match=r"^Decoder has no 'encoder.visual'.*WeCLIP"):
        weclip.capture(Decoder())


def small_gradients(data):
    torch.distributed.init_process_group("gloo")
    found = {}
    for kind in ("WeCLIP+", "ExCEL"):
        torch.manual_seed(0)
        model = Network(kind).eval()  # the dropout's draws depend on the number of ranks
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        small_step(wrapped, weclip.capture(wrapped), consistency(), batch(data)).backward()
        found.update({f"{kind} {name}": p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def test_two_ranks_have_the_mean_gradient():
    check_mean_of_ranks(*gradients_of_two_ranks((small_gradients,)))


# ---------------------------------------------------------------- the hosts themselves


@pytest.fixture(params=HOSTS)
def host_and_folder(request):
    host = HOSTS[request.param]
    return request.param, checkout(host.repository, host.commit)


def test_host_trains(host_and_folder, tmp_path):
    steps = in_fresh_process(train_host, *host_and_folder, tmp_path)
    host = HOSTS[host_and_folder[0]]
    print(host_and_folder[0], steps[0].terms)
    tokens = (host.size // 16) ** 2
    assert all(shape == (host.batch, 8, tokens, tokens) for step in steps for shape in step.tokens)


def test_the_second_view_of_the_images_is_the_hosts_own_forward(host_and_folder, tmp_path):
    maps, cams, gradients = in_fresh_process(own_and_second_view, *host_and_folder, tmp_path)
    assert maps < 1e-6
    assert cams < 1e-5
    assert all(name.split(".")[0].endswith(("decoder", "decoder_fts_fuse")) for name in gradients), "CLIP is frozen"
    assert len([name for name in gradients if name.endswith("attn.in_proj_weight")]) == 3
