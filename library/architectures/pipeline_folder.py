"""A model saved as a diffusers folder: how it comes into place, and what it holds beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from library.atomic import atomic_folder, write_atomic
from library.checkpoint.writer import require_room
from library.config.save_formats import is_pipeline
from library.errors import UserError

_VOCABULARY_FILES = ("vocab.json", "merges.txt", "spiece.model")  # read by older programs, and left out by transformers 5


@contextmanager
def pipeline_folder(path: Path, expected_bytes: int) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``path`` as a whole. UserError: no room, or something else is there."""
    if path.exists() and not is_pipeline(path):
        raise UserError("is there already, and is no diffusers model that could be replaced", place=str(path),
                        remedy="choose another --output_name, or move it away")
    require_room(path, expected_bytes)
    with atomic_folder(path) as folder:
        yield folder


def write_config(module: nn.Module, folder: Path, class_name: str = "") -> None:
    """``config.json`` of a module of diffusers or transformers; ``class_name``: the class that reads it, where it is another."""
    if hasattr(module, "save_config"):  # diffusers
        module.save_config(folder)
    else:
        module.config.architectures = [class_name or type(module).__name__]
        module.config.save_pretrained(folder)


def write_tokenizer(tokenizer: Any, found: Path, folder: Path, length: int, pad: int | None = None) -> None:
    """``tokenizer``, which was read from ``found``. ``length``: where pipelines cut captions; ``pad``: the token they pad with.
    The input's files may say neither."""
    tokenizer.model_max_length = length
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(folder)
    for name in _VOCABULARY_FILES:
        if (found / name).is_file():
            shutil.copyfile(found / name, folder / name)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    write_atomic(path, json.dumps(content, indent=2) + "\n")
