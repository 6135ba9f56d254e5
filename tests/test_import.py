"""`import acr_reg` stays light, and imports inside the package run one way."""

import ast
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "acr_reg"
CORE_DEPENDENCIES = {"torch", "einops", "numpy"}

# The rooms, from the bottom up. A room imports rooms on lower levels only. Files named _x are private helpers: anyone
# may import them, and what they import counts as imported by whoever imports them.
LEVELS = [
    {"tokens"},
    {"attention"},
    {"capture", "views"},
    {"samplers", "alignment"},
    {"functional"},
    {"blockwise"},
    {"losses"},
    {"cam"},
    {"gradient_cam"},
    {"metrics"},
    {"check"},
    {"integrations"},
    {"demo"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
OUTSIDE_THE_CORE = {"integrations", "demo", "__main__"}  # only these may import more than the three dependencies
USERS_OF_PUBLIC_NAMES = OUTSIDE_THE_CORE | {"check"}  # `from acr_reg import ...`; the rooms below import from rooms


# ---------------------------------------------------------------- what importing costs


def in_fresh_process(code: str) -> str:
    """Standard output of `code`, run with the compiled bytecode that an installed package has."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def modules_after(statement: str) -> set[str]:
    return set(json.loads(in_fresh_process(f"{statement}; import sys, json; print(json.dumps(list(sys.modules)))")))


def test_importing_loads_only_the_three_dependencies():
    loaded = modules_after("import acr_reg")
    extra = loaded - modules_after("import torch, numpy, einops")
    third_party = {name.partition(".")[0] for name in extra} - set(sys.stdlib_module_names)
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
    in_fresh_process(code)  # compiles, and brings the files into memory
    runs = [tuple(float(seconds) for seconds in in_fresh_process(code).split()) for _ in range(5)]
    ratio = statistics.median(rest / torch for torch, rest in runs)
    assert ratio <= 0.1, f"after torch, the rest of `import acr_reg` takes {ratio:.3f} of torch's own time: {runs}"


# ---------------------------------------------------------------- which way imports run


def imports_of(file: Path) -> tuple[set[str], set[str]]:
    """Names that the file imports, anywhere in it: (rooms of acr_reg; top-level packages). "" is acr_reg itself."""
    depth = len(file.relative_to(PACKAGE).parts) - 1  # dots beyond this many leave the file's own folder
    rooms: set[str] = set()
    packages: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            own = node.module == "acr_reg"
            modules = [f"acr_reg.{alias.name}" if own else str(node.module) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            modules = [f"acr_reg.{node.module or alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            package, _, inside = module.partition(".")
            if package != "acr_reg":
                packages.add(package)
            else:
                room = inside.partition(".")[0]
                is_file = (PACKAGE / f"{room}.py").exists() or (PACKAGE / room).is_dir()
                rooms.add(room if room and is_file else "")
    return rooms, packages


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_helper(room: str) -> bool:
    return room.startswith("_") and room != "__main__"


# rglob follows the symlink to integrations/ or not, by the version of Python.
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "integrations").glob("*.py")} - {PACKAGE / "__init__.py"})
IMPORTS = {file: imports_of(file) for file in FILES}
HELPERS = {room_of(file): rooms for file, (rooms, _) in IMPORTS.items() if is_helper(room_of(file))}


def reached(rooms: set[str]) -> set[str]:
    """The rooms and helpers, and all that the helpers import, to the end."""
    seen: set[str] = set()
    waiting = set(rooms)
    while waiting:
        room = waiting.pop()
        seen.add(room)
        waiting |= HELPERS.get(room, set()) - seen
    return seen


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file):
    room = room_of(file)
    below = reached(IMPORTS[file][0])
    if is_helper(room):
        assert room not in below, f"{room} imports itself, through other helpers"
        return
    assert room in LEVEL, f"acr_reg/{room} is not among the rooms: add it to LEVELS, or name it _{room} if private"
    for other in below - {room}:
        if other == "":
            assert room in USERS_OF_PUBLIC_NAMES, f"{name_of(file)} imports acr_reg itself: import from the room"
        elif not is_helper(other):
            assert LEVEL[other] < LEVEL[room], f"{name_of(file)} imports {other}, which is not below {room}"


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) not in OUTSIDE_THE_CORE], ids=name_of)
def test_the_core_imports_the_three_dependencies_only(file):
    beyond = IMPORTS[file][1] - CORE_DEPENDENCIES - set(sys.stdlib_module_names)
    assert not beyond, f"{name_of(file)} imports {sorted(beyond)}: heavy imports belong in acr_reg/demo"


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    """The tests above stand on it: a form that it overlooked would let anything through."""
    for name in ("tokens", "views", "capture", "_grid"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "losses.py").write_text(
        "import numpy.linalg\nfrom torch.nn import functional\nimport acr_reg.tokens\nfrom acr_reg.views import View\n"
        "from acr_reg import capture, AttentionMaps\n"
        "def late():\n    from . import _grid\n    from .absent import x\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert imports_of(tmp_path / "losses.py") == (
        {"tokens", "views", "capture", "", "_grid"},
        {"numpy", "torch"},
    )


@pytest.mark.parametrize("file", [PACKAGE / "__init__.py", *FILES], ids=name_of)
def test_files_stay_small(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{name_of(file)} has {lines} lines: split it along what it does"
