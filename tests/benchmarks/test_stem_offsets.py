"""The measurement of stems that docs/guides/views.md quotes: SegFormer's own stem, and the figures written."""

import json

import pytest

from benchmarks.marked_page import filled
from tests.support.paths import ROOT

pytest.importorskip("transformers")
from benchmarks.coverage import stem_offsets

MIT = [(-1.5, 4, 32), (-3.5, 8, 32), (-7.5, 16, 32), (-15.5, 32, 32)]  # offset, stride of queries, of keys


@pytest.fixture(scope="module")
def measured():
    return stem_offsets.measure("SegFormer", stem_offsets.Config(image=(128, 160), batch=1))


def test_offsets_of_segformer_are_those_of_its_convolutions(measured):
    assert [(r.query[0], r.query[1], r.key[1]) for r in measured] == MIT
    assert all(r.key[0] == r.query[0] for r in measured)


def test_tokens_matched_by_their_centres_are_nearer(measured):
    for result in measured:
        before, after = result.query_apart
        assert before > 0.5 * result.query[1]
        assert after < 0.5 * before
    assert sum(r.key_apart[1] for r in measured) < 0.5 * sum(r.key_apart[0] for r in measured)


def test_the_loss_of_a_flipped_pair_falls(measured):
    for result in measured:
        assert result.loss[1] < result.loss[0]
        assert result.loss_mirrored[1] < result.loss_mirrored[0]
    assert measured[-1].loss_mirrored[1] < 0.5 * measured[-1].loss_mirrored[0]


def test_the_page_shows_what_was_written():
    written = json.loads((ROOT / "benchmarks/coverage/stem_offsets.json").read_text(encoding="utf-8"))["results"]
    rows = [r for r in written if r["model"] == "SegFormer"]
    assert [(r["query"][0], r["query"][1], r["key"][1]) for r in rows] == MIT
    page = stem_offsets.PAGE.read_text(encoding="utf-8")
    assert filled(page, stem_offsets.MARKER, stem_offsets.table(written)) == page
    assert page.count(" → ") == 4 * len(rows)
