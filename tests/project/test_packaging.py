"""The wheel and the sdist hold the whole package and nothing else, and work where nothing else of it is."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import acr_reg
from tests.support.paths import ROOT

pytestmark = pytest.mark.packaging

SOURCES = ("acr_reg", "integrations")
BUILT_FROM = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command; its whole output where it fails."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files as a fresh clone has them, symlink included: building in the real tree would leave its output there."""
    folder = tmp_path_factory.mktemp("checkout") / "acr_reg"
    folder.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(source: Path, kind: str) -> Path:
    """Builds with the environment's own setuptools, hence without a network."""
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", source, cwd=source.parent)
    (built,) = (source / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sdist(checkout):
    return build(checkout, "sdist")


@pytest.fixture(scope="module")
def wheel(checkout):
    return build(checkout, "wheel")


@pytest.fixture(scope="module")
def unpacked_sdist(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def wheel_from_sdist(unpacked_sdist):
    return build(unpacked_sdist, "wheel")


def shipped(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def expected() -> set[str]:
    package = {path.relative_to(ROOT) for path in (ROOT / "acr_reg").rglob("*.py")}
    integrations = {Path("acr_reg") / path.relative_to(ROOT) for path in (ROOT / "integrations").rglob("*.py")}
    return {path.as_posix() for path in package | integrations} | {"acr_reg/py.typed"}


def test_a_wheel_holds_every_python_file_and_nothing_else(wheel):
    files = shipped(wheel)
    assert files.keys() == expected()
    for folder in ("acr_reg/", "acr_reg/demo/", "acr_reg/integrations/"):  # the set above could be empty of them
        assert f"{folder}__init__.py" in files


def test_the_wheel_of_the_sdist_is_the_same(wheel, wheel_from_sdist):
    assert shipped(wheel_from_sdist) == shipped(wheel)


def test_the_sdist_holds_the_sources_and_what_describes_them(unpacked_sdist):
    files = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    originals = {path.relative_to(ROOT).as_posix() for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    assert originals | set(BUILT_FROM) | {"acr_reg/py.typed"} <= files
    assert not [name for name in files if "__pycache__" in name]


def test_twine_accepts_both(sdist, wheel):
    report = run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=sdist.parent)
    assert report.count("PASSED") == 2, report


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == acr_reg.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in needed) == ["einops", "numpy", "torch"]
    assert {"demo", "test", "benchmarks", "dev", "docs"} <= set(metadata.get_all("Provides-Extra"))


def test_the_constraints_pin_all_that_the_extras_name(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    named = {re.match(r"[\w-]+", line)[0].lower() for line in metadata.get_all("Requires-Dist")} - {"acr-reg"}
    pins = [line for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    assert not [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert named <= {pin.partition("==")[0].lower() for pin in pins}


# What a user does first, from a folder that holds nothing else; it prints where each part was found, and the commands.
USE = """
import acr_reg, acr_reg.demo, acr_reg.integrations
from acr_reg import AllPairsConsistencyLoss
print(acr_reg.__file__, acr_reg.demo.__file__, acr_reg.integrations.__file__, sep="\\n")
import runpy, sys
sys.argv = ["acr_reg", "--help"]
runpy.run_module("acr_reg", run_name="__main__")
"""


def test_an_installed_wheel_works_from_anywhere(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    said = run(sys.executable, "-W", "error", "-c", USE, cwd=elsewhere, PYTHONPATH=str(target))
    assert [Path(place).relative_to(target).parent.as_posix() for place in said.splitlines()[:3]] == [
        "acr_reg",
        "acr_reg/demo",
        "acr_reg/integrations",
    ]
    assert "evaluate" in said


def test_a_clone_works_without_installing(checkout):
    """-S keeps out what .pth files add, such as an editable install of this tree; PYTHONPATH brings torch back."""
    libraries = os.pathsep.join(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    use = run(sys.executable, "-S", "-W", "error", "-c", USE, cwd=checkout, PYTHONPATH=libraries)
    assert all(Path(place).is_relative_to(checkout) for place in use.splitlines()[:3]), use
