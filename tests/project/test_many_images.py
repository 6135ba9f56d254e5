"""docs/guides/many_images.md: its script and its commands run, in one process, in several, and as a SLURM array."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.distributed.run import parse_args

from acr_reg.__main__ import main
from acr_reg.integrations.formats import load_cams
from acr_reg.integrations.formats.masks import save_mask
from tests.project.test_snippets import blocks_of
from tests.support.paths import ROOT
from tests.support.processes import Program, free_port, programs

PAGE = (ROOT / "docs" / "guides" / "many_images.md").read_text(encoding="utf-8")
SHELL = [block.replace("\\\n", "") for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)]
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NAMES = [f"2007_{number:06}" for number in range(7)]
# So that a core makes a map in no time. All else in the script stays as it is shown.
SMALL = {
    '"vit_small_patch16_224"': '"vit_tiny_patch16_224"',
    ", 20, 448": ", 20, 32",
    "BATCH, WORKERS = 8, 4": "BATCH, WORKERS = 2, 1",
}


class Said(NamedTuple):
    out: str
    err: str


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The folder in which the page's reader works."""
    folder = tmp_path_factory.mktemp("many_images")
    (source,) = [block.source for block in blocks_of(PAGE) if block.language == "python"]
    for shown, small in SMALL.items():
        assert source.count(shown) == 1
        source = source.replace(shown, small)
    (folder / "make_cams.py").write_text(source)
    voc, random = folder / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (voc / part).mkdir(parents=True)
    labels = {}
    for number, name in enumerate(NAMES):
        size = (20 + number, 30)
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(voc / "JPEGImages" / f"{name}.jpg")
        labels[name] = np.eye(20, dtype=np.float32)[[number, 19]].sum(0)
        save_mask(voc / "SegmentationClassAug" / f"{name}.png", random.choice([0, number + 1, 20], size))
    np.save(folder / "cls_labels.npy", labels)
    for file in (voc / "ImageSets/Segmentation/train_aug.txt", folder / "train.txt"):
        file.write_text("\n".join(NAMES))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=20, img_size=32)
    torch.save(model.state_dict(), folder / "vit_small_voc.pt")
    return folder


@pytest.fixture
def alone(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a line of the page in this process: loading torch in another one would take most of the time."""
    monkeypatch.chdir(project)

    def start(command: str, **variables: str) -> Said:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        python, *arguments = shlex.split(command)
        assert python == "python"
        if arguments[:2] == ["-m", "acr_reg"]:
            assert main(arguments[2:]) == 0
        else:
            runpy.run_path(arguments[0], run_name="__main__")
        return Said(*capsys.readouterr())

    return start


def run(shell: str, **variables: str) -> str:
    """What lines of the page print in a shell."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = ["bash", "-ec", shell]
    return subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, check=True).stdout


def torchrun(arguments: list[str], folder: Path) -> Program:
    outside = dict.fromkeys(VARIABLES)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **outside}
    return Program("-m", "torch.distributed.run", *arguments, cwd=folder, **environment)


def ended(process: Program) -> Said:
    said = Said(*process.communicate(timeout=300))
    assert process.returncode == 0, said.err
    return said


def shown(start: str) -> str:
    """The page's command that begins so."""
    (line,) = [line for block in SHELL for line in block.splitlines() if line.startswith(start)]
    return line


def fresh(project: Path) -> None:
    for file in (project / "cams").glob("*"):
        file.unlink()


def written(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "cams").iterdir())


EVERY = [f"{name}.npy" for name in NAMES]


def test_one_process_and_several_make_the_same_maps(project: Path, alone: Callable[..., Said]) -> None:
    fresh(project)
    said = alone("python make_cams.py").err
    assert "cams: 7 written, 0 already there, 0 failed" in said
    by_one = {name: load_cams(project / "cams" / f"{name}.npy") for name in NAMES}
    assert [maps[19].shape for maps in by_one.values()] == [(20 + number, 30) for number in range(7)]
    fresh(project)
    _, *arguments = shlex.split(shown("torchrun --nproc-per-node 8 make_cams.py"))
    started = parse_args(arguments)
    assert (started.nproc_per_node, started.training_script) == ("8", "make_cams.py")
    both = programs(2, started.training_script, cwd=project)
    said = "".join([ended(process).err for process in both])
    assert said.count("cams: 7 written, 0 already there, 0 failed") == 1
    assert written(project) == EVERY
    for name, maps in by_one.items():
        again = load_cams(project / "cams" / f"{name}.npy")
        # Normalising maps that random weights leave nearly flat enlarges the rounding of another batch.
        assert all(np.allclose(again[number], values, atol=1e-3) for number, values in maps.items())
    assert "cams: 0 written, 7 already there, 0 failed" in alone("python make_cams.py").err


def test_tasks_of_an_array_make_their_shares_and_a_last_job_the_rest(project: Path, alone: Callable[..., Said]) -> None:
    fresh(project)
    (script,) = [block for block in SHELL if "--array" in block]
    shell = 'python() { test "$*" = make_cams.py && env; }\n'  # prints the variables that the script would see
    variables = {"SLURM_ARRAY_TASK_COUNT": "3", "MASTER_ADDR": "left by a module of the cluster"}
    for task, count in (("0", 3), ("2", 2)):  # task 1 was lost
        printed = run(shell + script, SLURM_ARRAY_TASK_ID=task, **variables)
        seen = dict(re.findall(rf"^({'|'.join(VARIABLES)})=(.*)$", printed, re.M))
        assert seen == {"RANK": task, "WORLD_SIZE": "3"}
        said = alone("python make_cams.py", **seen).err
        assert f"cams: share {int(task) + 1} of 3: {count} written, 0 already there, 0 failed" in said
    assert len(written(project)) == 5
    assert '--wrap "python make_cams.py"' in shown("sbatch --dependency")
    said = alone("python make_cams.py").err
    assert "cams: 2 written, 5 already there, 0 failed" in said
    assert written(project) == EVERY


def test_one_torchrun_a_machine_numbers_the_processes_of_all_machines(tmp_path: Path) -> None:
    """Two of them on this machine stand for two machines. The test above runs the script with such numbers."""
    (script,) = [block for block in SHELL if "srun" in block]
    names = [*VARIABLES[:3], "LOCAL_RANK"]
    (tmp_path / "make_cams.py").write_text(f"import os\nprint(*[os.environ[name] for name in {names}], flush=True)\n")
    slurm = """
    scontrol() { echo localhost; }
    srun() { "$@"; }
    torchrun() { printf "%s\\n" "$@"; }
    """
    small = script.replace("--nproc-per-node 8", "--nproc-per-node 1").replace(":29500", f":{free_port()}")
    variables = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b"}
    arguments = run(slurm + small, **variables).splitlines()
    machines = [torchrun(arguments, tmp_path) for _ in range(2)]
    seen = [ended(machine).out.split() for machine in machines]
    assert sorted((rank, world, local) for rank, world, _, local in seen) == [("0", "2", "0"), ("1", "2", "0")]
    assert len({address for _, _, address, _ in seen}) == 1


def test_a_damaged_photo_is_told_as_shown(project: Path, alone: Callable[..., Said]) -> None:
    fresh(project)
    photo = project / "VOCdevkit/VOC2012/JPEGImages" / f"{NAMES[3]}.jpg"
    whole = photo.read_bytes()
    photo.write_bytes(whole[:500])
    said = alone("python make_cams.py").err
    photo.write_bytes(whole)
    lines = re.findall(r"^(.*(?:skipped: |  2007_000032: |1 failed).*)$", PAGE, re.M)
    assert len(lines) == 3
    for line in lines:
        told = line.replace("2007_000032", NAMES[3]).replace("10581", "6").removesuffix("...")
        assert told in said


def test_scores_and_pseudo_labels_are_made_as_shown(project: Path, alone: Callable[..., Said]) -> None:
    fresh(project)
    alone("python make_cams.py")
    table = alone(shown("python -m acr_reg evaluate --cams")).out
    assert "aeroplane" in table
    shared = shown("torchrun --nproc-per-node 8 -m acr_reg evaluate")  # tests/commands/test_evaluate.py starts torchrun
    assert alone(shared.replace("torchrun --nproc-per-node 8", "python")).out == table
    miou = re.search(r"mIoU +([\d.]+)", table)[1]  # type: ignore[index]
    assert f"(mIoU {miou})" in alone(shown("python -m acr_reg convert cams labels --to")).err
    assert f"{miou} over" in alone(shown("python -m acr_reg evaluate --labels")).out
    for folder in ("labels_band", "labels_alphas"):
        alone(shown(f"python -m acr_reg convert cams {folder} "))
        ids = {int(i) for name in NAMES for i in np.unique(Image.open(project / folder / f"{name}.png"))}
        assert 255 in ids and len(ids) > 2


def test_each_command_of_the_page_is_run_here() -> None:
    commands = [line for block in SHELL if "#SBATCH" not in block for line in block.splitlines()]
    assert len(commands) == 9, "a command came to the page: run it in a test of this file"
