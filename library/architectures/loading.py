"""What loading has in common for all models: a module built on meta and filled strictly, and facts read off a header.

Shapes decide every width and depth, so tiny models load like the published ones. What shapes cannot tell (head counts, group
counts) follows the published models' rule, or a ``config.json`` beside the weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.checkpoint.keymap import BoundMap, KeyMap, best_fit, identity, module_shapes
from library.checkpoint.reader import build_on_meta, load_module
from library.checkpoint.source import Source
from library.errors import UserError


def load(factory: Callable[[], nn.Module], source: Source, layouts: Iterable[KeyMap], dtype: torch.dtype | None,
         device: torch.device | str, place: str) -> nn.Module:
    """``factory()`` in eval mode, nothing trainable yet, filled from ``source``, whose names are those of the module or of one of
    ``layouts``. ``dtype`` None keeps the file's. ``place``: the part's name in messages.

    UserError: keys missing or left over, wrong shapes.
    """
    module = build_on_meta(factory).eval().requires_grad_(False)
    return load_module(module, source, fitting(module, source, layouts), dtype=dtype, device=device, place=place)


def without_weights(factory: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """``factory()`` in eval mode, nothing trainable yet, its parameters on meta in ``dtype``: what ``load`` would fill."""
    module = build_on_meta(factory).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def parameter_count(source: Source) -> int:
    """Numbers in the file; a table of words that stands there twice, under two names, counts once."""
    tied = "encoder.embed_tokens.weight" if "shared.weight" in source.tensors else ""
    return sum(math.prod(info.shape) for name, info in source.tensors.items() if name != tied)


def fitting(module: nn.Module, source: Source, layouts: Iterable[KeyMap]) -> BoundMap:
    """The map between ``module`` and the names of ``source``: of ``layouts`` the one that fits best; without any, equal names."""
    shapes = module_shapes(module)
    return best_fit(source.tensors, [layout.bind(shapes) for layout in layouts] or [identity(shapes)])


def count(names: Iterable[str], pattern: str) -> int:
    """1 + the largest index that ``pattern`` (its first group) finds at the start of a name."""
    return 1 + max((int(match.group(1)) for name in names if (match := re.match(pattern, name))), default=-1)


def config_json(path: Path, class_name: str) -> Mapping[str, Any]:
    """``config.json`` of a diffusers folder when it describes ``class_name``; a text of another model is passed over."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}",
                        remedy="download it again, or remove it: settings are read off the weights") from error
    names = {config.get("_class_name"), *(config.get("architectures") or ())} if isinstance(config, dict) else set()
    return config if class_name in names else {}
