"""The rules of the house: what a folder, a face, a file and a class may be. CONTRIBUTING.md says where things go."""

import ast
import configparser
import re

import pytest

from tests.support.paths import ROOT

FILES_AT_MOST = 12  # of a folder, beside its face: what a reader takes in at a glance
LINES_AT_MOST = 200  # of code in a class, without docstrings, comments and blank lines
SHIPPED = [ROOT / "acr_reg", ROOT / "integrations"]
CODE = [*SHIPPED, ROOT / "benchmarks"]


def python_files(folders):
    """A link, as acr_reg/integrations is, is followed nowhere."""
    return sorted(path for folder in folders for path in folder.rglob("*.py") if not under_a_link(path))


def under_a_link(path):
    return any(parent.is_symlink() for parent in path.parents)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


FILES = python_files(CODE)
FOLDERS = sorted({path.parent for path in FILES})
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), filename=str(path)) for path in FILES}


@pytest.mark.parametrize(
    "folder", sorted({*FOLDERS, *(path.parent for path in python_files([ROOT / "tests"]))}), ids=name_of
)
def test_every_folder_has_a_face_that_says_in_one_sentence_what_it_is_for(folder):
    face = folder / "__init__.py"
    assert face.exists(), f"{name_of(folder)} has no __init__.py: write one whose docstring says what the room is for"
    said = ast.get_docstring(ast.parse(face.read_text(encoding="utf-8"))) or ""
    assert said.endswith("."), f"{name_of(face)} says {said!r}: write a sentence"
    assert said.count(". ") == 0, f"{name_of(face)} says {said!r}: one sentence is enough"


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_holds_no_more_files_than_one_can_take_in(folder):
    files = [path.name for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert len(files) <= FILES_AT_MOST, f"{name_of(folder)} holds {len(files)} files: give some a folder of their own"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_private_name_stays_in_its_folder(file):
    for module, name in private_names(TREES[file]):
        home = ROOT.joinpath(*module.split("."))
        near = file.parent.resolve() in (home.parent.resolve(), home.resolve())
        assert near or is_root_module(module, name), f"{name_of(file)} uses {name} of {module}: make it public"


def private_names(tree):
    """(module, name) of each private name that a file imports from a module of ours, or reads as an attribute of it."""
    modules, found = {}, []  # the name of a module in this file: the module
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in filter(lambda alias: is_ours(alias.name), node.names):
                first = alias.name.partition(".")[0]
                modules[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and is_ours(str(node.module)):
            found += [(node.module, alias.name) for alias in node.names if is_private(alias.name)]
            inside = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            modules.update({name: module for name, module in inside.items() if is_module(module)})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            first, dot, rest = ast.unparse(node.value).partition(".")
            if first in modules and is_module(module := modules[first] + dot + rest):
                found.append((module, node.attr))
    return found


def is_ours(module):
    return module.partition(".")[0] in ("acr_reg", "benchmarks")


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return re.fullmatch(r"[\w.]+", name) is not None and (path.is_dir() or path.with_suffix(".py").exists())


@pytest.mark.parametrize(
    "source",
    [
        "from acr_reg.losses.blockwise import _rows",
        "import acr_reg.losses.blockwise\nacr_reg.losses.blockwise._rows()",
        "import acr_reg\nacr_reg.losses.blockwise._rows()",
        "import acr_reg.losses.blockwise as rows\nrows._rows()",
        "from acr_reg.losses import blockwise\n\ndef f():\n    return blockwise._rows.shape",
        "def f():\n    from acr_reg.losses import blockwise as rows\n    return rows._rows",
    ],
)
def test_private_names_are_found_however_they_are_reached(source):
    """The test above stands on it."""
    assert private_names(ast.parse(source)) == [("acr_reg.losses.blockwise", "_rows")]


def test_what_is_no_private_name_of_our_modules_is_left_alone():
    source = "import torch\nfrom acr_reg import losses, View\ntorch._C, losses.__doc__, View._make, self._rows"
    assert private_names(ast.parse(source)) == []


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_root_module(package, name):
    """The underscored files at the top of acr_reg/ serve all of the core."""
    return package == "acr_reg" and (ROOT / "acr_reg" / f"{name}.py").exists()


@pytest.mark.parametrize("file", [path for path in FILES if not path.is_relative_to(ROOT / "acr_reg")], ids=name_of)
def test_integrations_and_benchmarks_import_public_names_only(file):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("acr_reg"):
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            private = [part for part in parts if is_private(part)]
            inner = str(node.module).startswith("acr_reg.integrations") and file.is_relative_to(ROOT / "integrations")
            assert inner or not private, f"{name_of(file)} imports {private} of the core: make public what it needs"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_class_is_short_enough_to_be_read(file):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ClassDef):
            lines = lines_of_code(node, file.read_text(encoding="utf-8").splitlines())
            assert lines <= LINES_AT_MOST, f"{name_of(file)}: {node.name} has {lines} lines of code: take it apart"


def lines_of_code(node, lines):
    documented = [each for each in ast.walk(node) if isinstance(each, (ast.ClassDef, ast.FunctionDef))]
    strings = [each.body[0] for each in documented if ast.get_docstring(each) is not None]
    prose = {number for each in strings for number in range(each.lineno, each.end_lineno + 1)}
    own = range(node.lineno, node.end_lineno + 1)
    return sum(1 for n in own if n not in prose and lines[n - 1].strip() and not lines[n - 1].lstrip().startswith("#"))


def test_lines_of_code_are_neither_prose_nor_blank():
    documented = 'class A:\n    """Says\n    much."""\n\n    # why\n    x = 1\n\n'
    source = f'{documented}    def f(self):\n        """Says."""\n        return 1\n'
    assert lines_of_code(ast.parse(source).body[0], source.splitlines()) == 4


def test_every_package_is_in_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {name_of(path.parent).replace("/", ".") for path in python_files(SHIPPED)}
    expected = {f"acr_reg.{name}" if name.startswith("integrations") else name for name in folders}
    assert listed == expected
