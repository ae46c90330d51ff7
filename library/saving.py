"""When to save, what to call it, what to delete. Names and retention follow the dialect."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from library.config.save_formats import BESIDE, SUFFIXES, beside, is_pipeline
from library.log import log

SUFFIX = SUFFIXES["safetensors"]
Write = Callable[[Path, dict[str, int]], None]


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


class Saver:
    """Calls ``write(path, {"step", "epoch"})`` when a file is due, then removes what retention no longer keeps.

    ``write`` must put a whole file in place or raise; old files go only after the new one stands. As in the
    dialect ``last_n_steps`` counts steps (a file exactly that many steps old stays) but ``last_n_epochs`` counts saved
    epochs, that is files. ``protected``: paths that are never removed. ``suffix``: of the names; empty: folders are written.
    """

    def __init__(self, output_dir: Path, output_name: str, *, total_epochs: int, write: Write, every_n_steps: int | None = None,
                 every_n_epochs: int | None = None, n_epoch_ratio: int | None = None, last_n_steps: int | None = None,
                 last_n_epochs: int | None = None, protected: Iterable[Path] = (), suffix: str = SUFFIX):
        self.output_dir, self.output_name, self.total_epochs, self._write_file = output_dir, output_name, total_epochs, write
        self.suffix = suffix
        self.every_n_steps = every_n_steps
        self.every_n_epochs = epochs_between_saves(every_n_epochs, n_epoch_ratio, total_epochs)
        self.last_n_steps, self.last_n_epochs = last_n_steps, last_n_epochs
        self.protected = {path.resolve() for path in protected}
        self.saved_step: tuple[int, Path] | None = None

    def after_step(self, step: int, epoch: int) -> Path | None:
        """Save when step number ``step`` (from 1) is due."""
        if not self.every_n_steps or step % self.every_n_steps:
            return None
        path = self._write(step_name(self.output_name, step, self.suffix), step, epoch)
        if self.last_n_steps:
            self._remove(rf"{re.escape(self.output_name)}-step(\d{{8,}}){re.escape(self.suffix)}", step, self.last_n_steps + 1)
        return path

    def after_epoch(self, epoch: int, step: int) -> Path | None:
        """Save when ``epoch`` finished epochs are due. The last epoch is not: the final file follows."""
        if not self.every_n_epochs or epoch % self.every_n_epochs or epoch >= self.total_epochs:
            return None
        path = self._write(epoch_name(self.output_name, epoch, self.suffix), step, epoch)
        if self.last_n_epochs:
            keep = self.last_n_epochs * self.every_n_epochs
            self._remove(rf"{re.escape(self.output_name)}-(\d{{6,}}){re.escape(self.suffix)}", epoch, keep)
        return path

    def final(self, step: int, epoch: int) -> Path:
        return self._write(final_name(self.output_name, self.suffix), step, epoch)

    def emergency(self, step: int, epoch: int) -> Path | None:
        """A file of the last complete step when a run is stopped; None before the first step."""
        if step == 0:
            return None
        if self.saved_step is not None and self.saved_step[0] == step:
            return self.saved_step[1]
        return self._write(step_name(self.output_name, step, self.suffix), step, epoch)

    def _write(self, name: str, step: int, epoch: int) -> Path:
        path = self.output_dir / name
        self._write_file(path, {"step": step, "epoch": epoch})
        self.saved_step = (step, path)
        return path

    def _remove(self, pattern: str, current: int, keep: int) -> None:
        names = [entry.name for entry in self.output_dir.iterdir()]
        for name in outdated(names, re.compile(pattern), current, keep):
            path = self.output_dir / name
            place = path.resolve()
            if place in self.protected or any(place in kept.parents for kept in self.protected):
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
