"""What one safetensors file says it holds, and what other files are that people take for one. Needs no torch.

The format (huggingface/safetensors README): 8 bytes little-endian header length, that much JSON (name -> dtype, shape,
data_offsets; strings under ``__metadata__``), then the data, without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError, nearest

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
               "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit

_AGAIN = "download it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes ``start`` to ``stop`` of ``file``, row-major, little-endian.

    ``scale`` is the number that scaled fp8 files store beside a weight: the weight's value is stored value x scale.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    scale: TensorInfo | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, TensorInfo]  # in the order of the data
    metadata: Mapping[str, str]
    file_state: tuple[int, int]  # (size, mtime_ns): a file replaced since is not the file of this header


def read_header(path: Path) -> Header:
    """The header of one safetensors file, checked against the file's size. UserError for anything else than such a file."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            state = file_state(path)
            _refuse_other_formats(path, start, state[0])
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= MAX_HEADER_BYTES or start[8:9] != b"{":
                raise UserError("not a safetensors file (no header was found at its start)", place=str(path),
                                remedy=f"give a .safetensors file; if it is named so, it is damaged: {_AGAIN}")
            if state[0] < 8 + length:
                raise _truncated(path, state[0], f"its header alone takes {8 + length:,} bytes")
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", place=str(path),
                        remedy="check the path and its permissions") from error
    tensors, metadata = _parse(path, text, 8 + length)
    end = max((info.stop for info in tensors.values()), default=8 + length)
    if state[0] < end:
        raise _truncated(path, state[0], f"its header promises {end:,} bytes")
    if state[0] > end:
        raise UserError(f"damaged safetensors file: {state[0] - end:,} bytes after the last tensor", place=str(path),
                        remedy=_AGAIN)
    return Header(tensors, metadata, state)


def file_state(path: Path) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def _parse(path: Path, text: bytes, data_start: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    damaged = UserError("damaged safetensors file: its header is not valid", place=str(path), remedy=_AGAIN)
    try:
        fields = json.loads(text.decode("utf-8"))
        metadata = {str(key): str(value) for key, value in (fields.pop("__metadata__", None) or {}).items()}
        tensors = {name: _tensor_info(path, name, field, data_start) for name, field in fields.items()}
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    expected = data_start
    for name, info in tensors.items():
        if info.start != expected:
            raise UserError(f"damaged safetensors file: tensor {name!r} does not begin where the one before it ends",
                            place=str(path), remedy=_AGAIN)
        expected = info.stop
    return tensors, metadata


def _tensor_info(path: Path, name: str, field: dict, data_start: int) -> TensorInfo:
    dtype, shape, (start, stop) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(name)
    if dtype not in DTYPE_BYTES:
        raise UserError(f"tensor {name!r} is stored as {dtype!r}, which cannot be read here", place=str(path),
                        remedy=f"use a file in one of {', '.join(DTYPE_BYTES)}")
    if stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(name)
    return TensorInfo(dtype, shape, path, data_start + start, data_start + stop)


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    """UserError saying what the file is, when its first bytes show that it is something else."""
    text = start.lstrip().lower()
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return  # a header's length can begin with the very bytes of a pickle
    if size == 0:
        what, remedy = "the file is empty", _AGAIN
    elif start.startswith(b"version https://git-lfs"):
        what, remedy = "a git-lfs pointer, not the weights themselves", "run `git lfs pull` in its folder or download the file"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        what, remedy = "a web page, saved in place of the weights", f"{_AGAIN}; gated models need a login or an access token"
    elif text.startswith((b'{"error', b'{"detail', b'{"message')):
        what, remedy = "a server's error message, saved in place of the weights", f"{_AGAIN}; gated models need an access token"
    elif start.startswith(b"PK\x03\x04") or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        what, remedy = "a PyTorch pickle (.ckpt, .pt, .bin), which can run code when opened", "use the model's .safetensors file"
    elif start.startswith(b"GGUF"):
        what, remedy = "a GGUF file: quantised for inference, it cannot be trained", "use the model's .safetensors file"
    elif not any(start[:16]):
        what, remedy = "the file begins with zeros: its download did not finish", _AGAIN
    elif size < 10:
        what, remedy = f"the file is only {size} bytes long", _AGAIN
    else:
        return
    raise UserError(what, place=str(path), remedy=remedy)


def _truncated(path: Path, size: int, promise: str) -> UserError:
    return UserError(f"truncated safetensors file: {size:,} bytes, but {promise}", place=str(path),
                     remedy=f"the download or copy was cut short; {_AGAIN}")


def _missing(path: Path) -> UserError:
    if path.is_symlink():
        return UserError("a link to a file that does not exist", place=str(path), remedy=f"mend the link, or {_AGAIN}")
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return UserError(f"file not found; its folder {path.parent} does not exist either", place=str(path),
                         remedy="check the path")
    return UserError("file not found", place=str(path), remedy=nearest(path.name, beside) or "check the path")
