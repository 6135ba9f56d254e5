"""Reads the docstring of a family: its own paragraphs, and of each host the facts, the paragraphs and the lines to add.

The paragraphs of a family stand before its first host; the paragraphs of a host stand in its section, indented by eight
spaces. A paragraph may begin with a label, as in "Views. Squares only." A page joins the paragraphs of one label."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from acr_reg.integrations.added_lines import HEADING, Added, Section, sections

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
Place = tuple[str, Added]  # a file of the host, and the code for one place in it


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
    lines: list[Place] = field(default_factory=list)
    today: list[Place] = field(default_factory=list)
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
    family = paragraphs(re.split(rf"^{HEADING.pattern}$", text, maxsplit=1, flags=re.MULTILINE)[0])
    found: list[Host] = []
    today: dict[tuple[str, str], Section] = {}
    for section in sections(text):
        if section.today:
            today[section.host, section.commit] = section
            continue
        facts = {fact[1]: fact[2].replace("``", "`") for line in section.words if (fact := FACT.fullmatch(line))}
        found.append(Host(source, family, section.host, section.commit, prose(section), facts, section.places))
    for host in found:
        others = {top(file) for other in found if other is not host for file, _ in other.lines}
        mine = {top(file) for file, _ in host.lines}
        if edits := today.get((host.repository, host.commit)):
            host.today = [place for place in edits.places if top(place[0]) not in others - mine]
            host.today_because = prose(edits)
    return found


def top(file: str) -> str:
    """The first folder of a file, which tells hosts in one repository apart; "" for a file outside folders."""
    folder, _, name = file.partition("/")
    return folder if name else ""


def prose(section: Section) -> list[str]:
    return paragraphs("\n".join(line.strip() for line in section.words if not FACT.fullmatch(line)))


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
