"""benchmarks/recipe/ on made-up images: with a small host of the same commands, and with MCTformer+ itself."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.marked_page import END, filled
from benchmarks.recipe import __main__ as recipe_voc
from benchmarks.recipe.__main__ import Settings
from benchmarks.recipe.results import BEGIN, RecipeError, check_schema, summary, table, write_page
from tests.support.hosts import checkout
from tests.support.paths import ROOT

IDS = [f"2007_{number:06d}" for number in range(8)]
LISTS = {"train_aug": IDS, "train": IDS[:4], "val": IDS[6:]}
COUNTS = {name: len(ids) for name, ids in LISTS.items()}

# A host of the same options, without a network: what it trains is what the last line of its engine says.
MAIN = """import argparse, pathlib, engine
parser = argparse.ArgumentParser()
for name in ("data-path", "input-size", "device", "num_workers", "seed", "output_dir", "batch-size", "epochs", "lr",
             "drop-path", "finetune", "data-set", "img-list", "resume", "cam-npy-dir", "attention-dir"):
    parser.add_argument("--" + name)
parser.add_argument("--scales", nargs="+")
parser.add_argument("--gen_attention_maps", action="store_true")
args = parser.parse_args()
out = pathlib.Path(args.output_dir)
if args.gen_attention_maps:
    engine.make_maps(args, float(pathlib.Path(args.resume).read_text()))
else:
    with open(out / "trained.txt", "a") as file:
        file.write("once ")
    (out / "checkpoint.pth").write_text(str(engine.quality()))
"""
ENGINE = """import pathlib
import numpy as np
from PIL import Image
quality = lambda: 0.6
def make_maps(args, quality):
    folder = pathlib.Path(args.cam_npy_dir)
    folder.mkdir()
    for name in (pathlib.Path(args.img_list) / "train_aug_id.txt").read_text().split():
        mask = np.array(Image.open(pathlib.Path(args.data_path) / "SegmentationClassAug" / (name + ".png")))
        right = np.arange(mask.shape[1]) < quality * mask.shape[1]
        number = int(mask[mask < 255].max())
        np.save(folder / (name + ".npy"), {number - 1: (mask == number) * right.astype(np.float32)})
"""
EVALUATION = """print("Best background score: 0.010\\tmIoU: 12.500%")
"""
FAMILY = """The small host.

    xulianuwa/MCTformer at {commit}
        engine.py, before line 5:
            quality = lambda: 0.9

    xulianuwa/MCTformer at {commit}, on today's torch and timm
        main.py, before line 2:
            import os
"""


def make_voc(folder):
    for name in ("JPEGImages", "SegmentationClassAug"):
        (folder / name).mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for number, name in enumerate(IDS):
        height, width = (75, 100) if number % 2 else (90, 64)
        pixels = numbers.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[10:40, 5:60] = 1 + number
        mask[0] = 255
        image = Image.fromarray(mask)
        image.putpalette(list(range(256)) * 3)
        image.save(folder / "SegmentationClassAug" / f"{name}.png")
    return folder


def write_lists(folder):
    folder.mkdir(exist_ok=True)
    for name, ids in LISTS.items():
        (folder / f"{name}_id.txt").write_text("\n".join(ids))
    labels = {f"{name}.jpg": np.eye(20, dtype=np.float32)[number] for number, name in enumerate(IDS)}
    np.save(folder / "cls_labels.npy", labels, allow_pickle=True)


def git(folder, *arguments):
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


class Recipe:
    """The command with a small host, in a folder of its own."""

    def __init__(self, folder, monkeypatch):
        self.voc = make_voc(folder / "voc")
        self.host = folder / "host"
        self.host.mkdir()
        for name, text in {"main.py": MAIN, "engine.py": ENGINE, "evaluation.py": EVALUATION}.items():
            (self.host / name).write_text(text)
        write_lists(self.host / "voc12")
        git(self.host, "init", "-q")
        git(self.host, "add", ".")
        git(self.host, "commit", "-qm", "host")
        self.out = folder / "out"
        commit = git(self.host, "rev-parse", "HEAD")[:7]
        family = types.ModuleType("family")
        family.__doc__ = FAMILY.format(commit=commit)
        monkeypatch.setattr(recipe_voc, "COMMIT", commit)
        monkeypatch.setattr(recipe_voc, "mctformer", family)
        monkeypatch.setattr(recipe_voc, "PACKAGES", ("numpy",))
        self.settings = Settings(device="cpu", lists=COUNTS)

    def __call__(self, *options, settings=None):
        paths = ("--voc", self.voc, "--mctformer", self.host, "--out", self.out)
        return recipe_voc.main(list(map(str, (*paths, *options))), settings or self.settings)

    @property
    def results(self):
        return json.loads((self.out / "results.json").read_text())


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    return Recipe(tmp_path, monkeypatch)


def test_both_arms_are_trained_scored_and_compared(recipe, capsys):
    assert recipe("--seeds", "0", "1") == 0
    results = recipe.results
    check_schema(results)
    by_run = {(run["arm"], run["seed"]): run for run in results["runs"]}
    assert sorted(by_run) == [("with", 0), ("with", 1), ("without", 0), ("without", 1)]
    for (_, seed), run in by_run.items():
        assert run["images"] == 4
        assert run["host_miou"] == 0.125
        assert run["commands"]["train"][-1] == recipe.settings.finetune
        assert run["commands"]["train"][run["commands"]["train"].index("--seed") + 1] == str(seed)
    assert by_run["with", 0]["best_miou"] > by_run["without", 0]["best_miou"]
    assert by_run["with", 0]["source"] != by_run["without", 0]["source"]
    difference = by_run["with", 0]["best_miou"] - by_run["without", 0]["best_miou"]
    assert results["summary"]["differences"]["0"] == pytest.approx(difference)
    assert table(results) in capsys.readouterr().out
    assert (recipe.host / "engine.py").read_text() == ENGINE


def test_score_is_that_of_the_evaluate_command(recipe):
    assert recipe("--seeds", "0", "--arms", "without") == 0
    (run,) = recipe.results["runs"]
    folder = recipe.out / "without-seed0"
    command = [sys.executable, "-m", "acr_reg", "evaluate", "--cams", folder / "cams"]
    command += ["--masks", recipe.voc / "SegmentationClassAug", "--list", recipe.host / "voc12" / "train_id.txt"]
    command += ["--classes", "21", "--json", recipe.out / "again.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
    again = json.loads((recipe.out / "again.json").read_text())
    assert run["best_miou"] == again["best_miou"]
    assert run["per_class_iou"] == again["per_class_iou"]


def test_what_is_done_is_not_run_again(recipe):
    assert recipe("--seeds", "0", "--arms", "without") == 0
    assert recipe("--seeds", "0") == 0
    for arm in ("without", "with"):
        assert (recipe.out / f"{arm}-seed0" / "trained.txt").read_text() == "once "
    (recipe.out / "with-seed0" / "cams.json").unlink()  # as after an interruption
    assert recipe("--seeds", "0") == 0
    assert (recipe.out / "with-seed0" / "trained.txt").read_text() == "once "
    assert len(list((recipe.out / "with-seed0" / "cams").iterdir())) == 4
    assert len(recipe.results["runs"]) == 2


def test_what_is_made_of_a_stage_is_made_anew_with_it(recipe):
    assert recipe("--seeds", "0", "--arms", "with") == 0
    run = recipe.out / "with-seed0"
    (run / "cams" / "of_earlier_training.npy").write_bytes(b"")
    (run / "train.json").unlink()
    assert recipe("--seeds", "0", "--arms", "with") == 0
    assert (run / "trained.txt").read_text() == "once once "
    assert not (run / "cams" / "of_earlier_training.npy").exists()


def test_runs_of_other_settings_are_refused(recipe, capsys):
    assert recipe("--seeds", "0", "--arms", "without") == 0
    assert recipe("--seeds", "0", settings=Settings(device="cpu", lists=COUNTS, epochs=3)) == 1
    error = capsys.readouterr().err
    assert str(recipe.out / "without-seed0" / "train.json") in error and "another --out" in error


def test_a_stage_that_fails_is_named_and_started_again(recipe, capsys):
    text = recipe.host / "main.py"
    text.write_text("import sys\nsys.exit('no room left')\n")
    git(recipe.host, "commit", "-qam", "failing")
    recipe_voc.COMMIT = git(recipe.host, "rev-parse", "HEAD")[:7]
    recipe_voc.mctformer.__doc__ = FAMILY.format(commit=recipe_voc.COMMIT)
    assert recipe("--seeds", "0") == 1
    error = capsys.readouterr().err
    assert "train of without-seed0 ended with code 1: no room left" in error
    assert not (recipe.out / "without-seed0" / "train.json").exists()


def test_dry_run_prints_the_commands_and_runs_none(recipe, capsys, monkeypatch):
    monkeypatch.setattr(recipe_voc.torch.cuda, "is_available", lambda: False)
    assert recipe("--dry-run", settings=Settings(lists=COUNTS)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 2 * 3
    assert all(line.startswith(f"cd {recipe.out}/source-with") for line in lines)
    assert "--batch-size 32 --epochs 45 --lr 0.0005 --drop-path 0.1" in lines[0]
    assert sorted(each.name for each in recipe.out.iterdir()) == ["lists", "source-with", "source-without"]
    assert "0.9" in (recipe.out / "source-with" / "engine.py").read_text()
    assert "0.9" not in (recipe.out / "source-without" / "engine.py").read_text()
    assert "import os" in (recipe.out / "source-without" / "main.py").read_text()
    assert recipe(settings=Settings(lists=COUNTS)) == 1
    error = capsys.readouterr().err
    assert "no CUDA device" in error and "--dry-run" in error


def other_commit(recipe):
    recipe_voc.COMMIT = "9999999"


def changed_file(recipe):
    (recipe.host / "main.py").write_text("")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_commit, r"at commit (?!9999999)\w{7}\. Run git checkout 9999999"),
        (changed_file, r"differ from commit \w{7}: M main\.py\. .*git stash"),
        (
            lambda r: (r.host / ".git").rename(r.host / "git"),
            r"host is no git checkout .*Clone github.com/xulianuwa/MCTformer",
        ),
        (
            lambda r: (r.voc / "JPEGImages" / f"{IDS[5]}.jpg").unlink(),
            f"JPEGImages has 7 of the 8 files.* {IDS[5]} are missing",
        ),
        (
            lambda r: (r.voc / "SegmentationClassAug" / f"{IDS[0]}.png").unlink(),
            f"ClassAug has 3 of the 4 files.* {IDS[0]} are missing",
        ),
        (
            lambda r: setattr(r, "settings", Settings(lists={**COUNTS, "train": 1464})),
            r"train_id\.txt lists 4 images, not 1464",
        ),
        (lambda r: setattr(recipe_voc, "PACKAGES", ("no_such",)), "no_such, which is not installed.* pip install"),
    ],
)
def test_what_is_missing_is_named_before_anything_runs(recipe, capsys, damage, message):
    damage(recipe)
    assert recipe() == 1
    assert re.search(message, capsys.readouterr().err)
    assert not recipe.out.exists()


def test_weights_are_checked_and_put_where_the_host_looks(recipe, capsys, tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"not DeiT")
    assert recipe("--dry-run", "--weights", file) == 1
    assert "not cd65a155. Download it from https://" in capsys.readouterr().err
    assert recipe("--dry-run", "--weights", tmp_path / "none.pth") == 1
    assert f"--weights {tmp_path / 'none.pth'} does not exist" in capsys.readouterr().err
    monkeypatch.setattr(recipe_voc, "DEIT_SHA256", "")
    assert recipe("--dry-run", "--weights", file) == 0
    placed = recipe.out / "torch_home" / "hub" / "checkpoints" / "deit_small_patch16_224-cd65a155.pth"
    assert placed.read_bytes() == b"not DeiT"


def test_schema_refuses_what_is_missing_or_of_another_type(recipe):
    assert recipe("--seeds", "0", "--arms", "with") == 0
    results = recipe.results
    assert "differences" not in results["summary"]
    assert results["summary"]["with"]["standard_deviation"] is None
    with pytest.raises(RecipeError, match=r"\['masks'\] of results"):
        check_schema({name: value for name, value in results.items() if name != "masks"})
    results["runs"][0]["best_miou"] = "67"
    with pytest.raises(RecipeError, match=r"\['best_miou'\] of run 0"):
        check_schema(results)


def test_table_of_the_page_is_filled(tmp_path):
    scores = {("without", 0): 0.6, ("without", 1): 0.62, ("with", 0): 0.63}
    runs = [
        {"arm": arm, "seed": seed, "best_miou": score, "best_threshold": 0.4, "host_miou": score}
        for (arm, seed), score in scores.items()
    ]
    versions = {"torch": "2", "timm": "1"}
    results = {"runs": runs, "summary": summary(runs), "device": "X", "versions": versions, "masks": "M"}
    page = tmp_path / "page.md"
    page.write_text(f"Words.\n\n{BEGIN}\n\nUnmeasured.\n\n{END}\nMore words.\n")
    for _ in range(2):
        write_page(results, page)
    text = page.read_text()
    assert text.startswith("Words.\n") and text.endswith("\nMore words.\n")
    assert text.count(BEGIN) == 1
    assert "Unmeasured" not in text
    assert "| without ACR | mean of 2 | 61.00 ± 1.41 | | |" in text
    assert results["summary"]["differences"] == {"0": pytest.approx(0.03)}


def test_the_page_says_that_nothing_is_measured():
    page = (ROOT / "docs" / "hosts" / "recipe_mctformer_plus.md").read_text(encoding="utf-8")
    assert filled(page, BEGIN, "Unmeasured.\n\n" + table({"runs": [], "summary": {}})) == page


# ---------------------------------------------------------------- MCTformer+ itself

# In place of CUDA, OpenCV (pictures) and pandas (one list), where they are not installed.
STUBS = {
    "sitecustomize.py": "import torch\ntorch.Tensor.cuda = lambda self, *_, **__: self\n"
    "torch.cuda.synchronize = lambda *_: None\ntorch.set_num_threads(1)\n",
    "cv2.py": "import numpy as np\nCOLORMAP_JET = 2\napplyColorMap = lambda image, kind: np.stack([image] * 3, -1)\n"
    "imwrite = lambda *_: True\n",
    "pandas.py": "import types\nimport numpy as np\nclass DataFrame: pass\nSeries = DataFrame\n"
    "read_csv = lambda path, names: {names[0]: types.SimpleNamespace(values=np.array(open(path).read().split()))}\n",
}


def test_host_itself_runs_through(tmp_path, monkeypatch):
    """One epoch of two steps at 64 px without weights, on the CPU; then maps and both scores."""
    folder = checkout("xulianuwa/MCTformer", "0acc27a")
    recipe_voc.check_checkout(recipe_voc.Place(Path(), folder, Path()))
    host = tmp_path / "host"
    subprocess.run(["cp", "-r", str(folder), str(host)], check=True)
    write_lists(host / "voc12")
    for name, text in STUBS.items():
        (tmp_path / "stubs").mkdir(exist_ok=True)
        (tmp_path / "stubs" / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stubs'}:{ROOT}")
    monkeypatch.setattr(recipe_voc, "check_checkout", lambda place: None)
    monkeypatch.setattr(recipe_voc, "check_packages", lambda: None)
    settings = Settings(64, 4, 1, scales=(1.0, 0.75), finetune="", device="cpu", num_workers=0, lists=COUNTS)
    out = tmp_path / "out"
    arguments = ["--voc", make_voc(tmp_path / "voc"), "--mctformer", host, "--out", out, "--seeds", "0"]
    assert recipe_voc.main(list(map(str, arguments)), settings) == 0
    results = json.loads((out / "results.json").read_text())
    check_schema(results)
    for run in results["runs"]:
        sweep = dict(zip(run["thresholds"], run["miou"], strict=True))
        # The host counts the 16 classes that are nowhere as 0, and stops where it first gets worse.
        assert run["host_miou"] == pytest.approx(sweep[run["host_threshold"]] * 5 / 21, abs=1e-4)
        assert run["host_miou"] <= run["best_miou"]
    logs = {arm: (out / f"{arm}-seed0" / "train.log").read_text() for arm in recipe_voc.ARMS}
    assert all("Training time" in log for log in logs.values())
    assert results["runs"][0]["best_miou"] > 0
