"""The loss on pictures that are not trained, at fixed noise and fixed noise levels, so that only the weights change it.

A training loss jumps with the levels that happen to be drawn. Here every held-out picture is measured at the same
quantiles of the training density each time, with noise that depends on the seed and the picture alone.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace

import torch

from library.data.dataset import Batch, TrainingData, batches
from library.data.plan import StepPlan
from library.loop import Task
from library.objectives.noise import Draws, draw
from library.step import evaluating, training_losses

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of the density of levels: the middles of four equal parts
_STEP = 0  # noise is drawn as if for this step, whenever it is measured


@dataclass(frozen=True)
class Schedule:
    """After which steps to measure. Without either number: after every epoch."""

    every_n_steps: int | None
    every_n_epochs: int | None
    total_steps: int

    def due(self, step: int, epoch: int, epoch_ended: bool) -> bool:
        """After optimizer step ``step`` of epoch ``epoch`` (both from 1). The last step is always measured."""
        if step == self.total_steps or (self.every_n_steps and step % self.every_n_steps == 0):
            return True
        every = self.every_n_epochs or (None if self.every_n_steps else 1)
        return bool(every and epoch_ended and epoch % every == 0)


@dataclass(frozen=True)
class Validation:
    """``plan`` over the held-out pictures, in the same batch sizes as training; ``max_steps`` rounds of it at most."""

    data: TrainingData
    plan: StepPlan
    max_steps: int | None

    def measure(self, task: Task) -> float:
        """The mean loss over pictures and quantiles, the same on every rank; weights of the dataset file are left out."""
        runtime = task.runtime
        stop = self.plan.steps_per_epoch if self.max_steps is None else min(self.max_steps, self.plan.steps_per_epoch)
        total, count = torch.zeros((), dtype=torch.float64), 0
        steps = batches(self.data, self.plan, runtime.rank, 0, stop, workers=0)
        with torch.no_grad(), evaluating(task.modules), closing(steps):
            for group in steps:
                for batch in group.micro:
                    total += _batch_loss(task, batch)
                count += group.real_samples
        # float32 is what every device can add up; the sum over ranks is of a few thousand losses
        return float(runtime.sum_over_ranks(total.float().to(runtime.device)).item()) / count / len(QUANTILES)


def _batch_loss(task: Task, batch: Batch) -> torch.Tensor:
    """Sum of the losses of one batch at all quantiles, a scalar on the CPU."""
    given = task.encoded.batch(batch)
    real = (batch.weight != 0).to(given.latents)  # 0 for a batch that only keeps a rank busy
    drawn = draw(task.seed, _STEP, batch.sample_ids, tuple(given.latents.shape[1:]), given.latents.device)
    total = torch.zeros((), dtype=torch.float64)
    with task.runtime.autocast():
        text = task.text(given.text, batch.captions)
    for quantile in QUANTILES:
        with task.runtime.autocast():
            losses = training_losses(task.arch, task.denoiser, task.objective, given.latents, text, given.geometry, real,
                                     given.mask, _at(drawn, quantile))
        total += losses.double().sum().cpu()
    return total


def _at(drawn: Draws, quantile: float) -> Draws:
    """The same noise with the level that lies at ``quantile`` of the density."""
    uniform = torch.full_like(drawn.uniform, quantile)
    return replace(drawn, uniform=uniform, normal=torch.special.ndtri(uniform))
