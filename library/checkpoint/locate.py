"""Where the parts of a model lie: named by a flag, inside the checkpoint, beside it, in the hub cache, on the hub.

Nothing here knows a model; ``PartSpec`` records (``library/architectures``) say what to look for. Only headers are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.checkpoint.hub import Hub, HubFile
from library.checkpoint.header import TensorInfo
from library.checkpoint.source import Source, open_source
from library.errors import UserError, nearest

Tensors = Mapping[str, TensorInfo]
Recogniser = Callable[[Tensors], str]  # what tensors look like, in words
COMPONENT_FOLDERS = ("transformer", "unet")  # of a diffusers pipeline: the other parts stand one folder up
SHARED_FOLDERS = ("unet", "diffusion_models", "checkpoints", "diffusion_model")  # of ComfyUI's models/: one up, then by kind


@dataclass(frozen=True)
class PartSpec:
    """One part: how people call its file and how to know it.

    ``given`` is what the user wrote after ``flag`` (empty for a part without a flag of its own). ``prefixes_inside``: where it
    may stand in an all-in-one file. ``file_names``: usual names, relative to the checkpoint's folder. ``folders``: folders that
    hold such files in a shared tree of models. ``hub``: (repository, file) in order of preference. ``signature``: whether
    tensors are this part.
    """

    name: str
    title: str
    flag: str
    given: Path | str | None
    prefixes_inside: tuple[str, ...]
    file_names: tuple[str, ...]
    folders: tuple[str, ...]
    hub: tuple[tuple[str, str], ...]
    signature: Callable[[Tensors], bool]


@dataclass(frozen=True)
class Found:
    """A part's tensors with its prefix stripped, and where it was found, in words."""

    source: Source
    origin: str


def find(checkpoint: Source, parts: Sequence[PartSpec], looks_like: Recogniser, hub: Hub,
         ) -> tuple[dict[str, Found | HubFile], list[UserError]]:
    """What was found (or could be downloaded: ``HubFile``) and one error for each part that was not. Downloads nothing."""
    found: dict[str, Found | HubFile] = {}
    errors: list[UserError] = []
    for part in parts:
        try:
            found[part.name] = _given(part, looks_like) if part.given else _search(checkpoint, part, looks_like, hub)
        except UserError as error:
            errors.append(error)
    return found, errors


def fetch(found: Mapping[str, Found | HubFile], parts: Sequence[PartSpec], looks_like: Recogniser, hub: Hub) -> dict[str, Found]:
    """Download what ``find`` left on the hub. UserError when a download fails or holds something else."""
    specs = {part.name: part for part in parts}
    fetched: dict[str, Found] = {}
    for name, part in found.items():
        if isinstance(part, HubFile):
            opened = open_source(hub.download(part))
            source = _matching(opened, specs[name])
            if source is None:
                raise UserError(f"{part} on the hub is not the {specs[name].title}: it looks like {looks_like(opened.tensors)}",
                                remedy=f"give a path with {specs[name].flag}" if specs[name].flag else
                                "give a checkpoint or folder that holds it")
            part = Found(source, f"the hub: {part}")
        fetched[name] = part
    return fetched


def check_exists(path: Path, flag: str) -> None:
    """UserError naming the closest file of the same folder when ``path`` is not there."""
    if path.exists():
        return
    folder = path.parent
    names = [other.name for other in folder.iterdir()] if folder.is_dir() else []
    hint = nearest(path.name, names) if folder.is_dir() else f"there is no folder {folder}"
    raise UserError(f"{path} does not exist", place=flag, remedy=hint or "give the path of an existing file or folder")


def search_folders(checkpoint: Path) -> tuple[list[Path], list[Path]]:
    """(folders where usual names are looked up, roots of shared model trees that hold one folder per kind)."""
    beside, roots = [], []
    linked = os.path.abspath(checkpoint) != str(checkpoint.resolve())
    for path in (checkpoint, checkpoint.resolve()) if linked else (checkpoint,):  # a link stands for both its places
        folder = path if path.is_dir() else path.parent
        beside.append(folder)
        if folder.name in COMPONENT_FOLDERS:
            beside.append(folder.parent)
        roots += [parent.parent for parent in (folder, *list(folder.parents)[:2]) if parent.name in SHARED_FOLDERS]
    return list(dict.fromkeys(beside)), list(dict.fromkeys(roots))


def _given(part: PartSpec, looks_like: Recogniser) -> Found:
    path = Path(part.given)
    check_exists(path, part.flag)
    if path.is_dir():  # a whole pipeline may be given for one part of it
        path = next((path / name for name in part.file_names if "/" in name and (path / name).is_file()), path)
    try:
        opened = open_source(path)
    except UserError as error:  # it knows the file, and not by which flag that was given
        raise UserError(f"{error.place or path}: {error.message}", place=part.flag, remedy=error.remedy) from error
    source = _matching(opened, part)
    if source is None:
        raise UserError(f"{path} is not the {part.title}: it looks like {looks_like(opened.tensors)}", place=part.flag,
                        remedy=f"give the {part.title}, for instance {part.file_names[0]}")
    return Found(source, part.flag)


def _search(checkpoint: Source, part: PartSpec, looks_like: Recogniser, hub: Hub) -> Found | HubFile:
    if (inside := _inside(checkpoint, part)) is not None:
        return Found(inside, f"inside {checkpoint.path.name}")
    refused: list[str] = []
    for path in _candidates(checkpoint.path, part):
        opened = open_source(path)  # a broken file under the usual name is an error to mend, not one to pass over
        if (source := _matching(opened, part)) is not None:
            return Found(source, f"beside the checkpoint: {path}")
        refused.append(f"{path} looks like {looks_like(opened.tensors)}")
    for repo, name in part.hub:
        if (path := hub.cached(repo, name)) is not None and (source := _complete(path, part)) is not None:
            return Found(source, f"the hub cache: {repo}/{name}")
    reasons: list[str] = []
    for repo, name in part.hub:
        offer = hub.offer(repo, name)
        if isinstance(offer, HubFile):
            return offer
        reasons.append(offer)
    given = f"not given with {part.flag}, " if part.flag else ""
    beside, roots = search_folders(checkpoint.path)
    folders = [str(folder) for folder in beside] + [str(root / name) for root in roots for name in part.folders]
    raise UserError(
        f"the {part.title} was not found: {given}not inside {checkpoint.path.name}, not under a usual name "
        f"({few(part.file_names)}) in {', '.join(folders)}{''.join(f' ({text})' for text in refused)}, not in the hub cache "
        f"({', '.join(dict.fromkeys(repo for repo, _ in part.hub))}), and {', '.join(dict.fromkeys(reasons))}",
        remedy=f"give its path with {part.flag}" if part.flag else "give a checkpoint or folder that holds it")


def few(names: Sequence[str], count: int = 4) -> str:
    """The first ``count`` names and an ellipsis, for messages."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _candidates(checkpoint: Path, part: PartSpec) -> Iterator[Path]:
    beside, roots = search_folders(checkpoint)
    for folder in beside:
        yield from (folder / name for name in part.file_names if (folder / name).is_file())
    plain = [name for name in part.file_names if "/" not in name]
    for folder in (root / name for root in roots for name in part.folders):
        yield from (folder / name for name in plain if (folder / name).is_file())
        for name in plain:  # ComfyUI's downloads go one folder deeper
            yield from sorted(folder.glob(f"*/{name}"))


def _inside(source: Source, part: PartSpec) -> Source | None:
    for prefix in part.prefixes_inside:
        if any(name.startswith(prefix) for name in source.tensors):
            view = source.view(prefix)
            if part.signature(view.tensors):
                return view
    return None


def _matching(source: Source, part: PartSpec) -> Source | None:
    """``source`` itself, or the part of it that fits."""
    return source if part.signature(source.tensors) else _inside(source, part)


def _complete(path: Path, part: PartSpec) -> Source | None:
    """A cached file; None when it is something else or its shards were not all downloaded."""
    try:
        return _matching(open_source(path), part)
    except UserError:
        return None
