"""From a command line to a frozen ``Config``: defaults < launcher < ``--config_file`` < command line, all mistakes at once."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.atomic import write_atomic
from library.config import schema
from library.config.check import problems, remarks
from library.config.command_line import asks_for_help, last_of_each, scan
from library.config.data_options import CachingOptions, DatasetOptions
from library.config.dialect import DIALECT, INERT, LAUNCHER, Record
from library.config.help import help_text
from library.config.loss_options import LossOptions
from library.config.memory_options import MemoryOptions
from library.config.state_options import EmaOptions, StateOptions
from library.config.values import Setting, from_text, from_toml, settings_of, toml_text
from library.errors import UserError, nearest, raise_all
from library.toml_lines import Locator, load_toml

COMMAND_LINE, DEFAULT, LAUNCH = "command line", "default", "accelerate launch"
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SESSION_ONLY = ("config_file", "output_config")  # they say what to do with a file, so they cannot stand in one


class OutputWritten(Exception):
    """``--output_config`` has done its work; ``str()`` tells where. Nothing else is to be done."""


@dataclass(frozen=True)
class Entry:
    """What an entry script names: its modules (imported later, they are heavy) and its light classes of options.

    ``defaults`` replaces defaults of shared settings. ``architecture_options`` has class attributes ``latent`` (LatentSpec) and
    ``preview`` (the Prompt whose values a prompt file may leave out), and may have ``dialect`` (Records of flags that it knows
    but does not offer), ``weights_follow_mixed_precision`` (see ``Config.weights_dtype``), ``save_formats`` (values of
    ``--save_model_as``), ``samplers`` (names that a prompt file may give). A class of any section may have a method
    ``problems(config)`` (see ``check.problems``).
    """

    program: str
    architecture: str
    method: str
    objective_options: type
    architecture_options: type
    defaults: Mapping[str, object]

    def sections(self) -> dict[str, type]:
        """Attribute of ``Config`` -> class, in the order of ``--help``."""
        return {
            "model": schema.ModelOptions, "architecture": self.architecture_options, "dataset": DatasetOptions,
            "caching": CachingOptions, "training": schema.TrainingOptions, "optimizer": schema.OptimizerOptions,
            "objective": self.objective_options, "loss": LossOptions, "precision": schema.PrecisionOptions,
            "memory": MemoryOptions, "saving": schema.SavingOptions, "state": StateOptions, "ema": EmaOptions,
            "hub": schema.HubOptions, "metadata": schema.MetadataOptions, "sampling": schema.SamplingOptions,
            "logging": schema.LoggingOptions, "general": schema.GeneralOptions,
        }

    def settings(self) -> dict[str, Setting]:
        """Every flag of this script by name, with this script's defaults."""
        found = [one for section, cls in self.sections().items() for one in settings_of(section, cls, self.defaults)]
        catalogue = {one.name: one for one in found}
        assert len(catalogue) == len(found), "two sections share the name of a flag"
        assert set(self.defaults) <= set(catalogue), f"defaults of unknown flags: {set(self.defaults) - set(catalogue)}"
        return catalogue

    def dialect(self) -> dict[str, Record]:
        """Flags that are known but are no settings of this script."""
        own = {record.name: record for record in getattr(self.architecture_options, "dialect", ())}
        settings = self.settings()
        return {name: record for name, record in {**DIALECT, **own}.items() if name not in settings}


@dataclass(frozen=True)
class Config:
    """The settings of one run. ``origins``: flag -> ``command line``, ``file.toml:12``, ``accelerate launch`` or ``default``;
    ``notes``: sentences for the log, once (flags accepted without effect, values that overrule others)."""

    model: schema.ModelOptions
    architecture: Any
    dataset: DatasetOptions
    caching: CachingOptions
    training: schema.TrainingOptions
    optimizer: schema.OptimizerOptions
    objective: Any
    loss: LossOptions
    precision: schema.PrecisionOptions
    memory: MemoryOptions
    saving: schema.SavingOptions
    state: StateOptions
    ema: EmaOptions
    hub: schema.HubOptions
    metadata: schema.MetadataOptions
    sampling: schema.SamplingOptions
    logging: schema.LoggingOptions
    general: schema.GeneralOptions
    origins: Mapping[str, str]
    notes: tuple[str, ...]
    entry: Entry = field(repr=False)

    @property
    def weights_dtype(self) -> str:
        """``fp32`` or ``bf16``: in what the trained weights are kept."""
        return self.precision.kept_weights(getattr(self.architecture, "weights_follow_mixed_precision", False))

    def place(self, flag: str) -> str:
        """The ``place`` of a UserError about a setting: ``--flag`` or ``file.toml:12: flag``."""
        origin = self.origins.get(flag, DEFAULT)
        return f"--{flag}" if origin in (COMMAND_LINE, DEFAULT) else f"{origin}: {flag}"

    def secrets(self) -> tuple[str, ...]:
        """Keys and tokens, given here or in the usual environment variables: no message may hold one."""
        given = [getattr(getattr(self, setting.section), name) for name, setting in self.entry.settings().items()
                 if setting.meta["secret"]]
        return tuple(filter(None, (*given, *(os.environ.get(name) for name in SECRET_VARIABLES))))

    def changed(self) -> frozenset[str]:
        """The flags whose values are not this script's defaults."""
        return frozenset(name for name, setting in self.entry.settings().items()
                         if getattr(getattr(self, setting.section), name) != setting.default)


def parse(entry: Entry, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Config:
    """Read the launcher's environment, ``--config_file`` and ``argv``.

    Raises UserError(s) with everything that is wrong (including the conflicts of ``check.py`` that do not follow from
    other mistakes), SystemExit(0) after ``--help``, OutputWritten after ``--output_config``.
    """
    if asks_for_help(argv):
        _print(help_text(entry.program, entry.settings().values()))
        raise SystemExit(0)
    reader = _Reader(entry)
    given, errors = scan(argv, reader.takes)
    reader.errors += errors
    flags = {flag.name: flag.value for flag in last_of_each(given)}
    reader.read_environment(os.environ if env is None else env)
    writing = flags.get("output_config", False) not in (False, "false")
    if isinstance(flags.get("config_file"), str) and flags["config_file"] and not writing:
        reader.read_file(_existing_toml(Path(flags["config_file"])))
    for name, value in flags.items():
        reader.take(name, value, f"--{name}", COMMAND_LINE, from_text)
    config = reader.config()
    if writing:
        raise_all(reader.errors)
        raise OutputWritten(f"configuration written to {write_config(config)}")
    if reader.errors:
        raise_all(reader.errors + [error for about, error in problems(config) if not about & reader.wrong])
    return dataclasses.replace(config, notes=config.notes + remarks(config))


def to_toml(config: Config) -> str:
    """The whole resolved configuration, readable again by ``--config_file``. Secrets and empty values are left out."""
    settings = list(config.entry.settings().values())
    lines = [f"# Settings of {config.entry.program}. The names of the sections have no meaning; every key is a flag."]
    for section in config.entry.sections():
        saved = [one.name for one in settings if one.section == section and one.meta["saved"]]
        values = {name: getattr(getattr(config, section), name) for name in saved}
        written = [f"{name} = {toml_text(value)}" for name, value in values.items() if value is not None]
        lines += ["", f"[{section}]", *written] if written else []
    return "\n".join(lines) + "\n"


def write_config(config: Config) -> Path:
    """Write ``to_toml`` to the path of ``--config_file``. Raises UserError when it is not given or already exists."""
    path = config.general.config_file
    if path is None:
        raise UserError("there is no file to write to", place="--output_config", remedy="name a new one with --config_file")
    path = path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")
    if path.exists():
        raise UserError(f"{path} already exists and is not overwritten", place="--output_config", remedy="choose a new name")
    write_atomic(path, to_toml(config))
    return path


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _existing_toml(path: Path) -> Path:
    """The suffix .toml may be left out."""
    longer = path.with_name(f"{path.name}.toml") if path.name else path
    return longer if longer.is_file() and not path.is_file() else path


class _Reader:
    """Values by flag, filled layer by layer; mistakes are gathered in ``errors``, their flags in ``wrong``."""

    def __init__(self, entry: Entry):
        self.entry, self.settings, self.dialect = entry, entry.settings(), entry.dialect()
        self.values: dict[str, Any] = {name: setting.default for name, setting in self.settings.items()}
        self.origins: dict[str, str] = dict.fromkeys(self.settings, DEFAULT)
        self.errors: list[UserError] = []
        self.notes: dict[str, str] = {}
        self.wrong: set[str] = set()

    def takes(self, name: str) -> str | None:
        if name in self.settings:
            return {bool: "switch", tuple: "list"}.get(self.settings[name].kind, "value")
        return self.dialect[name].takes if name in self.dialect else None

    def read_environment(self, env: Mapping[str, str]) -> None:
        """What ``accelerate launch`` was told: precision is a default here, switches we do not follow are refused."""
        for variable, (harmless, what) in LAUNCHER.items():
            if env.get(variable, "").lower() not in harmless:
                self.errors.append(UserError(f"{what} is switched on in accelerate, and is not built yet", place=variable,
                                             remedy="run `accelerate config` again without it, or start with plain python"))
        precision = env.get("ACCELERATE_MIXED_PRECISION", "").lower()
        if precision:
            self.take("mixed_precision", precision, "accelerate launch --mixed_precision", LAUNCH, from_text)

    def read_file(self, path: Path) -> None:
        try:
            data, where = load_toml(path)
        except UserError as error:
            self.errors.append(error)
            self.wrong |= set(self.settings)  # nothing can be said about values that were not read
            return
        if isinstance(data.get("datasets"), list):
            self.errors.append(UserError("this is a dataset file", place=where.place("datasets"),
                                         remedy="give it to --dataset_config; --config_file holds the flags themselves"))
            self.wrong |= set(self.settings)
            return
        seen: dict[str, tuple[str, ...]] = {}
        for key, value in data.items():
            inner = value.items() if isinstance(value, dict) else [(None, value)]
            for name, leaf in inner:
                steps = (key,) if name is None else (key, name)
                self._take_key(steps, leaf, where, seen)

    def _take_key(self, steps: tuple[str, ...], value: Any, where: Locator, seen: dict[str, tuple[str, ...]]) -> None:
        name, place = steps[-1], where.place(*steps)
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            self.errors.append(UserError("tables inside sections are not read", place=place,
                                         remedy="write one level of [sections]"))
        elif name in seen:
            self.errors.append(UserError(f"stands a second time; the first is on line {where.line(*seen[name])}", place=place,
                                         remedy="keep one of them"))
        elif name in _SESSION_ONLY:
            self.errors.append(UserError("belongs on the command line, not into the file", place=place,
                                         remedy="remove this line"))
        else:
            seen[name] = steps
            self.take(name, value, place, f"{where.path}:{where.line(*steps)}", from_toml)

    def take(self, name: str, raw: Any, place: str, origin: str, read: Callable[[Setting, Any, str], Any]) -> None:
        """One flag from one layer. An empty text brings back the default."""
        setting = self.settings.get(name)
        if setting is None:
            self._take_foreign(name, raw, place)
            return
        if name == "mixed_precision" and self.origins[name] == LAUNCH and "no" != self.values[name] != raw != "":
            self.notes[name] = f"{place} {raw} overrules accelerate launch --mixed_precision {self.values[name]}"
        self.wrong.discard(name)
        if raw in ("", [""]) and setting.kind is not bool:
            self.values[name], self.origins[name] = setting.default, DEFAULT
            return
        try:
            text = "true" if raw is True and read is from_text else raw
            self.values[name], self.origins[name] = read(setting, text, place), origin
        except UserError as error:
            self.errors.append(error)
            self.wrong.add(name)

    def _take_foreign(self, name: str, raw: Any, place: str) -> None:
        record = self.dialect.get(name)
        if record is None:
            guess = nearest(name.replace("-", "_"), [*self.settings, *self.dialect])
            self.wrong |= {one for one in self.settings if repr(one) in guess}  # it is not missing, only misspelt
            kind = "key"
            if place.startswith("--"):
                kind, guess = "flag", re.sub(r"'(\w+)'", r"--\1", guess)
            self.errors.append(UserError(f"unknown {kind}", place=place, remedy=guess or "--help lists all of them"))
        elif record.is_neutral(raw):
            return
        elif record.status == INERT:
            self.notes[name] = f"{place} is accepted without effect: {record.reason}"
        else:
            self.errors.append(UserError(record.reason, place=place, remedy=record.remedy))

    def config(self) -> Config:
        sections = {section: cls(**{one.name: self.values[one.name] for one in self.settings.values() if one.section == section})
                    for section, cls in self.entry.sections().items()}
        return Config(**sections, origins=dict(self.origins), notes=tuple(self.notes.values()), entry=self.entry)
