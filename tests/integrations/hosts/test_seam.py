"""SEAM: ``cam_consistency`` replaces its equivariance term in its own training script. It needs no file.

SEAM is a CNN. It has no attention to capture, and ``AllPairsConsistencyLoss`` needs attention. The lines use
``cam_consistency`` alone. It is a mean over the classes present, and SEAM's term is a mean over all 20 classes with
zeros for the absent ones, so the lines multiply by ``present.mean()``.

The two terms differ a little. The host resizes with ``align_corners`` and reads single pixels; the library goes by the
pixels' centres and averages the finer map. On smooth maps of the host's 448 px the library's term is 1.4 % larger, and
its gradient has a cosine of 0.9986 with the host's. On small maps (64 px), where 0.3 of the side is not a whole number
of pixels, it is 9 % larger with a cosine of 0.83.

What was run. Two iterations ran on 2026-11-25 at 80 px, on a CPU with torch 2.14.1 and random weights. The first step's
term is 9 % larger. Replaced were the data set and its loader, the checkpoint, TensorBoard, the pictures of the first
step (OpenCV, pydensecrf) and saving. The step needs no edits on today's torch. Reading photos does, because Pillow has
dropped the name ``CUBIC``.

Views. The loop runs both views itself, the second scaled by 0.3. Only ``Scale`` fits there, because the host's other
loss compares the pair pixel by pixel.

    YudeWang/SEAM at 3212261
        title: SEAM
        regularises: its own equivariance term, by ``cam_consistency``
        views: scales
        train_SEAM.py, before line 14:
            from acr_reg import Scale
            from acr_reg.losses.functional import cam_consistency
        train_SEAM.py, before line 116:
            maps1 = cam1
        train_SEAM.py, before line 122:
            maps2 = cam2
        train_SEAM.py, in place of lines 129 to 129:
            onto_smaller, present = Scale(scale_factor).inverse, label[:, 1:, 0, 0]
            loss_er = cam_consistency(maps2[:, 1:], maps1[:, 1:], onto_smaller, labels=present) * present.mean()
"""

import os
import sys
import tempfile
import types

import pytest
import torch
import torch.nn.functional as F

from acr_reg import Scale
from acr_reg.losses.functional import cam_consistency
from tests.support.hosts import added_lines, checkout, host_on_path, in_fresh_process, patched_module

CLASSES, SIZE = 20, 80


def seams_term(maps1, maps2, present, factor):
    """L1 of normalised maps over all classes, on the smaller grid; written from the paper's formula."""

    def normalised(maps):
        maps = maps.relu()
        return maps / maps.amax((2, 3), keepdim=True) * present[:, :, None, None]

    small = F.interpolate(normalised(maps1), scale_factor=factor, mode="bilinear", align_corners=True)
    return (small - normalised(maps2)).abs().mean()


@pytest.mark.parametrize(("size", "off", "cosine"), [(64, 0.1, 0.8), (80, 0.03, 0.98), (448, 0.02, 0.99)])
def test_cam_consistency_is_seams_term_on_smooth_maps(size, off, cosine):
    torch.manual_seed(0)
    coarse = torch.randn(2, CLASSES, size // 16, size // 16)
    maps1, maps2 = (
        F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=True).requires_grad_()
        for maps, side in ((coarse, size), (coarse + 0.5 * torch.randn_like(coarse), int(0.3 * size)))
    )
    present = torch.zeros(2, CLASSES)
    present[0, [3, 7]] = present[1, 14] = 1
    own = seams_term(maps1, maps2, present, 0.3)
    ours = cam_consistency(maps2, maps1, Scale(0.3).inverse, labels=present) * present.mean()
    assert abs(ours / own - 1) < off
    own_gradient, gradient = (torch.autograd.grad(term, maps2)[0].flatten() for term in (own, ours))
    assert F.cosine_similarity(own_gradient, gradient, dim=0) > cosine


class Silent:
    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None


def run_host(folder):
    """The host's script as it is and with the lines: of both, what it reports of each step and how fc8 moved."""
    host_on_path(folder, ("cv2", "tensorboardX", "pydensecrf", "pydensecrf.densecrf", "pydensecrf.utils"))
    import network.resnet38_SEAM
    import tool.pyutils
    import tool.visualization
    import torch.utils.data
    import voc12.data

    generator = torch.Generator().manual_seed(2)
    labels = torch.zeros(2, CLASSES)
    labels[0, [3, 7]] = labels[1, 14] = 1
    batches = [(["a", "b"], torch.randn(2, 3, SIZE, SIZE, generator=generator), labels) for _ in range(2)]
    sys.modules["tensorboardX"].SummaryWriter = Silent
    sys.modules["cv2"].resize = lambda image, *_, **__: image
    sys.modules["cv2"].INTER_CUBIC = 0
    tool.visualization.generate_vis = lambda *_, **__: (None,) * 4
    voc12.data.VOC12ClsDataset = lambda *_, **__: range(4)
    torch.utils.data.DataLoader = lambda *_, **__: batches
    torch.save = lambda *_: None
    torch.load = lambda *_, **__: {}
    sys.argv = ["train_SEAM.py", "--weights", "none", "--max_epoches", "1", "--batch_size", "2"]
    sys.argv += ["--network", "built"]
    build, found, console, back = network.resnet38_SEAM.Net, {}, sys.stdout, os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # for the host's log
        for patched in (False, True):
            torch.manual_seed(0)
            model, steps = build(), []
            before = model.fc8.weight.detach().clone()
            sys.modules["built"] = types.SimpleNamespace(Net=lambda model=model: model)

            class Meter(tool.pyutils.AverageMeter):
                def add(self, values, steps=steps):
                    steps.append(values)
                    super().add(values)

            script_tools = types.SimpleNamespace(**{**vars(tool.pyutils), "AverageMeter": Meter})
            tool_before, tool.pyutils = tool.pyutils, script_tools
            lines = added_lines(sys.modules[__name__], "YudeWang/SEAM", "3212261")["train_SEAM.py"]
            patched_module(folder, "train_SEAM.py", lines if patched else None, "__main__")
            tool.pyutils = tool_before
            found[patched] = steps, model.fc8.weight.detach() - before
            del model
        sys.stdout = console
        os.chdir(back)
    return found


def test_host_trains_with_cam_consistency_as_its_equivariance_term():
    found = in_fresh_process(run_host, checkout("YudeWang/SEAM", "3212261"))
    (own, own_moved), (ours, moved) = found[False], found[True]
    print("SEAM", own, ours)
    assert len(own) == len(ours) == 2
    assert own[0]["loss_cls"] == ours[0]["loss_cls"]  # the rest of the step is the host's
    assert own[0]["loss_ecr"] == ours[0]["loss_ecr"]
    assert abs(ours[0]["loss_er"] / own[0]["loss_er"] - 1) < 0.15  # from there on the weights differ
    assert ours[1]["loss_er"] > 0
    print("cosine", F.cosine_similarity(own_moved.flatten(), moved.flatten(), dim=0))
    assert F.cosine_similarity(own_moved.flatten(), moved.flatten(), dim=0) > 0.9
    assert not torch.equal(own_moved, moved)
