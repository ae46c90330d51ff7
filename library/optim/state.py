"""What an optimizer keeps besides the state of each parameter: step counts, sums over all parameters, train or eval.

Libraries hold such numbers in their groups (beside the settings), as attributes, or under a text in ``state``. Which of them
are settings they do not say, so all that has changed since the optimizer was built is state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.optim.records import COUNTER, NOTHING, STATISTIC
from library.optim.table import record_of

_OUTSIDE = ("params", "lr", "initial_lr")  # of a group: set by the updater
OPTIMIZER = "optimizer:"  # the entry of what belongs to no group


def group_entry(name: str) -> str:
    """The name of a group's entry in a saved state; no parameter has a colon in its name."""
    return f"group:{name}"


class Shared:
    """The shared numbers of ``optimizer``, whose groups are called ``names``. Make it when the optimizer has just been built."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: Sequence[str]):
        self._optimizer = optimizer
        self._entries = [*map(group_entry, names), OPTIMIZER]
        assert len(set(self._entries)) == len(optimizer.param_groups) + 1, "groups need names of their own"
        self._built = self.copy()

    @property
    def entries(self) -> frozenset[str]:
        """The names that ``state_dict`` may use."""
        return frozenset(self._entries)

    def copy(self) -> list[dict[str, Any]]:
        """All shared numbers as they are, for ``put_back``: around calls that would each count as a step of their own."""
        optimizer = self._optimizer
        groups = [{key: _copied(value) for key, value in group.items() if key not in _OUTSIDE}
                  for group in optimizer.param_groups]
        own = {f".{key}": _copied(value) for key, value in vars(optimizer).items()
               if type(value) in (int, float) or _tensor(value)}
        own |= {key: _copied(value) for key, value in optimizer.state.items() if isinstance(key, str)}
        return [*groups, own]

    def put_back(self, copied: Sequence[Mapping[str, Any]]) -> None:
        """The numbers of ``copied`` again, and no others."""
        for group, values in zip(self._optimizer.param_groups, copied[:-1], strict=True):
            for key in group.keys() - values.keys() - set(_OUTSIDE):
                del group[key]
            group.update({key: _copied(value) for key, value in values.items()})
        state, own = self._optimizer.state, copied[-1]
        for key in [key for key in state if isinstance(key, str) and key not in own]:
            del state[key]
        for key, value in own.items():
            if key.startswith("."):
                setattr(self._optimizer, key[1:], _copied(value))
            else:
                state[key] = _copied(value)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """{entry: {key: number, text or tensor}} of what differs from the freshly built optimizer; empty for most."""
        found = {}
        for entry, values, built in zip(self._entries, self.copy(), self._built, strict=True):
            changed = {key: value for key, value in values.items() if key not in built or not _same(value, built[key])}
            if changed:
                found[entry] = changed
        return found

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what ``state_dict`` gave; entries that are not there are as freshly built. UserError for other groups."""
        stray = sorted(state.keys() - self.entries)
        if stray:
            raise UserError(f"the saved optimizer state has a group {stray[0].partition(':')[2]!r}, which does not train now",
                            remedy="resume with the model and the settings that the state was saved with")
        device = next((p.device for group in self._optimizer.param_groups for p in group["params"]), torch.device("cpu"))
        merged = []
        for entry, built in zip(self._entries, self._built, strict=True):
            saved = {key: value.to(device) if _tensor(value) and value.ndim == 0 and _on_device(built.get(key), device) else value
                     for key, value in state.get(entry, {}).items()}
            merged.append({**built, **saved})
        self.put_back(merged)


class Calls:
    """Calls of ``optimizer`` for some of its parameters at a time that make one step together, and count as one.

    ``separable``: several calls are right; False means that the optimizer sums over all parameters and must be called once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Sequence[str]):
        record = record_of(optimizer)
        keeps = record.keeps if record is not None else NOTHING
        self.separable = keeps != STATISTIC
        self._optimizer = optimizer
        self._shared = Shared(optimizer, names) if keeps == COUNTER else None
        self._before: list[dict[str, Any]] | None = None

    def begin(self) -> None:
        """The next call is the first one of a step."""
        self._before = None

    def step(self) -> None:
        """One call: every later one of the same step starts from the shared numbers that the first one started from."""
        if self._shared is not None:
            if self._before is None:
                self._before = self._shared.copy()
            else:
                self._shared.put_back(self._before)
        self._optimizer.step()


@contextmanager
def holding(optimizer: torch.optim.Optimizer, held: Sequence[list[Any]]) -> Iterator[None]:
    """Meanwhile each group of ``optimizer`` holds the parameters ``held`` and no others."""
    before = [group["params"] for group in optimizer.param_groups]
    try:
        for group, parameters in zip(optimizer.param_groups, held, strict=True):
            group["params"] = parameters
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, before, strict=True):
            group["params"] = parameters


@contextmanager
def only(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile the groups of ``optimizer`` hold ``parameters`` (those of them that they held before) and no others."""
    wanted = {id(parameter) for parameter in parameters}
    with holding(optimizer, [[p for p in group["params"] if id(p) in wanted] for group in optimizer.param_groups]):
        yield


def _tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _copied(value: Any) -> Any:
    return value.detach().clone() if _tensor(value) else value


def _same(one: Any, other: Any) -> bool:
    if _tensor(one) or _tensor(other):
        return _tensor(one) and _tensor(other) and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    return type(one) is type(other) and one == other


def _on_device(built: Any, device: torch.device) -> bool:
    """A number that was built there, or that appeared later: it was computed from the parameters."""
    return built is None or not _tensor(built) or built.device == device
