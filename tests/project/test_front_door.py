"""README.md is one page that begins with the installation and the diff; CITATION.cff is what citation tools read."""

from __future__ import annotations

import re

import pytest

import acr_reg
from tests.project.test_snippets import after_diff, blocks_of
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_readme_is_one_page() -> None:
    assert len(README.split()) <= 1200
    assert len(README.splitlines()) <= 200


def test_the_readme_shows_the_installation_and_the_diff_in_its_first_thirty_lines() -> None:
    screen = "\n".join(README.splitlines()[:30])
    (diff,) = (block for block in blocks_of(screen) if block.language == "diff")
    assert "pip install -e ." in screen.partition("```diff")[0]
    assert "+    loss += acr(attn_a, attn_b)" in diff.source and screen.count("```") == 2


def test_the_diff_adds_as_many_lines_as_the_readme_says() -> None:
    (diff,) = (block for block in blocks_of(README) if block.language == "diff")
    added = [line for line in diff.source.splitlines() if line.startswith("+")]
    (said,) = re.findall(r"Add (\w+) lines", README)
    assert {8: "eight", 9: "nine", 10: "ten"}[len(added)] == said
    assert not [line for line in diff.source.splitlines() if line.startswith("-")]


def test_the_script_to_copy_is_the_diff_applied() -> None:
    diff, script = blocks_of(README)[:2]
    assert (diff.language, script.language) == ("diff", "python")
    left = [line for line in after_diff(diff.source).splitlines() if line]
    assert [line for line in script.source.splitlines() if line] == left


def test_the_readme_normalises_the_class_maps_that_it_scores() -> None:
    """Class maps by gradient may have any maximum. CamMeanIoU compares them with thresholds from 0 to 1."""
    (maps,) = (block.source for block in blocks_of(README) if "GradientCam(" in block.source)
    assert "cams = normalize_cam(" in maps


def test_the_newest_release_is_this_version() -> None:
    assert re.findall(r"^## \[([\d.]+)\]", CHANGELOG, re.M)[0] == acr_reg.__version__


def test_the_citation_names_the_software_and_the_paper() -> None:
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load(CITATION)
    assert (cited["cff-version"], cited["type"], cited["version"]) == ("1.2.0", "software", acr_reg.__version__)
    assert {"message", "title", "authors"} <= cited.keys()
    paper = cited["preferred-citation"]
    assert paper["title"] in README
    assert paper["identifiers"][0]["value"] == "arXiv:2308.04321"
    assert [person["family-names"] for person in paper["authors"]][::7] == ["Sun", "Barnes"]


def test_no_message_advises_installing_from_an_index_that_does_not_have_the_package() -> None:
    for folder in ("acr_reg", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"acr[-_]reg\[|pip install acr", path.read_text(encoding="utf-8")), path
