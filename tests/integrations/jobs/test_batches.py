"""Class maps in batches equal those of single images, and one bad image takes no other with it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from acr_reg import GradientCam, HorizontalFlip, Identity, Lattice
from acr_reg.integrations.cam_folder import write_cams
from acr_reg.integrations.formats import load_cams

SIZES = [(30, 44), (51, 33), (16, 16), (30, 44), (48, 30), (44, 30), (20, 20)]
NAMES = [f"{number:03}" for number in range(len(SIZES))]
LABELS = {name: np.roll([1, 0, number % 2, 0], number) for number, name in enumerate(NAMES)} | {"002": [0, 0, 0, 0]}


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.png" for name in NAMES]
    for path, size in zip(paths, SIZES, strict=True):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return paths


def transform(photo):
    """Wide photos have another shape than high ones."""
    return (
        torch.from_numpy(np.array(photo.resize((32, 16) if photo.width > photo.height else (16, 24))))
        .float()[..., 0]
        .expand(3, -1, -1)
        / 255
    )


def cam(images, labels):
    tokens = functional.avg_pool2d(images, 8) * torch.linspace(0.2, 1, images.shape[-1] // 8)
    return torch.cat([tokens, tokens[:, :1] * torch.arange(images.shape[-1] // 8)], 1) * 7


def loaded(folder):
    return {path.stem: load_cams(path) for path in folder.iterdir()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, maps in found.items():
        assert list(maps) == list(expected[name])
        for number, values in maps.items():
            np.testing.assert_allclose(values, expected[name][number], atol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("views", [[Identity()], [Identity(), HorizontalFlip()]])
def test_batches_give_the_maps_of_single_images(tmp_path, photos, batch_size, views):
    seen = []

    def noting(images, labels):
        assert labels.shape == (len(images), 4)
        seen.append((len(images), tuple(images.shape[2:])))
        return cam(images, labels), Lattice(images.shape[2] // 8, images.shape[3] // 8, (8.0, 8.0), (4.0, 0.0))

    options = {"views": views, "merge": "max"}
    write_cams(noting, photos, LABELS, tmp_path / "single", transform, **options)
    assert {count for count, _ in seen} == {1}
    seen.clear()
    report = write_cams(noting, photos, LABELS, tmp_path / "batches", transform, batch_size=batch_size, **options)
    assert report.written == NAMES
    assert sum(count for count, _ in seen) == len(NAMES) * len(views)
    assert max(count for count, _ in seen) == min(batch_size, 5)
    assert_close(loaded(tmp_path / "batches"), loaded(tmp_path / "single"))
    for name, size in zip(NAMES, SIZES, strict=True):
        assert all(values.shape == size for values in load_cams(tmp_path / "batches" / f"{name}.npy").values())


def test_batches_of_a_transformer(tmp_path, photos):
    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(16, 2, 32)

    class Vit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed, self.block = torch.nn.Conv2d(3, 16, 8, 8), block

        def forward(self, images):
            return self.block(self.patch_embed(images).flatten(2).permute(2, 0, 1)).mean(0)[:, :4]

    def square(photo):
        return torch.from_numpy(np.array(photo.resize((32, 32)))).permute(2, 0, 1).double() / 255

    with GradientCam(Vit().double(), start_layer=0, query="all", steps=1) as gradient_cam:
        for folder, batch_size in (("single", 1), ("batches", 4)):
            report = write_cams(gradient_cam, photos, LABELS, tmp_path / folder, square, batch_size=batch_size)
            assert report.written == NAMES
    assert_close(loaded(tmp_path / "batches"), loaded(tmp_path / "single"))


def test_few_photos_wait_for_others_of_their_shape(tmp_path):
    read, made = [], []

    def all_different(path):
        read.append(path)
        return torch.ones(1, 1 + len(read), 4)

    def counting(images, labels):
        made.extend(images)
        assert len(read) - len(made) <= 8
        return images

    names = [f"{number}" for number in range(40)]
    report = write_cams(
        counting, names, {name: [1] for name in names}, tmp_path, all_different, transform_takes="path", batch_size=2
    )
    assert report.written == names
    assert load_cams(tmp_path / "7.npy")[0].shape == (9, 4)


def test_a_bad_image_fails_alone(tmp_path, photos):
    def one_is_bad(images, labels):
        maps = cam(images, labels)
        if (labels == torch.as_tensor(LABELS["004"])).all(1).any():
            raise IndexError("no such class")
        return maps

    report = write_cams(one_is_bad, photos, LABELS, tmp_path / "batches", transform, batch_size=3)
    assert report.failed == {"000": "IndexError: no such class", "004": "IndexError: no such class"}
    assert report.written == [name for name in NAMES if name not in ("000", "004")]  # which have equal labels
    write_cams(cam, photos, LABELS, tmp_path / "single", transform)
    expected = loaded(tmp_path / "single")
    assert_close(loaded(tmp_path / "batches"), {name: expected[name] for name in report.written})


def test_a_batch_that_fails_as_a_whole_is_told_and_made_one_by_one(tmp_path, photos):
    def small_memory(images, labels):
        if len(images) > 1:
            raise MemoryError("no room")
        return cam(images, labels)

    with pytest.warns(UserWarning, match=r"batch of 2 images.*MemoryError: no room.*smaller batch_size"):
        report = write_cams(small_memory, photos, LABELS, tmp_path / "cams", transform, batch_size=2)
    assert report.written == NAMES


@pytest.mark.parametrize("wrong", [lambda maps: maps[:1], lambda maps: maps.repeat(2, 1, 1, 1), lambda maps: maps[0]])
def test_a_cam_for_single_images_is_refused_with_batches(tmp_path, photos, wrong):
    with pytest.raises(RuntimeError, match=r"^cam .*batch of 3 images.*\(3, 4, h, w\).*batch_size"):
        write_cams(lambda images, _: wrong(cam(images, _)), photos, LABELS, tmp_path, transform, batch_size=3)
    assert not list(tmp_path.glob("*.npy"))


def test_what_cam_returns_is_told(tmp_path, photos):
    def nothing(images, labels):
        return cam(images, labels) if labels[0, 0] else None

    report = write_cams(nothing, photos, LABELS, tmp_path, transform)
    assert set(report.failed.values()) == {
        "TypeError: cam returned a NoneType. Return maps (1, 4, h, w), as a GradientCam does, and not what the model "
        "returns."
    }


# ---------------------------------------------------------------- the transform


def test_a_transform_of_paths_reads_any_file(tmp_path):
    np.save(tmp_path / "bands.npy", np.random.default_rng(0).random((13, 5, 7), np.float32))
    np.save(tmp_path / "sized.npy", np.zeros((2, 3, 4), np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.png", exif=exif)
    bands = []

    def read(path):
        assert isinstance(path, Path)
        if path.stem == "sized":
            return torch.from_numpy(np.load(path)), (21, 22)
        return torch.from_numpy(np.load(path)) if path.suffix == ".npy" else torch.ones(3, 4, 4)

    def count_bands(images, labels):
        bands.append(images.shape[1])
        return images[:, :1]

    photos = [tmp_path / name for name in ("bands.npy", "sized.npy", "turned.png")]
    labels = {path.stem: [1] for path in photos}
    report = write_cams(count_bands, photos, labels, tmp_path / "cams", read, transform_takes="path")
    assert not report.failed
    assert bands == [13, 2, 3]
    sizes = {name: maps[0].shape for name, maps in loaded(tmp_path / "cams").items()}
    assert sizes == {"bands": (5, 7), "sized": (21, 22), "turned": (60, 40)}


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        (lambda photo: np.zeros((3, 4, 4)), "type ndarray"),
        (lambda photo: torch.zeros(1, 3, 4, 4), "shape (1, 3, 4, 4)"),
        (lambda photo: torch.zeros(4, 4), "shape (4, 4)"),
        (lambda photo: (torch.zeros(3, 4, 4), (4, 4)), "type tuple"),
    ],
)
def test_a_transform_that_never_works_ends_the_run(tmp_path, photos, wrong, fact):
    with pytest.raises(RuntimeError, match=r"^transform failed for each of .*000, 001, 002: .*\(bands, h, w\)") as told:
        write_cams(cam, photos, LABELS, tmp_path / "cams", wrong)
    assert fact in str(told.value)
    assert os.listdir(tmp_path / "cams") == []


def test_photos_that_cannot_be_read_are_no_fault_of_the_transform(tmp_path, photos):
    for path in photos[:4]:
        path.write_bytes(b"no photo")
    report = write_cams(cam, photos, LABELS, tmp_path / "cams", transform)
    assert (len(report.failed), len(report.written)) == (4, 3)


# ---------------------------------------------------------------- the device


def test_images_and_labels_come_to_the_device(tmp_path, photos):
    devices = []

    def elsewhere(images, labels):
        devices.append((images.device.type, labels.device.type))
        return torch.rand(len(images), 4, 2, 2)

    write_cams(elsewhere, photos, LABELS, tmp_path / "a", transform, device="meta", batch_size=2)
    assert set(devices) == {("meta", "meta")}
    devices.clear()
    write_cams(elsewhere, photos, LABELS, tmp_path / "b", transform)
    assert set(devices) == {("cpu", "cpu")}


def test_a_gradient_cam_gets_images_where_its_model_is(tmp_path, photos):
    class Noting(GradientCam):
        def __call__(self, images, labels=None, size=None):
            assert images.device.type == "meta"
            return torch.rand(len(images), 4, 2, 2)

    report = write_cams(Noting(torch.nn.Linear(2, 2, device="meta")), photos, LABELS, tmp_path, transform)
    assert report.written == NAMES


def test_mistakes_are_told_before_any_work(tmp_path, photos):
    for options, facts in (
        ({"batch_size": 0}, r"batch_size=0 "),
        ({"workers": -1}, r"workers=-1 "),
        ({"transform_takes": "tensor"}, r"transform_takes='tensor'.*\"photo\" or \"path\""),
    ):
        with pytest.raises(ValueError, match=facts):
            write_cams(cam, photos, LABELS, tmp_path / "cams", transform, **options)
