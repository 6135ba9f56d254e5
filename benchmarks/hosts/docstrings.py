"""Reads the docstring of a family: its own paragraphs, and of each host the facts, the paragraphs and the lines to add.

The paragraphs of a family stand before its first host; the paragraphs of a host stand in its section, indented by eight
spaces. A paragraph may begin with a label, as in "Views. Squares only." A page joins the paragraphs of one label."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HEADING = re.compile(r"    (\S+/\S+) at ([0-9a-f]{7})(?: \(.*\))?(, on today's torch and timm)?")
FACT = re.compile(r"        (title|regularises|views): (.*)")
LABELS = (  # in the order of a page
    "What is regularised",
    "Weights to start from",
    "What was run",
    "Views",
    "Padding",
    "Where tokens are",
    "Noise floor",
    "Mixed precision",
    "Several processes",
    "Memory",
    "Faults of the published code",
    "What does not work",
)
LABEL = re.compile(rf"({'|'.join(LABELS)})\. ")
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
    family: list[str]
    """The paragraphs about all hosts of the file."""
    repository: str
    commit: str
    own: list[str] = field(default_factory=list)
    """The paragraphs about this host alone."""
    facts: dict[str, str] = field(default_factory=dict)
    lines: list[Lines] = field(default_factory=list)
    today: list[Lines] = field(default_factory=list)
    """The edits that the host itself needs on current versions."""
    today_because: list[str] = field(default_factory=list)
    """The paragraphs that say why it needs them."""

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
    family, *sections = re.split(rf"^(?={HEADING.pattern}$)", text, flags=re.MULTILINE)[:: HEADING.groups + 1]
    found: list[Host] = []
    today: dict[tuple[str, str], Section] = {}
    for section in map(Section, sections):
        if section.is_today:
            today[section.repository, section.commit] = section
        else:
            names = section.repository, section.commit
            found.append(Host(source, paragraphs(family), *names, section.prose, section.facts, section.lines))
    for host in found:
        others = {top(lines) for other in found if other is not host for lines in other.lines}
        mine = {top(lines) for lines in host.lines}
        if edits := today.get((host.repository, host.commit)):
            host.today = [lines for lines in edits.lines if top(lines) not in others - mine]
            host.today_because = edits.prose
    return found


class Section:
    """A host in a docstring, or the edits that it needs on today's torch and timm."""

    def __init__(self, text: str) -> None:
        heading, *rest = text.splitlines()
        match = HEADING.fullmatch(heading)
        assert match is not None
        self.repository, self.commit, self.is_today = match[1], match[2], match[3] is not None
        self.facts: dict[str, str] = {}
        self.lines: list[Lines] = []
        prose: list[str] = []
        for line in rest:
            if fact := FACT.fullmatch(line):
                self.facts[fact[1]] = fact[2].replace("``", "`")
            elif place := PLACE.fullmatch(line):
                self.lines.append(Lines(place[1], re.sub(r"lines (\d+) to \1$", r"line \1", place[2])))
            elif self.lines and line.startswith(" " * 12):
                self.lines[-1].code.append(line[12:])
            else:
                prose.append(line.strip())
        self.prose = paragraphs("\n".join(prose))


def top(lines: Lines) -> str:
    """The first folder of the file, which tells hosts in one repository apart; "" for a file outside folders."""
    folder, _, name = lines.file.partition("/")
    return folder if name else ""


def paragraphs(text: str) -> list[str]:
    """The paragraphs as Markdown, each on one line."""
    joined = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [re.sub(r":\w+:`~?([^`]+)`", r"`\1`", paragraph).replace("``", "`") for paragraph in joined if paragraph]


def by_label(found: Sequence[str]) -> list[str]:
    """The paragraphs in the order of a page: first those without a label, then one paragraph for each label."""
    texts: dict[str, list[str]] = {label: [] for label in ("", *LABELS)}
    for paragraph in found:
        match = LABEL.match(paragraph)
        texts[match[1] if match else ""].append(paragraph[match.end() :] if match else paragraph)
    return texts.pop("") + [f"**{label}.** {' '.join(said)}" for label, said in texts.items() if said]


def all_hosts(sources: Sequence[Path]) -> list[Host]:
    return [host for source in sources for host in hosts_of(source)]
