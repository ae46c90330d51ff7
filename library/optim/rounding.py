"""Training bfloat16 weights under any optimizer: float32 arithmetic, and stochastic rounding of the result.

A bfloat16 weight has 8 bits of precision, so most updates are smaller than half its spacing and rounding to nearest loses
them all. Rounding up with a probability equal to the distance covered keeps the mean exact (Gupta et al. 2015, "Deep
Learning with Limited Numerical Precision"; Zamirai et al. 2020, "Revisiting BFloat16 Training").

The optimizer is built over float32 stand-ins that have the shape of the weights but no memory. At each step they are filled,
a bounded number of bytes at a time, from weights and gradients; the optimizer steps; the result is rounded back. So every
optimizer sees float32 parameters and makes float32 state, and the model's own parameters are never replaced (a change of
their dtype would cut them from the hooks that DistributedDataParallel keeps on them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from library.optim.groups import Group
from library.optim.state import Calls, Shared, only

CHUNK_BYTES = 256 * 1024**2
_Entry = tuple[int, Parameter, Parameter]  # index over all parameters, weight, its stand-in
_ROUND_ELEMENTS = 16 * 1024**2  # random integers drawn at a time: 64 MB


class StochasticRounding:
    """Stand-ins for the bfloat16 parameters of ``groups``, and the step that goes through them.

    Give ``.groups`` to ``table.build``. ``chunk_bytes`` bounds the float32 copies of weights that exist at a time (as much
    again for their gradients); a single parameter larger than that is a chunk of its own. It does not bound those of an
    optimizer with a statistic over all parameters (``Record.keeps``). Parameters of other dtypes are stepped as they are.
    With the same ``seed`` all ranks round alike, so replicas stay equal.
    """

    def __init__(self, groups: Sequence[Group], seed: int, chunk_bytes: int = CHUNK_BYTES):
        self._seed = seed
        self._lifted: list[_Entry] = []
        self._plain: list[Parameter] = []
        self._chunk_bytes = chunk_bytes
        self.groups = tuple(Group(g.name, tuple((n, self._stand_in(p)) for n, p in g.params), g.learning_rate) for g in groups)
        self._by_weight = {id(entry[1]): entry for entry in self._lifted}

    def _stand_in(self, parameter: Parameter) -> Parameter:
        if parameter.dtype != torch.bfloat16:
            self._plain.append(parameter)
            return parameter
        stand_in = Parameter(_memoryless(parameter))
        self._lifted.append((len(self._lifted) + len(self._plain), parameter, stand_in))
        return stand_in

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """One optimizer step from the gradients of the weights, which are given up (set to None) on the way.

        The rounding is a function of (seed, ``step``, index of the parameter): a resumed run repeats it, and so does a run that
        steps its parameters in another order or some at a time. An optimizer that sums over all parameters is called once, so
        that float32 copies of all weights and gradients exist.
        """
        self._step(Calls(optimizer, [group.name for group in self.groups]), step, self._plain, self._lifted)

    @torch.no_grad()
    def step_some(self, calls: Calls, step: int, weights: Sequence[Parameter]) -> None:
        """The same for ``weights`` alone, which have gradients; nobody else in the optimizer's groups has one."""
        lifted = [self._by_weight[id(weight)] for weight in weights if id(weight) in self._by_weight]
        self._step(calls, step, [weight for weight in weights if id(weight) not in self._by_weight], lifted)

    def _step(self, calls: Calls, step: int, plain: Sequence[Parameter], lifted: Sequence[_Entry]) -> None:
        trained = [entry for entry in lifted if entry[1].grad is not None]
        chunks = list(self._chunks(trained)) if calls.separable else [trained]
        if calls.separable and any(parameter.grad is not None for parameter in plain):
            chunks.insert(0, [])
        for chunk in chunks:
            for _, weight, stand_in in chunk:
                stand_in.data = weight.detach().float()
                stand_in.grad = weight.grad.float()
                weight.grad = None
            calls.step()
            for parameter in plain:  # or the next call would step them again
                parameter.grad = None
            for index, weight, stand_in in chunk:
                round_stochastically(stand_in.detach(), weight.detach(), _generator(self._seed, step, index, weight.device))
                stand_in.grad = None
                stand_in.data = _memoryless(weight)

    @torch.no_grad()
    def evaluate(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer.eval()`` on the weights, through the stand-ins, in float32 and rounded to nearest: they are to look at."""
        counted = Shared(optimizer, [group.name for group in self.groups])
        before = counted.copy()
        chunks = self._chunks([entry for entry in self._lifted if optimizer.state.get(entry[2])])
        for chunk in [[], *chunks]:
            counted.put_back(before)  # or it would take the second call for one too many
            for _, weight, stand_in in chunk:
                stand_in.data = weight.detach().float()
            with only(optimizer, [stand_in for _, _, stand_in in chunk] or self._plain):
                optimizer.eval()  # type: ignore[attr-defined]
            for _, weight, stand_in in chunk:
                weight.detach().copy_(stand_in.detach())
                stand_in.data = _memoryless(weight)

    def _chunks(self, entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
        chunk: list[_Entry] = []
        chunk_bytes = 0
        for entry in entries:
            entry_bytes = 4 * entry[1].numel()
            if chunk and chunk_bytes + entry_bytes > self._chunk_bytes:
                yield chunk
                chunk, chunk_bytes = [], 0
            chunk.append(entry)
            chunk_bytes += entry_bytes
        if chunk:
            yield chunk


def round_stochastically(source: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """Write float32 ``source`` into bfloat16 ``target`` of the same shape, rounding up or down at random with the exact mean.

    bfloat16 is the upper half of a float32: a random 16-bit integer is added to the lower half, which carries into the upper
    half with the probability wanted, and the lower half is cleared. NaN and infinity pass unchanged: the carry could turn a NaN
    into a zero. ``generator`` lives on the device of the tensors.
    """
    if source.ndim == 0:
        source, target = source.unsqueeze(0), target.unsqueeze(0)
    rows = max(1, _ROUND_ELEMENTS * len(source) // max(1, source.numel()))
    for part, out in zip(source.split(rows), target.split(rows), strict=True):
        carry = torch.empty_like(part, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
        rounded = carry.add_(part.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
        out.copy_(torch.where(part.isfinite(), rounded, part))


def _memoryless(parameter: Tensor) -> Tensor:
    """float32 of the same shape on the same device over a single number of storage."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)


def _generator(seed: int, step: int, index: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"round/{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
