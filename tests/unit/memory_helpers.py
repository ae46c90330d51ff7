"""A small model of blocks, trained with any combination of the memory engine's parts, and a transport that is as late as it may."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from library.memory.boundaries import Boundaries
from library.memory.in_backward import StepInBackward
from library.memory.recompute import Recompute
from library.memory.schedule import evenly
from library.memory.streaming import Streaming
from library.memory.transport import CpuTransport, Lane
from library.optim import table
from library.optim.groups import Group
from library.optim.rounding import StochasticRounding
from library.optim.schedule import Schedule
from library.optim.updater import StepAfterBackward

WIDTH = 24
TOTAL = 10


class Block(nn.Module):
    """Called by keywords, returns a pair; has a norm, a buffer, a parameter that never gets a gradient and an odd-sized one."""

    def __init__(self, width: int = WIDTH, hidden: int = 40):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rise, self.fall = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.unused = nn.Parameter(torch.ones(7))
        self.tail = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x, *, shift):
        y = self.fall(torch.tanh(self.rise(self.norm(x) + shift))) * self.scale.to(x.dtype)
        return x + y * self.tail.mean(), y


class Model(nn.Module):
    """Blocks of two sizes between layers that are no blocks; an unused layer outside."""

    def __init__(self, blocks: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.first, self.time = nn.Linear(5, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(hidden=40 if index % 2 else 176) for index in range(blocks))
        self.last, self.idle = nn.Linear(WIDTH, 5), nn.Linear(2, 2)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "norm" in name or "tail" in name else noise / 5)
        self.to(dtype)

    def forward(self, x):
        x = x.to(self.first.weight.dtype)
        shift = self.time(x.mean().reshape(1, 1))
        x, side = self.first(x), 0.0
        for block in self.blocks:
            x, y = block(x, shift=shift)
            side = side + y.square().mean()
        return self.last(x).float(), side


@dataclass(frozen=True)
class Setting:
    """One combination. ``unit`` None: the plain updater."""

    blocks: int = 5
    streamed: int = 0
    look_ahead: int = 2
    unit: str | None = None
    optimizer: str = "AdamW"
    dtype: torch.dtype = torch.float32
    micro: int = 1
    stream_states: bool = False
    poison: bool = False
    transport: type = CpuTransport
    recompute: dict = field(default_factory=dict, hash=False)
    autocast: bool = False


class Run:
    """A model with the parts of ``setting`` around it; its inputs are a function of step and micro-batch."""

    def __init__(self, setting: Setting, model: nn.Module | None = None):
        self.setting = setting
        self.model = model or Model(setting.blocks, setting.dtype)
        blocks = list(self.model.blocks)
        self.recompute = Recompute(blocks, **setting.recompute)
        self.boundaries = Boundaries(blocks)
        self.streaming, self.transport = None, setting.transport()
        if setting.streamed:
            self.streaming = Streaming(self.boundaries, evenly(len(blocks), setting.streamed), self.recompute.blocks,
                                       self.transport, setting.look_ahead, poison=setting.poison)
            self.streaming.move_rest(self.model)
        named = list(self.model.named_parameters())
        half = len(named) // 2
        groups = [Group("one", tuple(named[:half]), 1e-2), Group("two", tuple(named[half:]), 2e-3)]
        rounding = StochasticRounding(groups, seed=3) if setting.dtype == torch.bfloat16 else None
        optimizer = table.build(setting.optimizer, [], rounding.groups if rounding else groups, 1e-2)
        if setting.unit is None:
            self.updater = StepAfterBackward(optimizer, groups, Schedule("cosine", 2), 0.0, rounding)
        else:
            self.updater = StepInBackward(optimizer, groups, Schedule("cosine", 2), setting.unit, self.boundaries, self.streaming,
                                          rounding, stream_states=setting.stream_states)

    def loss(self, step: int, micro: int = 0) -> torch.Tensor:
        x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(100 * step + micro))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.autocast):
            output, side = self.model(x)
        return (output - x.flip(-1)).square().mean() + 0.1 * side.float()

    def step(self, step: int) -> tuple[list[float], object]:
        losses = []
        for micro in range(self.setting.micro):
            last = micro == self.setting.micro - 1
            self.updater.begin_microbatch(step, TOTAL, last)
            loss = self.loss(step, micro) / self.setting.micro
            loss.backward()
            losses.append(loss.item())
            info = self.updater.after_backward(step, TOTAL, last)
        return losses, info

    def train(self, first: int, last: int) -> list[list[float]]:
        return [self.step(step)[0] for step in range(first, last)]

    def weights(self) -> dict[str, torch.Tensor]:
        if self.streaming is None:
            return {name: value.clone() for name, value in self.model.state_dict().items()}
        with self.streaming.host_weights():
            return {name: value.clone() for name, value in self.model.state_dict().items()}


def assert_same(ours: dict, others: dict) -> None:
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        other = others[name]
        if isinstance(value, dict):
            assert_same(value, other)
        else:
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, name


class _Moment:
    """An event that may lie in the future: ``pending`` are the copies that must run before it."""

    def __init__(self):
        self.pending: list = []


class LateTransport(CpuTransport):
    """Runs every copy at the last moment that the order of events permits: a wait that is missing shows as wrong numbers.

    Compute is the program itself. A copy runs when compute or another copy waits for its event, with all before it in its
    lane, or in ``drain``.
    """

    def __init__(self):
        super().__init__()
        self._queues = {lane: [] for lane in Lane}

    def event(self) -> _Moment:
        self.allocations += 1
        return _Moment()

    def copy(self, target, source, lane, after, done) -> None:
        waits = list(after.pending) if after is not None else []  # what the event stands for now, not when the copy runs
        entry = [partial(target.copy_, source), waits, lane]
        self._queues[lane].append(entry)
        done.pending = [entry]

    def wait(self, event: _Moment) -> None:
        for entry in event.pending:
            self._run(entry)

    def drain(self) -> None:
        for queue in self._queues.values():
            while queue:
                self._run(queue[-1])

    def _run(self, entry) -> None:
        run, waits, lane = entry
        queue = self._queues[lane]
        if not any(other is entry for other in queue):
            return  # has run
        while queue and queue[0] is not entry:
            self._run(queue[0])
        queue.pop(0)
        for other in waits:
            self._run(other)
        run()
