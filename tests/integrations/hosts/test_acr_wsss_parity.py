"""ACR_WSSS in double precision: its published loop and the patched one, where they agree and which is right where not.

Stubbed beyond ``host_training``: weights, photo and labels of infer_cam.py, OpenCV's reading and resizing in myTool.py.
"""

import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import acr_reg
from acr_reg.integrations import acr_wsss
from tests.integrations.hosts.test_acr_wsss import CLASSES, batch, noted_gradients, one_rank, prepare_host
from tests.support.hosts import added_lines, checkout, in_fresh_process, patched_module

ROUNDING = 1e-9  # of the norm of a parameter's gradient, in float64


@pytest.fixture
def host_folder():
    return checkout("OpenNLPLab/ACR_WSSS", "530a59d")


# ---------------------------------------------------------------- gradients


def literal_gradients(model, images, labels, prefix, alpha):
    """Of the published objective, from the maps that the host itself returns, with the grid's columns reversed."""
    rows, columns = (side // 16 for side in images.shape[-2:])
    mirrored = torch.arange(rows * columns).view(rows, columns).flip(1).flatten()
    loss, maps = 0, []
    for view in (images, images.flip(-1)):
        logits, _, attention, _ = model.forward_cls(view)
        loss = loss + F.multilabel_soft_margin_loss(logits, labels)
        maps.append(attention)
    a, b = (attention[:, :, :, prefix:] for attention in maps)
    b = b[..., mirrored]
    loss = loss + alpha * (a[:, :, 0] - b[:, :, 0]).abs().mean()
    loss = loss + alpha * (a[:, :, prefix:] - b[:, :, prefix:][:, :, mirrored]).abs().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def off(found, expected):
    """The largest relative difference over parameters; those whose gradient is rounding alone are left out."""
    assert found.keys() == expected.keys() != set()
    scale = max(each.norm() for each in expected.values())
    told = [name for name in expected if expected[name].norm() > 1e-9 * scale]
    assert len(told) > 100
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in told)


def compare(folder, backbone, height, width, file="train_acr.py"):
    """How far from the literal objective: (the patched loop, the host's own)."""
    prepared = prepare_host(folder)
    one_rank()

    def build(name):
        return prepared(name).double()

    images, labels = (each.double() for each in batch(2, height, width))
    torch.manual_seed(0)
    model = build(backbone)
    expected = literal_gradients(model, images, labels, model.pretrained.model.num_tokens, 100)
    del model
    return tuple(
        off(noted_gradients(folder, patched, (images, labels), 100, backbone, build, file), expected)
        for patched in (True, False)
    )


@pytest.mark.parametrize(("backbone", "file"), [("vitb_hybrid", "train_acr.py"), ("deit", "train_acr_coco.py")])
def test_on_square_images_both_loops_have_the_published_gradients(host_folder, backbone, file):
    ours, own = in_fresh_process(compare, host_folder, backbone, 64, 64, file)
    print(backbone, file, ours, own)
    assert ours < ROUNDING and own < ROUNDING


@pytest.mark.parametrize(("backbone", "width"), [("deit", 96), ("deit_distilled", 64)])
def test_elsewhere_only_the_patched_loop_has_them(host_folder, backbone, width):
    ours, own = in_fresh_process(compare, host_folder, backbone, 64, width)
    print(backbone, width, ours, own)
    assert ours < ROUNDING
    assert own > 0.01


# ---------------------------------------------------------------- class maps


def compare_inference(folder, method):
    """How far the library's maps are from what infer_cam.py writes with --aff, flip included, in [0, 1]."""
    prepared = prepare_host(folder)
    one_rank()
    torch.manual_seed(0)
    model = prepared("vitb_hybrid")
    weights = model.state_dict()
    images, labels = batch(2)
    names = ["a", "b"]
    size = (50, 40)
    script = patched_module(folder, "infer_cam.py", None)
    begin = torch.distributed.init_process_group
    script.dist = types.SimpleNamespace(init_process_group=lambda **_: begin("gloo"))
    script.ACR = lambda **_: prepared("vitb_hybrid")
    script.torch.load = lambda _: weights
    script.cv2 = types.SimpleNamespace(imread=lambda _: np.zeros((*size, 3), np.uint8))
    script.Image = types.SimpleNamespace(open=lambda _: np.zeros((*size, 3), np.uint8))

    def data(chunk, _):
        at = names.index(chunk[0])
        return images[at : at + 1], np.zeros((1, 3, *size)), labels[at : at + 1], chunk

    script.mytool = types.SimpleNamespace(
        read_file_2=lambda _: names, chunker=script.mytool.chunker, get_data_from_chunk_val=data
    )
    with tempfile.TemporaryDirectory() as out:
        nothing = dict.fromkeys(("out_crf", "heatmap"))
        options = types.SimpleNamespace(
            nr=0, gpus=1, world_size=1, backbone="", weights="", LISTpath="", IMpath="", start_layer=10, aff=True,
            getam_func=method, out_cam=out, **nothing,
        )  # fmt: skip
        script.train(0, options)
        theirs = [np.load(Path(out) / f"{name}.npy", allow_pickle=True).item() for name in names]

    model.eval()
    ours = 0
    flip = acr_reg.HorizontalFlip()
    with acr_wsss.capture(model) as host:
        for view in (acr_reg.Identity(), flip):
            logits, *_ = model.forward_cls(view(images))
            maps = host.take().attention
            cam = acr_reg.class_token_gradient_cam(logits, maps, labels, start_layer=10, method=method)
            spread = F.interpolate(acr_reg.propagate_cam(cam, maps), size, mode="bilinear", align_corners=True)
            ours = ours + view(spread)
    low, high = ours.amin((2, 3), keepdim=True), ours.amax((2, 3), keepdim=True)
    ours = (ours - low) / (high - low + 1e-6)
    errors = []
    for of_image, expected, label in zip(ours, theirs, labels, strict=True):
        assert sorted(expected) == label.nonzero().flatten().tolist()
        errors += [(of_image[c] - torch.from_numpy(expected[c])).abs().max().item() for c in expected]
    return max(errors)


@pytest.mark.parametrize("method", ["grad", "cam_grad"])
def test_class_maps_are_those_that_the_host_writes(host_folder, method):
    error = in_fresh_process(compare_inference, host_folder, method)
    print(method, error)
    assert error < 1e-3


# ---------------------------------------------------------------- what the docstring says of the host


def floors(folder):
    """Of the real models in train mode: the loss under Identity() and a flip, and what the loss warns of."""
    prepared = prepare_host(folder)
    images, _ = batch(2)
    found = {}
    for backbone in ("vitb_hybrid", "deit_distilled"):
        torch.manual_seed(0)
        model = prepared(backbone).train()
        model.forward = model.forward_cls
        with acr_wsss.capture(model) as host, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for view in (acr_reg.Identity(), acr_reg.HorizontalFlip()):
                model(images)
                first, second = host.take(), acr_wsss.second_view(host, view(images))
                acr = acr_reg.AllPairsConsistencyLoss(view)
                loss = acr(first.attention, second.attention, acr_wsss.cams(first), acr_wsss.cams(second))
                found[backbone, view == acr_reg.Identity()] = loss.item()
        patch_map = model.forward_cam(images)[3][:, model.pretrained.model.num_tokens - 1 :]
        with acr_wsss.capture(model) as host:
            model(images)
            cam = acr_wsss.cams(host.take())
        torch.testing.assert_close(cam.relu().flatten(2).mT, patch_map)
        found[backbone, "warns"] = any("overlapping windows" in str(each.message) for each in said)
    return found


def test_two_passes_on_the_same_images_are_the_same_and_the_hybrid_stem_is_warned_of(host_folder):
    found = in_fresh_process(floors, host_folder)
    print(found)
    for backbone in ("vitb_hybrid", "deit_distilled"):
        assert found[backbone, True] == 0
        assert found[backbone, False] > 0
        assert found[backbone, "warns"] == (backbone == "vitb_hybrid")


def read_images(folder, edited):
    prepare_host(folder)
    edits = added_lines(acr_wsss, "OpenNLPLab/ACR_WSSS", "530a59d", today=True)["myTool.py"]
    tool = patched_module(folder, "myTool.py", edits if edited else None)
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)

    def resize(image, size, **_):
        return F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], size[::-1])[0].permute(1, 2, 0).numpy()

    tool.cv2 = types.SimpleNamespace(
        imread=lambda _: photo, cvtColor=lambda image, _: image, resize=resize, COLOR_BGR2RGB=4, INTER_CUBIC=2
    )
    tool.load_image_label_list_from_npy = lambda names: [np.eye(CLASSES)[3] for _ in names]
    options = types.SimpleNamespace(IMpath="", crop_size=64)
    return tuple(tool.get_data_from_chunk_v2(["a", "b"], options)[0].shape)


def test_the_edits_for_todays_versions_are_needed_and_enough(host_folder):
    with pytest.raises(AttributeError, match="float"):
        in_fresh_process(read_images, host_folder, False)
    assert in_fresh_process(read_images, host_folder, True) == (2, 3, 64, 64)
