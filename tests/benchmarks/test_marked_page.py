"""Blocks between markers of a page are replaced, everything else stays, and a page without markers is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.marked_page import END, begin, fill, filled

FIRST, SECOND = begin("study report", "first"), begin("study report", "second")
PAGE = f"Words.\n\n{FIRST}\n\nold\n\n{END}\n\nMore.\n\n{SECOND}\n\nother\n\n{END}\nEnd.\n"


def test_a_marker_names_the_command():
    assert begin("cost page --write") == "<!-- table: python -m benchmarks.cost page --write -->"
    assert FIRST == "<!-- table first: python -m benchmarks.study report -->"


def test_a_block_is_replaced_and_everything_else_stays(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    for _ in range(2):
        fill(page, FIRST, "| new |")
    assert page.read_text(encoding="utf-8") == PAGE.replace("old", "| new |")
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("text", ["no markers", f"{FIRST}\n\nno end", f"{END}\n{FIRST}\n"])
def test_a_page_without_the_markers_is_refused(text: str):
    with pytest.raises(ValueError, match=r"no block <!-- table first: .* <!-- end of table -->"):
        filled(text, FIRST, "table")
