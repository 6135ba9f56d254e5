"""CONTRIBUTING.md says where things go: its paths exist, no addition is missing, and its rooms are the rooms."""

import re

import pytest

from tests.project.test_imports import FLOOR, PACKAGE
from tests.support.paths import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = r"[\w.-]+\.(?:cfg|md|py|rst|toml|txt)"
QUOTED = sorted({text for text in re.findall(r"`([^`\s]+)`", PAGE) if "/" in text or re.fullmatch(FILES, text)})
IN_COMMANDS = sorted(set(re.findall(r"\btests/[\w/.]+", PAGE)) - set(QUOTED))
ADDITIONS = [
    *("view", "distance", "attention kernel", "placement rule", "CAM method"),
    *("command", "host", "file format", "benchmark", "test"),
]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without the table's own head."""
    after = PAGE.split(f"\n{heading}\n")[1].splitlines()
    first = next(number for number, line in enumerate(after) if line.startswith("|---"))
    last = next(number for number in range(first, len(after)) if not after[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in after[first + 1 : last]]


def paths(cell: str) -> list[str]:
    return [text for text in re.findall(r"`([^`]+)`", cell) if text in QUOTED]


@pytest.mark.parametrize("path", [*QUOTED, *IN_COMMANDS])
def test_the_paths_exist(path: str) -> None:
    """Where a part of a path is yours to name, the folder before it exists."""
    assert (ROOT / re.split(r"/[^/]*(?:ROOM|FILE|NAME)", path)[0]).exists()


def test_the_paths_are_found() -> None:
    """The test above stands on it."""
    assert {"acr_reg/commands/NAME.py", "setup.cfg", ".ci/run", "tests/support", "README.md"} <= set(QUOTED)


def test_the_table_has_a_row_for_each_addition_with_its_file_and_its_test() -> None:
    table = rows("## Where does a new ... go?")
    assert [row[0] for row in table] == ADDITIONS
    for name, file, test, _ in table[:-1]:  # the last is the test itself
        assert paths(file), f"{name}: name the file to add it to"
        assert paths(test), f"{name}: name its test"
        assert all(path.startswith("tests/") for path in paths(test)), f"{name}: its test is in tests/"


def test_the_rooms_stand_on_the_floors_that_test_imports_holds() -> None:
    named = [
        path.removeprefix("acr_reg/").removesuffix(".py") for row in rows("## The house") for path in paths(row[0])
    ]
    floors = [FLOOR["" if name == "__init__" else name] for name in named]
    assert floors == sorted(floors, reverse=True)
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= set(named)
