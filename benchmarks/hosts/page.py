"""The Markdown of a host's page, and of the table of all hosts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.hosts.docstrings import Host, Lines, all_hosts
from benchmarks.marked_page import END, begin, filled

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
    first = [lines for lines in host.lines if lines.file == host.lines[0].file]
    added, removed = sum(len(lines.code) for lines in first), sum(lines.removed for lines in first)
    return "" if not first else f"{added}, {removed} removed" if removed else f"{added}"


def page(host: Host) -> str:
    link = f"[{host.repository}](https://github.com/{host.repository}/tree/{host.commit})"
    what = "The lines that add all-pairs consistency to" if host.lines else "What the library does with"
    parts = [
        f"# {host.title}",
        f"{what} {link} at commit `{host.commit}`, and what was run.",
        f"{MARKER}\n",
        f"| what is regularised | {host.facts['regularises']} |\n|---|---|\n| views | {host.facts['views']} |\n"
        f"| source of this page | `{host.source.relative_to(ROOT)}` |",
    ]
    if host.note and host.note not in (host.title, "MCTformer V1 and V2"):
        parts.append(f"Note: {host.note}.")
    if host.lines:
        parts += ["## Lines to add", start(host), *diffs(host.lines)]
    if host.today:
        parts += ["## Edits that the host itself needs on today's torch and timm", *diffs(host.today)]
    if host.module is not None:
        parts += ["## Put them into a checkout", by_script(host)]
    heading = "## What to know" if host.module is None else f"## What to know about the hosts of `{host.module}`"
    parts += [heading, host.family, f"\n{END}", AFTER]
    return "\n\n".join(parts).replace("\n\n\n", "\n\n").rstrip() + "\n"


AFTER = """## Next

The [weights](../guides/weights.md) and the [terms](../guides/terms.md) of the loss are read as in any loop. The host's
own scripts make the class maps; [scores and formats](../reference/formats.md) says how to score their files. [All
hosts](index.md) says which run to compare with."""


def start(host: Host) -> str:
    return (
        "Each piece stands before the line of that number in the unchanged file, at that line's indentation"
        + (", or replaces the lines named" if any(lines.removed for lines in host.lines) else "")
        + "."
    )


def diffs(all_lines: Sequence[Lines]) -> list[str]:
    parts = []
    for file, pieces in groupby(all_lines, lambda lines: lines.file):
        body = "\n".join(f"@@ {piece.place} @@\n" + "\n".join(f"+{line}" for line in piece.code) for piece in pieces)
        parts.append(f"`{file}`:\n\n{NOT_RUN}\n\n```diff\n{body}\n```")
    return parts


def by_script(host: Host) -> str:
    folder = host.repository.partition("/")[2]
    today = f", added_lines({host.module}, *host, today=True)" if host.today else ""
    call = f"add_lines(Path({folder!r}), added_lines({host.module}, *host){today})".replace("'", '"')
    return f"""Instead of by hand, with the checkout at that commit in `{folder}`:

<!-- not executed: needs a checkout; tests/integrations/hosts does it -->

```python
from pathlib import Path

from acr_reg.integrations import {host.module}
from acr_reg.integrations.added_lines import add_lines, added_lines

host = "{host.repository}", "{host.commit}"
{call}
```"""
