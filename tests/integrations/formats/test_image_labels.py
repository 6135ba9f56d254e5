"""Image labels are read from every file that people have, and an image is found in them whichever way it is keyed."""

import json
import os
import pickle
import types

import numpy as np
import pytest
import torch

from acr_reg.integrations.formats import image_labels
from acr_reg.integrations.formats.image_labels import labels_of, load_image_labels
from tests.support.class_maps import Call, write_npy

PERSON = np.eye(20, dtype=np.float32)[14]
DOG = np.eye(20, dtype=np.float32)[11]
VOC = ["2007_000032", "2012_004331"]


def npy(path, content):
    np.save(path, content)
    return path


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("key", [str, np.str_, int, np.int32, np.int64])
def test_dicts_of_psa_and_irn_are_read_under_the_names_of_the_photos(tmp_path, key, protocol):
    """PSA keys by text, lists from np.loadtxt by numpy's text, IRN by numbers."""
    content = {key(VOC[0]): PERSON, key(VOC[1]): DOG}
    path = write_npy(tmp_path / "cls_labels.npy", pickle.dumps(np.array(content, dtype=object), protocol=protocol))
    labels = load_image_labels(str(path))
    assert list(labels) == VOC
    assert all(type(name) is str for name in labels)
    assert labels[VOC[0]].tolist() == PERSON.tolist()
    assert labels[VOC[1]].tolist() == DOG.tolist()


def test_numbers_of_coco_become_its_names(tmp_path):
    labels = load_image_labels(npy(tmp_path / "cls_labels.npy", {np.int32(139): PERSON, np.int32(581929): DOG}))
    assert list(labels) == ["000000000139", "000000581929"]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float64])
def test_labels_of_every_type_are_read(tmp_path, dtype):
    labels = load_image_labels(npy(tmp_path / "cls_labels.npy", {"a": PERSON.astype(dtype)}))
    assert labels["a"].dtype == dtype
    assert labels["a"].tolist() == PERSON.astype(dtype).tolist()
    assert load_image_labels(npy(tmp_path / "tensors.npy", {"a": torch.from_numpy(PERSON)}))["a"].sum() == 1


def test_the_librarys_own_lists_are_read_without_the_background(tmp_path):
    path = tmp_path / "image_labels.json"
    path.write_text(json.dumps({"classes": ["background", "cat", "dog"], "labels": {"a": [2], "b": [1, 2], "c": []}}))
    found = {name: values.tolist() for name, values in load_image_labels(path).items()}
    assert found == {"a": [0, 1], "b": [1, 1], "c": [0, 0]}
    path.write_text(json.dumps({"classes": ["grass", "sky"], "labels": {"a": [0]}}))
    assert load_image_labels(path)["a"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "a dict"),
        (PERSON, r"float32 array of shape \(20,\), not a dict"),
        ({"a": PERSON, "b": DOG[:5]}, r"differ in length.*20.*5"),
        ({"a": PERSON * np.nan}, r"image a hold NaN"),
        ({"a": PERSON, "b": np.array([np.inf, *PERSON[1:]])}, r"image b hold NaN or infinity"),
        ({"a": np.zeros((2, 20))}, r"image a are a float64 array of shape \(2, 20\)"),
        ({"a": "person"}, r"image a are"),
        ({2007000032: PERSON, "2007_000032": DOG}, r"Two keys mean image 2007_000032.*Keep one"),
        ({2.5: PERSON}, r"The key 2\.5 is not the name"),
        ({True: PERSON}, r"The key True is not the name"),
        ({-3: PERSON}, r"The key -3 is not the name"),
    ],
)
def test_other_contents_are_refused_with_the_path(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"cls_labels\.npy: .*{message}"):
        load_image_labels(npy(tmp_path / "cls_labels.npy", content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "does not hold"),
        ('{"labels": {}}', "does not hold"),
        ("{", "Expecting"),
        ('{"classes": ["background", "cat"], "labels": {"a": [0]}}', "Image a has the class 0. Use 1 to 1"),
        ('{"classes": ["cat"], "labels": {"a": [1]}}', "Image a has the class 1. Use 0 to 0"),
        ('{"classes": ["cat"], "labels": {"a": [0.0]}}', r"Image a has the class 0\.0"),
        ('{"classes": ["cat"], "labels": {"a": [true]}}', r"Image a has the class True"),
        ('{"classes": ["cat"], "labels": {"a": 0}}', "int"),
        ('{"classes": ["cat"], "labels": {}}', "Save a dict"),
        ('{"classes": ["cat"], "labels": {"a": [0], "b": [], "a": []}}', "has a more than once"),
        ("[" * 100_000, "damaged: RecursionError"),
    ],
)
def test_other_lists_are_refused_with_the_path(tmp_path, text, message):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=rf"labels\.json: .*{message}"):
        load_image_labels(tmp_path / "labels.json")


def test_a_list_whose_numbers_would_not_fit_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_labels, "MOST_LABELS", 7)
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"classes": ["cat", "dog"], "labels": {name: [] for name in "abcd"}}))
    with pytest.raises(ValueError, match=r"labels\.json: The file has more than 7 classes times images"):
        load_image_labels(path)


def test_missing_files_and_other_endings_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        load_image_labels(tmp_path / "none.npy")
    with pytest.raises(ValueError, match=r"labels\.txt: .*'\.txt'.*\.npy or \.json"):
        load_image_labels(tmp_path / "labels.txt")


@pytest.mark.parametrize("place", ["key", "value"])
def test_code_in_a_file_is_not_run(tmp_path, place):
    mark = tmp_path / "mark"
    call = Call(os.system, f"touch {mark}")
    content = {call: PERSON} if place == "key" else {"a": call}
    path = write_npy(tmp_path / "cls_labels.npy", pickle.dumps(np.array(content, dtype=object), protocol=2))
    with pytest.raises(ValueError, match=r"cls_labels\.npy: The file asks for .*not read"):
        load_image_labels(path)
    assert not mark.exists()


def test_forged_text_keys_are_refused(tmp_path):
    """Bytes that are no text, which numpy itself would hand to Python unchecked."""
    whole = pickle.dumps(np.array({np.str_("ab"): PERSON}, dtype=object), protocol=3)
    text = "ab".encode("utf-32-le")
    assert text in whole
    for forged in (b"\xff" * 8, b"\x00\xd8\x00\x00" * 2):
        with pytest.raises(ValueError, match=r"cls_labels\.npy: .*utf-32"):
            load_image_labels(write_npy(tmp_path / "cls_labels.npy", whole.replace(text, forged)))


# ---------------------------------------------------------------- looking an image up


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("2007_000032", "2007_000032"),
        (2007000032, "2007_000032"),
        (np.int32(2007000032), "2007_000032"),
        ("2007_000032", "2007000032"),
        (139, "000000000139"),
        (139, "139"),
        (139, "COCO_train2014_000000000139"),
        (139, "COCO_val2014_000000000139"),
        ("000000000139", "COCO_train2014_000000000139"),
        ("COCO_train2014_000000000139", "000000000139"),
        ("COCO_val2014_000000000139", "000000000139"),
        ("10_10_s", "10_10_s"),
    ],
)
def test_an_image_is_found_whichever_way_its_data_set_keys_it(key, name):
    assert labels_of({key: PERSON, "other": DOG, 7: DOG}, name).tolist() == PERSON.tolist()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (12, "1_2"),
        (139, "image_000000000139"),
        (7000032, "7_000032"),
        (10, "10_10_s"),
        ("2007_000032.jpg", "2007_000033"),
        (139, "COCO_train2014_000000000138"),
        (12, "\u0661\u0662"),  # digits of another script, which int() would read
        (0, ""),
    ],
)
def test_numbers_are_not_guessed_from_other_names(key, name):
    with pytest.raises(KeyError, match=f"no labels of image {name}"):
        labels_of({key: PERSON}, name)


def test_two_keys_that_fit_must_agree():
    train, val = "COCO_train2014_000000000139", "COCO_val2014_000000000139"
    with pytest.raises(KeyError, match=r"COCO_train2014_.*COCO_val2014_.*all fit image 000000000139.*Keep one"):
        labels_of({train: PERSON, val: DOG}, "000000000139")
    with pytest.raises(KeyError, match=r"139, '000000000139'.*all fit image COCO_train"):
        labels_of({139: PERSON, "000000000139": DOG}, train)
    assert labels_of({train: PERSON, val: PERSON}, "000000000139").tolist() == PERSON.tolist()
    assert labels_of({train: PERSON, val: DOG, 139: DOG}, train).tolist() == PERSON.tolist()  # the name itself decides


def test_labels_may_be_lists_tensors_or_rows():
    for values in (PERSON.tolist(), torch.from_numpy(PERSON).bfloat16(), PERSON[None], torch.tensor(PERSON > 0)):
        assert labels_of({"a": values}, "a").tolist() == PERSON.tolist()
    assert labels_of(types.MappingProxyType({"a": PERSON}), "a").tolist() == PERSON.tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (PERSON * np.nan, "image a hold NaN"),
        (torch.full((20,), torch.nan), "image a hold NaN"),
        (np.zeros((2, 20)), r"image a are a float64 array of shape \(2, 20\)"),
        (3, r"image a are a int64 array of shape \(\)"),
        ("cat", "image a are"),
        (["cat"], "image a are"),
        (None, "image a are"),
    ],
)
def test_labels_that_are_no_vector_of_numbers_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        labels_of({"a": values}, "a")


def test_what_np_load_returns_without_item_is_refused_with_the_way_out(tmp_path):
    loaded = np.load(npy(tmp_path / "cls_labels.npy", {"a": PERSON}), allow_pickle=True)
    with pytest.raises(ValueError, match=r"object array of shape \(\), not a dict.*load_image_labels.*\.item\(\)"):
        labels_of(loaded, "a")
    assert labels_of(loaded.item(), "a").tolist() == PERSON.tolist()
