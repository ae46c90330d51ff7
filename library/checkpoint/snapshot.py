"""A copy of modules' weights in host memory, from which a file can be written while the modules train on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
import torch
from torch import nn

from library.errors import UserError

_ALIGNMENT = 64  # bytes
_SPARE = 1 << 30  # host memory that a copy leaves free for all else


class Snapshot:
    """One buffer of exactly the size of all weights, made at the first ``take`` and used again by the next ones.

    ``modules`` after ``take`` are doubles of the given ones: their class, configuration and names, with the weights of that
    moment and without hooks. They are for reading. Whoever calls ``take`` again must be done with them.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._live = dict(modules)
        self._buffer: torch.Tensor | None = None
        self._held: dict[int, torch.Tensor] = {}  # id of a live tensor -> its copy
        self.modules: dict[str, nn.Module] = {}

    @property
    def nbytes(self) -> int:
        return sum(_aligned(tensor) for tensor in _stored(self._live.values()).values())

    def require_memory(self) -> None:
        """UserError where the host has no room for the copy, with the numbers."""
        needed, free = self.nbytes, available_memory()
        if self._buffer is None and needed + _SPARE > free:
            raise UserError(f"the copy of the weights takes {needed / 1e9:.1f} GB of host memory and {_SPARE / 1e9:.1f} GB are "
                            f"left to all else, but only {free / 1e9:.1f} GB are free", place="--async_save",
                            remedy="leave it out: files are then written between two steps, without a copy")

    @torch.no_grad()
    def take(self) -> None:
        """Copy the weights as they are now. Waits for the device (a sync point): afterwards steps may change them.

        UserError as ``require_memory``, at the first call.
        """
        live = _stored(self._live.values())
        if self._buffer is None:
            self.require_memory()
            self._buffer = _host_buffer(sum(map(_aligned, live.values())), any(tensor.is_cuda for tensor in live.values()))
            start = 0
            for key, tensor in live.items():
                part = self._buffer[start:start + tensor.numel() * tensor.element_size()]
                part = part.view(tensor.dtype).view(tensor.shape)
                self._held[key] = nn.Parameter(part, requires_grad=False) if isinstance(tensor, nn.Parameter) else part
                start += _aligned(tensor)
            self.modules = {name: _double(module, self._held) for name, module in self._live.items()}
        assert live.keys() == self._held.keys(), "a module has other parameters than at the first copy"
        for key, tensor in live.items():
            self._held[key].copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in live.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)


def available_memory() -> int:
    """Bytes of host memory that this process can still have: what is free, within the limit of its container (cgroup v2)."""
    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get("inactive_file", "0")
        return free if limit == "max" else min(free, int(limit) - int(used) + int(cached))
    except (OSError, ValueError):
        return free


def _stored(modules: Iterable[nn.Module]) -> dict[int, torch.Tensor]:
    """Parameters and buffers, tied ones once, by identity."""
    return {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _host_buffer(size: int, pinned: bool) -> torch.Tensor:
    """uint8 (size,). torch's own pinned memory comes in powers of two, which can double the need: this is ordinary memory that is
    then locked, at its exact size. Where locking fails the copy is only slower."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if pinned and size:
        torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
    return buffer


def _double(module: nn.Module, held: Mapping[int, torch.Tensor]) -> nn.Module:
    """The module with copies for weights and without hooks. Made as torch replicates modules: nothing else is duplicated."""
    double = object.__new__(type(module))
    double.__dict__ = dict(module.__dict__)
    double.__dict__.pop("forward", None)  # a wrapper around the live one
    for name in [name for name in double.__dict__ if name.startswith(("_forward_", "_backward_"))]:
        double.__dict__[name] = {}
    double.__dict__["_parameters"] = {
        name: None if parameter is None else held[id(parameter)] for name, parameter in module._parameters.items()}
    double.__dict__["_buffers"] = {name: None if buffer is None else held[id(buffer)] for name, buffer in module._buffers.items()}
    double.__dict__["_modules"] = {name: None if child is None else _double(child, held)
                                   for name, child in module._modules.items()}
    return double
