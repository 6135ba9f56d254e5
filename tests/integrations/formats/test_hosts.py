"""The consumers' own readers, run on the files written here: each in a process of its own, inside its checkout.

ACR_REG_HOSTS names the folder of the checkouts, one a repository, named owner+name; without it these tests are skipped.
Packages that a reader imports and does not use are replaced by mocks where they are not installed; the dense CRF, by
the labels it was given.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acr_reg.integrations.formats import save_cams, save_crf_pair
from tests.integrations.formats.test_consumers import scene

HOSTS = os.environ.get("ACR_REG_HOSTS")
pytestmark = pytest.mark.skipif(not HOSTS, reason="ACR_REG_HOSTS is not set: no checkout whose reader could be run")

NAME = "2007_000032"
PRELUDE = """
import importlib, json, sys, types
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock
sys.path.insert(0, ".")
for name in ("chainercv", "cv2", "pandas", "pydensecrf", "pydensecrf.densecrf", "pydensecrf.utils", "scipy.misc",
             "texttable"):
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
import numpy as np
import torch
folder = sys.argv[1]
"""


@pytest.fixture
def run(tmp_path):
    def run_in(host, code):
        """What `code` prints last, as JSON; it stands in the checkout, and knows the test's `folder`."""
        checkout = Path(HOSTS) / host
        if not checkout.is_dir():
            pytest.skip(f"no checkout of {host} in ACR_REG_HOSTS ({HOSTS})")
        command = [sys.executable, "-W", "ignore", "-B", "-c", PRELUDE + code, str(tmp_path)]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run_in


@pytest.fixture
def truth(tmp_path):
    """The scene's ids, written as the mask and the list that the readers want, beside a photo."""
    ids, maps = scene()
    for folder in ("JPEGImages", "SegmentationClassAug", "cams", "low", "high", "out"):
        (tmp_path / folder).mkdir()
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "SegmentationClassAug" / f"{NAME}.png")
    Image.fromarray(np.zeros((*ids.shape, 3), np.uint8)).save(tmp_path / "JPEGImages" / f"{NAME}.jpg")
    (tmp_path / "val.txt").write_text(f"{NAME}\n")
    (tmp_path / "pairs.txt").write_text(f"/JPEGImages/{NAME}.jpg /SegmentationClassAug/{NAME}.png\n")
    return ids, maps


def assert_all_right(scores):
    """Percent of IoU by the name of a VOC class."""
    present = {name: round(scores[name], 4) for name in ("background", "aeroplane", "person")}
    assert present == {"background": 100, "aeroplane": 100, "person": 100}, scores


@pytest.mark.parametrize(
    ("host", "options"),
    [
        ("OpenNLPLab+ACR_WSSS", "21, 'npy', 0.3"),
        ("xulianuwa+MCTformer", "21, 'npy', 0.3"),
        ("xulianuwa+MCTformer@9606597", "21, 'npy', 0.3"),
        ("YudeWang+SEAM", "21, 'npy', 0.3"),
        ("liruiwen+TransCAM", "21, 'npy', 0.3"),
        ("yoon307+CTI", "21, 'cam', 0.3"),
        ("hustvl+WeakTr", "21, 'npy', 0.3, n_jobs=1"),
    ],
)
def test_psa_dict_in_evaluation(run, truth, tmp_path, host, options):
    save_cams(tmp_path / "cams" / f"{NAME}.npy", truth[1])
    code = f"""
from evaluation import do_python_eval
scores = do_python_eval(folder + "/cams", folder + "/SegmentationClassAug", ["{NAME}"], {options})
print(json.dumps({{name: float(value) for name, value in scores.items()}}))
"""
    assert_all_right(run(host, code))


@pytest.mark.parametrize("alpha", ["low", "high"])
def test_crf_pair_in_evaluation_of_cti(run, truth, tmp_path, alpha):
    save_crf_pair(*(tmp_path / which / f"{NAME}.npy" for which in ("low", "high")), truth[1])
    code = f"""
from evaluation import do_python_eval
scores = do_python_eval(folder + "/{alpha}", folder + "/SegmentationClassAug", ["{NAME}"], 21, "crf", 0)
print(json.dumps({{name: float(value) for name, value in scores.items()}}))
"""
    assert_all_right(run("yoon307+CTI", code))


@pytest.mark.parametrize(
    ("host", "module"),
    [
        ("xulianuwa+MCTformer", "psa.voc12.data"),
        ("xulianuwa+MCTformer@9606597", "psa.voc12.data"),
        ("YudeWang+SEAM", "voc12.data"),
        ("yoon307+CTI", "voc12.data"),
    ],
)
def test_crf_pair_in_the_data_set_of_affinitynet(run, truth, tmp_path, host, module):
    """The data set up to its labels, from which it draws pairs of pixels. (ACR_WSSS's own copy cannot be run: its base
    class returns four values and it takes two. TransCAM's reads label images, not this pair.)"""
    ids, maps = truth
    maps[0][18:20, :8] = 0.15
    save_crf_pair(*(tmp_path / which / f"{NAME}.npy" for which in ("low", "high")), maps)
    code = f"""
data = importlib.import_module("{module}")
pairs = data.VOC12AffDataset(folder + "/pairs.txt", folder + "/low", folder + "/high", 64, folder,
                             joint_transform_list=[], img_transform_list=[], label_transform_list=[])
pairs.extract_aff_lab_func = lambda label: label
print(json.dumps(pairs[0][1].tolist()))
"""
    expected = np.select([ids == 1, ids == 15], [1, 2], 0)
    expected[18:20, :8] = 255
    np.testing.assert_array_equal(np.array(run(host, code)), expected)


def test_irn_dict_in_eval_cam_of_toco(run, truth, tmp_path):
    save_cams(tmp_path / "cams" / f"{NAME}.npy", truth[1], "irn")
    code = """
import runpy
sys.argv = ["eval_cam.py", "--list_folder", folder, "--cam_folder", folder + "/cams", "--data_folder", folder,
            "--bkg_thre", "0.3"]
print(json.dumps(runpy.run_path("tools/eval_cam.py", run_name="__main__")["preds"][0].tolist()))
"""
    np.testing.assert_array_equal(np.array(run("rulixiang+ToCo", code)), truth[0])


def test_irn_dict_in_cam_to_ir_label(run, truth, tmp_path):
    """Foreground, background and what is between the two thresholds."""
    ids, maps = truth
    maps[0][18:20, :8] = 0.15
    save_cams(tmp_path / "cams" / f"{NAME}.npy", maps, "irn")
    code = f"""
from step import cam_to_ir_label as step
step.imutils.crf_inference_label = lambda image, labels, n_labels: labels
args = types.SimpleNamespace(cam_out_dir=folder + "/cams", conf_fg_thres=0.3, conf_bg_thres=0.1, num_workers=2,
                             ir_label_out_dir=folder + "/out")
step._work(0, [[dict(name={NAME.replace("_", "")}, img=np.zeros((22, 37, 3), np.uint8))]], args)
print("null")
"""
    run("jiwoon-ahn+irn", code)
    ids = ids.copy()
    ids[18:20, :8] = 255
    with Image.open(tmp_path / "out" / f"{NAME}.png") as written:
        np.testing.assert_array_equal(np.asarray(written), ids)


def test_irn_dict_in_make_sem_seg_labels(run, truth, tmp_path):
    """With edges so strong that the random walk stays where it is: what is left is where the maps are put."""
    ids, maps = truth
    save_cams(tmp_path / "cams" / f"{NAME}.npy", maps, "irn")
    code = f"""
torch.Tensor.cuda = lambda self, *_, **__: self
torch.cuda.device_count, torch.cuda.device = (lambda: 2), (lambda _: nullcontext())
from step import make_sem_seg_labels as step
class Edges(torch.nn.Module):
    def cuda(self): return self
    def forward(self, image): return torch.full((1, 6, 10), 0.999), None
step.DataLoader = lambda packs, **_: packs
args = types.SimpleNamespace(cam_out_dir=folder + "/cams", sem_seg_out_dir=folder + "/out", beta=10, exp_times=8,
                             sem_seg_bg_thres=0.25, num_workers=2)
pack = dict(name=[{NAME.replace("_", "")}], size=(22, 37), img=[torch.zeros(2, 3, 22, 37)])
step._work(0, Edges(), [[pack]], args)
print("null")
"""
    run("jiwoon-ahn+irn", code)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(ids, 2, mode="edge"), (5, 5))
    inside = around.min((2, 3)) == around.max((2, 3))
    with Image.open(tmp_path / "out" / f"{NAME}.png") as written:
        np.testing.assert_array_equal(np.asarray(written)[inside], ids[inside])


@pytest.mark.parametrize("threshold", [0.3, 2])
def test_clip_es_dict_in_eval_cam(run, truth, tmp_path, threshold):
    save_cams(tmp_path / "cams" / f"{NAME}.npy", truth[1], "clip_es")
    code = f"""
import eval_cam
eval_cam.eval_list = ["{NAME}"]
args = types.SimpleNamespace(cam_type="attn_highres", cam_out_dir=folder + "/cams", cam_eval_thres={threshold},
                             gt_root=folder + "/SegmentationClassAug")
print(json.dumps(float(eval_cam.run_eval_cam(args))))
"""
    assert run("linyq2117+CLIP-ES", code) == 1
