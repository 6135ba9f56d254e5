"""The blocks of docs/reference/commands.md: the help of each command of python -m acr_reg, 100 columns wide."""

from __future__ import annotations

import os
from contextlib import redirect_stdout, suppress
from io import StringIO
from unittest import mock

from acr_reg.__main__ import COMMANDS, main
from benchmarks.marked_page import begin, filled

COLUMNS = "100"


def with_help(page: str) -> str:
    for command in COMMANDS:
        page = filled(page, begin("reference --write", command), f"```text\n{help_of(command)}\n```")
    return page


def help_of(command: str) -> str:
    said = StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": COLUMNS}), redirect_stdout(said), suppress(SystemExit):
        main([command, "--help"])
    return said.getvalue().strip()
