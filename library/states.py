"""Going on from a saved state, and writing such states: where the parts of a run meet ``checkpoint.train_state``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from library.architectures.base import Architecture
from library.checkpoint import train_state
from library.checkpoint.train_state import Logged, SavedState, StateFacts
from library.config.parse import Config, Entry, to_toml
from library.data.items import Items
from library.data.plan import StepPlan
from library.data.spec import DatasetSpec
from library.dist import Runtime
from library.ema import Ema
from library.errors import UserError
from library.log import log
from library.loop import Task
from library.optim.updating import Updating
from library.report.report import Report
from library.state_writing import Contents
from library.resume import data_settings, identity, require_same, version_notes, versions
from library.state_upload import find_saved


def find(config: Config, runtime: Runtime) -> SavedState | None:
    """The state that ``--resume`` names, the same on every rank; None without the flag, or where there is none yet.

    The first rank reads and checks every byte of it; the others take its word for it.
    """
    if config.state.resume is None:
        return None
    found = find_saved(config) if runtime.is_main else None
    place = runtime.exchange(found.path if found else None)[0]
    if place is None:
        return None
    return found or train_state.open_state(place, verify=False)


def kept_stride(saved: SavedState | None, world_size: int) -> int | None:
    """Batches of a step when going on with another number of processes: as many as before, so that each step has the samples it
    would have had. None: as the settings say."""
    return saved.facts.stride if saved is not None and saved.facts.world_size != world_size else None


def facts_of_run(entry: Entry, config: Config, arch: Architecture, specs: tuple[DatasetSpec, ...], items: Items, plan: StepPlan,
                 total_steps: int, frozen: tuple[str, ...], saved: SavedState | None = None) -> StateFacts:
    """What all states of this run say; ``frozen``: text encoders that do not train; ``saved``: where it goes on."""
    f32 = torch.float32
    model = identity(entry.architecture, entry.method, arch.vae_identity(f32), arch.text_identity(frozen, f32))
    return StateFacts(step=0, epoch=0, total_steps=total_steps, stride=plan.stride, steps_per_epoch=plan.steps_per_epoch,
                      world_size=plan.world_size, model=model, data=items.digest(), config=to_toml(config),
                      data_settings=data_settings(specs), versions=versions(),
                      **({"serial": saved.facts.serial, **vars(saved.facts.logged)} if saved is not None else {}))


def check(saved: SavedState, facts: StateFacts, config: Config) -> None:
    """Refuse a state of another run; say what was confirmed to be different."""
    settings = replace(facts, step=saved.facts.step,
                       stride=facts.world_size * config.training.gradient_accumulation_steps)
    for change in require_same(saved.facts, settings, config, str(saved.path), config.state.resume_anyway):
        log.warning("going on although %s", change)
    for note in version_notes(saved.facts.versions):
        log.info(note)


def restore(saved: SavedState, task: Task, weights: Mapping[str, torch.Tensor], ema: Ema | None,
            readable: Callable[[], AbstractContextManager]) -> Task:
    """``task`` as it was after the saved step. UserError for a state of other weights."""
    with readable():
        saved.load_weights(weights)
        if ema is not None and (average := saved.part("ema")) is not None:
            ema.load_state_dict(average)
    task.updater.load_state_dict(saved.part("optimizer"))
    task.nans.skipped.update(saved.facts.skipped)
    if task.scaler is not None and (scale := saved.part("scaler")) is not None:
        task.scaler.load_state_dict(scale)
    log.info("going on after step %d of %d, from %s", saved.facts.step, task.total_steps, saved.path)
    return replace(task, first_step=saved.facts.step)


def contents(step: int, epoch: int, facts: StateFacts, name: str, task: Task, weights: Mapping[str, torch.Tensor],
             ema: Ema | None) -> Contents:
    """What a state after ``step`` steps consists of: the live tensors, not copies. ``name``: of the run."""
    now = replace(facts, step=step, epoch=epoch, saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                  skipped=sorted(task.nans.skipped))
    if ema is not None:
        ema.wait()
    parts = {"optimizer": task.updater.state_dict(), "scaler": task.scaler.state_dict() if task.scaler is not None else None,
             "ema": ema.state_dict() if ema is not None else None}
    return Contents(now, name, weights, parts)


def go_back(path: Path | None, runtime: Runtime, task: Task, weights: Mapping[str, torch.Tensor], ema: Ema | None,
            readable: Callable[[], AbstractContextManager]) -> int:
    """Put the state at ``path``, which the first rank has chosen and checked, in place of the run as it is; returns its step."""
    place = runtime.exchange(path)[0]
    if place is None:
        raise UserError("no state of this run is whole any more, so it cannot go back to one", place="--nan_policy rollback",
                        remedy="look at the disk; checkpoints can be used as the model to start from")
    return restore(train_state.open_state(place, verify=False), task, weights, ema, readable).first_step


@contextmanager
def averaged(ema: Ema, readable: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Inside, the model has its averaged weights and can run; streamed weights are exchanged where they can be reached."""
    with _exchanged(ema.swapped(), readable):
        yield


@contextmanager
def delivered(updater: Updating, readable: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """The same with the weights that the optimizer delivers, where these are not the ones it trains at."""
    if not updater.has_modes:
        yield
        return
    with _exchanged(updater.evaluating(), readable):
        yield


@contextmanager
def _exchanged(exchange: AbstractContextManager, readable: Callable[[], AbstractContextManager]) -> Iterator[None]:
    with readable():
        exchange.__enter__()
    try:
        yield
    finally:
        with readable():
            exchange.__exit__(None, None, None)


@dataclass(frozen=True)
class Keeping:
    """What a run leaves besides its checkpoints and logs, and where it began.

    ``state(step, epoch, logged)``: what a state of now consists of. ``go_back(path)``: restore one, see above. ``first_state``:
    the one that the run went on from, and ``logged`` what it had logged.
    """

    state: Callable[[int, int, Logged], Contents]
    go_back: Callable[[Path | None], int]
    first_step: int = 0
    first_state: Path | None = None
    logged: Logged = Logged()
    ema: Ema | None = None
    report: Report | None = None
