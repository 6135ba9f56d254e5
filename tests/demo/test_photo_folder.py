"""A folder of photos in VOC layout: what is read, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from acr_reg.demo.photo_folder import open_folder
from acr_reg.errors import CommandError
from tests.support.attention import says

MakePhotos = Callable[..., Path]


def test_classes_left_out_become_unknown_and_photos_of_them_alone_are_dropped(make_photos: MakePhotos) -> None:
    folder = open_folder(make_photos(), ["dog", "cat"])
    assert folder.background
    assert folder.names == ("background", "cat", "dog")
    assert folder.splits == {"train": ["a", "b", "c"], "dev": ["e", "f"], "test": ["c", "e"]}
    assert folder.label_matrix(["a", "c", "e"]).tolist() == [[1, 0], [1, 1], [1, 0]]
    mask = folder.mask("e")  # cat, and a bird
    assert mask.shape == (40, 56)
    assert sorted(np.unique(mask)) == [0, 1, 255]
    assert (mask == 255).sum() == 4 * 56 + 30 * 14
    assert sorted(np.unique(folder.mask("c"))) == [0, 1, 2, 255]


def test_without_a_background_class_ids_start_at_the_first_class(make_photos: MakePhotos) -> None:
    folder = open_folder(make_photos(["cat", "bird", "dog"]))
    assert not folder.background
    assert folder.names == ("cat", "bird", "dog")
    assert sorted(np.unique(folder.mask("c"))) == [0, 2, 255]
    assert folder.label_matrix(["c"]).tolist() == [[1, 0, 1]]


def test_an_unknown_class_is_refused_with_the_classes_to_choose_from(make_photos: MakePhotos) -> None:
    with pytest.raises(CommandError) as error:
        open_folder(make_photos(), ["cat", "horse"])
    assert says(error, "no class horse.", "--classes from cat, bird, dog.")


@pytest.mark.parametrize(
    ("file", "content", "facts"),
    [
        ("ImageSets/dev.txt", "e\nz\n", ("1 image ids without labels", "the first z", "image_labels.json")),
        ("ImageSets/dev.txt", "\n", ("empty", "image ids")),
        ("ImageSets/test.txt", None, ("cannot be read", "No such file", "image ids")),
        ("image_labels.json", "[]", ("cannot be read", '{"classes": ', '"labels": ')),
    ],
)
def test_errors_say_what_the_folder_lacks(
    make_photos: MakePhotos, file: str, content: str | None, facts: tuple[str, ...]
) -> None:
    root = make_photos()
    (root / file).unlink()
    if content is not None:
        (root / file).write_text(content)
    with pytest.raises(CommandError) as error:
        open_folder(root)
    assert says(error, str(root / file), *facts)


def test_a_folder_without_masks_is_refused(make_photos: MakePhotos) -> None:
    root = make_photos()
    (root / "SegmentationClass").rename(root / "Masks")
    with pytest.raises(CommandError) as error:
        open_folder(root)
    assert says(error, str(root), "SegmentationClassAug or SegmentationClass", "Add the masks")
