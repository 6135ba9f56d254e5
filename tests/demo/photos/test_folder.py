"""A folder of photos in VOC layout: what is read, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acr_reg.demo.photos.folder import open_folder
from acr_reg.errors import CommandError
from acr_reg.integrations.formats.masks import read_mask
from tests.support.attention import says
from tests.support.image_files import GREY, write_png

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


def test_photos_and_masks_are_turned_as_their_exif_says(make_photos: MakePhotos) -> None:
    root = make_photos()
    lying = open_folder(root).mask("c")
    for path in (root / "JPEGImages" / "c.jpg", root / "SegmentationClass" / "c.png"):
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(path) as image:
            image.copy().save(path, exif=exif)
    folder = open_folder(root)
    assert folder.photo("c").size == (40, 56)
    assert (folder.mask("c") == np.rot90(lying, -1)).all()


def test_a_mask_of_four_bits_keeps_its_ids(make_photos: MakePhotos) -> None:
    root = make_photos()
    path = root / "SegmentationClass" / "c.png"
    ids = read_mask(path)
    write_png(path, np.where(ids == 255, 15, ids), 4, GREY)
    assert sorted(np.unique(open_folder(root).mask("c"))) == [0, 1, 3, 255]


@pytest.mark.parametrize("format", ["JPEG", "WEBP", None])
def test_a_mask_that_may_not_hold_its_ids_is_refused_by_name(make_photos: MakePhotos, format: str | None) -> None:
    root = make_photos()
    path = root / "SegmentationClass" / "c.png"
    ids = read_mask(path)
    if format is None:
        Image.fromarray(ids.astype(np.uint16) * 2).save(path)
    else:
        Image.fromarray(ids).save(path, format=format)
    with pytest.raises(CommandError) as error:
        open_folder(root).mask("c")
    assert says(error, "c.png", "the id 510" if format is None else f"{format} file")


def test_a_photo_that_cannot_be_read_is_named(make_photos: MakePhotos) -> None:
    root = make_photos()
    (root / "JPEGImages" / "c.jpg").write_text("no photo")
    with pytest.raises(CommandError) as error:
        open_folder(root).photo("c")
    assert says(error, "c.jpg", "Save it as PNG")
