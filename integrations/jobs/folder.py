"""Fills a folder with one file per image. Finished images are passed over, bad ones named and skipped."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from acr_reg.integrations.formats import Format, check_format, save_cams, save_crf_pair
from acr_reg.integrations.formats.files import DamagedFile
from acr_reg.integrations.formats.load import map_size
from acr_reg.integrations.formats.save import ALPHAS, check_alphas
from acr_reg.integrations.formats.write import remove_unfinished
from acr_reg.integrations.jobs.progress import show_progress
from acr_reg.integrations.jobs.reading import Failure, reading
from acr_reg.integrations.jobs.saving import saving
from acr_reg.integrations.jobs.shares import Share, share_of_run

_SHOWN = 5
_OF_THE_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR)  # one image's errors, not the disk's

# What a target saves of an image: its maps, as save_cams takes them, and the (H, W) of the image (None: the maps have
# that size).
Maps = tuple[Mapping[int, npt.ArrayLike], tuple[int, int] | None]


class Target(Protocol):
    """Where the files of a run go."""

    @property
    def folders(self) -> list[Path]: ...

    def files(self, name: str) -> list[Path]: ...

    def save(self, name: str, maps: Mapping[int, npt.ArrayLike], size: tuple[int, int] | None) -> None:
        """Files appear whole or not at all. Raises ValueError for an error of this image alone."""

    def check(self, name: str) -> tuple[int, int] | None:
        """The (H, W) of what the files of an earlier run hold, if they hold any.

        Raises DamagedFile if they are not whole, and ValueError if they cannot stand beside those of this run."""


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

    def check(self, name: str) -> tuple[int, int] | None:
        """Raises ValueError if a file of an earlier run is in another format: the folder would mix formats."""
        for file in self.files(name):
            try:
                size = map_size(file, self.format)
            except DamagedFile:
                raise
            except ValueError as error:
                raise ValueError(
                    f"{file} of an earlier run is not in the format {self.format}. Choose another folder, or overwrite "
                    f"the files. ({error})"
                ) from error
        return size


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that the disk does not take
        return False


def fill(
    target: Target,
    names: Sequence[str],
    read: Callable[[str], Any],
    what: str,
    overwrite: bool,
    progress: bool,
    make: Callable[[Iterator[tuple[str, Any]]], Iterable[tuple[str, Maps | Failure]]] | None = None,
    *,
    workers: int = 0,
    share: bool = True,
    size_of: Callable[[str], tuple[int, int] | None] | None = None,
) -> FolderReport:
    """Makes and saves the maps of every ID whose files are missing or not whole.

    ``read`` takes an ID, in a worker process if there are any. ``make`` takes what was read and gives the maps, in any
    order; without it, ``read`` returns them. They are saved in threads beside it. If ``read`` raises, or maps cannot
    be saved as they are, that ID alone fails. An error of the disk ends the run, with the report so far as its
    ``report``, and so does a :class:`StopRun`. ``size_of`` an ID is the (H, W) that files of an earlier run must have.

    The processes of torchrun or of an array divide the IDs, unless ``share`` is False; the report is of all processes
    that hear of each other. Failures and the summary are written to standard error.
    """
    with share_of_run(share) as part:
        for folder in target.folders:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file. Name a folder to write to.")
            folder.mkdir(parents=True, exist_ok=True)
            if part.speaks:
                remove_unfinished(folder)
        own = _own(part, names)
        made = [] if overwrite else [name for name in own if all(map(_is_there, target.files(name)))]
        earlier = _checked(target, made, size_of, progress and part.speaks)
        for refusal in filter(None, part.gather(earlier.refusal)):  # of any process, so that all end if one does
            raise ValueError(refusal)
        report = FolderReport(existing=earlier.whole)
        known = set(earlier.whole)
        waiting = [name for name in own if name not in known]
        with reading(waiting, read, workers) as items, show_progress(progress and part.speaks) as bar:
            for name, reason in earlier.damaged.items():
                bar.note(f"{name} is made anew: {reason}")
            step = bar.begin(what if part.world == 1 else f"{what}, {part}", len(waiting))

            def end(name: str, error: ValueError | Failure | None) -> None:
                if error is None:
                    report.written.append(name)
                else:
                    report.failed[name] = error.text if isinstance(error, Failure) else str(error)
                    bar.note(f"{name} skipped: {report.failed[name]}")
                step()

            folders = ", ".join(map(os.fspath, target.folders))
            try:
                with saving() as saver:
                    for name, maps in items if make is None else make(items):
                        if isinstance(maps, Failure):
                            end(name, maps)
                        else:
                            saver.save(partial(_save, target, name, *maps), partial(end, name))
            except OSError as error:  # of the disk
                report = error.report = _merged([report], names)  # type: ignore[attr-defined]
                bar.note(f"{folders}: {'' if part.world == 1 else f'{part}: '}ended early. {report}")
                raise
            if part.world > 1 and not part.is_apart:
                bar.begin("Waiting for the other processes", None)
            report = _merged(part.gather(report), names)
            if part.speaks and (progress or report.failed):
                whose = f"{part}: " if part.is_apart else ""
                bar.note(f"{folders}: {whose}{report}")
        return report


@dataclass
class _Earlier:
    """What an earlier run left: IDs whose files are whole, why others are not, and why this run cannot go on."""

    whole: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None


def _checked(
    target: Target, names: Sequence[str], size_of: Callable[[str], tuple[int, int] | None] | None, progress: bool
) -> _Earlier:
    found = _Earlier()
    with show_progress(progress and len(names) > 0) as bar:
        step = bar.begin("Checking files of an earlier run", len(names))
        for name in names:
            try:
                size = target.check(name)
                wanted = None if size is None or size_of is None else size_of(name)
            except DamagedFile as error:
                found.damaged[name] = str(error)
            except (OSError, ValueError) as error:
                found.refusal = str(error)
                break
            else:
                if size is not None and wanted is not None and size != wanted:
                    found.refusal = (
                        f"{target.files(name)[0]} of an earlier run is {size[0]}x{size[1]} and its photo "
                        f"{wanted[0]}x{wanted[1]} (HxW). Choose another folder, or overwrite its files (--overwrite)."
                    )
                    break
                found.whole.append(name)
            step()
    return found


def _save(target: Target, name: str, maps: Mapping[int, npt.ArrayLike], size: tuple[int, int] | None) -> None:
    try:
        target.save(name, maps, size)
    except OSError as error:
        if error.errno not in _OF_THE_NAME:
            raise
        raise ValueError(f"{error.strerror}: the disk takes no file of this name. Rename the image.") from error


def _own(part: Share, names: Sequence[str]) -> list[str]:
    """This process's IDs, of all: which files exist changes while other processes start. The order of a folder differs
    between machines, so it decides nothing."""
    ordered = sorted(names)
    digests = part.gather(hashlib.sha256("\n".join(ordered).encode(errors="surrogatepass")).hexdigest())
    if len(set(digests)) > 1:
        raise ValueError(
            f"The {part.world} processes of this run were given different images. Give all of them the whole list: "
            "each takes its share."
        )
    mine = set(part.of(ordered))
    return [name for name in names if name in mine]


def _merged(reports: list[FolderReport], names: Sequence[str]) -> FolderReport:
    """One report, in the order of ``names``: batches and processes have others."""
    place = {name: number for number, name in enumerate(names)}
    return FolderReport(
        sorted((name for report in reports for name in report.written), key=place.__getitem__),
        sorted((name for report in reports for name in report.existing), key=place.__getitem__),
        dict(sorted((item for report in reports for item in report.failed.items()), key=lambda item: place[item[0]])),
    )
