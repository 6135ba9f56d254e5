"""Saving beside the work, with nothing lost that was made."""

import threading

import numpy as np
import pytest
import torch

from acr_reg.integrations.cam_folder import write_cams
from acr_reg.integrations.jobs import saving as module
from acr_reg.integrations.jobs.folder import CamFolder
from acr_reg.integrations.jobs.saving import saving


def test_work_goes_on_while_a_file_is_written(tmp_path, monkeypatch):
    second_begun = threading.Event()
    save = CamFolder.save

    def slow(self, name, maps, size):
        assert second_begun.wait(20)
        save(self, name, maps, size)

    def cam(images, labels):
        if images.max() == 1:
            second_begun.set()
        return images

    monkeypatch.setattr(CamFolder, "save", slow)
    report = write_cams(
        cam,
        ["0", "1"],
        {"0": [1], "1": [1]},
        tmp_path,
        lambda path: torch.full((1, 2, 2), float(path.name)),
        transform_takes="path",
    )
    assert report.written == ["0", "1"]


def test_few_results_wait_and_each_is_told_in_the_thread_of_the_caller():
    written, told = [], []
    with saving() as saver:
        for number in range(50):
            saver.save(lambda number=number: written.append(number), lambda e: told.append(threading.current_thread()))
            assert len(saver.waiting) <= module.WAITING_AT_MOST
    assert sorted(written) == list(range(50))
    assert told == [threading.main_thread()] * 50


def test_results_are_told_in_their_order_and_saved_side_by_side():
    gates, told = [threading.Event() for _ in range(module.THREADS)], []
    with saving() as saver:
        for number, gate in enumerate(gates):
            saver.save(lambda gate=gate: gate.wait(20), lambda error, number=number: told.append(number))
        for gate in reversed(gates):
            gate.set()
    assert told == list(range(module.THREADS))


def test_a_value_error_is_the_result_of_its_save_alone():
    def refuse():
        raise ValueError("no map")

    told = []
    with saving() as saver:
        for write in (refuse, lambda: None):
            saver.save(write, told.append)
    assert [str(error) for error in told] == ["no map", "None"]


def test_an_interruption_saves_what_is_made():
    written, gate = [], threading.Event()

    def slow(number):
        gate.wait(20)
        written.append(number)

    def interrupt():
        with saving() as saver:
            for number in range(3):
                saver.save(lambda number=number: slow(number), lambda error: None)
            gate.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert sorted(written) == [0, 1, 2]


def test_an_error_of_the_disk_ends_the_run_and_gives_up_the_saves_behind_it():
    written, gate = [], threading.Event()

    def full():
        gate.wait(20)
        raise OSError("No space left on device")

    def run():
        with saving() as saver:
            saver.save(full, lambda error: None)
            saver.save(lambda: gate.wait(0.5), lambda error: None)
            saver.save(lambda: written.append(2), lambda error: None)
            gate.set()

    with pytest.raises(OSError, match="No space left"):
        run()
    assert threading.active_count() == 1 or not any(t.name.startswith("saving") for t in threading.enumerate())


def test_what_was_saved_behind_an_error_of_the_disk_is_told():
    gate, told = threading.Event(), []

    def full():
        raise OSError("No space left on device")

    def run():
        with saving() as saver:
            saver.save(lambda: gate.wait(20), told.append)
            saver.save(full, told.append)
            saver.save(lambda: None, lambda error: told.append("behind"))
            gate.set()
            saver.waiting[2][0].result(20)

    with pytest.raises(OSError, match="No space left"):
        run()
    assert told == [None, "behind"]


def test_a_map_that_cannot_be_saved_fails_its_image_alone(tmp_path):
    report = write_cams(
        lambda images, labels: images,
        ["0", "1", "2"],
        {name: [1] for name in "012"},
        tmp_path,
        lambda path: torch.full((1, 2, 2), np.nan if path.name == "1" else 1.0),
        transform_takes="path",
        batch_size=3,
    )
    assert report.written == ["0", "2"]
    assert "has NaN" in report.failed["1"]
