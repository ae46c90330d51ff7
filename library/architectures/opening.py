"""Opening what ``--pretrained_model_name_or_path`` names: a file, a folder or a hub repository. Reads headers only."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.checkpoint.hub import Hub, HubFile
from library.checkpoint.locate import check_exists
from library.checkpoint.source import Source, open_source
from library.errors import UserError

FLAG = "--pretrained_model_name_or_path"


@dataclass(frozen=True)
class CheckpointSpec:
    """``title`` of the model; ``component``: its denoiser's folder in a diffusers pipeline; ``files`` of a repository or folder
    that may hold the denoiser, in order of preference."""

    title: str
    component: str
    files: tuple[str, ...]


def open_checkpoint(spec: CheckpointSpec, name: str | Path, hub: Hub) -> Source:
    """The file, folder (diffusers pipeline, its denoiser's folder, shards), or hub repository called ``name``.

    A repository may be followed by a file: ``org/repo/file.safetensors``. UserError when there is nothing or no such file.
    """
    path = Path(name)
    if path.is_dir():
        inside = next((path / file for file in spec.files if (path / file).is_file()), None)
        component = path / spec.component
        if inside is None and not component.is_dir():
            _check_pipeline(path, spec)
        return open_source(inside or (component if component.is_dir() else path))
    repo = repository(name)
    if path.exists() or repo is None:
        check_exists(path, FLAG)
        one_of_several = re.search(r"-\d{5}-of-\d{5}\.safetensors$", path.name)  # the dialect names a model by any of its shards
        return open_source(path.parent if one_of_several else path)
    rest = str(name)[len(repo) + 1:]
    files = (rest,) if rest else spec.files
    broken: list[UserError] = []
    for cached in filter(None, (hub.cached(repo, file) for file in files)):
        try:
            return open_source(cached)
        except UserError as error:  # not all shards were downloaded
            broken.append(error)
    reasons = []
    for file in files:
        offer = hub.offer(repo, file)
        if isinstance(offer, HubFile):
            return open_source(hub.download(offer))
        reasons.append(offer)
    if broken:
        raise broken[0]
    raise UserError(f"{name} is neither a file or folder here nor in the hub cache, and {', '.join(dict.fromkeys(reasons))}",
                    place=FLAG,
                    remedy=f"give the path of a checkpoint of {spec.title}, or the name of a hub repository that holds one")


def _check_pipeline(folder: Path, spec: CheckpointSpec) -> None:
    """UserError for a diffusers pipeline of another model, or one that lacks the denoiser's folder; it may hold other parts."""
    index = folder / "model_index.json"
    if not index.is_file() or not any(entry.is_dir() for entry in folder.iterdir()):
        return
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    raise UserError(f"{folder} is a diffusers folder{f' ({kind})' if kind else ''} without the folder {spec.component}, "
                    f"which holds the weights of {spec.title}", place=FLAG,
                    remedy=f"download the whole of it, or give the folder of {spec.title}")


def repository(name: str | Path) -> str | None:
    """``org/repo`` when ``name`` can be one and is nothing here; paths with more parts only if they end in a file."""
    text = str(name).replace(os.sep, "/")  # a Path on Windows has turned the slash round
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(/[\w./-]+\.(safetensors|sft|json))?", text)
    if match is None or Path(name).exists():
        return None
    if match.group(2) is None and text.endswith((".safetensors", ".sft", ".ckpt", ".gguf", ".pt")):
        return None
    if Path(Path(text).parts[0]).is_dir():
        return None  # the first part is a folder here: a mistyped path, not a repository
    return match.group(1)


def absent(given: Mapping[str, Path | str | None]) -> list[UserError]:
    """One error for each path, by the name of its flag, that was given and is not there."""
    errors = []
    for name, path in given.items():
        try:
            if path:
                check_exists(Path(path), f"--{name}")
        except UserError as error:
            errors.append(error)
    return errors
