"""CLIP-ES makes class maps with a frozen CLIP. It trains nothing and needs no file.

The library makes the class maps of its CLIP, and spreads the host's own maps over the captured attention. CLIP-ES runs
11 blocks under ``no_grad`` and the last one by ``forward_last_layer``. ``Classifier`` in the test puts both into one
forward, so that one run holds all 12 blocks (``no_grad=True``). The logits average the patches, and the class token's
row of the last block has no gradient, so ``query="all"`` reads the rows of the patches. The affinity is the mean of the
last 8 blocks.

What was run. On 2026-11-29, on a CPU with torch 2.14.1 and random weights: a CLIP of 12 blocks and 64 channels on
images of 64 x 96, with the host's ``encode_image``, ``forward_last_layer`` and ``GradCAM``. Replaced were OpenCV, lxml,
ttach and pkg_resources, which these parts do not call.

    linyq2117/CLIP-ES at 3893f81
        title: CLIP-ES
        regularises: nothing, because it trains nothing; class maps of its CLIP are made
        views: none
"""

import sys
import types
import warnings

import torch
from torch import nn

from acr_reg import capture_attention, class_token_gradient_cam, normalize_cam, propagate_cam
from acr_reg.integrations.formats import load_cams, save_cams
from tests.support.hosts import checkout, host_on_path, in_fresh_process

CLASSES, HEIGHT, WIDTH = 5, 64, 96
PRESENT = (1, 4)


class Classifier(nn.Module):
    """The host's two steps as one forward."""

    def __init__(self, clip, text):
        super().__init__()
        self.clip = clip
        self.text = text

    def forward(self, images):
        features, _ = self.clip.encode_image(images, *images.shape[-2:])
        logits, _ = self.clip.forward_last_layer(features, self.text)
        return logits


def class_maps(folder):
    import packaging.version

    sys.modules["pkg_resources"] = types.SimpleNamespace(packaging=packaging)
    host_on_path(folder, ("cv2", "lxml", "ttach"))
    from clip.model import CLIP
    from pytorch_grad_cam import GradCAM

    torch.manual_seed(0)
    clip = CLIP(32, 64, 12, 64, 16, 77, 49408, 64, 1, 1).float().eval()
    model, image = Classifier(clip, torch.randn(CLASSES, 32)), torch.randn(1, 3, HEIGHT, WIDTH)

    def to_grid(tokens, height, width):
        return tokens[1:].permute(1, 2, 0).unflatten(2, (height, width))

    host_cam = GradCAM(clip, [clip.visual.transformer.resblocks[-1].ln_1], reshape_transform=to_grid)
    features, weights = clip.encode_image(image, HEIGHT, WIDTH)
    own = torch.zeros(1, CLASSES, HEIGHT // 16, WIDTH // 16)
    for category in PRESENT:
        given = [features, model.text, HEIGHT, WIDTH]
        found, _, last = host_cam(given, [lambda output, c=category: output[c]], None)
        own[0, category] = torch.from_numpy(found[0])

    labels = torch.zeros(1, CLASSES)
    labels[0, PRESENT] = 1
    with capture_attention(model, no_grad=True) as attention:
        logits = model(image)
        maps = attention.take()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        by_class_row = class_token_gradient_cam(logits, maps, labels, start_layer=-1)
    of_patches = class_token_gradient_cam(logits, maps, labels, start_layer=-1, query="all")
    captured = torch.stack([layer.weights().mean(1) for layer in maps])
    return {
        "attention": (captured - torch.stack([*weights, last])).abs().max().item(),
        "class row": (by_class_row.abs().max().item(), [str(warning.message) for warning in said]),
        "raw": (of_patches, own),
        "spread": [propagate_cam(cams, maps.select(range(4, 12))).detach() for cams in (of_patches, own)],
    }


def test_class_maps_of_the_hosts_clip(tmp_path):
    found = in_fresh_process(class_maps, checkout("linyq2117/CLIP-ES", "3893f81"))
    assert found["attention"] < 1e-6, "all 12 blocks, as the host returns them"
    largest, (said,) = found["class row"]
    assert largest == 0
    assert 'query="all"' in said
    for raw, spread in zip(found["raw"], found["spread"], strict=True):
        assert raw.shape == spread.shape == (1, CLASSES, HEIGHT // 16, WIDTH // 16)
        assert [c for c in range(CLASSES) if raw[0, c].max() > 0] == list(PRESENT)
        assert (spread - raw)[0, PRESENT].abs().amax() > 1e-3 * raw.max()
        scaled = normalize_cam(spread, "minmax")[0]
        save_cams(tmp_path / "image.npy", {c: scaled[c] for c in PRESENT}, "clip_es", (HEIGHT, WIDTH))
        loaded = load_cams(tmp_path / "image.npy")
        assert list(loaded) == list(PRESENT)
        assert all(each.shape == (HEIGHT, WIDTH) for each in loaded.values())
