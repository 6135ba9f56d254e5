"""Reads the lines to add from the docstring of a host file, and puts them into a checkout of the host.

The docstring has a section for each host. It names files and places in them, and gives the code for each place. Each
level is indented by four more spaces::

    owner/name at 0123abc (which of its models)
        Facts and paragraphs about the host.

        folder/file.py, before line 12:
            print("at the indentation of line 12")
        folder/file.py, in place of lines 14 to 16:
            print("at the indentation of line 14")

If the heading ends in ``on today's torch and timm``, the section holds the edits that the host itself needs there,
without ACR. The pages of docs/hosts are made from the same docstrings (``benchmarks/hosts``).
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

__all__ = ["Added", "add_lines", "added_lines", "with_added_lines"]


@dataclass(frozen=True)
class Added:
    """Code that replaces the lines from ``first`` to ``end - 1``, counted from 1."""

    first: int
    end: int
    code: str


Lines = dict[str, list[Added]]
_TODAY = "on today's torch and timm"
_PLACE = re.compile(r"        (\S+\.py), (?:before line (\d+)|in place of lines (\d+) to (\d+)):")


def added_lines(module: ModuleType, host: str, commit: str, *, today: bool = False) -> Lines:
    """The code to add to each file of the host ``owner/name`` at a commit of seven digits.

    With ``today=True`` it returns the edits that the host itself needs on current versions, {} if it needs none. Raises
    ValueError for a host that the docstring does not name.
    """
    named = False
    in_host = False
    code: list[str] | None = None
    parts: dict[str, list[tuple[int, int, list[str]]]] = {}
    for line in (module.__doc__ or "").splitlines():
        if heading := re.match(r"    (\S+/\S+) at ([0-9a-f]{7})", line):
            is_host = heading.groups() == (host, commit)
            named = named or is_host
            in_host = is_host and line.endswith(_TODAY) == today
            code = None
        elif in_host and (place := _PLACE.fullmatch(line)):
            code = []
            first = int(place[2] or place[3])
            parts.setdefault(place[1], []).append((first, int(place[4] or first - 1) + 1, code))
        elif code is not None and line.startswith(" " * 12):
            code.append(line[12:])
        elif line.strip():
            code = None
    if not named or (not parts and not today):
        raise ValueError(
            f"{module.__name__} has no lines to add to {host} at {commit}. Its docstring names the hosts and commits."
        )
    return {file: [Added(first, end, "\n".join(code)) for first, end, code in found] for file, found in parts.items()}


def with_added_lines(source: str, lines: list[Added]) -> str:
    """The source with the code added. Each piece gets the indentation of the line at its place."""
    text = source.splitlines()
    for added in sorted(lines, key=lambda added: added.first, reverse=True):
        inside = 1 <= added.first <= len(text) and added.first <= added.end <= len(text) + 1
        if not inside or not text[added.first - 1].strip():
            raise ValueError(
                f"Line {added.first} of {len(text)} holds no code to take the indentation from. Check out the commit "
                "that the docstring names."
            )
        line = text[added.first - 1]
        indent = line[: len(line) - len(line.lstrip())]
        text[added.first - 1 : added.end - 1] = textwrap.indent(added.code, indent).splitlines()
    return "\n".join(text) + "\n"


def add_lines(folder: Path, *additions: Lines) -> None:
    """Adds the code to a checkout of the host. All line numbers count in the unchanged files."""
    changed = {}
    for file in dict.fromkeys(name for lines in additions for name in lines):
        path = folder / file
        if not path.is_file():
            raise ValueError(f"There is no {file} in {folder}. Give the folder of a checkout of the host.")
        places = [place for lines in additions for place in lines.get(file, [])]
        changed[path] = with_added_lines(path.read_text(encoding="utf-8"), places)
    for path, text in changed.items():  # all or none
        path.write_text(text, encoding="utf-8")
