"""Optimizers by name: found, tried out, built. Importing this module loads neither torch nor any optimizer."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError, nearest
from library.optim import arguments
from library.optim.records import RECORDS, STATISTIC, Record

if TYPE_CHECKING:
    import torch

    from library.optim.groups import Group

_BY_NAME = {name.lower(): record for record in RECORDS for name in (record.name, *record.aliases)}
_BY_PATH = {record.path: record for record in reversed(RECORDS) if record.name == record.path.rpartition(".")[2]}
_PLACE = "--optimizer_type"
_ARGS_PLACE = "--optimizer_args"
_RESERVED = {"params": "it is filled in", "lr": "use --learning_rate"}
_LOWEST_FACTOR = 0.01  # of an optimizer that finds its step size itself: below, the rate was meant for another one


def find(name: str) -> Record:
    """The record of ``name`` (any case; empty means AdamW) or of the dotted path of a class. UserError otherwise.

    Of a class that is not listed nothing is known, so it is treated with the most care: stepped over all parameters at once.
    """
    record = _BY_NAME.get((name or "AdamW").lower()) or _BY_PATH.get(name)
    if record is not None:
        return record
    if "." in name.strip("."):
        return Record(name, name, name.split(".")[0], keeps=STATISTIC)
    hint = nearest(name.lower(), _BY_NAME)
    offered = ", ".join(record.name for record in RECORDS)
    raise UserError(f"unknown optimizer {name!r}", place=_PLACE,
                    remedy=f"{hint} known are {offered}, and the dotted path of any class".strip())


def record_of(optimizer: torch.optim.Optimizer) -> Record | None:
    """The record that ``build`` made it from; None for an optimizer made elsewhere."""
    return getattr(optimizer, "kiln_record", None)


def check(name: str, args: Sequence[str], learning_rate: float | None = None, averaged: bool = False) -> None:
    """Raise every UserError that ``build`` could raise, by making one step on a few numbers; for before any weight is read.

    ``learning_rate``: of the run; refused where the optimizer finds its own step size and this would stop it. ``averaged``:
    the run keeps an average of the weights, refused where the optimizer delivers one itself.
    """
    import torch

    record = find(name)
    if record.own_rate and learning_rate is not None and learning_rate < _LOWEST_FACTOR:
        raise UserError(f"{learning_rate:g} would stop {record.name}, which finds the learning rate itself and multiplies it by "
                        "this", place="--learning_rate", remedy="use --learning_rate 1")
    parameter = torch.nn.Parameter(torch.full((8, 8), 0.5))
    parameter.grad = torch.ones(8, 8)
    rate = 1.0 if record.own_rate else 1e-3
    optimizer = _make(record, args, [{"params": [parameter], "lr": rate}], rate)
    if averaged and has_modes(optimizer):
        raise UserError(f"{record.name} averages the weights itself, and saves that average", place="--ema_decay",
                        remedy="leave --ema_decay out")
    try:
        if has_modes(optimizer):
            optimizer.train()  # type: ignore[attr-defined]
        optimizer.step()
    except Exception as error:
        raise _unusable(record, args, error) from error


def remarks(name: str, lr_scheduler: str, max_grad_norm: float) -> tuple[str, ...]:
    """What is allowed but might surprise: sentences for the log."""
    record, found = find(name), []
    if record.name == "SGDNesterov8bit":
        found.append(f"{record.name}: {record.note}")
    if record.modes and lr_scheduler not in ("constant", "constant_with_warmup"):
        found.append(f"{record.name} averages its weights instead of lowering the learning rate; --lr_scheduler {lr_scheduler} "
                     "lowers it as well, and constant is what it was made for")
    if record.name == "ProdigyPlusScheduleFree" and max_grad_norm:
        found.append(f"{record.name} estimates the step size from the gradients as they are; --max_grad_norm 0 turns "
                     "clipping off")
    return tuple(found)


def build(name: str, args: Sequence[str], groups: Sequence[Group], learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer over ``groups``, each at its own learning rate, in training mode; ``args`` are ``key=value`` with Python
    literals.

    ``learning_rate`` is only the default that some optimizers insist on. Raises UserError for an unknown name, a missing
    package, and arguments that the optimizer does not have or that cannot work here; ``check`` raises the rest beforehand.
    """
    record = find(name)
    rates = {group.name: group.learning_rate for group in groups}
    if record.one_rate and len(set(rates.values())) > 1:
        shown = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        raise UserError(f"{record.name} has one step size for all groups, but their learning rates differ ({shown})",
                        place=_PLACE, remedy="give all of them the same learning rate, or use ProdigyPlusScheduleFree, which "
                                             "has one for each")
    param_groups = [{"params": [p for _, p in group.params], "lr": group.learning_rate} for group in groups]
    optimizer = _make(record, args, param_groups, learning_rate)
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it trains at other weights than it delivers; a class that is not listed shows it by its methods."""
    record = record_of(optimizer)
    if record is not None and record in RECORDS:
        return record.modes
    return all(callable(getattr(optimizer, method, None)) for method in ("train", "eval"))


def given_arguments(name: str, args: Sequence[str]) -> dict[str, Any]:
    """``args`` as the keyword arguments that they stand for. UserError as ``build``."""
    record = find(name)
    return _arguments(record, args, _load(record))


def _make(record: Record, args: Sequence[str], param_groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
    import torch

    factory = _load(record)
    given = {**record.defaults, **_arguments(record, args, factory)}
    parameters = [parameter for group in param_groups for parameter in group["params"]]
    if record.fused and not {"fused", "foreach", "differentiable"} & given.keys():
        if all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters):
            given["fused"] = True
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some announce themselves
            optimizer = factory(param_groups, lr=learning_rate, **given)
    except Exception as error:
        raise _unusable(record, args, error) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{record.name} is not an optimizer of torch", place=_PLACE,
                        remedy="name a subclass of torch.optim.Optimizer")
    optimizer.kiln_record = record  # type: ignore[attr-defined]
    return optimizer


def _unusable(record: Record, args: Sequence[str], error: Exception) -> UserError:
    said = f"{error}" or type(error).__name__
    return UserError(f"{record.name} refuses its arguments ({' '.join(args)}): {said}", place=_ARGS_PLACE,
                     remedy="correct or remove them")


def _load(record: Record) -> type:
    if record.noisy_logger:
        logging.getLogger(record.noisy_logger).setLevel(logging.ERROR)
    module, _, attribute = record.path.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # also a package that is there but broken, e.g. built for another CUDA
        raise _not_there(record, error) from error
    if not record.matrices:
        return factory
    from library.optim.matrices import over_matrices
    return over_matrices(factory)


def _not_there(record: Record, error: Exception) -> UserError:
    if record not in RECORDS and not isinstance(error, ModuleNotFoundError):
        return UserError(f"{record.path} cannot be imported: {error}", place=_PLACE, remedy="check its spelling")
    reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
    remedy = f"run: pip install {record.package}" if record in RECORDS else "install it, or check the spelling of the path"
    return UserError(f"{record.name} needs the package {record.package}, which {reason}", place=_PLACE, remedy=remedy)


def _arguments(record: Record, args: Sequence[str], factory: type) -> dict[str, Any]:
    return arguments.read(args, factory, owner=record.name, place=_ARGS_PLACE, reserved=_RESERVED, refused=record.refused)
