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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

__all__ = ["Added", "Section", "add_lines", "added_lines", "sections", "with_added_lines"]


@dataclass(frozen=True)
class Added:
    """Code that replaces the lines from ``first`` to ``end - 1``, counted from 1."""

    first: int
    end: int
    code: str


@dataclass
class Section:
    """One section of a docstring, as it stands there."""

    host: str
    commit: str
    today: bool
    """Whether it holds the edits that the host itself needs on current versions."""
    words: list[str] = field(default_factory=list)
    """The lines that are no code and name no place."""
    places: list[tuple[str, Added]] = field(default_factory=list)
    """The files, each with the code for one place in it, in order."""


Lines = dict[str, list[Added]]
HEADING = re.compile(r"    (\S+/\S+) at ([0-9a-f]{7})(?: \(.*\))?(, on today's torch and timm)?")
_PLACE = re.compile(r"        (\S+\.py), (?:before line (\d+)|in place of lines (\d+) to (\d+)):")


def sections(docstring: str) -> list[Section]:
    """The sections of a docstring, in order."""
    found: list[Section] = []
    in_code = False
    for line in docstring.splitlines():
        if heading := HEADING.fullmatch(line):
            found.append(Section(heading[1], heading[2], heading[3] is not None))
            in_code = False
        elif found and (place := _PLACE.fullmatch(line)):
            first = int(place[2] or place[3])
            found[-1].places.append((place[1], Added(first, int(place[4] or first - 1) + 1, "")))
            in_code = True
        elif in_code and line.startswith(" " * 12):
            file, added = found[-1].places[-1]
            code = f"{added.code}\n{line[12:]}" if added.code else line[12:]
            found[-1].places[-1] = file, replace(added, code=code)
        elif found:
            in_code = in_code and not line.strip()
            found[-1].words.append(line)
    return found


def added_lines(module: ModuleType, host: str, commit: str, *, today: bool = False) -> Lines:
    """The code to add to each file of the host ``owner/name`` at a commit of seven digits.

    With ``today=True`` it returns the edits that the host itself needs on current versions, {} if it needs none. Raises
    ValueError for a host that the docstring does not name.
    """
    of_host = [each for each in sections(module.__doc__ or "") if (each.host, each.commit) == (host, commit)]
    parts: Lines = {}
    for file, added in (place for section in of_host if section.today == today for place in section.places):
        parts.setdefault(file, []).append(added)
    if not of_host or (not parts and not today):
        raise ValueError(
            f"{module.__name__} has no lines to add to {host} at {commit}. Its docstring names the hosts and commits."
        )
    return parts


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
