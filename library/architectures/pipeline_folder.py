"""A model saved as a diffusers folder: what such folders have in common, whatever is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from library.atomic import atomic_folder, write_atomic
from library.checkpoint.writer import require_room
from library.config.save_formats import is_pipeline
from library.errors import UserError


@contextmanager
def pipeline_folder(path: Path, expected_bytes: int) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``path`` as a whole. UserError: no room, or something else is there."""
    if path.exists() and not is_pipeline(path):
        raise UserError("is there already, and is no diffusers model that could be replaced", place=str(path),
                        remedy="choose another --output_name, or move it away")
    require_room(path, expected_bytes)
    with atomic_folder(path) as folder:
        yield folder


def write_config(module: nn.Module, folder: Path) -> None:
    """``config.json`` of a module of diffusers or transformers."""
    if hasattr(module, "save_config"):  # diffusers
        module.save_config(folder)
    else:
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(folder)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    write_atomic(path, json.dumps(content, indent=2) + "\n")
