"""Nested Python values with tensors in them, as JSON and a flat table of tensors: what a state keeps instead of pickles.

Numbers, texts, None, lists, tuples and dictionaries come back as they were, floats to the last bit, NaN and infinity included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch

from library.checkpoint.dtypes import DTYPE_NAMES
from library.errors import UserError

Read = Callable[[str], torch.Tensor]
MARK = "$"  # keys of ours in JSON begin with it


def pack(value: Any, place: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """(what JSON holds, tensors by name); the tensors are the ones in ``value``, not copies.

    ``place`` names the value in errors. A tensor of a format that safetensors does not know becomes bytes. UserError for a
    value that cannot be kept.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _pack(value, "", tensors, place), tensors


def _pack(value: Any, key: str, tensors: dict[str, torch.Tensor], place: str) -> Any:
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value, key, tensors, place)
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{key}/{index}", tensors, place) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        if all(isinstance(name, str) and not name.startswith(MARK) for name in value):
            return {name: _pack(item, f"{key}/{name}" if key else name, tensors, place) for name, item in value.items()}
        return {"$items": [[_pack(name, f"{key}/{index}k", tensors, place), _pack(item, f"{key}/{index}v", tensors, place)]
                           for index, (name, item) in enumerate(value.items())]}
    raise _cannot(place, key, type(value))


def _pack_tensor(value: torch.Tensor, key: str, tensors: dict[str, torch.Tensor], place: str) -> dict[str, Any]:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        raise _cannot(place, key, type(value))  # a class of its own, such as a quantised one, is more than its numbers
    assert key not in tensors, f"two values of the {place} share the name {key}"
    if value.dtype in DTYPE_NAMES:
        tensors[key] = value
        return {"$tensor": key}
    tensors[key] = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return {"$tensor": key, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def _cannot(place: str, key: str, kind: type) -> UserError:
    return UserError(f"{key or 'a value'} is a {kind.__module__}.{kind.__qualname__}, which a saved state cannot hold",
                     place=place, remedy="use another optimizer or schedule, or train without saving states")


def unpack(packed: Any, read: Read) -> Any:
    """The value again; ``read(name)`` gives one tensor."""
    if isinstance(packed, list):
        return [unpack(item, read) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "$float" in packed:
        return float(packed["$float"])
    if "$tuple" in packed:
        return tuple(unpack(item, read) for item in packed["$tuple"])
    if "$items" in packed:
        return {unpack(name, read): unpack(item, read) for name, item in packed["$items"]}
    if "$tensor" not in packed:
        return {name: unpack(item, read) for name, item in packed.items()}
    tensor = read(packed["$tensor"])
    return tensor.view(getattr(torch, packed["dtype"])).reshape(packed["shape"]) if "dtype" in packed else tensor
