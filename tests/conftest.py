"""Test-wide settings: tests that build the package go last, and the core's tests can run without the extras."""

import gc
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = (
    *("PIL", "matplotlib", "rich", "scipy", "skimage", "sklearn", "timm", "torchvision", "transformers"),
    *("accelerate", "pytorch_lightning", "tensorboard"),
)
# Parts of the package that may import extras themselves.
NEED_EXTRAS = re.compile(r"acr_reg\.(?:pictures|demo|commands|__main__|integrations\.(?:cam_folder|scoring))\b")
IMPORT = re.compile(r"^(?:from ([\w.]+) import ([\w, ]+|\()|import ([\w.]+))", re.MULTILINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A broken function is then reported in seconds. The sort is stable: the rest keeps its order."""
    items.sort(key=lambda item: item.get_closest_marker("packaging") is not None)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no pass over the garbage need look at it."""
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """.ci/lowest sets the variable; everywhere else a missing extra is a failure."""
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests of Ctrl-C would hang
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("ACR_REG_CORE_ONLY") == "1":
        config.pluginmanager.register(CoreOnly())


class CoreOnly:
    """Leaves out files that import an extra, and skips tests that turn out to need one that is not installed."""

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        if collection_path.suffix != ".py" or not imports_an_extra(collection_path):
            return None
        print(f"{collection_path.relative_to(ROOT)}: left out, it imports an extra")
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        return (yield from skipping_where_an_extra_is_missing())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        return (yield from skipping_where_an_extra_is_missing())


def imports_an_extra(file: Path, seen: frozenset[Path] = frozenset()) -> bool:
    """Whether the file, or one of tests/ or benchmarks/ that it imports, imports an extra at its top level."""
    for package, names, module in IMPORT.findall(file.read_text(encoding="utf-8")):
        imported = package or module
        if imported.partition(".")[0] in EXTRAS or NEED_EXTRAS.match(imported):
            return True
        if imported.partition(".")[0] not in ("tests", "benchmarks"):
            continue
        parts = [imported, *(f"{imported}.{name.strip()}" for name in names.strip("(").split(",") if name.strip())]
        for part in (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in parts):
            if part.exists() and part not in seen and imports_an_extra(part, seen | {file}):
                return True
    return False


def skipping_where_an_extra_is_missing() -> Iterator[None]:
    try:
        return (yield)
    except Exception as error:
        missing = next((e for e in (error, error.__cause__) if isinstance(e, ModuleNotFoundError)), None)
        if missing is not None and str(missing.name).partition(".")[0] in EXTRAS:
            pytest.skip(f"needs {missing.name}, and only the core is installed")
        raise


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The models are small: more threads than one only wait for each other."""
    torch.set_num_threads(1)
