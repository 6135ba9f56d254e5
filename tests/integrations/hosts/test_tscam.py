"""TS-CAM: its own training function with the generic lines, ``HostCapture`` on ``capture_attention``. It needs no file.

What is regularised. The class token's row and the pairs of patches of all 12 blocks, and the map of the convolutional
head, which ``FeatureRecorder`` records. The host classifies by that map alone, so its own loss gives the last block's
class token no gradient. The activation term does. An image has one class.

What was run. Two steps of ``train_one_epoch`` ran on 2026-11-29, on a CPU with torch 2.14.1, timm 1.0.31 and random
weights, with DeiT-Ti at 96 px and 8 classes. Replaced were the loader, the TensorBoard writer, OpenCV and the GPU.
164140757/SCM, which grew from TS-CAM, did not run: at be5bdfa its training script has a syntax error (line 80).

Views. Squares of the size that the model trains at.

    vasgaowei/TS-CAM at 25aece4
        title: TS-CAM
        regularises: the class token's row, the affinity, the head's map
        views: squares of the size it trains at
        tools_cam/train_cam.py, before line 19:
            from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention
            from acr_reg.integrations.host import FeatureRecorder, HostCapture, unwrap
        tools_cam/train_cam.py, before line 118:
            host = HostCapture(model, capture_attention(model), FeatureRecorder(unwrap(model).head))
            acr = AllPairsConsistencyLoss(HorizontalFlip())
        tools_cam/train_cam.py, before line 128:
            first = host.take()
            second = host.run(lambda: model(acr.view(input)))
            present = torch.nn.functional.one_hot(target, cls_logits.shape[1])
            loss = loss + acr(first.attention, second.attention, first.features, second.features, labels=present)
            del first, second
"""

import sys
import types

import torch

from tests.support.hosts import (
    added_lines,
    check_training,
    checkout,
    host_on_path,
    in_fresh_process,
    is_query_and_key,
    patched_module,
)

CLASSES, SIZE = 8, 96


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, SIZE, SIZE, generator=generator), torch.tensor([3, 6])


def train_host(folder):
    host_on_path(folder / "lib", ("cv2", "tensorboard", "torch.utils.tensorboard"))
    sys.path += [str(folder), str(folder / "tools_cam")]
    from models.deit import deit_tscam_tiny_patch16_224

    lines = added_lines(sys.modules[__name__], "vasgaowei/TS-CAM", "25aece4")["tools_cam/train_cam.py"]
    writer = types.SimpleNamespace(add_scalar=lambda *_: None)
    cfg = types.SimpleNamespace(BASIC=types.SimpleNamespace(DISP_FREQ=100))

    def build():
        return deit_tscam_tiny_patch16_224(img_size=SIZE, num_classes=CLASSES, drop_path_rate=0.1)

    def train(model, patched):
        sys.modules.pop("_init_paths", None)
        script = patched_module(folder, "tools_cam/train_cam.py", lines if patched else None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        wrapped, loss = torch.nn.DataParallel(model), torch.nn.CrossEntropyLoss()
        script.train_one_epoch([batch(2), batch(3)], wrapped, "cpu", loss, optimizer, 1, writer, cfg, 0)

    return check_training(build, train, layers=12, watched=is_query_and_key)


def test_host_trains():
    steps = in_fresh_process(train_host, checkout("vasgaowei/TS-CAM", "25aece4"))
    print("TS-CAM", steps[0].terms)
    tokens = 1 + (SIZE // 16) ** 2
    assert all(step.tokens == ((2, 3, tokens, tokens),) * 12 for step in steps)
