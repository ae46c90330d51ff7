"""One table of rules, walked the same way in both directions, between the names in a file and those in a module.

Every rule comes down to *segments*: runs of elements of a file tensor that are runs of elements of a module tensor. Reading
copies segments one way, writing the other, so the two cannot disagree. Widths and depths come from the module: tiny models
pass through the same table as full-size ones.

Patterns: a placeholder of one letter, ``{i}``, is an index; ``{leaf}`` is one path segment that is no number (``weight``);
``{rest}`` is anything. ``{~i}`` (file side only) is the index ``i`` counted from the end of the module's list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rename:
    """The same tensor under two names. ``also``: names under which files hold a second, tied copy; any one of them will do."""

    original: str
    module: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fuse:
    """One tensor in the file = the module's tensors, concatenated on dimension 0 in this order."""

    original: str
    module: tuple[str, ...]


@dataclass(frozen=True)
class SwapHalves:
    """The two halves of dimension 0 change places: (shift, scale) in the file, (scale, shift) in the module."""

    original: str
    module: str


@dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution in the file, (out, in, 1, 1), is a linear layer in the module, (out, in)."""

    original: str
    module: str


@dataclass(frozen=True)
class Transpose:
    """A matrix (in, out) in the file, used as ``x @ m``, is the weight (out, in) of a linear layer in the module."""

    original: str
    module: str


@dataclass(frozen=True)
class Drop:
    """A tensor that files are known to carry and the module has no use for."""

    original: str


Rule = Rename | Fuse | SwapHalves | Pointwise | Transpose | Drop


@dataclass(frozen=True)
class Segment:
    """``count`` elements of the flattened file tensor from ``original_start`` are those of the module's from ``module_start``."""

    module_key: str
    module_start: int
    original_start: int
    count: int


@dataclass(frozen=True)
class Binding:
    """How one tensor of the file is made of tensors of the module.

    ``transposed``: the module's only tensor is the file's with rows and columns exchanged (its one segment is all of both).
    """

    shape: Shape
    segments: tuple[Segment, ...]
    also: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class BoundMap:
    """A key map whose indexes and shapes are those of one module."""

    bindings: Mapping[str, Binding]
    shapes: Mapping[str, Shape]
    drops: tuple[re.Pattern[str], ...] = ()

    def original_shapes(self) -> dict[str, Shape]:
        """Name -> shape of what a file must contain (of a tied tensor: its first name)."""
        return {name: binding.shape for name, binding in self.bindings.items()}

    def optional_shapes(self) -> dict[str, Shape]:
        """Name -> shape of the tied copies that a file may contain as well, or instead."""
        return {copy: binding.shape for binding in self.bindings.values() for copy in binding.also}

    def module_shapes(self) -> dict[str, Shape]:
        return dict(self.shapes)

    def is_dropped(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self.drops)

    def canonical(self, name: str) -> str:
        """The first name of a tied tensor; any other name is returned as it is."""
        if name in self.bindings:
            return name
        return next((first for first, binding in self.bindings.items() if name in binding.also), name)

    def to_module(self, original_key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """The module's tensors that this tensor of the file holds: views of it where the rule allows, else copies."""
        binding = self.bindings[self.canonical(original_key)]
        assert tuple(tensor.shape) == binding.shape, f"{original_key}: {tuple(tensor.shape)}, expected {binding.shape}"
        if binding.transposed:
            return [(binding.segments[0].module_key, tensor.t())]
        flat, out = tensor.reshape(-1), {}
        for segment in binding.segments:
            part = flat[segment.original_start:segment.original_start + segment.count]
            size = math.prod(self.shapes[segment.module_key])
            if segment.count == size:
                out[segment.module_key] = part
            else:
                whole = out.setdefault(segment.module_key, flat.new_empty(size))
                whole[segment.module_start:segment.module_start + segment.count].copy_(part)
        return [(name, part.view(self.shapes[name])) for name, part in out.items()]

    def to_original(self, original_key: str, get: Callable[[str], Tensor]) -> Tensor:
        """The tensor of the file, made of what ``get(module_key)`` returns; a view where one tensor is all of it."""
        binding = self.bindings[self.canonical(original_key)]
        parts = {name: get(name) for name in dict.fromkeys(segment.module_key for segment in binding.segments)}
        for name, part in parts.items():
            assert tuple(part.shape) == self.shapes[name], f"{name}: {tuple(part.shape)}, expected {self.shapes[name]}"
        first = next(iter(parts.values()))
        if binding.transposed:
            return first.t()
        if len(binding.segments) == 1:
            return first.reshape(binding.shape)
        out = first.new_empty(math.prod(binding.shape))
        for segment in binding.segments:
            part = parts[segment.module_key].reshape(-1)[segment.module_start:segment.module_start + segment.count]
            out[segment.original_start:segment.original_start + segment.count].copy_(part)
        return out.view(binding.shape)


@dataclass(frozen=True)
class KeyMap:
    """The rules between one file layout and one kind of module. The first rule that matches a module's name applies."""

    rules: tuple[Rule, ...]

    def bind(self, module_shapes: Mapping[str, Shape]) -> BoundMap:
        """The map for a module with these tensors. AssertionError: a tensor of the module that no rule covers."""
        compiled = [_Compiled(rule, part, module_shapes) for rule in self.rules if not isinstance(rule, Drop)
                    for part in range(len(_module_patterns(rule)))]
        found: dict[str, tuple[Rule, dict[int, str], tuple[str, ...]]] = {}
        for key in module_shapes:
            match = next((hit for entry in compiled if (hit := entry.match(key))), None)
            if match is None:
                known = [pattern for rule in self.rules for pattern in _module_patterns(rule)]
                raise AssertionError(f"the key map has no rule for the module's {key!r} {nearest(key, known)}")
            rule, part, original, also = match
            parts = found.setdefault(original, (rule, {}, also))[1]
            assert part not in parts, f"{key!r} and {parts[part]!r} both stand for {original!r}"
            parts[part] = key
        bindings = {original: _binding(original, rule, parts, also, module_shapes)
                    for original, (rule, parts, also) in found.items()}
        drops = tuple(_regex(rule.original) for rule in self.rules if isinstance(rule, Drop))
        return BoundMap(bindings, dict(module_shapes), drops)


def identity(module_shapes: Mapping[str, Shape]) -> BoundMap:
    """The map of a file that uses the module's own names."""
    return KeyMap((Rename("{rest}", "{rest}"),)).bind(module_shapes)


def best_fit(names: Iterable[str], bounds: Sequence[BoundMap]) -> BoundMap:
    """The layout that shares most names with a file; of equals the first. Loading with it tells what does not fit."""
    names = set(names)
    return max(bounds, key=lambda bound: sum(name in names for name in (*bound.original_shapes(), *bound.optional_shapes())))


def module_shapes(module: nn.Module) -> dict[str, Shape]:
    """Name -> shape of what a file holds of a module: its parameters, tied ones once, and its persistent buffers."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    saved = module.state_dict(keep_vars=True)
    return shapes | {name: tuple(buffer.shape) for name, buffer in module.named_buffers() if name in saved}


@dataclass(frozen=True)
class _Compiled:
    """One module-side pattern of a rule, ready to match."""

    rule: Rule
    part: int
    shapes: Mapping[str, Shape]
    start: str = field(init=False)
    pattern: re.Pattern[str] = field(init=False)
    lengths: dict[str, int] = field(init=False)

    def __post_init__(self):
        module = _module_patterns(self.rule)[self.part]
        object.__setattr__(self, "start", module.split("{")[0])
        object.__setattr__(self, "pattern", _regex(module))
        reversed_names = re.findall(r"\{~(\w+)\}", self.rule.original)
        lengths = {name: _list_length(module.split(f"{{{name}}}")[0], self.shapes) for name in reversed_names}
        object.__setattr__(self, "lengths", lengths)

    def match(self, key: str) -> tuple[Rule, int, str, tuple[str, ...]] | None:
        hit = self.pattern.fullmatch(key) if key.startswith(self.start) else None  # tables have hundreds of patterns
        if hit is None:
            return None
        values = hit.groupdict()
        values |= {f"~{name}": str(length - 1 - int(values[name])) for name, length in self.lengths.items()}
        also = self.rule.also if isinstance(self.rule, Rename) else ()
        return self.rule, self.part, _fill(self.rule.original, values), tuple(_fill(name, values) for name in also)


def _list_length(prefix: str, names: Iterable[str]) -> int:
    """How many blocks a module has under ``prefix`` (literal, ends with a dot)."""
    indexes = [int(name[len(prefix):].split(".", 1)[0]) for name in names if name.startswith(prefix)]
    return max(indexes, default=-1) + 1


def _module_patterns(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, Drop):
        return ()
    return rule.module if isinstance(rule, Fuse) else (rule.module,)


def _regex(pattern: str) -> re.Pattern[str]:
    def group(name: str) -> str:
        return f"(?P<{name}>{'.+' if name == 'rest' else '[0-9]+' if len(name) == 1 else '[a-z_]+'})"

    pieces = re.split(r"\{(\w+)\}", pattern)
    return re.compile("".join(group(piece) if index % 2 else re.escape(piece) for index, piece in enumerate(pieces)))


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(~?\w+)\}", lambda hit: values[hit[1]], pattern)


def _binding(original: str, rule: Rule, parts: Mapping[int, str], also: tuple[str, ...], shapes: Mapping[str, Shape]) -> Binding:
    patterns = _module_patterns(rule)
    missing = [patterns[part] for part in range(len(patterns)) if part not in parts]
    assert not missing, f"{original!r} is made of {patterns}; the module lacks {missing}"
    keys = [parts[part] for part in range(len(patterns))]
    first = shapes[keys[0]]
    if isinstance(rule, SwapHalves):
        assert first and first[0] % 2 == 0, f"{keys[0]}: {first} has no halves"
        half = math.prod(first) // 2
        return Binding(first, (Segment(keys[0], half, 0, half), Segment(keys[0], 0, half, half)))
    if isinstance(rule, Pointwise):
        return Binding((*first, 1, 1), (Segment(keys[0], 0, 0, math.prod(first)),))
    if isinstance(rule, Transpose):
        assert len(first) == 2, f"{keys[0]}: {first} is no matrix"
        return Binding(first[::-1], (Segment(keys[0], 0, 0, math.prod(first)),), transposed=True)
    segments, start = [], 0
    for key in keys:
        assert shapes[key][1:] == first[1:], f"{original!r} cannot be fused from {[shapes[name] for name in keys]}"
        count = math.prod(shapes[key])
        segments.append(Segment(key, 0, start, count))
        start += count
    shape = (sum(shapes[key][0] for key in keys), *first[1:]) if len(keys) > 1 else first
    return Binding(shape, tuple(segments), also)
