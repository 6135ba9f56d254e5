"""Messages are plain sentences: what happened, what was expected, what to do; CONTRIBUTING.md has the rule."""

import ast
import re

import pytest

from tests.project.test_house import SHIPPED, TREES, name_of, python_files

LETTERS_AT_MOST = 120  # beside values


def messages_of(tree):
    """(line, literal text) of what is raised or warned of in so many words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            call = node
        else:
            continue
        text = literal_of(call.args[0]) if call.args else None
        if text is not None:
            yield node.lineno, text


def literal_of(node):
    """The text that is written in the code; values count as nothing."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [literal_of(node.left), literal_of(node.right)]
        return "".join(part for part in parts if part) or None
    return None


MESSAGES = {file: list(messages_of(TREES[file])) for file in python_files(SHIPPED)}
SAYING = [file for file, said in MESSAGES.items() if said]


@pytest.mark.parametrize("file", SAYING, ids=name_of)
def test_a_message_is_sentences_and_no_form(file):
    for line, text in MESSAGES[file]:
        assert not re.search(r"\bfound\b.*;\s*expected\b", text), f"{name_of(file)}:{line}: write sentences: {text!r}"


@pytest.mark.parametrize("file", SAYING, ids=name_of)
def test_a_message_is_short(file):
    for line, text in MESSAGES[file]:
        assert len(text) <= LETTERS_AT_MOST, f"{name_of(file)}:{line}: {len(text)} characters beside values: {text!r}"


def test_the_reader_finds_the_messages():
    assert sum(map(len, MESSAGES.values())) > 100


def test_the_reader_sees_what_is_raised_and_warned_of():
    tree = ast.parse('raise ValueError(f"a {x} b" + "c")\nwarnings.warn("d", stacklevel=2)\nraise KeyError\n')
    assert list(messages_of(tree)) == [(1, "a  bc"), (2, "d")]
