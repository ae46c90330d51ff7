"""When to save, what to call it, when to try again, what to delete. Names and retention follow the dialect."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from library.checkpoint.verify import Damaged
from library.config.save_formats import BESIDE, SUFFIXES, beside, is_pipeline
from library.errors import NoRoom
from library.log import log

SUFFIX = SUFFIXES["safetensors"]
LONGEST_PAUSE = 64  # steps
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", -1))


class Write(Protocol):
    def __call__(self, path: Path, info: dict[str, int], then: Callable[[], None], at_once: bool = False) -> None:
        """Put a whole file of ``info`` (``step``, ``epoch``) in place, read it back, call ``then()``; or raise and leave nothing.

        Without ``at_once`` the file may be written while training goes on, as long as it holds the weights of now.
        """


def step_name(output_name: str, step: int, suffix: str = SUFFIX) -> str:
    """After optimizer step number ``step`` (from 1). ``suffix`` here and below: empty for a folder."""
    return f"{output_name}-step{step:08d}{suffix}"


def epoch_name(output_name: str, epoch: int, suffix: str = SUFFIX) -> str:
    """After ``epoch`` finished epochs."""
    return f"{output_name}-{epoch:06d}{suffix}"


def final_name(output_name: str, suffix: str = SUFFIX) -> str:
    return f"{output_name}{suffix}"


def epochs_between_saves(every_n_epochs: int | None, n_epoch_ratio: int | None, total_epochs: int) -> int | None:
    """``--save_every_n_epochs``, or what ``--save_n_epoch_ratio`` makes of the length of the run."""
    if n_epoch_ratio:
        return max(1, total_epochs // n_epoch_ratio)
    return every_n_epochs or None


def endangered(output_dir: Path, output_name: str, inputs: Iterable[Path], suffix: str = SUFFIX) -> list[Path]:
    """Of ``inputs`` those that a run with this folder and name would sooner or later write over."""
    parts = rf"(_({'|'.join(BESIDE)}))?" if suffix else ""
    ours = re.compile(rf"{re.escape(output_name)}(-step\d{{8,}}|-\d{{6,}})?{parts}{re.escape(suffix)}")
    folder = output_dir.resolve()

    def replaced(place: Path) -> bool:  # itself, or with the folder that holds it
        return any(parent.parent.resolve() == folder and ours.fullmatch(parent.name) for parent in (place, *place.parents))

    # both places of a link: it would be replaced itself
    return sorted(path for path in inputs if replaced(path.absolute()) or replaced(path.resolve()))


def outdated(names: Iterable[str], pattern: re.Pattern[str], current: int, keep: int) -> list[str]:
    """Of ``names`` those of ``pattern`` (one group: the number) that are ``keep`` or more behind ``current``.

    Numbers above ``current`` are of another run with the same name and are left alone.
    """
    numbers = {name: int(match.group(1)) for name in names if (match := pattern.fullmatch(name))}
    return sorted(name for name, number in numbers.items() if number <= current - keep)


def is_full(error: BaseException) -> bool:
    """A file could not be written for lack of space."""
    return any(isinstance(one, NoRoom) or isinstance(one, OSError) and one.errno in _FULL for one in _causes(error))


def may_pass(error: BaseException) -> bool:
    """The disk is the reason, so that the same file may be written a little later; not for weights that do not fit a format."""
    return any(isinstance(one, (OSError, NoRoom, Damaged)) for one in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


class Retry:
    """When to try again after a file could not be written: after 1, 2, 4, ... steps, at most ``LONGEST_PAUSE``.

    Cheap when the disk is still full: free space is asked for before anything is copied or written.
    """

    def __init__(self) -> None:
        self.step: int | None = None  # the one after which to try again; None: nothing is owed
        self._pause = 1

    def failed(self, step: int) -> int:
        """After ``step``; returns the step after which to try again."""
        self.step, self._pause = step + self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return self.step

    def clear(self) -> None:
        self.step, self._pause = None, 1


class Saver:
    """Calls ``write`` when a file is due, then removes what retention no longer keeps.

    Old files go only after the new one stands and was read back. As in the dialect ``last_n_steps`` counts steps (a file exactly
    that many steps old stays) but ``last_n_epochs`` counts saved epochs, that is files. ``protected``: paths that are never
    removed; ``in_use``: paths that stay until the next removal. ``suffix``: of the names; empty: folders are written.
    ``on_saved(path)`` is told of every file. What could not be saved is owed (``retry``): ``late`` saves it, named by its step.
    """

    def __init__(self, output_dir: Path, output_name: str, *, total_epochs: int, write: Write, every_n_steps: int | None = None,
                 every_n_epochs: int | None = None, n_epoch_ratio: int | None = None, last_n_steps: int | None = None,
                 last_n_epochs: int | None = None, protected: Iterable[Path] = (), suffix: str = SUFFIX,
                 in_use: Callable[[Path], bool] = lambda path: False, on_saved: Callable[[Path], None] = lambda path: None):
        self.output_dir, self.output_name, self.total_epochs, self._write_file = output_dir, output_name, total_epochs, write
        self.suffix, self.in_use, self.on_saved = suffix, in_use, on_saved
        self.every_n_steps = every_n_steps
        self.every_n_epochs = epochs_between_saves(every_n_epochs, n_epoch_ratio, total_epochs)
        self.last_n_steps, self.last_n_epochs = last_n_steps, last_n_epochs
        self.protected = {path.resolve() for path in protected}
        self.saved_step: tuple[int, Path] | None = None
        self.retry = Retry()

    def after_step(self, step: int, epoch: int) -> Path | None:
        """Save when step number ``step`` (from 1) is due."""
        return self.late(step, epoch) if self.every_n_steps and step % self.every_n_steps == 0 else None

    def after_epoch(self, epoch: int, step: int) -> Path | None:
        """Save when ``epoch`` finished epochs are due. The last epoch is not: the final file follows."""
        if not self.every_n_epochs or epoch % self.every_n_epochs or epoch >= self.total_epochs:
            return None
        pattern = rf"{re.escape(self.output_name)}-(\d{{6,}}){re.escape(self.suffix)}"
        keep = self.last_n_epochs * self.every_n_epochs if self.last_n_epochs else 0
        name = epoch_name(self.output_name, epoch, self.suffix)
        return self._write(name, step, epoch, lambda: self._remove(pattern, epoch, keep))

    def late(self, step: int, epoch: int) -> Path:
        """Save now, whether it is due or not."""
        pattern = rf"{re.escape(self.output_name)}-step(\d{{8,}}){re.escape(self.suffix)}"
        keep = self.last_n_steps + 1 if self.last_n_steps else 0
        name = step_name(self.output_name, step, self.suffix)
        return self._write(name, step, epoch, lambda: self._remove(pattern, step, keep))

    def final(self, step: int, epoch: int) -> Path:
        return self._write(final_name(self.output_name, self.suffix), step, epoch, at_once=True)

    def emergency(self, step: int, epoch: int) -> Path | None:
        """A file of the last complete step when a run is stopped; None before the first step."""
        if step == 0:
            return None
        if self.saved_step is not None and self.saved_step[0] == step:
            return self.saved_step[1]
        return self._write(step_name(self.output_name, step, self.suffix), step, epoch, at_once=True)

    def _write(self, name: str, step: int, epoch: int, clear_away: Callable[[], None] = lambda: None,
               at_once: bool = False) -> Path:
        path = self.output_dir / name

        def then() -> None:
            self.saved_step = (step, path)
            self.retry.clear()
            clear_away()
            self.on_saved(path)

        self._write_file(path, {"step": step, "epoch": epoch}, then, at_once=at_once)
        return path

    def _remove(self, pattern: str, current: int, keep: int) -> None:
        """``keep`` 0: nothing is ever removed."""
        names = [entry.name for entry in self.output_dir.iterdir()] if keep else []
        for name in outdated(names, re.compile(pattern), current, keep):
            path = self.output_dir / name
            place = path.resolve()
            if place in self.protected or any(place in kept.parents for kept in self.protected) or self.in_use(path):
                continue
            if not self.suffix and (path.is_symlink() or not is_pipeline(path)):
                continue  # no folder of ours
            try:
                path.unlink(missing_ok=True) if self.suffix else shutil.rmtree(path)
                for companion in [beside(path, part) for part in BESIDE] if self.suffix else ():
                    if companion.resolve() not in self.protected:
                        companion.unlink(missing_ok=True)
            except OSError as error:  # on Windows a file that another program has loaded cannot be removed
                log.warning("%s is no longer kept, but could not be removed: %s", path, error.strerror or error)
