"""PyTorch's ``.ckpt`` files as a header: names, shapes and byte offsets, without running what a pickle may ask for.

``torch.load(weights_only=True)`` reads the pickle, which then cannot call anything but what rebuilds tensors, and on meta, so
that no weight is read. Such a file is a zip archive whose entries are not compressed: each tensor lies in it as plain bytes and
is read from there like one of a safetensors file.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import torch

from library.checkpoint.dtypes import DTYPE_NAMES
from library.checkpoint.header import Header, TensorInfo, file_state
from library.errors import UserError

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_ENTRY = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field that follow
_INSTEAD = "use the model's .safetensors file"


def is_archive(path: Path) -> bool:
    """Whether this is a file of ``torch.save`` since PyTorch 1.6."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == _ENTRY


def read_pickle(path: Path) -> Header:
    """The header of a ``.ckpt``; a training checkpoint's weights are those under ``state_dict``.

    UserError: a file that holds more than weights, is damaged, or holds weights in an unusual way.
    """
    state = file_state(path)
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
        starts = _data_starts(path)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise UserError("damaged PyTorch file", place=str(path), remedy=f"download it again, or {_INSTEAD}") from error
    except Exception as error:  # pickle.UnpicklingError, and whatever a strange pickle leads to
        raise UserError("holds more than weights, and opening the rest could run code", place=str(path),
                        remedy=_INSTEAD) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {str(name): _info(path, str(name), tensor, starts) for name, tensor in weights.items()
               if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise UserError("holds no tensors", place=str(path), remedy="give the file with the weights")
    return Header(dict(sorted(tensors.items(), key=lambda item: item[1].start)), {}, state)


def _info(path: Path, name: str, tensor: torch.Tensor, starts: dict[int, int]) -> TensorInfo:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if not tensor.is_contiguous() or tensor.dtype not in DTYPE_NAMES or offset is None:
        raise UserError(f"tensor {name!r} is stored in an unusual way", place=str(path), remedy=_INSTEAD)
    if tensor.numel() == 0:
        return TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), path, offset, offset)
    start = offset + tensor.storage_offset() * tensor.element_size()
    stop = start + tensor.numel() * tensor.element_size()
    if stop > offset + starts.get(offset, -1):
        raise UserError(f"damaged PyTorch file: tensor {name!r} is not where it should be", place=str(path),
                        remedy=f"download it again, or {_INSTEAD}")
    return TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), path, start, stop)


def _data_starts(path: Path) -> dict[int, int]:
    """Where the bytes of each entry of the archive begin, and how many there are. ValueError: not as PyTorch writes them."""
    starts: dict[int, int] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise ValueError("numbers with the high byte first")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed")
            file.seek(entry.header_offset)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            if signature != _ENTRY:
                raise ValueError("no entry where the directory has one")
            starts[entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length] = entry.file_size
    return starts

