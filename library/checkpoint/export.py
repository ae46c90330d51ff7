"""From a module to the tensors of a file, in the layout it came from, made one at a time when the writer asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from library.checkpoint.dtypes import DTYPE_NAMES
from library.checkpoint.keymap import BoundMap, identity, module_shapes
from library.checkpoint.reader import match_names
from library.checkpoint.source import Source, stored_dtype


class Entry(NamedTuple):
    """One tensor of a file to be: ``dtype`` is safetensors' name of the format it will be stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Export:
    """What to write: the entries in order and ``get(name)``, which makes one tensor (any format or device) when it is needed."""

    entries: tuple[Entry, ...]
    get: Callable[[str], torch.Tensor]

    def __add__(self, other: Export) -> Export:
        mine = {entry.name for entry in self.entries}
        twice = [entry.name for entry in other.entries if entry.name in mine]
        assert not twice, f"written twice: {twice[:3]}"
        return Export(self.entries + other.entries, lambda name: self.get(name) if name in mine else other.get(name))

    def in_order(self, names: Sequence[str]) -> Export:
        """The same in the order of ``names`` (a source's ``layout_order``); what they do not name follows."""
        rank = {name: index for index, name in enumerate(names)}
        return Export(tuple(sorted(self.entries, key=lambda entry: rank.get(entry.name, len(rank)))), self.get)


def export_module(module: nn.Module | Mapping[str, torch.Tensor], bound: BoundMap | None, *, dtype: torch.dtype | None = None,
                  prefix: str = "", also: Iterable[str] = (), order: Sequence[str] = ()) -> Export:
    """The module's weights (or a mapping of its names to tensors, such as an average of them) in the layout of ``bound``.

    ``bound`` None: the module's own names. ``dtype`` None: each as it is; integers stay integers. ``prefix`` stands before
    every name in the file. ``also``: names of tied copies to write too; ``order``: the order of names in the file. Both take
    names with or without the prefix and ignore those they do not know, so that a source's (or its view's) ``layout_order``
    may be given for either: the file then looks like the source.
    """
    if isinstance(module, nn.Module):
        bound = identity(module_shapes(module)) if bound is None else bound
        found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors = {name: found[name] for name in bound.shapes}
    else:
        tensors = module
        bound = identity({name: tuple(tensor.shape) for name, tensor in module.items()}) if bound is None else bound
    wanted = {prefix + name.removeprefix(prefix) for name in also}
    names = {prefix + name: name for name in bound.original_shapes()}
    copies = {prefix + name: name for name in bound.optional_shapes() if prefix + name in wanted}
    shapes = bound.original_shapes() | bound.optional_shapes()

    def entry(file_name: str, original: str) -> Entry:
        first = tensors[bound.bindings[bound.canonical(original)].segments[0].module_key].dtype
        return Entry(file_name, shapes[original], DTYPE_NAMES[dtype if dtype is not None and first.is_floating_point else first])

    @torch.no_grad()
    def get(file_name: str) -> torch.Tensor:
        return bound.to_original((names | copies)[file_name], lambda key: tensors[key].detach())

    entries = tuple(entry(file_name, original) for file_name, original in (names | copies).items())
    return Export(entries, get).in_order([prefix + name.removeprefix(prefix) for name in order])


def convert(source: Source, stored: BoundMap, bound: BoundMap, *, dtype: torch.dtype | None = None, prefix: str = "") -> Export:
    """Tensors of a source whose names are those of ``stored``, in the layout of ``bound``: two maps of the same module.

    Each is read when its turn comes, so that a part which nobody trains need not be in memory to be saved in another layout.
    """
    files = {original: name for name, original in match_names(source, stored, "part").items()}
    held_by = {segment.module_key: original for original, binding in stored.bindings.items() for segment in binding.segments}

    def tensor(key: str) -> torch.Tensor:
        original = held_by[key]
        return dict(stored.to_module(original, source.read(files[original])))[key]

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        first = source.tensors[files[held_by[bound.bindings[name].segments[0].module_key]]]
        return Entry(prefix + name, shape, DTYPE_NAMES[stored_dtype(first, dtype)])

    entries = tuple(entry(name, shape) for name, shape in bound.original_shapes().items())
    return Export(entries, lambda name: bound.to_original(name.removeprefix(prefix), tensor))


def carry(source: Source, names: Iterable[str] | None = None, *, prefix: str = "", dtype: torch.dtype | None = None) -> Export:
    """Tensors of a source (all by default) to be written unchanged, or in another floating format, under ``prefix``."""
    names = tuple(source.layout_order if names is None else names)
    entries = tuple(Entry(prefix + name, source.tensors[name].shape, DTYPE_NAMES[stored_dtype(source.tensors[name], dtype)])
                    for name in names)
    return Export(entries, lambda name: source.read(name.removeprefix(prefix)))
