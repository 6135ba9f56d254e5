"""The tables of docs/reference/api.md: each name that a section documents, with the first sentence of its docstring."""

from __future__ import annotations

import importlib
import inspect
import re

from benchmarks.marked_page import filled

MARKER = re.compile(r"^<!-- table [\w-]+: python -m benchmarks\.reference --write -->$", re.M)
DIRECTIVE = re.compile(r"^\.\. auto(\w+):: ([\w.]+)$", re.M)
ROLE = re.compile(r":[a-z:]+:`~?([^`]+)`")


def with_tables(page: str) -> str:
    """The page with the table of each section made anew from the directives below its marker."""
    for marker in MARKER.findall(page):
        section = re.split(r"^## ", page.partition(marker)[2], maxsplit=1, flags=re.M)[0]
        page = filled(page, marker, table(DIRECTIVE.findall(section)))
    return page


def table(directives: list[tuple[str, str]]) -> str:
    lines = ["| name | what it is |", "|---|---|"]
    for kind, name in directives:
        lines += [f"| `{shown}` | {first_sentence(obj)} |" for shown, obj in documented(kind, name)]
    return "\n".join(lines)


def documented(kind: str, name: str) -> list[tuple[str, object]]:
    """What a directive shows: the object it names, or the public classes and functions of a module."""
    if kind == "module":
        module = importlib.import_module(name)
        own = [(key, value) for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
        return [(name, module)] + [(key, value) for key, value in own if key[0] != "_" and inspect.getdoc(value)]
    module_name, _, attribute = (name if "." in name else f"acr_reg.{name}").rpartition(".")
    return [(name, getattr(importlib.import_module(module_name), attribute))]


def first_sentence(obj: object) -> str:
    """The first sentence of the docstring as Markdown, on one line. Values without one show themselves."""
    if isinstance(obj, tuple):
        return ", ".join(f"`{value}`" for value in obj)
    paragraph = " ".join((inspect.getdoc(obj) or "").partition("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z`])", ROLE.sub(r"`\1`", paragraph).replace("``", "`"))[0]
    return re.sub(r"(?<!`)\*", r"\\*", sentence).replace("|", r"\|").rstrip(":")
