"""The training loop: batches in, steps out. Reads top to bottom; knows no model and no file format."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from library.architectures.base import Architecture, TextEncoders
from library.data.dataset import Batch, StepMicro, batches
from library.data.plan import StepPlan
from library.dist import Runtime, launcher_is_gone
from library.ema import Ema
from library.encode import Encoded
from library.errors import UserError
from library.interrupt import StopRequest
from library.memory.report import peak_bytes
from library.objectives.base import Objective
from library.objectives.loss import mean
from library.objectives.noise import draw
from library.memory.in_backward import StepInBackward
from library.nan_policy import NanPolicy, with_pictures
from library.optim.updater import NonFinite, StepAfterBackward, UpdateInfo
from library.step import training_losses


@dataclass(frozen=True)
class Task:
    """All that a step needs. Modules are as they are called: replicated when there are several processes."""

    runtime: Runtime
    arch: Architecture
    denoiser: nn.Module
    encoders: TextEncoders  # those that train
    objective: Objective
    updater: StepAfterBackward | StepInBackward
    encoded: Encoded
    plan: StepPlan
    seed: int
    first_step: int
    total_steps: int
    workers: int
    scaler: torch.amp.GradScaler | None
    nans: NanPolicy
    ema: Ema | None = None
    readable: Callable[[], AbstractContextManager] = nullcontext  # in it every weight can be read where it lies

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.denoiser, *self.encoders.modules.values())

    def text(self, fixed: Mapping[str, torch.Tensor], captions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Everything that is known of ``captions``: what does not change, and what the encoders that train make of them now."""
        return {**fixed, **self.arch.encode_text(self.encoders, captions)} if self.encoders.modules else fixed


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step, numbered from 1. ``loss`` is the mean over the step's samples on all ranks, NaN for a step
    that was left out; ``left_out``: how many were, up to this one."""

    step: int
    epoch: int
    epoch_ended: bool
    loss: float
    update: UpdateInfo
    samples: int
    seconds: float  # all of it, ``waited`` included
    waited: float  # seconds of it in which the batches were not ready
    peak_bytes: int
    stopping: bool  # this step is the last one, because somebody asked for that
    left_out: int = 0


def train(task: Task, stop: StopRequest, after_step: Callable[[StepReport], None],
          go_back: Callable[[], int] | None = None) -> int:
    """Run until ``total_steps`` or until ``stop`` is requested. Returns the number of steps done, first_step included.

    Raises NonFinite for a gradient that is not finite, before the weights have taken it, and for a loss that is not, unless
    ``task.nans`` has another answer. ``go_back()`` restores the newest state and returns its step.
    """
    first = task.first_step
    while (done := _train_from(task, first, stop, after_step)) is None:
        task.updater.leave_out(first, task.total_steps)  # the step that was broken off has nothing under way any more
        first = go_back()
        task.nans.allow(first)
    return done


def _train_from(task: Task, first: int, stop: StopRequest, after_step: Callable[[StepReport], None]) -> int | None:
    """``train`` from step ``first`` on; None when the run is to go back."""
    done = first
    started = time.perf_counter()
    groups = _read(task, first)
    with closing(groups):
        for group in groups:
            waited = time.perf_counter() - started
            made = _step(task, group)
            if made is None:
                return None
            update, loss = made
            done = group.step + 1
            now = time.perf_counter()
            stopping = task.runtime.any_rank(stop.requested or launcher_is_gone())
            after_step(StepReport(done, group.epoch, done % task.plan.steps_per_epoch == 0, loss, update,
                                  group.real_samples, now - started, waited, peak_bytes(task.runtime.device), stopping,
                                  task.nans.left_out(done)))
            started = time.perf_counter()
            if stopping:
                break
    return done


def _step(task: Task, group: StepMicro) -> tuple[UpdateInfo, float] | None:
    """The step's update and mean loss (NaN where the step is left out), or None when the run is to go back because of it."""
    losses: list[torch.Tensor] = []
    if group.step + 1 in task.nans.skipped:  # known to fail, from the time before the run went back
        return task.updater.leave_out(group.step, task.total_steps), math.nan
    try:
        for index, batch in enumerate(group.micro):
            update = _microbatch(task, batch, group, index == len(group.micro) - 1, losses)
        if task.ema is not None and not update.skipped:
            with task.readable():
                task.ema.update()
        loss = task.runtime.sum_over_ranks(torch.stack([part.sum() for part in losses]).sum()).item() / group.real_samples
        if not math.isfinite(loss) and not update.skipped:
            raise NonFinite("the loss is NaN or infinite", place=f"step {group.step + 1}")
        return update, loss
    except NonFinite as error:
        named = with_pictures(error, task.runtime, group.step + 1, losses, [batch.paths for batch in group.micro])
    if task.nans.goes_back(named, group.step + 1):
        return None
    return task.updater.leave_out(group.step, task.total_steps), math.nan


def _read(task: Task, first: int) -> Generator[StepMicro, None, None]:
    """The steps of this rank from ``first`` on. A picture that only this rank reads, and cannot read, is told by this rank."""
    try:
        yield from batches(task.encoded.train, task.plan, task.runtime.rank, first, task.total_steps, task.workers)
    except UserError as error:
        error.of_one_process = True
        raise


def _microbatch(task: Task, batch: Batch, group: StepMicro, last: bool, losses: list[torch.Tensor]) -> UpdateInfo | None:
    """Forward, backward and, with the last one of a step, the update. Its losses (B,), detached, are put to ``losses``.

    Each micro-batch counts by its samples, not as one of several equal parts, so that 1x4 and 4x1 give the same step.
    """
    task.updater.begin_microbatch(group.step, task.total_steps, last)
    if task.ema is not None and last and task.updater.inside_backward:
        task.ema.wait()  # it may still be reading the weights
    _backward(task, batch, group.step, group.real_samples, last, losses)
    if task.ema is not None and last:
        task.ema.wait()
    if last:
        task.nans.look(losses, group.step + 1)
    return task.updater.after_backward(group.step, task.total_steps, last, task.scaler)


def _backward(task: Task, batch: Batch, step: int, samples: int, last: bool, seen: list[torch.Tensor]) -> None:
    """Gradients are added to what is there. NonFinite before the backward pass where that would use them up."""
    runtime = task.runtime
    given = task.encoded.batch(batch)
    weight = batch.weight.to(runtime.device, non_blocking=True)
    # DistributedDataParallel decides in the forward pass whether this backward exchanges gradients.
    with ExitStack() as stack:
        for module in () if last else task.modules:
            stack.enter_context(runtime.no_sync(module))
        with runtime.autocast():
            draws = draw(task.seed, step, batch.sample_ids, tuple(given.latents.shape[1:]), given.latents.device)
            text = task.arch.vary_text(task.text(given.text, batch.captions), draws)
            losses = training_losses(task.arch, task.denoiser, task.objective, given.latents, text, given.geometry, weight,
                                     given.mask, draws)
        seen.append(losses.detach())
        if task.updater.inside_backward and runtime.any_rank(not bool(losses.isfinite().all())):  # waits for the device
            raise NonFinite("the loss is NaN or infinite", place=f"step {step + 1}")
        # It averages gradients over ranks; the loss is a mean over all their samples, hence the factor.
        total = mean(losses, samples) * runtime.world_size
        (task.scaler.scale(total) if task.scaler is not None else total).backward()
