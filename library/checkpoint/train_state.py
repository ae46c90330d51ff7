"""Everything an exact resume needs, as one folder: weights, optimizer, counters, settings. No pickles.

    {output_name}-step00000123-state/
        weights.safetensors                           what trains, by name, in the dtype it is trained in
        optimizer.safetensors, optimizer.json         its tensors, and its numbers with the places of the tensors
        ema.*, scaler.*, schedule.* ...               other parts, in the same way
        state.json                                    counters, identities, versions, run ids
        config.toml                                   the resolved settings
        manifest.json                                 bytes and xxh3-128 of every file, and a digest of itself; written last

Written aside, fsynced and renamed as a whole; nothing is loaded from a folder before every byte of it was checked. Both ways
go tensor by tensor: no second copy of the model or of the optimizer's state is made. All of it is the same on every rank (noise,
batches and schedules are pure functions of the step), so the first rank writes and every rank reads.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from library.atomic import atomic_folder, write_atomic
from library.checkpoint.dtypes import DTYPE_NAMES
from library.checkpoint.export import Entry
from library.checkpoint.header import DTYPE_BYTES, read_header
from library.checkpoint.source import Source, staging_buffer
from library.checkpoint.state_tree import MARK, pack, unpack
from library.checkpoint.writer import require_room, write_safetensors
from library.errors import UserError

MANIFEST, FACTS, CONFIG, WEIGHTS = "manifest.json", "state.json", "config.toml", "weights"
FORMAT = 1
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Logged:
    """Where the curves of a run stand: ``run_ids`` as ``Tracker.run_ids``; ``mean_loss``, the running mean that is drawn."""

    run_ids: Mapping[str, str] = field(default_factory=dict)
    mean_loss: float | None = None


@dataclass(frozen=True)
class StateFacts:
    """What a state says of the run that wrote it, besides tensors.

    ``step`` optimizer steps are done, of which the last was one of ``epoch`` (from 1). The place in the data follows from
    ``step``, ``stride`` (batches of a step over all ranks, ``StepPlan.stride``) and ``steps_per_epoch``. ``model`` and
    ``data`` are texts that are equal for equal models (architecture, method, frozen weights) and data (``Items.digest()``).
    ``config``: the settings as ``parse.to_toml`` gives them; ``data_settings``: those of the dataset file, by name.
    ``skipped``: numbers (from 1) of the steps that are left out because of a NaN, later ones among them (``nan_policy``).
    ``serial`` grows with every state written into a folder, so that the newest is known without trusting clocks.
    """

    step: int
    epoch: int
    total_steps: int
    stride: int
    steps_per_epoch: int
    world_size: int
    model: str
    data: str
    config: str
    data_settings: Mapping[str, str] = field(default_factory=dict)
    run_ids: Mapping[str, str] = field(default_factory=dict)
    mean_loss: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    saved_at: str = ""
    serial: int = 0
    skipped: list[int] = field(default_factory=list)

    @property
    def logged(self) -> Logged:
        return Logged(self.run_ids, self.mean_loss)


def save(path: Path, facts: StateFacts, weights: Mapping[str, torch.Tensor], parts: Mapping[str, Any]) -> int:
    """Write the folder ``path``, which takes the place of an older state of that name; returns its bytes.

    ``weights`` is asked for each tensor twice: for its form, and when its turn to be written comes. ``parts``: name -> a
    dictionary of nested values with tensors in them, such as ``optimizer`` -> ``updater.state_dict()``; those that are None
    are left out. Tensors may lie on any device. UserError: too little room (told before anything is written), a tensor that is
    NaN or infinite, a value that cannot be kept, no right to write, something else in the way. What stood there before is then
    untouched.
    """
    path = Path(path)
    if path.exists() and not is_state(path):
        raise UserError("is there already, and is no training state that could be replaced", place=str(path),
                        remedy="move it away, or choose another --output_name")
    assert not {WEIGHTS, Path(FACTS).stem, Path(MANIFEST).stem} & parts.keys()
    assert all(isinstance(key, str) and not key.startswith(MARK) for part in parts.values() if part is not None for key in part)
    packed = {name: pack(value, name) for name, value in parts.items() if value is not None}
    texts = {f"{name}.json": _json(content) for name, (content, _) in packed.items()}
    texts |= {FACTS: _json({key: value for key, value in _as_dict(facts).items() if key != "config"}), CONFIG: facts.config}
    tables = {WEIGHTS: weights} | {name: tensors for name, (_, tensors) in packed.items() if tensors}
    entries = {name: [Entry(key, tuple(table[key].shape), _format(table[key], key)) for key in table]
               for name, table in tables.items()}
    require_room(path, sum(_about_bytes(listed) for listed in entries.values()) + sum(map(len, texts.values())))
    with atomic_folder(path) as folder:
        try:
            size = _fill(folder, entries, tables, texts)
        except UserError as error:  # it names the file under its passing name, which means nothing to anybody
            message, place = (text.replace(str(folder), str(path)) for text in (error.message, error.place))
            raise type(error)(message, place=place, remedy=error.remedy) from error
    for left in leftovers(path):  # of a run that was killed while it replaced this very state
        shutil.rmtree(left.parent, ignore_errors=True)
    return size


def _fill(folder: Path, entries: Mapping[str, list[Entry]], tables: Mapping[str, Mapping[str, torch.Tensor]],
          texts: Mapping[str, str]) -> int:
    """Write the files, the manifest last; returns their bytes."""
    files: dict[str, dict[str, Any]] = {}
    for name, listed in entries.items():
        checksum = xxhash.xxh3_128()
        size = write_safetensors(folder / f"{name}.safetensors", listed, tables[name].__getitem__, checksum=checksum)
        files[f"{name}.safetensors"] = {"bytes": size, "xxh3_128": checksum.hexdigest()}
    for name, text in texts.items():
        data = text.encode("utf-8")
        write_atomic(folder / name, data)
        files[name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    write_atomic(folder / MANIFEST, _json(_signed({"format": FORMAT, "files": files})))
    return sum(each["bytes"] for each in files.values())


def is_state(path: Path) -> bool:
    """Whether this is a folder that ``save`` made, whole or not."""
    return (path / MANIFEST).is_file()


def leftovers(path: Path) -> list[Path]:
    """Whole states that a killed run had moved aside to put a newer one at ``path`` (see ``atomic_folder``)."""
    name = glob.escape(path.name)
    return sorted(path.parent.glob(f".{name}.*.previous/{name}"))


def open_state(path: Path, verify: bool = True) -> SavedState:
    """The state in the folder ``path``. Every file is read and compared with its checksum first, unless ``verify`` is False (then
    only presence and lengths are looked at). UserError where something is missing, cut short or changed."""
    path = Path(path)
    files = _manifest(path)
    for name, wanted in files.items():
        _check_file(path / name, wanted, verify)
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        facts["config"] = (path / CONFIG).read_text(encoding="utf-8")
        known = {each.name for each in dataclasses.fields(StateFacts)}
        return SavedState(path, StateFacts(**{key: value for key, value in facts.items() if key in known}), frozenset(files))
    except (OSError, ValueError, TypeError) as error:
        raise _broken(path, f"{FACTS} cannot be read: {error}") from error


@dataclass(frozen=True)
class SavedState:
    """A whole state on disk. Its tensors are read when they are asked for."""

    path: Path
    facts: StateFacts
    files: frozenset[str]

    def load_weights(self, into: Mapping[str, torch.Tensor]) -> None:
        """Fill the tensors of ``into``, in place and bit for bit, wherever they lie.

        UserError, with nothing changed, unless names, shapes and dtypes are those of the state.
        """
        source = _tensors(self.path / f"{WEIGHTS}.safetensors")
        self._require_same_weights(source, into)
        staging = {}
        with torch.no_grad():
            for name, target in into.items():
                if target.device not in staging:
                    staging[target.device] = staging_buffer(target.device)
                if target.is_contiguous():
                    source.read_into(name, target.detach().view(-1), staging=staging[target.device])
                else:
                    target.copy_(source.read(name))

    def part(self, name: str) -> Part | None:
        """A part that was saved, or None where the run had none of that name."""
        return Part(self.path, name, f"{name}.safetensors" in self.files) if f"{name}.json" in self.files else None

    def _require_same_weights(self, source: Source, into: Mapping[str, torch.Tensor]) -> None:
        stray = sorted(source.tensors.keys() ^ into.keys())
        if stray:
            side = "only in the state" if stray[0] in source else "not in the state"
            raise UserError(f"this state is of another model: {len(stray)} names of weights stand on one side only; {stray[0]!r} "
                            f"is {side}", place=str(self.path), remedy="resume with the model and settings it was saved with")
        for name, tensor in into.items():
            info, wanted = source.tensors[name], (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            if (info.dtype, info.shape) != wanted:
                raise UserError(f"this state is of another model: {name!r} is {info.dtype} {list(info.shape)} in it and "
                                f"{wanted[0]} {list(wanted[1])} now", place=str(self.path),
                                remedy="resume with the model and the precision it was saved with")


class Part(Mapping[str, Any]):
    """One part of a state: a dictionary of which an entry's tensors are read, onto the CPU, when that entry is asked for.

    So an optimizer's state can be moved to its places parameter by parameter. ``dict(part)`` reads all of it.
    """

    def __init__(self, path: Path, name: str, has_tensors: bool):
        self._packed = json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
        self._source = _tensors(path / f"{name}.safetensors") if has_tensors else None
        self._latest: tuple[str, Any] | None = None  # whoever asks twice in a row gets the same

    def __getitem__(self, key: str) -> Any:
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # let go of the old before the new is read
            self._latest = (key, unpack(self._packed[key], self._read))
        return self._latest[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def _read(self, name: str) -> torch.Tensor:
        assert self._source is not None
        return self._source.read(name)


def _tensors(file: Path) -> Source:
    header = read_header(file)
    return Source(file, header.tensors, header.metadata, {file: header.file_state})  # names mean nothing but themselves here


def _format(tensor: torch.Tensor, name: str) -> str:
    assert tensor.dtype in DTYPE_NAMES, f"{name}: {tensor.dtype}"
    return DTYPE_NAMES[tensor.dtype]


def _about_bytes(entries: list[Entry]) -> int:
    return sum(math.prod(entry.shape) * DTYPE_BYTES[entry.dtype] + 200 for entry in entries)  # 200: its line in the header


def _as_dict(facts: StateFacts) -> dict[str, Any]:
    return {each.name: getattr(facts, each.name) for each in dataclasses.fields(facts)}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _signed(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "digest": xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())}


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_dir():
        raise UserError("no such folder" if not path.exists() else "is a file, and a state is a folder", place=str(path),
                        remedy="give the folder whose name ends in -state, or latest")
    try:
        text = (path / MANIFEST).read_bytes().decode("utf-8")
        content = json.loads(text)
        version = content["format"]
        del content["digest"]
    except FileNotFoundError as error:
        raise UserError(f"is no training state: it has no {MANIFEST}", place=str(path),
                        remedy="give the folder whose name ends in -state, or latest") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _broken(path, f"{MANIFEST} cannot be read") from error
    if text != _json(_signed(content)):
        raise _broken(path, f"{MANIFEST} was changed")
    if version != FORMAT:
        raise UserError(f"is a state of format {version}, and this program reads format {FORMAT}", place=str(path),
                        remedy="resume with the version of the program that wrote it")
    return content["files"]


def _check_file(path: Path, wanted: Mapping[str, Any], verify: bool) -> None:
    checksum, size = xxhash.xxh3_128(), 0
    try:
        if not verify:
            size = path.stat().st_size
        else:
            buffer = memoryview(bytearray(_READ_BYTES))
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    checksum.update(buffer[:count])
                    size += count
    except OSError as error:
        raise _broken(path.parent, f"{path.name} cannot be read: {error.strerror or error}") from error
    if size != wanted["bytes"]:
        raise _broken(path.parent, f"{path.name} has {size:,} bytes instead of {wanted['bytes']:,}")
    if verify and checksum.hexdigest() != wanted["xxh3_128"]:
        raise _broken(path.parent, f"{path.name} does not hold what was written")


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"this state is broken: {why}", place=str(path),
                     remedy="--resume latest takes the newest one that is whole")
