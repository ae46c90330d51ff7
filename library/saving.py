"""When to save, what to call it, what to delete. Names and retention follow the dialect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from library.log import log

SUFFIX = ".safetensors"
Write = Callable[[Path, dict[str, int]], None]


def step_name(output_name: str, step: int) -> str:
    """After optimizer step number ``step`` (from 1)."""
    return f"{output_name}-step{step:08d}{SUFFIX}"


def epoch_name(output_name: str, epoch: int) -> str:
    """After ``epoch`` finished epochs."""
    return f"{output_name}-{epoch:06d}{SUFFIX}"


def final_name(output_name: str) -> str:
    return f"{output_name}{SUFFIX}"


def epochs_between_saves(every_n_epochs: int | None, n_epoch_ratio: int | None, total_epochs: int) -> int | None:
    """``--save_every_n_epochs``, or what ``--save_n_epoch_ratio`` makes of the length of the run."""
    if n_epoch_ratio:
        return max(1, total_epochs // n_epoch_ratio)
    return every_n_epochs or None


def endangered(output_dir: Path, output_name: str, inputs: Iterable[Path]) -> list[Path]:
    """Of ``inputs`` those that a run with this folder and name would sooner or later write over."""
    ours = re.compile(rf"{re.escape(output_name)}(-step\d{{8,}}|-\d{{6,}})?{re.escape(SUFFIX)}")
    folder = output_dir.resolve()
    places = {path: {path.absolute(), path.resolve()} for path in inputs}  # a link would be replaced itself
    return sorted(path for path, both in places.items()
                  if any(place.parent.resolve() == folder and ours.fullmatch(place.name) for place in both))


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
    epochs, that is files. ``protected``: paths that are never removed.
    """

    def __init__(self, output_dir: Path, output_name: str, *, total_epochs: int, write: Write, every_n_steps: int | None = None,
                 every_n_epochs: int | None = None, n_epoch_ratio: int | None = None, last_n_steps: int | None = None,
                 last_n_epochs: int | None = None, protected: Iterable[Path] = ()):
        self.output_dir, self.output_name, self.total_epochs, self._write_file = output_dir, output_name, total_epochs, write
        self.every_n_steps = every_n_steps
        self.every_n_epochs = epochs_between_saves(every_n_epochs, n_epoch_ratio, total_epochs)
        self.last_n_steps, self.last_n_epochs = last_n_steps, last_n_epochs
        self.protected = {path.resolve() for path in protected}
        self.saved_step: tuple[int, Path] | None = None

    def after_step(self, step: int, epoch: int) -> Path | None:
        """Save when step number ``step`` (from 1) is due."""
        if not self.every_n_steps or step % self.every_n_steps:
            return None
        path = self._write(step_name(self.output_name, step), step, epoch)
        if self.last_n_steps:
            self._remove(rf"{re.escape(self.output_name)}-step(\d{{8,}}){re.escape(SUFFIX)}", step, self.last_n_steps + 1)
        return path

    def after_epoch(self, epoch: int, step: int) -> Path | None:
        """Save when ``epoch`` finished epochs are due. The last epoch is not: the final file follows."""
        if not self.every_n_epochs or epoch % self.every_n_epochs or epoch >= self.total_epochs:
            return None
        path = self._write(epoch_name(self.output_name, epoch), step, epoch)
        if self.last_n_epochs:
            keep = self.last_n_epochs * self.every_n_epochs
            self._remove(rf"{re.escape(self.output_name)}-(\d{{6,}}){re.escape(SUFFIX)}", epoch, keep)
        return path

    def final(self, step: int, epoch: int) -> Path:
        return self._write(final_name(self.output_name), step, epoch)

    def emergency(self, step: int, epoch: int) -> Path | None:
        """A file of the last complete step when a run is stopped; None before the first step."""
        if step == 0:
            return None
        if self.saved_step is not None and self.saved_step[0] == step:
            return self.saved_step[1]
        return self._write(step_name(self.output_name, step), step, epoch)

    def _write(self, name: str, step: int, epoch: int) -> Path:
        path = self.output_dir / name
        self._write_file(path, {"step": step, "epoch": epoch})
        self.saved_step = (step, path)
        return path

    def _remove(self, pattern: str, current: int, keep: int) -> None:
        names = [entry.name for entry in self.output_dir.iterdir()]
        for name in outdated(names, re.compile(pattern), current, keep):
            path = self.output_dir / name
            if path.resolve() in self.protected:
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # on Windows a file that another program has loaded cannot be removed
                log.warning("%s is no longer kept, but could not be removed: %s", path, error.strerror or error)
