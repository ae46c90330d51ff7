"""The optimizers on offer, as records of what each one is and needs. Importing this loads neither torch nor any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

# What an optimizer keeps besides the state of each parameter, and so whether its parameters may be stepped in several calls:
NOTHING = "nothing"  # any order, any number of calls
COUNTER = "counter"  # numbers that each call changes alike (a step count): several calls need them put back in between
STATISTIC = "statistic"  # sums over all parameters: only a single call with all gradients is right


@dataclass(frozen=True)
class Record:
    """One optimizer: ``path`` of its class, the pip ``package`` it comes from, and how it differs from the plain case.

    ``defaults``: keyword arguments unless the user gives them. ``refused``: argument -> why it cannot be used here.
    ``bytes_per_parameter``: of float32 state, whatever the dtype of the weights (they are stepped as float32);
    ``bytes_if``: argument -> that many more when it is on; ``small_bytes``: instead, of weights too small for 8 bits;
    ``vector_bytes``: of vectors; ``factored``: number of statistics that are kept as the rows and columns of a matrix,
    where a dimension is at least ``factored_from``.
    ``fused``: takes ``fused=True``, which needs no temporary copies of all parameters, on CPU and CUDA.
    ``noisy_logger``: warns on import about things we do not use.
    ``keeps``: NOTHING, COUNTER or STATISTIC. ``one_rate``: all groups must have the same learning rate.
    ``own_rate``: finds the step size itself; the learning rate is a factor on it, 1 as a rule.
    ``modes``: trains at other weights than it delivers, hence train() and eval(). ``paged``: state may move to CPU memory.
    ``matrices``: is given weights of more than two dimensions as matrices (first dimension, all others).
    """

    name: str
    path: str
    package: str = "torch"
    bytes_per_parameter: float = 8.0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    bytes_if: Mapping[str, float] = field(default_factory=dict)
    small_bytes: float = 0.0
    vector_bytes: float = 0.0
    factored: int = 0
    factored_from: int = 0
    fused: bool = False
    noisy_logger: str = ""
    keeps: str = NOTHING
    one_rate: bool = False
    own_rate: bool = False
    modes: bool = False
    paged: bool = False
    matrices: bool = False
    note: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def per_parameter(self) -> bool:
        """Parameters may be stepped in several calls (for COUNTER with ``state.Shared.put_back`` in between)."""
        return self.keeps != STATISTIC

    def state_bytes(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> int:
        """Bytes of state for one parameter of ``shape``, from the declared numbers. ``arguments``: those given by the user."""
        given = {**self.defaults, **arguments}
        each = self.bytes_per_parameter + sum(more for key, more in self.bytes_if.items() if given.get(key))
        numbers = prod(shape)
        if not shape:
            return 0  # a single number, not worth a line
        if self.vector_bytes and len(shape) == 1:
            return round(self.vector_bytes * numbers)
        if self.small_bytes and numbers < given.get("min_8bit_size", 4096):
            return round(self.small_bytes * numbers)
        if self.factored and len(shape) >= 2 and max(shape) >= self.factored_from:
            return round(each * numbers + 4 * self.factored * (shape[0] + numbers // max(1, shape[0])))
        return round((each + (4 if self.factored else 0)) * numbers)


_OWN_RATE = "the learning rate comes from --learning_rate and --lr_scheduler"
_ADAFACTOR_RATE = ("its own learning rate is --lr_scheduler adafactor --learning_rate 1 with scale_parameter=True "
                   "(warmup_init: and --lr_warmup_steps 10000)")
_FSDP = {"fsdp_in_use": "parameters are not sharded here"}
_EIGHT = 1 + 4 / 256  # a byte, and a float32 scale for each block of 256
_LOOP = {"foreach": False}  # the other way makes temporary copies of all parameters
_AMSGRAD = {"amsgrad": 4.0}
_UNPAGED = {"is_paged": "paged state has names of its own (PagedAdamW, PagedAdamW8bit, PagedLion8bit, PagedAdEMAMix8bit)"}
_STATISTIC_NOTE = "bf16 weights are stepped all at once: 8 bytes per parameter more during the step"
_RATE_NOTE = "one learning rate for all groups"


def _torch(name: str, each: float, fused: bool = False, **more: Any) -> Record:
    return Record(name, f"torch.optim.{name}", bytes_per_parameter=each, fused=fused, defaults={} if fused else _LOOP, **more)


def _bitsandbytes(name: str, each: float, cls: str = "", **more: Any) -> Record:
    small = round(each) * 4.0 if name.endswith("8bit") else 0.0  # float32 instead of bytes
    return Record(name, f"bitsandbytes.optim.{cls or name}", "bitsandbytes", each, noisy_logger="bitsandbytes.backends.cpu.ops",
                  small_bytes=small,
                  refused={} if name.startswith("Paged") else _UNPAGED, paged=name.startswith("Paged"), **more)


def _dadaptation(name: str, each: float, path: str = "", **more: Any) -> Record:
    return Record(name, f"dadaptation.{path or name}", "dadaptation", each, keeps=STATISTIC, one_rate=True, own_rate=True,
                  **{"refused": _FSDP, "note": f"{_RATE_NOTE}; {_STATISTIC_NOTE}", **more})


def _schedule_free(name: str, each: float, **more: Any) -> Record:
    return Record(name, f"schedulefree.{name}", "schedulefree", each, defaults=_LOOP, keeps=COUNTER, modes=True,
                  note="use --lr_scheduler constant or constant_with_warmup: it averages instead of decaying", **more)


RECORDS = (
    _torch("AdamW", 8, fused=True, bytes_if=_AMSGRAD),
    _bitsandbytes("AdamW8bit", 2 * _EIGHT),
    # torch's own Adafactor keeps bf16 state for bf16 weights and barely learns; this one computes in float32.
    Record("Adafactor", "transformers.optimization.Adafactor", "transformers", 0, factored=1, matrices=True,
           defaults={"scale_parameter": False, "relative_step": False, "warmup_init": False}, bytes_if={"beta1": 4.0},
           refused={"relative_step": _ADAFACTOR_RATE, "warmup_init": _ADAFACTOR_RATE},
           note="3x3 convolutions are factored as matrices (outputs, all others); clips each update by itself"),
    _torch("Adam", 8, fused=True, bytes_if=_AMSGRAD),
    _torch("SGD", 0, fused=True, bytes_if={"momentum": 4.0}),
    Record("SGDNesterov", "torch.optim.SGD", bytes_per_parameter=0, defaults={"momentum": 0.9, "nesterov": True}, fused=True,
           bytes_if={"momentum": 4.0}),
    _torch("NAdam", 8), _torch("RAdam", 8), _torch("Adamax", 8),
    _torch("RMSprop", 4, bytes_if={"momentum": 4.0, "centered": 4.0}),
    _torch("Adagrad", 4), _torch("Adadelta", 8), _torch("Rprop", 8), _torch("ASGD", 4),
    _bitsandbytes("SGDNesterov8bit", _EIGHT, "SGD8bit", defaults={"momentum": 0.9},
                  note="bitsandbytes has no Nesterov momentum: this is plain momentum, as under this name in the dialect"),
    _bitsandbytes("Lion8bit", _EIGHT),
    _bitsandbytes("AdEMAMix", 12), _bitsandbytes("AdEMAMix8bit", 3 + 3 * 4 / 256),
    _bitsandbytes("PagedAdamW", 8), _bitsandbytes("PagedAdamW8bit", 2 * _EIGHT), _bitsandbytes("PagedAdamW32bit", 8),
    _bitsandbytes("PagedLion8bit", _EIGHT), _bitsandbytes("PagedAdEMAMix8bit", 3 + 3 * 4 / 256),
    Record("Lion", "lion_pytorch.Lion", "lion-pytorch", 4, note="wants a third to a tenth of AdamW's learning rate"),
    Record("Muon", "library.optim.muon.Muon", "torch", 4, vector_bytes=8, note="orthogonal steps for matrices and convolutions; "
           "vectors and scalars are stepped by AdamW (8 bytes each) at the same learning rate"),
    Record("CAME", "came_pytorch.CAME.CAME", "came-pytorch", 4, factored=2, matrices=True,
           note="3x3 convolutions are factored as matrices (outputs, all others); clips each update by itself"),
    Record("Prodigy", "prodigyopt.Prodigy", "prodigyopt", 16, keeps=STATISTIC, one_rate=True, own_rate=True, refused=_FSDP,
           note=f"{_RATE_NOTE}; slice_p=11 brings the state down to 9 bytes; {_STATISTIC_NOTE}"),
    Record("ProdigyPlusScheduleFree", "prodigyplus.ProdigyPlusScheduleFree", "prodigy-plus-schedule-free", 4 + 4 / 11, factored=1,
           factored_from=32, keeps=STATISTIC, own_rate=True, modes=True, aliases=("Prodigy+ScheduleFree", "ProdigyScheduleFree"),
           refused={"fused_back_pass": "when to step is decided by the trainer"},
           note="each group finds its own step size; made for --max_grad_norm 0 and a constant schedule; " + _STATISTIC_NOTE),
    _dadaptation("DAdaptation", 12, "experimental.DAdaptAdamPreprint", aliases=("DAdaptAdamPreprint",)),
    _dadaptation("DAdaptAdaGrad", 12, refused={}), _dadaptation("DAdaptAdam", 12), _dadaptation("DAdaptAdan", 20),
    _dadaptation("DAdaptAdanIP", 20, "experimental.DAdaptAdanIP", refused={}),
    _dadaptation("DAdaptLion", 8), _dadaptation("DAdaptSGD", 12),
    _schedule_free("AdamWScheduleFree", 8), _schedule_free("RAdamScheduleFree", 8), _schedule_free("SGDScheduleFree", 4),
)
