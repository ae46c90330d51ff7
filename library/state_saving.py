"""When to write a state, what to call it, which old ones to remove. Names and retention follow the dialect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from library.checkpoint.state_find import SUFFIX, found_states, remove_states
from library.checkpoint.train_state import open_state
from library.config.schema import SavingOptions
from library.config.state_options import StateOptions
from library.errors import UserError
from library.log import log
from library.saving import Retry, epoch_name, epochs_between_saves, final_name, outdated, step_name


class Write(Protocol):
    def __call__(self, path: Path, step: int, epoch: int, then: Callable[[], None], at_once: bool = False) -> None: ...

Outdated = Callable[[Iterable[str]], list[str]]  # of names of states those that are no longer kept


class StateSaver:
    """Calls ``write(path, step, epoch, then, at_once)`` when a state is due, then removes those that are no longer kept.

    ``write`` must put a whole state in place, read it back and call ``then``, perhaps later unless ``at_once``; or raise. Nothing
    is removed before. ``begun``: step and place of the state that the run went on from. What could not be saved is owed
    (``retry``): ``late`` saves it, named by its step.

    With ``--save_state`` a state goes with every checkpoint, so the same settings say when; ``--save_state_every_n_steps`` asks
    for states of their own. As in the dialect retention counts steps for the one kind and saved epochs for the other, and where
    it has no setting of its own that of the checkpoints holds. ``on_saved(path, outdated)`` hears of each state, and which names
    are no longer kept beside it; one that is ``in_use`` is removed later.
    """

    def __init__(self, output_dir: Path, output_name: str, options: StateOptions, saving: SavingOptions, *, total_epochs: int,
                 write: Write, begun: tuple[int, Path] | None = None,
                 on_saved: Callable[[Path, Outdated], None] | None = None, in_use: Callable[[Path], bool] = lambda path: False):
        self.folder, self.name, self.options, self.total_epochs, self._write_state = (
            output_dir, output_name, options, total_epochs, write)
        self._on_saved, self._in_use = on_saved, in_use
        self.written = [begun] if begun else []  # (step, path) of this run's states, each whole when it was written; newest last
        self.retry = Retry()
        self.every_n_steps = saving.save_every_n_steps
        self.every_n_epochs = epochs_between_saves(saving.save_every_n_epochs, saving.save_n_epoch_ratio, total_epochs)
        self.last_n_steps = options.save_last_n_steps_state or saving.save_last_n_steps
        self.last_n_epochs = options.save_last_n_epochs_state or saving.save_last_n_epochs

    @property
    def latest(self) -> tuple[int, Path] | None:
        return self.written[-1] if self.written else None

    def due_after_step(self, step: int) -> bool:
        """Whether ``step`` steps (from 1) call for a state; another moment may call for one at the same step."""
        periods = (self.options.save_state_every_n_steps, self.every_n_steps if self.options.save_state else None)
        return any(period and step % period == 0 for period in periods)

    def after_step(self, step: int, epoch: int) -> Path | None:
        return self.late(step, epoch) if self.due_after_step(step) else None

    def late(self, step: int, epoch: int) -> Path:
        """Save now, whether it is due or not."""
        keep = self.last_n_steps + 1 if self.last_n_steps else None
        return self._write(step_name(self.name, step, SUFFIX), step, epoch, self._rule(r"-step(\d{8,})", step, keep))

    def first(self) -> None:
        """A state of a run that has not begun, for ``--nan_policy rollback``; not where it went on from one."""
        if not self.written:
            self._write(step_name(self.name, 0, SUFFIX), 0, 0, at_once=True)

    def after_epoch(self, epoch: int, step: int) -> Path | None:
        """After ``epoch`` finished epochs; not after the last, which the end of training follows."""
        if not (self.options.save_state and self.every_n_epochs) or epoch % self.every_n_epochs or epoch >= self.total_epochs:
            return None
        keep = self.last_n_epochs * self.every_n_epochs if self.last_n_epochs else None
        return self._write(epoch_name(self.name, epoch, SUFFIX), step, epoch, self._rule(r"-(\d{6,})", epoch, keep))

    def final(self, step: int, epoch: int) -> Path | None:
        if not (self.options.save_state or self.options.save_state_on_train_end):
            return None
        return self._write(final_name(self.name, SUFFIX), step, epoch, at_once=True)

    def emergency(self, step: int, epoch: int) -> Path | None:
        """A state of the last complete step when a run is stopped, whatever the settings; None before the first step."""
        if step == 0:
            return None
        if self.latest is not None and self.latest[0] == step:
            return self.latest[1]
        return self._write(step_name(self.name, step, SUFFIX), step, epoch, at_once=True)

    def newest_whole(self) -> Path | None:
        """Of the states of this run the newest one of which every byte is still what was written; the others are told of."""
        for _, path in reversed(self.written):
            try:
                return open_state(path).path
            except UserError as error:
                if path.exists():
                    log.warning("passed over %s: %s", path, error.message)
        return None

    def _write(self, name: str, step: int, epoch: int, old: Outdated = lambda names: [], at_once: bool = False) -> Path:
        path = self.folder / name

        def then() -> None:
            self.written.append((step, path))
            self.retry.clear()
            by_name = {each.name: each for each in found_states(self.folder, self.name) if each.parent == self.folder}
            remove_states([by_name[each] for each in old(by_name) if not self._in_use(by_name[each])], path, read_back=True)
            if self._on_saved is not None:
                self._on_saved(path, old)

        self._write_state(path, step, epoch, then, at_once=at_once)
        return path

    def _rule(self, numbered: str, current: int, keep: int | None) -> Outdated:
        """``keep`` None: all are kept."""
        pattern = re.compile(rf"{re.escape(self.name)}{numbered}{SUFFIX}")
        return lambda names: outdated(names, pattern, current, keep) if keep else []
