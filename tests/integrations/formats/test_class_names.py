"""Names of classes come from the sets everybody knows, or from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acr_reg.integrations.formats.class_names import class_names


@pytest.mark.parametrize(("source", "count", "first"), [("voc", 20, "aeroplane"), ("coco", 80, "person")])
def test_known_sets_have_a_background_where_there_is_one(source: str, count: int, first: str) -> None:
    assert class_names(source, count + 1)[:2] == class_names(source, None)[:2] == ["background", first]
    assert len(class_names(source, None)) == count + 1
    assert class_names(source, None, background=False) == class_names(source, count, background=False)
    assert class_names(source, None, background=False)[0] == first


@pytest.mark.parametrize("form", ["names.txt", "image_labels.JSON"])
@pytest.mark.parametrize(
    ("names", "background", "expected"),
    [
        (["cow", "traffic light"], True, ["background", "cow", "traffic light"]),
        (["background", "cow"], True, ["background", "cow"]),
        (["building", "grass"], False, ["building", "grass"]),
        (["background", "cow"], False, ["background", "cow"]),
    ],
)
def test_a_file_has_as_many_names_as_there_are_or_as_are_asked_for(
    tmp_path: Path, form: str, names: list[str], background: bool, expected: list[str]
) -> None:
    file = tmp_path / form
    file.write_text("\n".join(names) if form.endswith("txt") else json.dumps({"classes": names, "labels": {}}))
    assert class_names(str(file), None, background) == expected
    assert class_names(str(file), len(expected), background) == expected
    with pytest.raises(ValueError, match=rf"{form} has {len(names)} names for 9 ids"):
        class_names(str(file), 9, background)


@pytest.mark.parametrize("content", ["[1, 2]", '{"labels": {}}', '{"classes": "cow"}', '{"classes": [1]}', "{", "3"])
def test_a_json_file_without_names_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=r'names\.json holds no list of names.*"classes"'):
        class_names(str(tmp_path / "names.json"), None)
