"""Scoring the files of a list: in this process, in workers and over several processes, with equal counts."""

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from acr_reg.integrations import scoring
from acr_reg.integrations.formats import save_cams
from acr_reg.integrations.formats.masks import save_mask
from acr_reg.integrations.jobs.shares import Share
from acr_reg.integrations.scoring import Sample, find_samples, read_list, score_cams, score_labels
from acr_reg.metrics import CamMeanIoU, LabelMeanIoU
from tests.support.paths import ROOT

IMAGES = 60  # enough for workers


class Folder:
    """Images with class maps, label maps and masks, their samples, and the counts of the metrics alone."""

    def __init__(self, folder, images=IMAGES):
        rng = np.random.default_rng(0)
        names = [f"image_{number}" for number in range(images)]
        for kind in ("cams", "labels", "masks"):
            (folder / kind).mkdir()
        (folder / "list.txt").write_text("\n".join(names))
        self.cams, self.labels = CamMeanIoU(4), LabelMeanIoU(4)
        for name in names:
            size = tuple(rng.integers(4, 9, 2))
            mask, labels = (rng.choice([0, 1, 2, 3, 255], size).astype(np.uint8) for _ in range(2))
            maps = {number: rng.random(size).astype(np.float32) for number in rng.permutation(3)[: rng.integers(0, 4)]}
            save_cams(folder / "cams" / f"{name}.npy", maps)
            save_mask(folder / "labels" / f"{name}.png", labels)
            save_mask(folder / "masks" / f"{name}.png", mask)
            stacked = np.stack(list(maps.values())) if maps else np.zeros((0, *size))
            self.cams.update(stacked, mask, [number + 1 for number in maps])
            self.labels.update(labels, mask)
        entries = read_list(folder / "list.txt")
        self.path = folder
        self.of_cams = find_samples(entries, folder / "cams", folder / "masks")
        self.of_labels = find_samples(entries, folder / "labels", folder / "masks", "labels")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def assert_equal_counts(found, expected):
    for each in ("predicted", "correct", "truth"):
        np.testing.assert_array_equal(getattr(found.counts(), each), getattr(expected.counts(), each))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_counts_what_the_metric_alone_counts(folder, workers):
    assert_equal_counts(score_cams(folder.of_cams, CamMeanIoU(4), workers=workers, progress=False), folder.cams)
    found = score_labels(folder.of_labels, LabelMeanIoU(4), workers=workers, progress=False)
    np.testing.assert_array_equal(found.confusion(), folder.labels.confusion())


def test_counts_are_added_to_those_that_the_metric_has_and_it_stays_as_it_is(folder):
    metric = score_cams(folder.of_cams[:20], CamMeanIoU(4), progress=False)
    before = metric.counts().predicted
    assert_equal_counts(score_cams(folder.of_cams[20:], metric, progress=False), folder.cams)
    np.testing.assert_array_equal(metric.counts().predicted, before)


def test_few_images_start_no_worker(folder, monkeypatch):
    asked = []
    reading = scoring.reading

    def recorded(names, read, workers):
        asked.append(workers)
        return reading(names, read, workers)

    monkeypatch.setattr(scoring, "reading", recorded)
    score_cams(folder.of_cams[:49], CamMeanIoU(4), workers=2, progress=False)
    score_cams(folder.of_cams[:50], CamMeanIoU(4), workers=2, progress=False)
    assert asked == [0, 2]


def test_what_a_worker_does_can_be_sent_to_it_where_processes_are_not_forked(folder, monkeypatch):
    reading = scoring.reading
    monkeypatch.setattr(scoring, "reading", lambda names, read, _: reading(names, pickle.loads(pickle.dumps(read)), 0))
    found = score_cams(folder.of_cams, CamMeanIoU(4), "psa", resize=True, workers=2, progress=False)
    assert_equal_counts(found, folder.cams)


class TwoMeet:
    """What the first of two processes sees: its own value, and that of the other."""

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        return [value, self.other(value)]

    def leave(self, failed):
        pass


def test_each_process_counts_its_share_and_has_the_counts_of_all(folder):
    rest = score_cams(folder.of_cams[1::2], CamMeanIoU(4), progress=False)
    share = Share(0, 2, TwoMeet(lambda value: rest))
    assert_equal_counts(score_cams(folder.of_cams, CamMeanIoU(4), progress=False, share=share), folder.cams)


def test_an_error_in_another_process_is_raised_here(folder):
    (folder.path / "cams" / "image_0.npy").write_bytes(b"damaged")
    failures = []
    share = Share(0, 2, TwoMeet(lambda value: failures.append(value) or value))
    with pytest.raises(ValueError, match=r"image_0\.npy"):
        score_cams(folder.of_cams, CamMeanIoU(4), progress=False, share=share)
    share = Share(0, 2, TwoMeet(lambda value: failures[0]))
    with pytest.raises(ValueError, match=r"image_0\.npy"):
        score_cams(folder.of_cams[1:], CamMeanIoU(4), progress=False, share=share)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def other_size(path):
    save_mask(path, np.zeros((30, 31), np.uint8))


def large_ids(path):
    save_mask(path, np.asarray(Image.open(path)) // 100 + 40)


def negative(path):
    save_cams(path, {40: np.zeros((3, 3))})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("cams/image_41.npy", truncate, r"cams/image_41\.npy"),
        ("cams/image_41.npy", os.remove, r"cams/image_41\.npy"),
        ("cams/image_41.npy", negative, r"cams/image_41\.npy holds classes \[40\], and 4 ids allow 0 to 2"),
        ("masks/image_41.png", truncate, r"masks/image_41\.png"),
        ("masks/image_41.png", other_size, r"masks/image_41\.png is 30x31 \(HxW\).*--resize"),
        ("masks/image_41.png", large_ids, r"masks/image_41\.png: mask with ids"),
    ],
)
def test_a_bad_file_is_named_in_one_message_from_a_worker_too(folder, file, damage, message, workers):
    damage(folder.path / file)
    with pytest.raises(ValueError, match=message) as caught:
        score_cams(folder.of_cams, CamMeanIoU(4), workers=workers, progress=False)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("file", ["labels/image_3.png", "masks/image_3.png"])
@pytest.mark.parametrize("damage", [truncate, os.remove, other_size, large_ids])
def test_a_bad_label_map_or_mask_is_named(folder, file, damage):
    damage(folder.path / file)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        score_labels(folder.of_labels, LabelMeanIoU(4), progress=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [(SyntaxError("broken PNG file"), "SyntaxError: broken PNG file"), (MemoryError(), "The memory is too small")],
)
def test_an_unforeseen_error_names_the_files(folder, monkeypatch, error, message):
    def broken(path):
        raise error

    monkeypatch.setattr(scoring, "read_mask", broken)
    with pytest.raises(ValueError, match=rf"image_0\.npy with .*image_0\.png: {message}"):
        score_cams(folder.of_cams, CamMeanIoU(4), progress=False)


def sample(folder, labels, mask):
    paths = [folder / "labels.png", folder / "mask.png"]
    for path, ids in zip(paths, (labels, mask), strict=True):
        save_mask(path, np.asarray(ids, np.uint8))
    return Sample("a", *paths)


def test_labels_are_resized_to_the_nearest_pixel(tmp_path):
    labels = np.array([[0, 1, 2], [3, 1, 0]])
    enlarged = sample(tmp_path, labels, np.kron(labels, np.ones((2, 3))))
    assert score_labels([enlarged], LabelMeanIoU(4), resize=True, progress=False).compute().miou == 1
    reduced = sample(tmp_path, np.kron(labels, np.ones((3, 5))), labels)  # odd: the middle pixel
    assert score_labels([reduced], LabelMeanIoU(4), resize=True, progress=False).compute().miou == 1
    uneven = sample(tmp_path, [[0, 1, 2]], [[0, 0, 1, 2, 2]])
    assert score_labels([uneven], LabelMeanIoU(4), resize=True, progress=False).compute().miou == 1


@pytest.mark.parametrize(
    ("mask", "background", "ignore_index", "message"),
    [
        ([[0, 255]], True, 255, r"every pixel is 0 \(background\) or 255 \(ignored\).*--ignore-index"),
        ([[0, 0]], True, 255, r"every pixel is 0 \(background\) or 255"),
        ([[0, 0]], True, None, r"every pixel is 0 \(background\)\."),
        ([[255, 255]], True, 255, r"every pixel is 255 \(ignored\)\."),
        ([[255, 255]], False, 255, r"every pixel is 255 \(ignored\)\."),
        ([[0, 3]], True, 3, r"every pixel is 0 \(background\) or 3 \(ignored\)"),
    ],
)
def test_masks_without_a_class_are_refused(tmp_path, mask, background, ignore_index, message):
    labels = sample(tmp_path, mask, mask)
    with pytest.raises(ValueError, match=f"The masks hold no class: {message}"):
        score_labels([labels], LabelMeanIoU(4, ignore_index), background=background, progress=False)
    save_cams(tmp_path / "maps.npy", {0: np.zeros((1, 2))})
    cams = Sample("a", tmp_path / "maps.npy", labels.mask)
    with pytest.raises(ValueError, match=f"The masks hold no class: {message}"):
        score_cams([cams], CamMeanIoU(4, [0.5], background, ignore_index), progress=False)


def test_without_background_masks_of_class_0_alone_have_a_class(tmp_path):
    labels = sample(tmp_path, [[0, 0]], [[0, 255]])
    assert score_labels([labels], LabelMeanIoU(4), background=False, progress=False).compute().miou == 1


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from acr_reg.integrations import scoring
from acr_reg.metrics import CamMeanIoU

def slow(path):
    (Path(sys.argv[1]) / f"worker_{os.getpid()}").touch()
    time.sleep(20)
    return read_mask(path)

read_mask, scoring.read_mask = scoring.read_mask, slow
folder = Path(sys.argv[1])
samples = scoring.find_samples(scoring.read_list(folder / "list.txt"), folder / "cams", folder / "masks")
if __name__ == "__main__":
    try:
        scoring.score_cams(samples, CamMeanIoU(4), workers=2, progress=False)
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are for POSIX")
def test_ctrl_c_leaves_no_worker(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, tmp_path]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("worker_*"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "interrupted\n", "")
    workers = [int(path.name.removeprefix("worker_")) for path in tmp_path.glob("worker_*")]
    assert len(workers) == 2
    assert not any(is_running(worker) for worker in workers)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
