"""docs/: the reference lists every public name, messages are quoted from blocks that raise them, and the tutorial runs
and shows what `python -m benchmarks.pictures tutorial` made. test_snippets.py runs the blocks of the other pages."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import matplotlib  # noqa: F401  # this file is left out where the extras are not installed
import pytest
from PIL import Image

import acr_reg
from acr_reg.__main__ import COMMANDS
from benchmarks.pictures.tutorial import BLOCK, NOT_RUN, PICTURE, SETTING, filled, quoted, write
from benchmarks.reference.commands import with_help
from benchmarks.reference.names import with_tables
from tests.project.test_snippets import blocks_of
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
TUTORIAL = (DOCS / "start" / "tutorial.md").read_text(encoding="utf-8")
NUMBERS = DOCS / "start" / "tutorial" / "tutorial.json"


API = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
COMMANDS_PAGE = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")


def test_the_reference_lists_every_public_name_once() -> None:
    directives = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", API, re.M)
    assert sorted(directives) == sorted(acr_reg.__all__)


def test_the_tables_of_the_reference_are_current() -> None:
    assert with_tables(API) == API, "run python -m benchmarks.reference --write"
    listed = re.findall(r"^\| `(\w+)` \|", API, re.M)
    assert all(listed.count(name) == 1 for name in acr_reg.__all__)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help otherwise on other Pythons")
def test_the_help_of_the_commands_is_current() -> None:
    assert with_help(COMMANDS_PAGE) == COMMANDS_PAGE, "run python -m benchmarks.reference --write"


def test_every_command_has_a_section_with_an_example() -> None:
    sections = re.split(r"^## ", COMMANDS_PAGE, flags=re.M)[1:]
    assert [section.splitlines()[0] for section in sections] == list(COMMANDS)
    for section in sections:
        assert f"```bash\npython -m acr_reg {section.splitlines()[0]} " in section


SECTIONS = re.split(r"^### ", (DOCS / "reference" / "messages.md").read_text(encoding="utf-8"), flags=re.M)[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_every_heading_of_messages_is_a_message_that_a_block_raises(section: str) -> None:
    heading = section.splitlines()[0]
    raised = re.findall(r"^Traceback .*?\n\.\.\.\n(.*?)(?=\n>>>|\n```)", section, re.M | re.S)
    words = [re.escape(part.strip()) for part in heading.split("...")]
    assert any(re.search(".*".join(words), " ".join(message.split())) for message in raised)


def test_the_tutorial_names_the_setting_of_its_pictures() -> None:
    (setting,) = SETTING.findall(TUTORIAL)
    short, long = ([int(number) for number in numbers.split(",")] for numbers in setting[1:])
    assert all(few < many for few, many in zip(short, long, strict=True))
    if NUMBERS.exists():
        assert json.loads(NUMBERS.read_text())["setting"] == long


def test_the_tutorial_quotes_its_numbers_or_says_that_there_are_none() -> None:
    if not NUMBERS.exists():
        assert NOT_RUN in TUTORIAL
        return
    table = "\n".join(quoted(json.loads(NUMBERS.read_text())))
    assert table in TUTORIAL
    assert filled(TUTORIAL, table) == TUTORIAL


def test_the_tutorial_shows_every_picture_and_no_other() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(tutorial/(\w+\.png)\)", TUTORIAL)
    pictures = sorted((DOCS / "start" / "tutorial").glob("*.png"))
    assert sorted(shown) == [path.name for path in pictures]
    for path in pictures:
        assert path.stat().st_size < 250_000
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50


def test_every_block_runs_and_the_pictures_and_numbers_are_made(tmp_path: Path) -> None:
    """With the page's own, short setting, whose numbers mean nothing."""
    assert len(BLOCK.findall(TUTORIAL)) == len(blocks_of(TUTORIAL)) and ">>>" not in TUTORIAL
    table = "\n".join(quoted(write(tmp_path, short=True)))
    assert {path.name for path in tmp_path.iterdir()} == {"scenes.png", "rows.png", "cams.png", "tutorial.json"}
    page = filled(TUTORIAL, table)
    assert table in page and NOT_RUN not in page and not PICTURE.search(page)
    assert len(re.findall(r"\(tutorial/\w+\.png\)", page)) == 3


COMMAND = re.compile(r"^ *(?:torchrun .*-m acr_reg|python -m acr_reg) +([a-z]+) (.*)$", re.M)
HELP = re.compile(r"^```text\n.*?^```$", re.M | re.S)  # output, which says [options] and MODEL
COMMANDS_SHOWN = [
    pytest.param(command, options, id=f"{path.name}: {command} {options[:40]}")
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    for command, options in COMMAND.findall(HELP.sub("", path.read_text(encoding="utf-8")).replace("\\\n", " "))
]


@pytest.mark.parametrize(("command", "options"), COMMANDS_SHOWN)
def test_every_command_shown_has_these_options(command: str, options: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[command].module).add_arguments(parser)
    parser.parse_args(shlex.split(options, comments=True))


def test_commands_are_found() -> None:
    assert len(COMMANDS_SHOWN) > 10
