"""The optimizers on offer, as records. Importing this module loads neither torch nor any optimizer."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

    from library.optim.groups import Group


@dataclass(frozen=True)
class Record:
    """One optimizer: ``path`` of its class, the pip ``package`` it comes from, and how it differs from the plain case.

    ``defaults``: keyword arguments unless the user gives them. ``refused``: argument -> why it cannot be used here.
    ``fused``: takes ``fused=True``, which needs no temporary copies of all parameters, on CPU and CUDA. ``noisy_logger``:
    warns on import about things we do not use.

    To be listed here, an optimizer must give the same result when its parameters are stepped in several calls, some at a
    time (no statistic over all of them): stochastic rounding does so. The tests hold every record to it.
    """

    name: str
    path: str
    package: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    fused: bool = False
    noisy_logger: str = ""


_OWN_RATE = "the learning rate comes from --learning_rate and --lr_scheduler"

RECORDS = (
    Record("AdamW", "torch.optim.AdamW", "torch", fused=True),
    Record("AdamW8bit", "bitsandbytes.optim.AdamW8bit", "bitsandbytes", noisy_logger="bitsandbytes.backends.cpu.ops",
           refused={"is_paged": "paged states are not built yet"}),
    # torch's own Adafactor keeps bf16 state for bf16 weights and barely learns; this one computes in float32.
    Record("Adafactor", "transformers.optimization.Adafactor", "transformers",
           defaults={"scale_parameter": False, "relative_step": False, "warmup_init": False},
           refused={"relative_step": _OWN_RATE, "warmup_init": _OWN_RATE}),
)
_BY_NAME = {record.name.lower(): record for record in RECORDS}

# Names of the dialect that are optimizers elsewhere: the answer to them is not "unknown".
_NOT_YET = ("SGDNesterov", "SGDNesterov8bit", "Lion", "Lion8bit", "PagedLion8bit", "PagedAdamW", "PagedAdamW8bit",
            "PagedAdamW32bit", "AdEMAMix8bit", "PagedAdEMAMix8bit", "DAdaptation", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan",
            "DAdaptAdanIP", "DAdaptLion", "DAdaptSGD", "Prodigy", "RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree")
_PLACE = "--optimizer_type"
_ARGS_PLACE = "--optimizer_args"


def find(name: str) -> Record:
    """The record of ``name`` (any case; empty means AdamW). UserError otherwise."""
    record = _BY_NAME.get((name or "AdamW").lower())
    if record is not None:
        return record
    offered = ", ".join(record.name for record in RECORDS)
    if name.lower() in {other.lower() for other in _NOT_YET}:
        raise UserError(f"{name} is not built yet", place=_PLACE, remedy=f"use one of {offered}")
    hint = nearest(name.lower(), _BY_NAME)
    raise UserError(f"unknown optimizer {name!r}", place=_PLACE, remedy=f"{hint} known are {offered}".strip())


def check(name: str, args: Sequence[str]) -> None:
    """Raise every UserError that ``build`` could raise, by making one step on two numbers; for before any weight is read."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1, 2))
    parameter.grad = torch.ones(1, 2)
    record = find(name)
    factory = _load(record)
    arguments = {**record.defaults, **_arguments(record, args, factory)}
    try:
        factory([parameter], lr=1e-3, **arguments).step()
    except (TypeError, ValueError, RuntimeError, LookupError, NotImplementedError) as error:
        raise UserError(f"{record.name} refuses its arguments ({' '.join(args)}): {error}", place=_ARGS_PLACE,
                        remedy="correct or remove them") from error


def build(name: str, args: Sequence[str], groups: Sequence[Group], learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer over ``groups``, each at its own learning rate; ``args`` are ``key=value`` with Python literals.

    ``learning_rate`` is only the default that some optimizers insist on. Raises UserError for an unknown name, a missing
    package, and arguments that the optimizer does not have or that cannot work here; ``check`` raises the rest beforehand.
    """
    record = find(name)
    factory = _load(record)
    arguments = {**record.defaults, **_arguments(record, args, factory)}
    parameters = [parameter for group in groups for _, parameter in group.params]
    if record.fused and not {"fused", "foreach", "differentiable"} & arguments.keys():
        if all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters):
            arguments["fused"] = True
    param_groups = [{"params": [p for _, p in group.params], "lr": group.learning_rate} for group in groups]
    return factory(param_groups, lr=learning_rate, **arguments)


def _load(record: Record) -> type:
    if record.noisy_logger:
        logging.getLogger(record.noisy_logger).setLevel(logging.ERROR)
    module, _, attribute = record.path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # also a package that is there but broken, e.g. built for another CUDA
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
        raise UserError(f"{record.name} needs the package {record.package}, which {reason}", place=_PLACE,
                        remedy=f"run: pip install {record.package}") from error


def _arguments(record: Record, args: Sequence[str], factory: type) -> dict[str, Any]:
    known = [key for key in inspect.signature(factory).parameters if key not in ("params", "lr")]
    arguments: dict[str, Any] = {}
    for arg in args:
        key, equals, text = arg.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{arg!r} is not of the form key=value", place=_ARGS_PLACE,
                            remedy="write for example weight_decay=0.01")
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise UserError(f"{text!r} is not a Python value (in {arg!r})", place=_ARGS_PLACE,
                            remedy="write numbers, True, False, None, or tuples as in betas=0.9,0.99; put text in quotes, "
                                   f"as in {key}='...'") from None
        if key == "lr":
            raise UserError(f"{arg!r}: the learning rate is a flag of its own", place=_ARGS_PLACE, remedy="use --learning_rate")
        if key not in known:
            raise UserError(f"{record.name} has no argument {key!r}", place=_ARGS_PLACE,
                            remedy=nearest(key, known) or f"it has {', '.join(known)}")
        if key in arguments:
            raise UserError(f"{key} is given twice", place=_ARGS_PLACE, remedy="keep one of them")
        if key in record.refused and value:
            raise UserError(f"{arg!r} cannot be used: {record.refused[key]}", place=_ARGS_PLACE, remedy=f"leave {key} out")
        arguments[key] = value
    return arguments
