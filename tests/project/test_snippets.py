"""Every example that the documentation shows is run: README.md, docs/*.md and the docstrings.

In Markdown, ```python blocks run in the order they stand in, one namespace a file; those with prompts (>>>) run as
doctests. A ```diff block runs as the code that it leaves behind. `<!-- not executed: reason -->` above a block exempts
it.
"""

import doctest
import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

import acr_reg
from tests.support.paths import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# test_docs.py runs the tutorial: it draws the pictures of the page from the models that its blocks train.
RUN_HERE = [page for page in DOCUMENTS if page.name != "tutorial.md"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
EXEMPTION = re.compile(r"<!-- not executed: \S.*-->")


@dataclass(frozen=True)
class Block:
    language: str  # "python" or "diff"
    source: str
    line: int  # of its first line of code, from 1
    exempt: bool


def blocks_of(markdown: str) -> list[Block]:
    """The ```python and ```diff blocks of a document, in order."""
    blocks: list[Block] = []
    lines = markdown.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", lines[number])
        if fence is None:
            number += 1
            continue
        before = next((line for line in reversed(lines[:number]) if line.strip()), "")
        first = number + 1
        end = next((i for i in range(first, len(lines)) if lines[i].strip() == fence[1]), len(lines))
        indent = len(lines[number]) - len(lines[number].lstrip())
        source = "\n".join(line[indent:] for line in lines[first:end])
        if fence[2] in ("python", "py", "python3", "pycon", "diff"):
            language = "diff" if fence[2] == "diff" else "python"
            blocks.append(Block(language, source, first + 1, EXEMPTION.fullmatch(before.strip()) is not None))
        number = end + 1
    return blocks


def after_diff(source: str) -> str:
    """The code that a diff leaves behind; a removed line becomes an empty one, so that line numbers stay."""
    kept = []
    for line in source.splitlines():
        header = line.startswith(("--- ", "+++ ", "@@", "diff ", "index "))
        kept.append("" if header or line.startswith("-") else line[1:])
    return "\n".join(kept)


def execute(block: Block, namespace: dict[str, Any], filename: str) -> None:
    source = after_diff(block.source) if block.language == "diff" else block.source
    if re.search(r"^\s*>>> ", source, re.MULTILINE):
        examples = doctest.DocTestParser().get_doctest(source, {}, filename, filename, block.line - 1)
        examples.globs = namespace  # itself, where get_doctest takes a copy: later blocks see what these assign
        run_examples(examples)
    else:
        padded = "\n" * (block.line - 1) + source  # so that a traceback shows the document's own line numbers
        exec(compile(padded, filename, "exec"), namespace)


class Runner(doctest.DocTestRunner):
    """Raises an error of import as it is, so that tests/conftest.py sees a package that is not installed."""

    def report_unexpected_exception(self, out, test, example, exc_info):
        if isinstance(exc_info[1], ModuleNotFoundError):
            raise exc_info[1]
        super().report_unexpected_exception(out, test, example, exc_info)


def run_examples(examples: doctest.DocTest) -> None:
    report: list[str] = []
    result = Runner(optionflags=FLAGS).run(examples, out=report.append, clear_globs=False)
    assert result.failed == 0, "".join(report)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Snippets may write files, and draw random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("document", RUN_HERE, ids=lambda document: document.name)
def test_documents(document):
    blocks = blocks_of(document.read_text(encoding="utf-8"))
    exempt = [block for block in blocks if block.exempt]
    python = [block for block in blocks if block.language == "python"]
    count = f"{document.name}: {len(blocks)} blocks ({len(python)} python), {len(exempt)} exempt"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for position, block in enumerate(blocks, start=1):
        if block.exempt:
            continue
        try:
            execute(block, namespace, document.name)
        except Exception as error:
            raise AssertionError(f"{count}; block {position}, line {block.line}, failed: {error!r}") from error
    if document.name == "README.md":
        assert set(python) - set(exempt), f"{count}; a README must show at least one python block that runs"


MODULES = sorted(
    [acr_reg.__name__, *(module.name for module in pkgutil.walk_packages(acr_reg.__path__, "acr_reg."))],
)


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    return [examples for examples in doctest.DocTestFinder(exclude_empty=True).find(module) if examples.examples]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    for examples in examples_of(importlib.import_module(name)):
        torch.manual_seed(0)
        run_examples(examples)


def test_every_public_function_is_shown():
    """In an example of some docstring, or in a block of a document: all of them are run above."""
    modules = [importlib.import_module(name) for name in MODULES if "demo" not in name and "integrations" not in name]
    shown = [example.source for module in modules for examples in examples_of(module) for example in examples.examples]
    for document in DOCUMENTS:
        shown += [block.source for block in blocks_of(document.read_text(encoding="utf-8")) if not block.exempt]
    functions = [name for name in acr_reg.__all__ if inspect.isfunction(getattr(acr_reg, name))]
    assert functions
    unseen = [name for name in functions if not re.search(rf"\b{name}\(", "\n".join(shown))]
    assert not unseen, f"public functions that no example calls: {unseen}"


# ---------------------------------------------------------------- the reader itself

DOCUMENT = """
```bash
false
```
```python
total = 1
```
<!-- not executed: needs a GPU -->

```python
raise RuntimeError
```
- item
  ```python
  >>> total += 1
  >>> total
  2
  ```
```diff
@@ a training loop @@
 for step in range(2):
-    total += 10
+    total += 1
```
"""


def test_the_reader_finds_the_blocks():
    assert [(block.language, block.line, block.exempt) for block in blocks_of(DOCUMENT)] == [
        ("python", 6, False),
        ("python", 11, True),
        ("python", 15, False),
        ("diff", 20, False),
    ]


def test_blocks_share_a_namespace_and_a_diff_leaves_its_new_code():
    namespace: dict[str, Any] = {}
    for block in blocks_of(DOCUMENT):
        if not block.exempt:
            execute(block, namespace, "document")
    assert namespace["total"] == 4


@pytest.mark.parametrize("source", ["raise ValueError", ">>> 1 + 1\n3", "1 +"])
def test_a_block_that_fails_fails(source):
    (block,) = blocks_of(f"```python\n{source}\n```")
    with pytest.raises((ValueError, AssertionError, SyntaxError)):
        execute(block, {}, "document")


def test_an_exemption_needs_a_reason():
    (block,) = blocks_of("<!-- not executed: -->\n```python\n1\n```")
    assert not block.exempt
