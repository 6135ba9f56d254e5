"""What a docstring says of its hosts: about the family, and for each host its facts and the lines to add."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HEADING = re.compile(r"    (\S+/\S+) at ([0-9a-f]{7})(?: \((.*)\))?(, on today's torch and timm)?")
FACT = re.compile(r"        (title|regularises|views): (.*)")
LABELS = ("Views", "Noise floor", "Mixed precision", "Parallel", "Padding", "What does not work", "Where tokens are")
PLACE = re.compile(r"        (\S+\.py), ((?:before|in place of) .*):")


@dataclass
class Lines:
    """Code for one place of a file of the host, as "before line 5"."""

    file: str
    place: str
    code: list[str] = field(default_factory=list)

    @property
    def removed(self) -> int:
        numbers = [int(number) for number in re.findall(r"\d+", self.place)]
        return numbers[-1] - numbers[0] + 1 if self.place.startswith("in place of") else 0


@dataclass
class Host:
    source: Path
    family: str
    """What the docstring says of all its hosts."""
    repository: str
    commit: str
    note: str
    facts: dict[str, str] = field(default_factory=dict)
    lines: list[Lines] = field(default_factory=list)
    today: list[Lines] = field(default_factory=list)
    """The edits that the host itself needs on current versions."""

    @property
    def title(self) -> str:
        return self.facts["title"]

    @property
    def page(self) -> str:
        return self.title.lower().replace("+", "_plus").replace("-", "_") + ".md"

    @property
    def module(self) -> str | None:
        """The file of acr_reg.integrations that serves the host, if one does."""
        return self.source.stem if self.source.parent.name == "integrations" else None


def hosts_of(source: Path) -> list[Host]:
    """The hosts that a file's docstring names, in its order."""
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    family = about(text)
    found: list[Host] = []
    today: dict[tuple[str, str], list[Lines]] = {}
    into: list[Lines] = []
    for line in text.splitlines():
        if heading := HEADING.fullmatch(line):
            repository, commit, note, is_today = heading.groups()
            if is_today:
                into = today.setdefault((repository, commit), [])
            else:
                found.append(Host(source, family, repository, commit, note or ""))
                into = found[-1].lines
        elif found and (fact := FACT.fullmatch(line)):
            found[-1].facts[fact[1]] = fact[2].replace("``", "`")
        elif found and (place := PLACE.fullmatch(line)):
            into.append(Lines(place[1], re.sub(r"lines (\d+) to \1$", r"line \1", place[2])))
        elif found and into and line.startswith(" " * 12):
            into[-1].code.append(line[12:])
    for host in found:
        others = {top(lines) for other in found if other is not host for lines in other.lines}
        mine = {top(lines) for lines in host.lines}
        edits = today.get((host.repository, host.commit), [])
        host.today = [lines for lines in edits if top(lines) not in others - mine]
    return found


def top(lines: Lines) -> str:
    """The first folder of the file, which tells hosts in one repository apart; "" for a file outside folders."""
    folder, _, name = lines.file.partition("/")
    return folder if name else ""


def about(text: str) -> str:
    """The paragraphs before the lines to add, as Markdown."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if HEADING.fullmatch(paragraph.splitlines()[0]) or paragraph.startswith("The lines to add stand"):
            continue
        if paragraph.startswith("    "):  # a literal block, except the lines of a host
            if not PLACE.match(paragraph):
                kept.append(f"```text\n{paragraph}\n```")
            continue
        kept.append(as_markdown(paragraph))
    return "\n\n".join(kept)


def as_markdown(paragraph: str) -> str:
    plain = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", paragraph).replace("``", "`")
    label = re.match(rf"({'|'.join(LABELS)})[.:,]", plain)
    if label is None:
        return plain
    rest = plain[label.end() :].lstrip()
    return f"**{label[1]}.** {rest[:1].upper()}{rest[1:]}"


def all_hosts(sources: Sequence[Path]) -> list[Host]:
    return [host for source in sources for host in hosts_of(source)]
