"""The Markdown of a host's page, and of the table of all hosts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from acr_reg.integrations.added_lines import Added
from benchmarks.hosts.docstrings import Host, Place, all_hosts, by_label
from benchmarks.marked_page import END, begin, filled, wrapped

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "hosts"
INDEX = FOLDER / "index.md"
MARKER = begin("hosts --write")
FILES = ("mctformer", "toco", "afa", "acr_wsss", "transcam", "weclip")
TESTS = ("tscam", "clip_es", "seam")  # hosts that need no file: their tests hold the lines
SOURCES = (
    *(ROOT / "integrations" / f"{name}.py" for name in FILES),
    *(ROOT / "tests" / "integrations" / "hosts" / f"test_{name}.py" for name in TESTS),
)
NOT_RUN = "<!-- not executed: lines of a host's file; tests/integrations/hosts runs them there -->"


def pages() -> dict[Path, str]:
    """Path -> text of every page in docs/hosts that comes from a docstring."""
    hosts = all_hosts(SOURCES)
    index = filled(INDEX.read_text(encoding="utf-8"), MARKER, table(hosts))
    return {INDEX: index} | {FOLDER / host.page: page(host) for host in hosts}


def table(hosts: Sequence[Host]) -> str:
    lines = ["| host | commit | lines added | what is regularised | views |", "|---|---|---|---|---|"]
    for host in hosts:
        cells = (f"[{host.title}]({host.page})", f"`{host.commit}`", size(host))
        lines.append(f"| {' | '.join((*cells, host.facts['regularises'], host.facts['views']))} |")
    return "\n".join(lines)


def size(host: Host) -> str:
    """Lines added to the first script; further scripts of a host, for other data sets, take the same lines."""
    first = [added for file, added in host.lines if file == host.lines[0][0]]
    added, removed = sum(len(each.code.splitlines()) for each in first), sum(each.end - each.first for each in first)
    return "" if not first else f"{added}, {removed} removed" if removed else f"{added}"


def page(host: Host) -> str:
    link = f"[{host.repository}](https://github.com/{host.repository}/tree/{host.commit})"
    what = "The lines that add ACR to" if host.lines else "How the library works with"
    parts = [
        f"# {host.title}",
        wrapped(f"{what} {link} at commit `{host.commit}`, and what was run there."),
        f"{MARKER}\n",
        f"| what is regularised | {host.facts['regularises']} |\n|---|---|\n| views | {host.facts['views']} |\n"
        f"| source of this page | `{host.source.relative_to(ROOT)}` |",
    ]
    if host.lines:
        parts += ["## Lines to add", wrapped(start(host)), *diffs(host.lines)]
    if host.today:
        parts += ["## Edits that the host itself needs on today's torch and timm"]
        parts += [*map(wrapped, host.today_because), *diffs(host.today)]
    if host.module is not None:
        parts += ["## Put them into a checkout", by_script(host)]
    parts += ["## What to know", *map(wrapped, by_label(host.family + host.own)), f"\n{END}", AFTER]
    return "\n\n".join(parts).replace("\n\n\n", "\n\n").rstrip() + "\n"


AFTER = """## Next

[Weights](../guides/weights.md) and [terms](../guides/terms.md) say how to set and read the loss. The host's own scripts
make the class maps, and [scores and formats](../reference/formats.md) says how to score them. [Host
codebases](index.md) says which run to compare with."""


def start(host: Host) -> str:
    return (
        "Put each piece before the given line of the unchanged file, at the indentation of that line"
        + (", or in place of the given lines" if any(added.end > added.first for _, added in host.lines) else "")
        + "."
    )


def diffs(places: Sequence[Place]) -> list[str]:
    parts = []
    for file, pieces in groupby(places, lambda place: place[0]):
        body = "\n".join(f"@@ {where(added)} @@\n{textwrap.indent(added.code, '+', bool)}" for _, added in pieces)
        parts.append(f"`{file}`:\n\n{NOT_RUN}\n\n```diff\n{body}\n```")
    return parts


def where(added: Added) -> str:
    if added.end == added.first:
        return f"before line {added.first}"
    last = added.end - 1
    return f"in place of line {last}" if last == added.first else f"in place of lines {added.first} to {last}"


def by_script(host: Host) -> str:
    folder = host.repository.partition("/")[2]
    today = f", added_lines({host.module}, *host, today=True)" if host.today else ""
    call = f"add_lines(Path({folder!r}), added_lines({host.module}, *host){today})".replace("'", '"')
    return f"""This script adds all lines to a checkout of that commit in the folder `{folder}`:

<!-- not executed: needs a checkout; tests/integrations/hosts does it -->

```python
from pathlib import Path

from acr_reg.integrations import {host.module}
from acr_reg.integrations.added_lines import add_lines, added_lines

host = "{host.repository}", "{host.commit}"
{call}
```"""
