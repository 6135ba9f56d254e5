"""The one writer of generated blocks, such as tables, between two markers of a page."""

from __future__ import annotations

import textwrap
from pathlib import Path

from acr_reg.integrations.formats.write import replacing

END = "<!-- end of table -->"


def begin(command: str, name: str = "") -> str:
    """The marker before a block: the command that writes it, and its name if the command writes several."""
    return f"<!-- table{name and f' {name}'}: python -m benchmarks.{command} -->"


def filled(text: str, marker: str, block: str) -> str:
    """The page's text with the block between `marker` and END. ValueError if either is missing."""
    head, found, rest = text.partition(marker)
    _, end, tail = rest.partition(END)
    if not found or not end:
        raise ValueError(f"The page has no block {marker} ... {END}. Put both lines where the table belongs.")
    return f"{head}{marker}\n\n{block}\n\n{END}{tail}"


def wrapped(paragraph: str) -> str:
    """In lines of 120 columns, without breaking a link or a hyphenated word."""
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def fill(page: Path, marker: str, block: str) -> None:
    write_page(page, filled(page.read_text(encoding="utf-8"), marker, block))


def write_page(page: Path, text: str) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    with replacing(page) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
