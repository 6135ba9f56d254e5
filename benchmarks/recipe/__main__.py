"""20-class VOC 2012 with MCTformer+, without and with ACR: train, make class maps, score them. Not run on VOC yet.

    python -m benchmarks.recipe --voc VOCdevkit/VOC2012 --mctformer MCTformer --out runs/voc --dry-run
    python -m benchmarks.recipe --voc VOCdevkit/VOC2012 --mctformer MCTformer --out runs/voc --write

See docs/hosts/recipe_mctformer_plus.md. The host's checkout stays as it is; the lines that
acr_reg/integrations/mctformer.py lists are added to copies of it. Finished stages are not run again. ``--out`` holds
one set of settings.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from acr_reg.__main__ import main as acr_reg_command
from acr_reg.demo.record import write_json
from acr_reg.errors import some
from acr_reg.integrations import mctformer
from acr_reg.integrations.added_lines import add_lines, added_lines
from acr_reg.integrations.jobs.progress import show_progress
from benchmarks.recipe.results import STAGES, RecipeError, collect, table, write_page

HOST, COMMIT = "xulianuwa/MCTformer", "0acc27a"
DEIT = "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"
DEIT_SHA256 = "cd65a155"  # the first digits, as in the name
PACKAGES = ("torch", "torchvision", "timm", "numpy", "PIL", "sklearn", "cv2", "pandas")
ARMS = ("without", "with")


@dataclass(frozen=True)
class Settings:
    """The defaults are the host's own. ``lists``: the number of images of each voc12/NAME_id.txt."""

    input_size: int = 448
    batch_size: int = 32
    epochs: int = 45
    lr: float = 5e-4
    drop_path: float = 0.1
    scales: tuple[float, ...] = (1.0, 0.75, 1.25)
    finetune: str = DEIT
    device: str = "cuda"
    num_workers: int = 10
    lists: Mapping[str, int] = field(default_factory=lambda: {"train_aug": 10582, "train": 1464, "val": 1449})


@dataclass(frozen=True)
class Place:
    """The folders of data, host, results and masks."""

    voc: Path
    checkout: Path
    out: Path
    masks: str = "SegmentationClassAug"

    def source(self, arm: str) -> Path:
        return self.out / f"source-{arm}"

    def run(self, arm: str, seed: int) -> Path:
        return self.out / f"{arm}-seed{seed}"


# ---------------------------------------------------------------- before anything runs


def check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"The host imports {', '.join(missing)}, which is not installed. Run pip install torchvision timm "
            "scikit-learn opencv-python-headless pandas pillow."
        )


def check_device(settings: Settings) -> None:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("There is no CUDA device. Run this on a machine with a GPU, or with --dry-run.")


def check_checkout(place: Place) -> None:
    """Raise unless this is the host's own repository at the commit, with no file changed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(place.checkout), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RecipeError(
                f"{place.checkout} is no git checkout ({done.stderr.strip()}). Clone github.com/{HOST} there and run "
                f"git checkout {COMMIT}."
            )
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    if not head.startswith(COMMIT):
        raise RecipeError(f"{place.checkout} is at commit {head[:7]}. Run git checkout {COMMIT} there for MCTformer+.")
    changed = git("status", "--porcelain", "--untracked-files=no")
    if changed:
        raise RecipeError(
            f"Files in {place.checkout} differ from commit {COMMIT}: {some(changed.splitlines())}. The recipe changes "
            "copies only. Run git stash there, or clone again."
        )
    if not (place.checkout / "voc12" / "cls_labels.npy").is_file():
        raise RecipeError(f"{place.checkout} has no voc12/cls_labels.npy, the host's image labels. Clone all of it.")


def check_data(place: Place, settings: Settings) -> dict[str, list[str]]:
    """The host's lists, once every image and mask in them was found."""
    listed = {}
    for name, count in settings.lists.items():
        path = place.checkout / "voc12" / f"{name}_id.txt"
        if not path.is_file():
            raise RecipeError(f"The host's list {path} is missing. Clone all of the host.")
        listed[name] = path.read_text(encoding="utf-8").split()
        if len(listed[name]) != count:
            raise RecipeError(f"{path} lists {len(listed[name])} images, not {count}. Clone the host again.")
    images = sorted({each for ids in listed.values() for each in ids})
    for folder, ids, suffix in (("JPEGImages", images, ".jpg"), (place.masks, listed["train"], ".png")):
        missing = [each for each in ids if not (place.voc / folder / f"{each}{suffix}").is_file()]
        if missing:
            raise RecipeError(
                f"{place.voc / folder} has {len(ids) - len(missing)} of the {len(ids)} files in the host's lists; "
                f"{some(missing)} are missing. docs/hosts/recipe_mctformer_plus.md says how to get the data."
            )
    return listed


def place_weights(place: Place, weights: Path | None) -> None:
    """Put the file where torch.hub looks for the download, because the host loads these weights by address only."""
    if weights is None:
        return
    if not weights.is_file():
        raise RecipeError(f"--weights {weights} does not exist. Get DeiT-S from {DEIT}, or leave --weights out.")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if not digest.startswith(DEIT_SHA256):
        raise RecipeError(f"{weights} has sha256 {digest[:8]}, not {DEIT_SHA256}. Download it from {DEIT}.")
    target = hub(place) / "hub" / "checkpoints" / DEIT.rpartition("/")[2]
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, target)


def hub(place: Place) -> Path:
    return place.out / "torch_home"


def prepare(place: Place, listed: Mapping[str, Sequence[str]]) -> None:
    """Copy the host, add the lines that today's versions need and ACR's, and list the images to score."""
    today = added_lines(mctformer, HOST, COMMIT, today=True)
    for arm, lines in (("without", [today]), ("with", [today, added_lines(mctformer, HOST, COMMIT)])):
        folder = place.source(arm)
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(place.checkout, folder, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        add_lines(folder, *lines)
        for file in folder.glob("*.py"):
            compile(file.read_text(encoding="utf-8"), str(file), "exec")
    # The host makes maps of its train_aug list, seven times as many as are scored: here the list is shorter.
    lists = place.out / "lists"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "train_aug_id.txt").write_text("\n".join(listed["train"]), encoding="utf-8")
    (lists / "val_id.txt").write_text("\n".join(listed["val"]), encoding="utf-8")


# ---------------------------------------------------------------- the commands


def commands(place: Place, settings: Settings, arm: str, seed: int) -> dict[str, list[str]]:
    """The host's own commands, to be run in the copy of its checkout."""
    run = place.run(arm, seed)
    common = ["main.py", "--data-path", place.voc, "--input-size", settings.input_size, "--device", settings.device]
    common += ["--num_workers", settings.num_workers, "--seed", seed]
    train = [*common, "--output_dir", run, "--batch-size", settings.batch_size, "--epochs", settings.epochs]
    train += ["--lr", settings.lr, "--drop-path", settings.drop_path]
    train += ["--finetune", settings.finetune] if settings.finetune else []
    cams = [*common, "--data-set", "VOC12MS", "--img-list", place.out / "lists", "--gen_attention_maps"]
    cams += ["--resume", run / "checkpoint.pth", "--cam-npy-dir", run / "cams", "--attention-dir", run / "pictures"]
    cams += ["--output_dir", run, "--scales", *settings.scales]
    evaluate = ["evaluation.py", "--list", "voc12/train_id.txt", "--gt_dir", place.voc / place.masks]
    evaluate += ["--logfile", run / "evallog.txt", "--type", "npy", "--curve", "True"]
    evaluate += ["--predict_dir", run / "cams", "--comment", "train"]
    stages = {"train": train, "cams": cams, "evaluate": evaluate}
    return {name: [sys.executable, *map(str, command)] for name, command in stages.items()}


def run_stage(place: Place, settings: Settings, arm: str, seed: int, stage: str) -> None:
    """Run one command, unless it is done with the same settings and source by its record."""
    run = place.run(arm, seed)
    run.mkdir(parents=True, exist_ok=True)
    command = commands(place, settings, arm, seed)[stage]
    record_file = run / f"{stage}.json"
    identity = {"command": command, "source": fingerprint(place.source(arm))}
    if record_file.is_file():
        record = json.loads(record_file.read_text(encoding="utf-8"))
        if {name: record.get(name) for name in identity} != identity:
            raise RecipeError(
                f"{record_file} was made by another command, host or acr_reg. Choose another --out, or remove {run} to "
                "run it again."
            )
        print(f"{run.name}: {stage} is done", flush=True)
        return
    print(f"{run.name}: {stage}, log in {run / f'{stage}.log'}", flush=True)
    for later in STAGES[STAGES.index(stage) :]:  # they used the result that is now replaced
        (run / f"{later}.json").unlink(missing_ok=True)
    (run / "score.json").unlink(missing_ok=True)
    for leftover in ("cams", "pictures") if stage == "cams" else ():
        shutil.rmtree(run / leftover, ignore_errors=True)
    environment = {**os.environ, "TORCH_HOME": str(hub(place))} if hub(place).is_dir() else None
    begin = time.time()
    with open(run / f"{stage}.log", "w", encoding="utf-8") as log, show_progress() as progress:
        progress.begin(f"{run.name}: {stage}", None)
        done = subprocess.run(
            command, cwd=place.source(arm), env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        last = (run / f"{stage}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise RecipeError(
            f"{stage} of {run.name} ended with code {done.returncode}: {' | '.join(last)}. Read {run / f'{stage}.log'} "
            "and start again. Finished stages are kept."
        )
    write_json(record_file, {**identity, "seconds": round(time.time() - begin, 1)})


def fingerprint(folder: Path) -> str:
    """The sha256 of the host's Python files, with the added lines."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def score(place: Place, arm: str, seed: int) -> None:
    """Run ``python -m acr_reg evaluate`` on the train list. It is cheap, so it always runs."""
    run = place.run(arm, seed)
    arguments = ["evaluate", "--cams", run / "cams", "--masks", place.voc / place.masks]
    arguments += ["--list", place.source(arm) / "voc12" / "train_id.txt", "--classes", 21, "--json", run / "score.json"]
    if acr_reg_command(list(map(str, arguments))):
        raise RecipeError(f"The class maps in {run / 'cams'} could not be scored: see above. They should be PSA dicts.")


def run_all(place: Place, settings: Settings, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    for seed in seeds:  # both arms of a seed before the next seed, so that a part of the runs compares
        for arm in arms:
            for stage in STAGES:
                run_stage(place, settings, arm, seed, stage)
            score(place, arm, seed)
            results = collect(place.out, asdict(settings), f"{HOST} at {COMMIT}", place.masks)
    return results


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.recipe", description="MCTformer+ without and with ACR")
    add = parser.add_argument
    add("--voc", type=Path, required=True, metavar="DIR", help="VOCdevkit/VOC2012")
    add("--mctformer", type=Path, required=True, metavar="DIR", help=f"a clone of {HOST} at {COMMIT}")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of copies, runs and results.json")
    add("--masks", default=Place.masks, metavar="NAME", help="folder of masks in --voc (default: %(default)s)")
    add("--weights", type=Path, metavar="FILE", help="DeiT-S, if there is no network to download it")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    add("--arms", nargs="+", choices=ARMS, default=ARMS, help="(default: both)")
    add("--dry-run", action="store_true", help="check and copy everything and print the commands, but run none")
    add("--write", action="store_true", help="fill the table of docs/hosts/recipe_mctformer_plus.md")
    args = parser.parse_args(arguments)
    settings = settings or Settings()
    place = Place(args.voc.resolve(), args.mctformer.resolve(), args.out.resolve(), args.masks)
    try:
        check_packages()
        check_checkout(place)
        listed = check_data(place, settings)
        if not args.dry_run:
            check_device(settings)
        place_weights(place, args.weights)
        prepare(place, listed)
        if args.dry_run:
            for seed in args.seeds:
                for arm in args.arms:
                    for command in commands(place, settings, arm, seed).values():
                        print(f"cd {place.source(arm)} && {' '.join(command)}")
            return 0
        results = run_all(place, settings, args.arms, args.seeds)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(results))
    if args.write:
        write_page(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
