"""Curves and pictures for TensorBoard, wandb, and every other tracker that accelerate knows. None of them can end a training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from library.config.parse import Config
from library.config.schema import ACCELERATE_TRACKERS, LoggingOptions
from library.errors import UserError
from library.log import log, without
from library.toml_lines import load_toml

Settings = Mapping[str, str | int | float | bool]


class Sink(Protocol):
    """One place where curves go. ``run_id``: what a later run needs to go on in the same place; empty where it cannot."""

    run_id: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def settings(self, values: Settings) -> None: ...

    def go_back(self, step: int) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Every sink in use by name, on the first rank; no sink elsewhere and when none is wanted.

    A sink that fails (a full disk, a lost connection) is named in the log and left out from then on.
    """

    def __init__(self, sinks: Mapping[str, Sink], earlier: Mapping[str, str] | None = None):
        """``earlier``: ids of trackers that were in use before this run, and may be again."""
        self.sinks = dict(sinks)
        # For ``open_tracker`` of a run that goes on with this one; a sink that fails meanwhile is worth another try then.
        self.run_ids = {**(earlier or {}), **{name: sink.run_id for name, sink in sinks.items() if sink.run_id}}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of one step."""
        self._each(lambda sink: sink.scalars(step, values))

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture under a name that stays the same over the steps."""
        self._each(lambda sink: sink.picture(step, name, path))

    def settings(self, values: Settings) -> None:
        self._each(lambda sink: sink.settings(values))

    def go_back(self, step: int) -> None:
        """The run does the steps after ``step`` again: what was drawn of them goes, where a tracker can hide it. Others draw them
        twice or keep the first value, and both are the same, as going back is exact."""
        self._each(lambda sink: sink.go_back(step))

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self.sinks = {}

    def _each(self, action: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                action(sink)
            except Exception as error:  # whatever a tracker raises, it is not worth the training
                log.error("%s gets no more curves, training goes on: %s: %s", name, type(error).__name__, error)
                del self.sinks[name]


class TensorBoardSink:
    """``folder``/``name`` is where the events go; ``run_id`` is ``folder`` without what lies above it.

    ``done`` steps of a run that goes on here are kept; what the folder has of later ones is hidden by TensorBoard's own mark.
    """

    def __init__(self, folder: Path, name: str, arguments: Mapping[str, Any], done: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.run_id, self.done = folder.name, done
        self._open = lambda **more: SummaryWriter(str(folder / name), **{**more, **arguments})
        with _arguments("tensorboard", "SummaryWriter"):
            self.writer = self._open(**({"purge_step": done + 1} if (folder / name).is_dir() else {}))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.writer.add_image(name, _pixels(path), step, dataformats="HWC")

    def settings(self, values: Settings) -> None:
        rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in values.items())
        self.writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", self.done)

    def go_back(self, step: int) -> None:
        self.writer.close()
        self.writer = self._open(purge_step=step + 1)

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    def __init__(self, project: str, key: str | None, arguments: Mapping[str, Any]):
        import wandb

        if key:
            wandb.login(key=key)
        with _arguments("wandb", "wandb.init"), _unobserved():
            self.wandb, self.run = wandb, wandb.init(project=project, **arguments)
        self.run_id = str(self.run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def settings(self, values: Settings) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def go_back(self, step: int) -> None:
        """Nothing to do: of a step that it has seen it keeps the first value."""

    def close(self) -> None:
        self.run.finish()


@dataclass(frozen=True)
class Continued:
    """How a tracker is told to go on with an earlier run. ``id_of`` what accelerate's class holds as ``tracker``."""

    id_of: Callable[[Any], str | None]
    arguments: Callable[[str], dict[str, Any]]


# DVCLive keeps no ids: it goes on in its folder when told so by ``resume = true`` in --log_tracker_config.
CONTINUED: dict[str, Continued] = {
    "aim": Continued(lambda run: run.hash, lambda run_id: {"run_hash": run_id}),
    "clearml": Continued(lambda task: task.id, lambda run_id: {"continue_last_task": run_id}),
    "comet_ml": Continued(lambda experiment: experiment.get_key(),
                          lambda run_id: {"experiment_key": run_id, "mode": "get_or_create"}),
    "mlflow": Continued(lambda run: run.info.run_id, lambda run_id: {"run_id": run_id}),
    "swanlab": Continued(lambda run: run.id, lambda run_id: {"id": run_id, "resume": "allow"}),
    "trackio": Continued(lambda run: run.name, lambda run_id: {"name": run_id, "resume": "allow"}),
}


class AccelerateSink:
    """A tracker of accelerate, ``kind`` by its name there. ``folder``: for those that write files."""

    def __init__(self, kind: str, project: str, folder: Path | None, arguments: Mapping[str, Any], run_id: str = ""):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        make = LOGGER_TYPE_TO_CLASS[kind]
        going_on = CONTINUED.get(kind)
        if run_id and going_on is not None:
            arguments = {**going_on.arguments(run_id), **arguments}
        where = {"logging_dir": str(folder)} if make.requires_logging_directory else {}
        with _arguments(kind, make.__name__), _unobserved():
            self.tracker = make(project, **where, **arguments)
            self.tracker.start()
        try:
            self.run_id = str(going_on.id_of(self.tracker.tracker) or "") if going_on is not None else ""
        except AttributeError:  # another version of that package: curves are drawn all the same
            self.run_id = ""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        if hasattr(self.tracker, "log_images"):
            self.tracker.log_images({name: _pixels(path)[None]}, step=step)

    def settings(self, values: Settings) -> None:
        self.tracker.store_init_configuration(dict(values))

    def go_back(self, step: int) -> None:
        """Nothing can be done: accelerate's trackers have no way to take a value back."""

    def close(self) -> None:
        self.tracker.finish()


def _pixels(path: Path) -> Any:
    """(H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


@contextmanager
def _unobserved() -> Iterator[None]:
    """Trackers look at the process for themselves when they start: at the command line, in which a token may stand, at the path
    of the program, and at all that is printed, where files are named. wandb's own variables win where the user has set them."""
    argv, name = sys.argv, Path(sys.argv[0]).name
    quiet = {key: value for key, value in (("WANDB_PROGRAM", name), ("WANDB_CONSOLE", "off")) if key not in os.environ}
    sys.argv = [name]
    os.environ.update(quiet)
    try:
        yield
    finally:
        sys.argv = argv
        for key in quiet:
            os.environ.pop(key, None)


@contextmanager
def _arguments(kind: str, what: str) -> Iterator[None]:
    """Arguments from --log_tracker_config that a tracker does not take are the user's mistake."""
    try:
        yield
    except TypeError as error:
        raise UserError(f"{what} refuses its arguments: {error}", place="--log_tracker_config",
                        remedy=f"correct or remove them in [{kind}]") from error


def tracker_arguments(path: Path | None) -> dict[str, dict[str, Any]]:
    """What ``--log_tracker_config`` holds: arguments in a table for each tracker, such as [wandb]. UserError otherwise."""
    tables = load_toml(path)[0] if path is not None else {}
    known = ("tensorboard", "wandb", *ACCELERATE_TRACKERS)
    stray = [name for name, value in tables.items() if name not in known or not isinstance(value, dict)]
    if stray:
        raise UserError(f"{stray[0]!r} is not a table of a tracker", place=str(path),
                        remedy=f"write the name of a tracker in brackets ({', '.join(known)}) and the arguments below it")
    return tables


def open_tracker(options: LoggingOptions, settings: Settings | None, is_main: bool,
                 resumed: Mapping[str, str] | None = None, done: int = 0) -> Tracker:
    """Start the trackers that ``options`` name. ``settings``: to show beside the curves, free of secrets and paths.

    ``resumed``: ``Tracker.run_ids`` of the run that this one goes on with after ``done`` steps; its curves are continued where
    the tracker can.
    Raises UserError for a tracker that refuses its arguments or cannot be started.
    """
    extra, resumed = tracker_arguments(options.log_tracker_config), dict(resumed or {})
    if not is_main or not options.trackers:
        return Tracker({}, resumed)
    run = Path(resumed.get("tensorboard", "")).name or f"{options.log_prefix}{datetime.now():%Y%m%d%H%M%S}"
    folder = options.logging_dir / run if options.logging_dir else None
    sinks: dict[str, Sink] = {}
    for name in options.trackers:
        arguments = extra.get(name, {})
        try:
            if name == "tensorboard":
                sinks[name] = TensorBoardSink(folder, options.log_tracker_name, arguments, done)
            elif name == "wandb":
                given = {"name": options.wandb_run_name} if options.wandb_run_name else {}
                given |= {"id": resumed[name], "resume": "allow"} if name in resumed else {}
                sinks[name] = WandbSink(options.log_tracker_name, options.wandb_api_key, {**given, **arguments})
            else:
                sinks[name] = AccelerateSink(name, options.log_tracker_name, folder, arguments, resumed.get(name, ""))
        except UserError:
            raise
        except Exception as error:  # no connection, a wrong key, a folder that cannot be made: better said now than never
            what = without(filter(None, (options.wandb_api_key,)), f"{type(error).__name__}: {error}")
            raise UserError(f"{name} cannot be started: {what}", place="--log_with",
                            remedy="mend that, or leave this tracker out") from error
    tracker = Tracker(sinks, resumed)
    if settings is not None:
        tracker.settings(settings)
    return tracker


def public_settings(config: Config) -> dict[str, str | int | float | bool]:
    """The settings without keys and without anything that is or holds a path: what --log_config sends."""
    settings = config.entry.settings().values()
    values = {one.name: getattr(getattr(config, one.section), one.name) for one in settings if one.meta["saved"]}
    plain = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in values.items()
             if value is not None and not isinstance(value, Path)}
    return {name: value for name, value in plain.items() if not any(mark in str(value) for mark in "/\\")}
