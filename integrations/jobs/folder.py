"""Fills a folder with one file of class maps per image. Finished images are passed over, bad ones named and skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy.typing as npt

from acr_reg.integrations.formats import Format, check_format, load_cams, save_cams, save_crf_pair
from acr_reg.integrations.formats.save import ALPHAS, check_alphas
from acr_reg.integrations.jobs.progress import show_progress

_SHOWN = 5

# From an ID to its maps, as save_cams takes them, and the (H, W) of the image (None: the maps have that size).
MakeMaps = Callable[[str], tuple[Mapping[int, npt.ArrayLike], tuple[int, int] | None]]


class StopRun(RuntimeError):
    """Raised when the next image would fail in the same way."""


@dataclass(frozen=True)
class FolderReport:
    """The result of a run over many images, by their IDs.

    ``failed`` maps each skipped image to its error. If it is empty, the run is complete. Running again makes missing
    files.
    """

    written: list[str] = field(default_factory=list)
    existing: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{len(self.written)} written, {len(self.existing)} already there, {len(self.failed)} failed"
        for name, message in list(self.failed.items())[:_SHOWN]:
            text += f"\n  {name}: {message}"
        more = len(self.failed) - _SHOWN
        return text + (f"\n  and {more} more (`failed` of the report names all)" if more > 0 else "")


@dataclass(frozen=True)
class CamFolder:
    """Where the files of a format go: one folder, or two for a CRF pair, named after it and their alpha."""

    path: Path
    format: Format
    alphas: tuple[float, float] = ALPHAS

    def __post_init__(self) -> None:
        check_format(self.format)
        check_alphas(self.alphas)

    @property
    def folders(self) -> list[Path]:
        if self.format != "psa_crf":
            return [self.path]
        return [self.path.with_name(f"{self.path.name}_{alpha:g}") for alpha in self.alphas]

    def is_empty(self) -> bool:
        return not any(path for folder in self.folders for path in folder.glob("*.np[yz]"))

    def files(self, name: str) -> list[Path]:
        suffix = ".npz" if self.format == "npz" else ".npy"
        return [folder / f"{name}{suffix}" for folder in self.folders]

    def save(self, name: str, maps: Mapping[int, npt.ArrayLike], size: tuple[int, int] | None) -> None:
        files = self.files(name)
        if self.format == "psa_crf":
            save_crf_pair(files[0], files[1], maps, self.alphas, size)
        else:
            save_cams(files[0], maps, self.format, size)

    def check(self, name: str) -> None:
        """Raises ValueError if the file of an earlier run is in another format: the folder would mix formats."""
        file = self.files(name)[0]
        try:
            load_cams(file, self.format)
        except ValueError as error:
            raise ValueError(
                f"{file} of an earlier run is not in the format {self.format}. Choose another folder, or overwrite the "
                f"files. ({error})"
            ) from error


def fill(
    target: CamFolder, names: Sequence[str], make: MakeMaps, what: str, overwrite: bool, progress: bool
) -> FolderReport:
    """Makes and saves the maps of every ID whose files are incomplete.

    If ``make`` raises, or its maps cannot be saved as they are, that ID alone fails. An error of the disk ends the run,
    and so does a :class:`StopRun`. Failures and the summary are written to standard error.
    """
    for folder in target.folders:
        folder.mkdir(parents=True, exist_ok=True)
    finished = [] if overwrite else [name for name in names if all(file.is_file() for file in target.files(name))]
    if finished:
        target.check(finished[0])
    report = FolderReport(existing=finished)
    waiting = [name for name in names if name not in set(finished)]
    with show_progress(progress) as bar:
        step = bar.begin(what, len(waiting))
        for name in waiting:
            try:
                _one(target, name, make)
            except ValueError as error:
                report.failed[name] = str(error)
                bar.note(f"{name} skipped: {error}")
            else:
                report.written.append(name)
            step()
        if progress or report.failed:
            bar.note(f"{', '.join(map(os.fspath, target.folders))}: {report}")
    return report


def _one(target: CamFolder, name: str, make: MakeMaps) -> None:
    """Raises ValueError for an error of this image alone."""
    try:
        maps, size = make(name)
    except StopRun:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error) from error
    target.save(name, maps, size)
