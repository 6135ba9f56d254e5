"""Class names for tables and pictures: those of VOC and COCO, and of files."""

import json

import pytest

from acr_reg.integrations.formats.class_names import class_names


def test_voc_and_coco_have_their_names_in_the_order_of_their_ids():
    voc, coco = class_names("voc", 21), class_names("coco", 81)
    assert [voc[number] for number in (0, 1, 8, 15, 20)] == ["background", "aeroplane", "cat", "person", "tvmonitor"]
    assert [coco[number] for number in (0, 1, 12, 80)] == ["background", "person", "stop sign", "toothbrush"]
    assert len(set(voc)) == 21
    assert len(set(coco)) == 81


def test_without_background_id_0_is_the_first_class():
    assert class_names("voc", 20, background=False)[0] == "aeroplane"
    assert class_names("coco", 80, background=False)[79] == "toothbrush"


@pytest.mark.parametrize("text", ["cat\nfire hydrant\n", "\ufeffcat\r\n fire hydrant \r\n\r\n", "cat\nfire hydrant"])
def test_a_file_may_leave_out_the_background(tmp_path, text):
    path = tmp_path / "names.txt"
    path.write_bytes(text.encode())
    assert class_names(str(path), 3) == ["background", "cat", "fire hydrant"]
    assert class_names(str(path), 2) == ["cat", "fire hydrant"]  # the file names the background as it likes
    assert class_names(str(path), 2, background=False) == ["cat", "fire hydrant"]


@pytest.mark.parametrize(
    ("source", "num_classes", "background", "message"),
    [
        ("voc", 81, True, "voc has 20 names for 81 ids.*81, or 80 without background"),
        ("voc", 21, False, "voc has 20 names for 21 ids.*with 21"),
        ("coco", 21, True, "coco has 80 names for 21 ids"),
        ("names.txt", 4, True, r"names\.txt has 2 names for 4 ids.*4, or 3 without background"),
        ("gap.txt", 3, True, r"gap\.txt, line 2 is empty"),
        ("absent.txt", 3, True, r"absent\.txt cannot be read.*voc, coco or a text file"),
        ("VOC", 21, True, "VOC cannot be read.*voc, coco"),
        (".", 21, True, "cannot be read"),
        ("image.png", 3, True, r"image\.png cannot be read"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, monkeypatch, source, num_classes, background, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "gap.txt").write_text("cat\n\ndog\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=message):
        class_names(source, num_classes, background)


def test_a_known_set_has_a_background_where_there_is_one():
    assert class_names("voc", None) == class_names("voc", 21)
    assert class_names("coco", None, background=False) == class_names("coco", 80, background=False)


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
def test_a_file_has_as_many_names_as_there_are_or_as_are_asked_for(tmp_path, form, names, background, expected):
    file = tmp_path / form
    file.write_text("\n".join(names) if form.endswith("txt") else json.dumps({"classes": names, "labels": {}}))
    assert class_names(str(file), None, background) == expected
    assert class_names(str(file), len(expected), background) == expected
    with pytest.raises(ValueError, match=rf"{form} has {len(names)} names for 9 ids"):
        class_names(str(file), 9, background)


@pytest.mark.parametrize("content", ["[1, 2]", '{"labels": {}}', '{"classes": "cow"}', '{"classes": [1]}', "{", "3"])
def test_a_json_file_without_names_is_refused_by_name(tmp_path, content):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=r'names\.json holds no list of names.*"classes"'):
        class_names(str(tmp_path / "names.json"), None)
