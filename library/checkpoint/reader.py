"""From files into a module: strict, streamed, in the format and on the device where the weights will stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from library.checkpoint.dtypes import TORCH_DTYPES
from library.checkpoint.header import TensorInfo
from library.checkpoint.keymap import BoundMap, identity, module_shapes
from library.checkpoint.source import Source, open_source, staging_buffer, stored_dtype
from library.errors import UserError, nearest

__all__ = ["Source", "TensorInfo", "build_on_meta", "load_module", "open_source", "parameters_on_meta"]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on meta (shapes without memory) and their buffers real.

    ``with torch.device("meta")`` would empty the buffers too; those that no file holds (position counts, rotary frequencies)
    could then not be filled again, as only the constructor knows how. Here they are computed as always, and cost a few
    kilobytes. torch's registration hook is process-wide, so build models from one thread at a time.
    """
    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is: what is tied stays one object
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    """``factory()`` without memory for its parameters; see ``parameters_on_meta``."""
    with parameters_on_meta():
        return factory()


def load_module(module: nn.Module, source: Source, bound: BoundMap | None, *, dtype: torch.dtype | None,
                device: torch.device | str = "cpu", place: str,
                on_progress: Callable[[int, int], None] | None = None) -> nn.Module:
    """Fill ``module`` (parameters on meta) with the weights of ``source``; returns it.

    ``bound`` None: the file uses the module's own names. ``dtype`` None: as stored; it never touches integers, nor the
    buffers that no file holds, which keep the precision their author chose. Tied parameters stay tied, ``requires_grad`` and
    the train/eval mode stay as they are. Memory: the module, plus one staging buffer of 16 MiB.

    ``place`` names the part in messages (``transformer``). Raises one UserError for tensors that are missing, left over or of
    another shape, with the nearest names; nothing is read then. ``on_progress(done_bytes, total_bytes)`` counts bytes on disk.
    """
    bound = identity(module_shapes(module)) if bound is None else bound
    names = match_names(source, bound, place)
    _refuse_empty_buffers(module, bound)
    owners = _owners(module)
    device = torch.device(device)
    staging = staging_buffer(device)
    loaded: dict[str, torch.Tensor] = {}
    total, done = sum(source.tensors[name].nbytes for name in names), 0
    for name, original in names.items():
        binding = bound.bindings[original]
        for segment in binding.segments:
            key = segment.module_key
            if key not in loaded:
                target = _target_dtype(source, name, _current(owners[key]), dtype, place)
                loaded[key] = torch.empty(bound.shapes[key], dtype=target, device=device)
            part = loaded[key].view(-1)[segment.module_start:segment.module_start + segment.count]
            source.read_into(name, part, segment.original_start, staging)
            if binding.transposed:
                loaded[key] = loaded[key].view(binding.shape).t().contiguous()
        done += source.tensors[name].nbytes
        if on_progress is not None:
            on_progress(done, total)
    for key, tensor in loaded.items():
        _place(owners[key], tensor)
    _move_computed_buffers(module, set(loaded), device)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"{place}: still without values: {left[:5]}"
    return module


def match_names(source: Source, bound: BoundMap, place: str) -> dict[str, str]:
    """Name in the file -> name in the map, in the order of the data; UserError unless they fit one to one."""
    wanted, optional = bound.original_shapes(), bound.optional_shapes()
    shapes = wanted | optional
    names: dict[str, str] = {}
    filled: set[str] = set()
    for name in sorted((name for name in source.tensors if name in shapes), key=lambda name: name in optional):
        original = bound.canonical(name)
        if original not in filled:  # of tied copies the first is read
            filled.add(original)
            names[name] = original
    missing = [name for name in wanted if name not in filled]
    extra = [name for name in source.tensors if name not in shapes and not bound.is_dropped(name)]
    wrong = [name for name in names if source.tensors[name].shape != shapes[name]]
    problems = []
    if missing:
        problems.append(f"{_count(missing, 'tensor is', 'tensors are')} missing, first {_with_nearest(missing, extra)}")
    if extra:
        problems.append(f"{_count(extra, 'name is', 'names are')} unknown, first {_with_nearest(extra, missing or wanted)}")
    if wrong:
        first = wrong[0]
        problems.append(f"{_count(wrong, 'tensor has', 'tensors have')} another shape, first {first!r}: "
                        f"{list(source.tensors[first].shape)} in the file, {list(shapes[first])} in the model")
    if problems:
        raise UserError(f"does not fit the {place}: {'; '.join(problems)}", place=str(source.path),
                        remedy=f"give the whole {place} of the model that this script is for")
    return {name: names[name] for name in source.layout_order if name in names}


def _count(names: list[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"


def _with_nearest(names: list[str], known) -> str:
    hint = nearest(names[0], known)
    return f"{names[0]!r} ({hint})" if hint else repr(names[0])


Owner = tuple[nn.Module, str]


def _owners(module: nn.Module) -> Mapping[str, list[Owner]]:
    """First name of each parameter and buffer -> every (module, attribute) where that same object hangs."""
    places: dict[int, tuple[str, list[Owner]]] = {}
    for prefix, child in module.named_modules():
        for attribute, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(id(tensor), (name, []))[1].append((child, attribute))
    return dict(places.values())


def _current(owners: list[Owner]) -> torch.Tensor:
    child, attribute = owners[0]
    return getattr(child, attribute)


def _target_dtype(source: Source, name: str, current: torch.Tensor, dtype: torch.dtype | None, place: str) -> torch.dtype:
    stored = TORCH_DTYPES[source.tensors[name].dtype]
    if not current.dtype.is_floating_point:
        return current.dtype  # counts and masks; some writers store them as numbers of another kind
    if not stored.is_floating_point:
        raise UserError(f"{name!r} of the {place} is stored as {source.tensors[name].dtype}: quantised weights cannot be trained",
                        place=str(source.path), remedy="use a bf16, fp16 or fp8 file")
    return stored_dtype(source.tensors[name], dtype)


def _place(owners: list[Owner], tensor: torch.Tensor) -> None:
    current = _current(owners)
    value = nn.Parameter(tensor, requires_grad=current.requires_grad) if isinstance(current, nn.Parameter) else tensor
    for child, attribute in owners:
        table = child._parameters if attribute in child._parameters else child._buffers
        table[attribute] = value


def _move_computed_buffers(module: nn.Module, loaded: set[str], device: torch.device) -> None:
    for prefix, child in module.named_modules():
        for attribute, buffer in child._buffers.items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            if buffer is not None and name not in loaded:
                child._buffers[attribute] = buffer.to(device)


def _refuse_empty_buffers(module: nn.Module, bound: BoundMap) -> None:
    empty = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in bound.shapes]
    assert not empty, f"buffers without values, which no file holds: {empty[:5]}; build the module with build_on_meta()"
