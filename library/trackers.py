"""Curves and pictures for TensorBoard and wandb."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from library.config.parse import Config
from library.config.schema import LoggingOptions
from library.config.values import toml_text
from library.errors import UserError
from library.toml_lines import load_toml

NAMES = {"loss": "loss/step", "validation_loss": "loss/validation", "learning_rate": "lr/denoiser", "grad_norm": "loss/grad_norm",
         "seconds": "speed/seconds_per_step", "images_per_second": "speed/images_per_second", "peak_bytes": "memory/peak_bytes"}


class Sink(Protocol):
    """One place where curves go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def settings(self, text: str) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Every sink in use, on the first rank; no sink elsewhere and when none is wanted."""

    def __init__(self, sinks: list[Sink]):
        self.sinks = sinks

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of one step, by the names of ``NAMES``."""
        for sink in self.sinks:
            sink.scalars(step, {NAMES[name]: value for name, value in values.items()})

    def picture(self, step: int, path: Path) -> None:
        for sink in self.sinks:
            sink.picture(step, path.stem, path)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class TensorBoardSink:
    def __init__(self, folder: Path, arguments: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer = SummaryWriter(str(folder), **arguments)
        except TypeError as error:
            raise UserError(f"TensorBoard's SummaryWriter refuses its arguments: {error}", place="--log_tracker_config",
                            remedy="correct or remove them in [tensorboard]") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def settings(self, text: str) -> None:
        self.writer.add_text("settings", f"```toml\n{text}\n```")

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    def __init__(self, project: str, key: str | None, arguments: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("wandb is not installed", place="--log_with",
                            remedy="pip install wandb, or use --log_with tensorboard") from None
        if key:
            wandb.login(key=key)
        self.wandb, self.run = wandb, wandb.init(project=project, **arguments)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def settings(self, text: str) -> None:
        self.run.config.update({"settings": text})

    def close(self) -> None:
        self.run.finish()


def tracker_arguments(path: Path | None) -> dict[str, dict[str, Any]]:
    """What ``--log_tracker_config`` holds: arguments per tracker in tables [tensorboard] and [wandb]. UserError otherwise."""
    tables = load_toml(path)[0] if path is not None else {}
    stray = [name for name, value in tables.items() if name not in ("tensorboard", "wandb") or not isinstance(value, dict)]
    if stray:
        raise UserError(f"{stray[0]!r} is not a table of a tracker", place=str(path),
                        remedy="write [tensorboard] or [wandb] and the arguments below it")
    return tables


def open_tracker(options: LoggingOptions, settings: str | None, is_main: bool) -> Tracker:
    """Start the trackers that ``options`` name. ``settings``: TOML to show beside the curves, free of secrets and paths.

    Raises UserError for a tracker whose package is missing or that refuses its arguments.
    """
    if not is_main or not options.trackers:
        return Tracker([])
    extra = tracker_arguments(options.log_tracker_config)
    sinks: list[Sink] = []
    for name in options.trackers:
        if name == "tensorboard":
            folder = options.logging_dir / f"{options.log_prefix}{datetime.now():%Y%m%d%H%M%S}" / options.log_tracker_name
            sinks.append(TensorBoardSink(folder, extra.get("tensorboard", {})))
        else:
            arguments = {**({"name": options.wandb_run_name} if options.wandb_run_name else {}), **extra.get("wandb", {})}
            sinks.append(WandbSink(options.log_tracker_name, options.wandb_api_key, arguments))
    for sink in sinks:
        if settings is not None:
            sink.settings(settings)
    return Tracker(sinks)


def public_settings(config: Config) -> str:
    """The settings without keys and without anything that is a path, as TOML: what --log_config sends."""
    settings = config.entry.settings().values()
    values = {one.name: getattr(getattr(config, one.section), one.name) for one in settings if one.meta["saved"]}
    shown = {name: value for name, value in values.items() if value is not None and not isinstance(value, Path)}
    return "\n".join(f"{name} = {toml_text(value)}" for name, value in shown.items()
                     if not any(mark in str(value) for mark in "/\\"))
