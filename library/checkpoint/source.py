"""Weights on disk - one file or several shards, whole or the part under a prefix - as names that can be read one by one.

Bytes go by ``readinto`` straight to where they stay, or through one small staging buffer when they change format or device.
Nothing is memory-mapped: resident memory counts each weight once, and the files can be replaced while the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from library.checkpoint.dtypes import TORCH_DTYPES
from library.checkpoint.header import Header, TensorInfo, file_state, read_header
from library.checkpoint.pickled import is_archive, read_pickle
from library.errors import UserError, nearest

STAGING_BYTES = 16 << 20
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# Scaled fp8 files keep a factor beside each weight: `x.scale_weight` (older) or `x.weight_scale`, and notes for other programs.
_SCALES, _SCALE_NOTES = (".scale_weight", ".weight_scale"), ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")


class Source:
    """Tensors by name. ``tensors`` and ``layout_order`` follow the order of the data in the files."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str],
                 states: Mapping[Path, tuple[int, int]]):
        self.path, self.tensors, self.metadata = path, dict(tensors), dict(metadata)
        self._states = states

    @property
    def layout_order(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of data on disk."""
        return sum(info.nbytes for info in self.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"Source({self.path}, {len(self.tensors)} tensors)"

    def view(self, prefix: str) -> Source:
        """The tensors under ``prefix``, named without it. May be empty."""
        kept = {name[len(prefix):]: info for name, info in self.tensors.items() if name.startswith(prefix) and name != prefix}
        return Source(self.path, kept, self.metadata, self._states)

    def read(self, name: str, out_dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor. ``out_dtype`` applies to floating tensors only; None keeps the file's (scaled fp8: bfloat16)."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=stored_dtype(info, out_dtype), device=device)
        self.read_into(name, tensor.view(-1))
        return tensor

    def read_into(self, name: str, out: torch.Tensor, start: int = 0, staging: torch.Tensor | None = None) -> None:
        """Fill the contiguous ``out`` (n,) with elements ``start`` to ``start + n`` of a tensor, in ``out``'s dtype.

        ``staging``: bytes to use on the way (see ``staging_buffer``), so that reading many tensors needs one buffer.
        UserError if the file ends early, was replaced, or cannot be read.
        """
        info = self.tensors[name]
        stored = TORCH_DTYPES[info.dtype]
        if out.numel() == 0:
            return
        position = info.start + start * stored.itemsize
        assert position + out.numel() * stored.itemsize <= info.stop, f"{name}: past its end"
        self._check_state(info.file)
        try:
            with open(info.file, "rb", buffering=0) as file:
                if out.device.type == "cpu" and out.dtype == stored and info.scale is None:
                    _read_exactly(file, position, out.view(torch.uint8), info.file)
                    return
                scale = None if info.scale is None else self._scale(name, info.scale)
                staging = staging_buffer(out.device) if staging is None else staging
                step = max(staging.numel() // stored.itemsize, 1)
                for begin in range(0, out.numel(), step):
                    target = out[begin:begin + step]
                    chunk = staging[:target.numel() * stored.itemsize]
                    _read_exactly(file, position + begin * stored.itemsize, chunk, info.file)
                    values = chunk.view(stored).to(out.device)  # the narrow format crosses the bus; the cast happens there
                    # (the copy has ended when .to() returns: the staging buffer may be filled again)
                    target.copy_(values if scale is None else values.to(torch.float32).mul_(scale))
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", place=str(info.file),
                            remedy="check the file and the disk") from error

    def identity(self) -> str:
        """A hex digest of names, formats, shapes and samples of the data: what the weights are, wherever they lie.

        Small tensors count whole, large ones by their beginning, end and four places between; any training step changes those.
        """
        digest = hashlib.sha256()
        samples: dict[str, bytes] = {}
        for path in self.files:
            self._check_state(path)
            with open(path, "rb", buffering=0) as file:
                for name, info in self.tensors.items():
                    if info.file == path:
                        samples[name] = b"".join(_sample(file, info))
        for name in sorted(self.tensors):
            info = self.tensors[name]
            scale = "" if info.scale is None else repr(self._scale(name, info.scale))
            digest.update(json.dumps([name, info.dtype, info.shape, scale]).encode())
            digest.update(samples[name])
        return digest.hexdigest()

    def _scale(self, name: str, info: TensorInfo) -> float:
        if info.numel != 1:
            raise UserError(f"{name!r} is quantised with a table of scales {list(info.shape)}, not with one per tensor",
                            place=str(info.file), remedy="use a bf16, fp16 or plain fp8 file")
        value = torch.empty(1, dtype=TORCH_DTYPES[info.dtype])
        with open(info.file, "rb", buffering=0) as file:
            _read_exactly(file, info.start, value.view(torch.uint8), info.file)
        return float(value)

    def _check_state(self, path: Path) -> None:
        try:
            unchanged = file_state(path) == self._states[path]
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            raise UserError("the file was changed or removed while it was in use", place=str(path),
                            remedy="start again, and save to another name than the file that is read")


def open_source(path: Path | str) -> Source:
    """A ``.safetensors`` file, an ``*.index.json``, or a folder that holds one of them or a set of shards; a ``.ckpt`` file if it
    holds nothing but weights. Reads headers only.

    UserError, one line, for a path that is missing, is no such file, is damaged, or is not one clear set of weights.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    header = read_pickle(path) if is_archive(path) else read_header(path)
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard[3]) > 1:
        raise UserError(f"one shard of {int(shard[3])}, not the whole model", place=str(path),
                        remedy=f"give the folder {path.parent} or its .index.json")
    return _join(path, [header])


def stored_dtype(info: TensorInfo, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that ``read`` returns: ``wanted`` for floating tensors, else the file's own."""
    stored = TORCH_DTYPES[info.dtype]
    if not stored.is_floating_point:
        return stored
    # fp8 x scale needs a wider format; the rounding of bfloat16 is far below that of fp8 itself
    return wanted or (torch.bfloat16 if info.scale is not None else stored)


def staging_buffer(device: torch.device | str = "cpu") -> torch.Tensor:
    """Bytes on the way from a file; page-locked when they go to an accelerator, which doubles the speed of that copy."""
    return torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")


def _open_folder(folder: Path) -> Source:
    if (folder / "model_index.json").is_file():
        parts = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not parts:
            raise UserError("a diffusers folder without the folders of its models", place=str(folder),
                            remedy="download the whole of it, not model_index.json alone")
        raise UserError("a diffusers folder of several models", place=str(folder),
                        remedy=f"give one of its parts: {', '.join(parts)}")
    index = _only(folder, sorted(folder.glob("*.index.json")), "index files")
    if index:
        return _open_index(index)
    files = sorted(entry for entry in folder.glob("*.safetensors") if not entry.name.startswith("."))
    shards = [(entry, match) for entry in files if (match := _SHARD.fullmatch(entry.name))]
    if shards and len(shards) == len(files) and len({(match[1], match[3]) for _, match in shards}) == 1:
        absent = set(range(1, int(shards[0][1][3]) + 1)) - {int(match[2]) for _, match in shards}
        if absent:
            raise UserError(f"shards {sorted(absent)} of {int(shards[0][1][3])} are missing", place=str(folder),
                            remedy="download them")
        return _join(folder, [read_header(entry) for entry in files])
    file = _only(folder, files, "safetensors files")
    if file:
        return _join(folder, [read_header(file)])
    others = sorted(entry.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.gguf") for entry in folder.glob(pattern))
    raise UserError(f"no .safetensors file in this folder{f', only {others[0]}' if others else ''}", place=str(folder),
                    remedy="give the folder or file that holds the model's .safetensors")


def _only(folder: Path, found: Sequence[Path], what: str) -> Path | None:
    """The one file, or of several the one under diffusers' and transformers' plain name; UserError when that is not clear."""
    plain = [entry for entry in found if re.fullmatch(r"(diffusion_pytorch_)?model\.safetensors(\.index\.json)?", entry.name)]
    if len(found) <= 1 or len(plain) == 1:
        return plain[0] if plain else found[0] if found else None
    names = ", ".join(entry.name for entry in found[:5])
    raise UserError(f"several {what}: {names}", place=str(folder), remedy="give the one that is meant")


def _open_index(path: Path) -> Source:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in table.items()}
    except FileNotFoundError as error:
        raise UserError("file not found", place=str(path), remedy="check the path") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("not a readable index of shards (no weight_map)", place=str(path), remedy="download it again") from error
    files = sorted(set(names.values()))
    absent = [file for file in files if Path(file).name != file or not (path.parent / file).exists()]
    if absent or not files:
        raise UserError(f"the index names {len(absent)} shards that are not beside it: {', '.join(absent[:3])}", place=str(path),
                        remedy="download the missing files into the same folder")
    headers = {file: read_header(path.parent / file) for file in files}
    lost = [name for name, file in names.items() if name not in headers[file].tensors]
    if lost:
        close = nearest(lost[0], headers[names[lost[0]]].tensors)
        raise UserError(f"{len(lost)} tensors of the index are not in their shards, first {lost[0]!r} {close}", place=str(path),
                        remedy="index and shards are of different models; download them again")
    return _join(path, list(headers.values()))


def _join(path: Path, headers: Sequence[Header]) -> Source:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    states: dict[Path, tuple[int, int]] = {}
    for header in headers:
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice is not None:
            raise UserError(f"tensor {twice!r} is in two shards", place=str(path),
                            remedy="the folder mixes models; download it again")
        tensors |= header.tensors
        metadata |= {key: value for key, value in header.metadata.items() if key not in metadata}
        states |= {info.file: header.file_state for info in header.tensors.values()}
    if not tensors:
        raise UserError("holds no tensors", place=str(path), remedy="give the file with the weights")
    return Source(path, _with_scales(tensors), metadata, states)


def _with_scales(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors with the factors of scaled fp8 put where they belong, and their helpers out of sight."""
    scales = {name.removesuffix(ending) + ".weight": info
              for name, info in tensors.items() for ending in _SCALES if name.endswith(ending)}
    scaled = {name: info for name, info in scales.items() if name in tensors and tensors[name].dtype.startswith("F8")}
    if not scaled:
        # a file may be marked without being scaled; the marker holds no weight
        return {name: info for name, info in tensors.items() if name.rsplit(".", 1)[-1] != "scaled_fp8"}
    helpers = tuple(f".{note}" for note in _SCALE_NOTES) + _SCALES
    return {name: TensorInfo(info.dtype, info.shape, info.file, info.start, info.stop, scaled.get(name))
            for name, info in tensors.items() if not f".{name}".endswith(helpers)}


def _read_exactly(file, position: int, out: torch.Tensor, path: Path) -> None:
    """Fill the bytes ``out`` (n,) from ``position``."""
    buffer = memoryview(out.numpy())
    file.seek(position)
    done = 0
    while done < len(buffer):
        # one call moves at most 2 GiB - 4 KiB on Linux, and less than 2 GiB on macOS
        count = file.readinto(buffer[done:done + (1 << 30)])
        if not count:
            raise UserError("the file ended early", place=str(path), remedy="it was changed while it was read; start again")
        done += count


def _sample(file, info: TensorInfo) -> Iterator[bytes]:
    size, places = 256, 6
    if info.nbytes <= size * places:
        starts, size = [info.start], info.nbytes
    else:
        starts = [info.start + (info.nbytes - size) * index // (places - 1) for index in range(places)]
    for start in starts:
        file.seek(start)
        yield file.read(size)
