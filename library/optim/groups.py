"""Named groups of parameters: what trains, and at which learning rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Parameter


@dataclass(frozen=True)
class Group:
    """Parameters that share ``learning_rate`` (before the schedule's multiplier); their names are unique over all groups."""

    name: str
    params: tuple[tuple[str, Parameter], ...]
    learning_rate: float


def named_parameters(groups: Sequence[Group]) -> dict[str, Parameter]:
    """Every parameter of every group by name, in order."""
    pairs = [pair for group in groups for pair in group.params]
    named = dict(pairs)
    assert len(named) == len(pairs), f"used twice: {[n for n, count in Counter(n for n, _ in pairs).items() if count > 1][:3]}"
    return named


def assert_partition(groups: Sequence[Group], parameters: Iterable[tuple[str, Parameter]]) -> None:
    """Every parameter that requires a gradient sits in exactly one group, and the groups hold no others.

    ``parameters`` is ``module.named_parameters()``. The invariant is ours, so a breach is an AssertionError: a parameter
    left out would silently not train, one held twice would be stepped twice.
    """
    times = Counter(id(parameter) for parameter in named_parameters(groups).values())
    twice = [name for name, parameter in named_parameters(groups).items() if times[id(parameter)] > 1]
    assert not twice, f"in more than one group: {twice[:3]}"
    trainable = {id(parameter): name for name, parameter in parameters if parameter.requires_grad}
    missing = [name for key, name in trainable.items() if key not in times]
    assert not missing, f"trainable but in no group: {missing[:3]}"
    extra = [name for name, parameter in named_parameters(groups).items() if id(parameter) not in trainable]
    assert not extra, f"in a group but not trainable: {extra[:3]}"
