"""An old Python or torch is refused by name, before anything it cannot parse or import."""

import ast
import re
import subprocess
import sys

import pytest

from acr_reg._versions import require_supported_versions
from tests.support.paths import ROOT


@pytest.mark.parametrize("python", [(2, 7), (3, 7), (3, 9), (3, 9, 18)])
def test_old_python_is_refused(python):
    with pytest.raises(ImportError) as caught:
        require_supported_versions(python, "2.14.1")
    found = ".".join(str(number) for number in python[:2])
    assert "needs Python 3.10 or newer" in str(caught.value)  # expected
    assert f"this is Python {found} ({sys.executable})" in str(caught.value)
    assert "python3.11 -m venv" in str(caught.value)  # next step


@pytest.mark.parametrize("torch_version", ["1.7.1", "1.7.1+cu110", "1.13.1", "2.0.1", "2.0.1+cu118", "0.4.0"])
def test_old_torch_is_refused(torch_version):
    with pytest.raises(ImportError) as caught:
        require_supported_versions((3, 10), torch_version)
    assert "needs torch 2.1 or newer" in str(caught.value)  # expected
    assert f"this is torch {torch_version}." in str(caught.value)
    assert "pip install 'torch>=2.1'" in str(caught.value)  # next step


@pytest.mark.parametrize("python", [(3, 10), (3, 11, 7), (3, 13), (4, 0)])
@pytest.mark.parametrize(
    "torch_version",
    ["2.1.0", "2.1.0+cu118", "2.1.0a0+git1f2e3d4", "2.10.0", "2.14.1", "2.15.0a0", "2.15.0.dev20261101", "3.0", "main"],
)
def test_supported_versions_pass(python, torch_version):
    require_supported_versions(python, torch_version)


def test_the_running_environment_passes():
    require_supported_versions()


def test_python_is_refused_before_torch_is_imported():
    """On an old interpreter torch may be missing; the message must still be about the interpreter."""
    code = (
        "import sys; sys.path.insert(0, 'acr_reg'); sys.modules['torch'] = None; sys.version_info = (3, 8, 0)\n"
        "import _versions; _versions.require_supported_versions()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert re.match(r"ImportError: .*Python 3\.10 or newer.*Python 3\.8 ", run.stderr.splitlines()[-1])


def test_importing_the_package_with_an_old_torch_says_so():
    """The whole way: `import acr_reg` in a process whose torch is 1.7.1 and has nothing else in it."""
    code = (
        "import sys, types; sys.modules['torch'] = torch = types.ModuleType('torch'); torch.__version__ = '1.7.1'\n"
        "import acr_reg"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert re.match(r"ImportError: .*torch 2\.1 or newer.*torch 1\.7\.1\.", run.stderr.splitlines()[-1])


@pytest.mark.parametrize("file", ["__init__.py", "_versions.py"])
def test_python_37_can_parse_what_runs_before_the_check(file):
    """A SyntaxError in either file would hide the message. A file is compiled whole before its first line runs."""
    source = (ROOT / "acr_reg" / file).read_text(encoding="utf-8")
    ast.parse(source, filename=file, feature_version=(3, 7))


def test_the_check_comes_before_every_other_import():
    tree = ast.parse((ROOT / "acr_reg" / "__init__.py").read_text(encoding="utf-8"))
    has_docstring = isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant)
    statements = tree.body[has_docstring:]
    assert [ast.unparse(node) for node in statements[:2]] == [
        "from ._versions import require_supported_versions",
        "require_supported_versions()",
    ], "acr_reg/__init__.py must begin (after its docstring) with the import and the call of the version check"
