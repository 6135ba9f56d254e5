"""docs/hosts: every host of every docstring has a page, and the pages are as the docstrings say."""

from __future__ import annotations

import importlib

import pytest

from acr_reg.integrations.added_lines import Added, added_lines
from benchmarks.hosts.docstrings import Host, all_hosts, by_label, hosts_of
from benchmarks.hosts.page import FOLDER, SOURCES, page, pages
from tests.support.paths import ROOT

HOSTS = all_hosts(SOURCES)
PAGES = pages()
RECIPE = "recipe_mctformer_plus.md"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_page_is_current(path) -> None:
    """python -m benchmarks.hosts --write"""
    assert path.read_text(encoding="utf-8") == PAGES[path]


def test_there_is_no_other_page() -> None:
    assert {path.name for path in FOLDER.glob("*.md")} == {path.name for path in PAGES} | {RECIPE}


def test_every_host_file_has_pages() -> None:
    """A host file is one that has ``capture`` and ``second_view``."""
    files = [path for path in (ROOT / "integrations").glob("*.py") if "def second_view(" in path.read_text()]
    assert set(files) <= set(SOURCES)
    assert {host.source for host in HOSTS} == set(SOURCES)


@pytest.mark.parametrize("host", [host for host in HOSTS if host.module], ids=lambda host: host.title)
def test_a_page_shows_all_lines_that_are_put_into_a_checkout(host: Host) -> None:
    module = importlib.import_module(f"acr_reg.integrations.{host.module}")
    edits = {"lines": added_lines(module, host.repository, host.commit)}
    edits["today"] = added_lines(module, host.repository, host.commit, today=True)
    for lines, added in ((host.lines, edits["lines"]), (host.today, edits["today"])):
        for file in {file for file, _ in lines}:
            assert [piece for name, piece in lines if name == file] == added[file]
    together = [other for other in HOSTS if (other.repository, other.commit) == (host.repository, host.commit)]
    assert {file for other in together for file, _ in other.lines} == edits["lines"].keys()
    assert {file for other in together for file, _ in other.today} == edits["today"].keys()


def test_lines_of_two_hosts_in_one_repository_are_told_apart(tmp_path) -> None:
    source = tmp_path / "family.py"
    source.write_text(
        '"""A family.\n\nOf two.\n\n'
        "    a/b at 0123abc (one)\n        title: One\n        one/f.py, before line 2:\n            x = 1\n\n"
        "    a/b at 0123abc (two)\n        title: Two+\n"
        "        two/f.py, in place of lines 3 to 3:\n            y = 1\n\n"
        "    a/b at 0123abc, on today's torch and timm\n        one/g.py, before line 1:\n            z = 1\n"
        '"""\n'
    )
    one, two = hosts_of(source)
    assert (one.page, two.page) == ("one.md", "two_plus.md")
    assert [file for file, _ in one.today] == ["one/g.py"]
    assert two.today == []
    assert two.lines == [("two/f.py", Added(3, 4, "y = 1"))]
    one.facts |= {"regularises": "all", "views": "any"}
    one.source = ROOT / "integrations" / "family.py"
    assert "@@ before line 2 @@\n+x = 1" in page(one)
    assert "y = 1" not in page(one)


def test_a_page_joins_what_is_said_of_its_host_and_of_the_family(tmp_path) -> None:
    source = tmp_path / "family.py"
    source.write_text(
        '"""A family.\n\nWhat does not work. All.\n\nViews. Any\nview.\n\n'
        "    a/one at 0123abc\n        title: One\n\n        Views. Of ``one``\n        only.\n\n        Words.\n\n"
        "        f.py, before line 2:\n            x = 1\n\n"
        "    a/one at 0123abc, on today's torch and timm\n        A reason.\n\n"
        "        g.py, before line 1:\n            z = 1\n\n"
        "    a/two at 0123abc\n        title: Two\n"
        '"""\n'
    )
    one, two = hosts_of(source)
    told = ["A family.", "Words.", "**Views.** Any view. Of `one` only.", "**What does not work.** All."]
    assert by_label(one.family + one.own) == told
    assert by_label(two.family + two.own) == ["A family.", "**Views.** Any view.", "**What does not work.** All."]
    assert (one.today_because, two.today_because) == (["A reason."], [])
    assert [added.code for _, added in (*one.lines, *one.today)] == ["x = 1", "z = 1"]
