"""`import acr_reg` stays light, and imports inside the package go down only."""

import ast
import json
import os
import statistics
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "acr_reg"
CORE_DEPENDENCIES = {"torch", "einops", "numpy"}

# The floors of the house, from the bottom up: a room is a folder or a file of acr_reg/. A room imports itself and rooms
# on lower floors. "" is acr_reg itself, the face: what stands above it imports public names from there.
FLOORS = [
    {"_versions", "_torch_private", "_tensors", "errors", "metrics"},
    {"tokens", "processes", "random_numbers"},
    {"attention"},
    {"views"},
    {"alignment", "placement"},
    {"capture"},
    {"cam"},
    {"losses"},
    {"inspection"},
    {""},
    {"integrations"},
    {"pictures"},
    {"demo"},
    {"commands"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OUTSIDE_THE_CORE = {"integrations", "pictures", "commands", "demo", "__main__"}  # these alone may import other packages


# ---------------------------------------------------------------- what importing costs


def in_fresh_process(code: str) -> str:
    """Standard output of `code`, run with the compiled bytecode that an installed package has."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_loads_only_the_three_dependencies():
    code = (
        "import json, sys; import torch, numpy, einops; before = list(sys.modules); import acr_reg\n"
        "print(json.dumps([before, list(sys.modules)]))"
    )
    before, loaded = map(set, json.loads(in_fresh_process(code)))
    third_party = {name.partition(".")[0] for name in loaded - before} - set(sys.stdlib_module_names)
    assert third_party <= CORE_DEPENDENCIES | {"acr_reg"}, f"import acr_reg also loads {sorted(third_party)}"
    outside = loaded & {f"acr_reg.{room}" for room in OUTSIDE_THE_CORE}
    assert not outside, f"import acr_reg also loads {sorted(outside)}"


def test_importing_takes_no_more_than_torch_and_a_tenth():
    """Processor time of torch and of all the rest, in one process each time: both feel the same load of the machine.
    Without garbage collection: whose import a full pass over torch's objects falls into is chance (0.05 s of it)."""
    code = (
        "import gc; gc.disable()\n"
        "from time import process_time as now\n"
        "start = now(); import torch; between = now(); import acr_reg; end = now()\n"
        "print(between - start, end - between)"
    )
    # The first one may compile, and bring the files into memory: it is one of three, of which the median counts.
    runs = [tuple(float(seconds) for seconds in in_fresh_process(code).split()) for _ in range(3)]
    ratio = statistics.median(rest / torch for torch, rest in runs)
    assert ratio <= 0.1, f"after torch, the rest of `import acr_reg` takes {ratio:.3f} of torch's own time: {runs}"


# ---------------------------------------------------------------- which way imports go


def imports_of(file: Path) -> tuple[set[str], set[str]]:
    """What a file imports, anywhere in it: (modules of acr_reg, by their whole name; other top-level packages)."""
    own = file.relative_to(PACKAGE).parts[:-1]
    inside: set[str] = set()
    packages: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = str(node.module or "")
            if node.level:
                base = ".".join(("acr_reg", *own[: len(own) + 1 - node.level], *filter(None, [base])))
            modules = [name if is_module(name := f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        for module in modules:
            (inside if module.partition(".")[0] == "acr_reg" else packages).add(module)
    return inside, {package.partition(".")[0] for package in packages}


def is_module(name: str) -> bool:
    package, *parts = name.split(".")
    path = PACKAGE.joinpath(*parts)
    return package == "acr_reg" and bool(parts) and (path.with_suffix(".py").exists() or path.is_dir())


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("acr_reg", *parts)).removesuffix(".__init__")


def room_of(module: str) -> str:
    """ "" for acr_reg itself."""
    return module.partition(".")[2].partition(".")[0]


# rglob follows the symlink to integrations/ or not, by the version of Python.
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "integrations").rglob("*.py")})
IMPORTS = {module_of(file): imports_of(file) for file in FILES}


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_imports_go_down_only(module):
    room = room_of(module)
    assert room in FLOOR, f"{module} stands in no room of this list: put it into one, or add its floor"
    for other in IMPORTS[module][0]:
        below = room_of(other)
        assert below == room or FLOOR[below] < FLOOR[room], f"{module} imports {other}, which is not below it"


def test_no_import_leads_back_to_where_it_came_from():
    graph = {module: imported - {module} for module, (imported, _) in IMPORTS.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises where there is a cycle
    assert set(order) >= set(graph)


@pytest.mark.parametrize("module", [module for module in sorted(IMPORTS) if room_of(module) not in OUTSIDE_THE_CORE])
def test_the_core_imports_the_three_dependencies_only(module):
    beyond = IMPORTS[module][1] - CORE_DEPENDENCIES - set(sys.stdlib_module_names)
    assert not beyond, f"{module} imports {sorted(beyond)}: what needs them belongs in demo/ or commands/"


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    """The tests above stand on it: a form that it overlooked would let anything through."""
    for name in ("tokens.py", "views/view.py", "losses/grid.py", "capture.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "losses" / "terms.py").write_text(
        "import numpy.linalg\nfrom torch.nn import functional\nimport acr_reg.tokens\n"
        "from acr_reg.views.view import View\nfrom acr_reg import capture, AttentionMaps\n"
        "def late():\n    from . import grid\n    from .absent import x\n    from ..views import view\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    names = ("tokens", "views.view", "capture", "losses.grid", "losses.absent")
    assert imports_of(tmp_path / "losses" / "terms.py") == (
        {"acr_reg", *(f"acr_reg.{name}" for name in names)},
        {"numpy", "torch"},
    )
