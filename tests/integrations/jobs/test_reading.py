"""Reading in worker processes: the same results, each failure its own, and no process left behind."""

import multiprocessing
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from acr_reg.integrations.cam_folder import write_cams
from acr_reg.integrations.formats import load_cams
from acr_reg.integrations.jobs.reading import Failure, StopRun, reading

NAMES = [f"{number:02}" for number in range(7)]


def read(name):
    if name == "03":
        raise ValueError("a bad value")
    if name == "05":
        raise OSError("no such file")
    if name == "06":
        raise MemoryError
    return torch.full((2,), float(name)), np.full(2, int(name)), name


@pytest.mark.parametrize("workers", [0, 1, 9])
def test_results_come_in_order_and_failures_as_results(workers):
    with reading(NAMES, read, workers) as items:
        found = dict(items)
    assert list(found) == NAMES
    assert found.pop("03") == Failure("a bad value")
    assert found.pop("05") == Failure("OSError: no such file")
    assert found.pop("06").text.startswith("MemoryError: The memory is too small for this image. Use fewer workers")
    for name, (tensor, array, text) in found.items():
        assert tensor.tolist() == array.tolist() == [float(name)] * 2
        assert isinstance(array, np.ndarray)  # DataLoader would make it a tensor
        assert text == name
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_read(workers):
    with reading([], read, workers) as items:
        assert list(items) == []


def draw(name):
    return torch.rand(1).item(), np.random.random(), random.random()  # noqa: NPY002


def test_workers_draw_different_random_numbers():
    with reading(NAMES, draw, 2) as items:
        draws = list(zip(*(drawn for _, drawn in items), strict=True))
    assert [len(set(each)) for each in draws] == [len(NAMES)] * 3


def kill_worker(name):
    os._exit(3)


def test_a_worker_that_dies_ends_the_run():
    with reading(NAMES, kill_worker, 1) as items, pytest.raises(StopRun, match=r"died: .*\w\. Memory.*fewer workers="):
        list(items)
    assert not multiprocessing.active_children()


@pytest.fixture
def _spawning():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("_spawning")
def test_a_function_that_cannot_be_sent_to_a_worker_is_told():
    with pytest.raises(ValueError, match=r"could not start: .*lambda.*top of a module.*workers=0"):  # noqa: SIM117
        with reading(NAMES, lambda name: name, 1):
            pass
    assert not multiprocessing.active_children()


def sleep(name):
    time.sleep(60)


def test_an_interruption_leaves_no_worker(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # s that it waits for a worker's end
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt) as kept:  # noqa: SIM117 - with its traceback, as a notebook keeps it
        with reading(NAMES, sleep, 1) as items:
            list(items)
    assert not multiprocessing.active_children()
    assert kept.value


# ---------------------------------------------------------------- write_cams


@pytest.fixture
def photos(tmp_path):
    for name in NAMES:
        Image.fromarray(np.full((4, 6, 3), int(name), np.uint8)).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in NAMES]


LABELS = {name: [1] for name in NAMES}


def transform(photo):
    values = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255
    if values.max() == 2 / 255:
        raise IndexError("a bad photo")
    return values.requires_grad_() * 2  # which a worker can send only detached


def bands(images, labels):
    return images[:, :1]


def test_workers_make_the_same_files(tmp_path, photos, capsys):
    for workers in (0, 2):
        report = write_cams(bands, photos, LABELS, tmp_path / f"{workers}", transform, workers=workers, batch_size=3)
        assert report.failed == {"02": "IndexError: a bad photo"}
        assert report.written == [name for name in NAMES if name != "02"]
    assert capsys.readouterr().err.count("02 skipped: IndexError: a bad photo") == 2
    for name in report.written:
        here, there = (load_cams(tmp_path / folder / f"{name}.npy")[0] for folder in ("0", "2"))
        np.testing.assert_array_equal(here, there)


def interrupted(images, labels):
    raise KeyboardInterrupt


def test_an_interruption_of_cam_leaves_no_worker_and_no_file(tmp_path, photos):
    with pytest.raises(KeyboardInterrupt) as kept:
        write_cams(interrupted, photos, LABELS, tmp_path / "cams", transform, workers=2)
    assert not multiprocessing.active_children()
    assert os.listdir(tmp_path / "cams") == []
    assert kept.value


def narrower(path):
    return torch.ones(1, 4, 1 + int(path.stem))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux, to count open files")
def test_images_that_wait_hold_no_open_file(tmp_path):
    """Of the 1024 that a process may have: 4 batches of images wait for their like, each from a worker."""
    open_files = []

    def counting(images, labels):
        open_files.append(len(os.listdir("/proc/self/fd")))
        return images

    names = [f"{number}" for number in range(60)]
    before, labels = len(os.listdir("/proc/self/fd")), {name: [1] for name in names}
    options = {"transform_takes": "path", "workers": 1, "batch_size": 12, "progress": False}
    assert write_cams(counting, names, labels, tmp_path, narrower, **options).written == names
    assert max(open_files) - before < 30


def on_gpu(photo):
    return torch.zeros(3, 4, 4, device="meta")


def no_gpu(photo):
    raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA, use the 'spawn' start method")


@pytest.mark.parametrize("moving", [on_gpu, no_gpu])
def test_a_transform_that_uses_a_gpu_in_a_worker_is_told(tmp_path, photos, moving):
    with pytest.raises(StopRun, match=r"transform uses a GPU in a worker.*device=.*workers=0"):
        write_cams(bands, photos, LABELS, tmp_path / "cams", moving, workers=1)
    assert not multiprocessing.active_children()
    assert os.listdir(tmp_path / "cams") == []
