"""The loss on pictures that are not trained, at fixed noise and fixed noise levels, so that only the weights change it.

A training loss jumps with the levels that happen to be drawn. Here every held-out picture is measured at the same
quantiles of the training density each time, with noise that depends on the seed and the picture alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from library.config.data_options import DatasetOptions
from library.data.dataset import Batch, TrainingData, batches
from library.data.plan import StepPlan
from library.loop import StepReport, Task
from library.objectives.noise import Draws, draw
from library.states import delivered
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
class Measured:
    """Mean losses over pictures and quantiles: of all, and, where pictures of several datasets are held out, of each of them by
    its name (``dataset 2``: the second of the dataset file)."""

    loss: float
    by_dataset: Mapping[str, float]

    def values(self, name: str) -> dict[str, float]:
        """By column of the log: ``name`` and ``name/dataset 2``."""
        return {name: self.loss, **{f"{name}/{dataset}": loss for dataset, loss in self.by_dataset.items()}}


@dataclass(frozen=True)
class Validation:
    """``plan`` over the held-out pictures, in the same batch sizes as training; ``max_steps`` rounds of it at most."""

    data: TrainingData
    plan: StepPlan
    max_steps: int | None

    @cached_property
    def datasets(self) -> tuple[int, ...]:
        """The datasets that held-out pictures are of."""
        return tuple(sorted({dataset for dataset, _ in self.data.items.groups}))

    def measure(self, task: Task) -> Measured:
        """The same on every rank; weights of the dataset file are left out."""
        runtime = task.runtime
        stop = self.plan.steps_per_epoch if self.max_steps is None else min(self.max_steps, self.plan.steps_per_epoch)
        sums = torch.zeros(len(self.datasets), 2, dtype=torch.float64)  # of losses, and of how many
        steps = batches(self.data, self.plan, runtime.rank, 0, stop, workers=0)
        with torch.no_grad(), evaluating(task.modules), closing(steps):
            for group in steps:
                for batch in group.micro:
                    dataset = int(batch.sample_ids[0].partition(".")[0])  # a batch is of one dataset
                    row = sums[self.datasets.index(dataset)]
                    row[0] += _batch_loss(task, batch)
                    row[1] += int((batch.weight != 0).sum()) * len(QUANTILES)
        # float32 is what every device can add up; the sum over ranks is of a few thousand losses
        sums = runtime.sum_over_ranks(sums.float().to(runtime.device)).double().cpu()
        total, count = sums.sum(0).tolist()
        if len(self.datasets) == 1:
            return Measured(total / count, {})
        each = zip(self.datasets, sums.tolist(), strict=True)
        return Measured(total / count, {f"dataset {dataset + 1}": loss / of for dataset, (loss, of) in each if of})


class Validating:
    """Measures the held-out pictures of a run whenever that is due; never where none are held out."""

    def __init__(self, task: Task, options: DatasetOptions, batch_sizes: list[int]):
        held_out, self.task = task.encoded.validation, task
        self.times = Schedule(options.validate_every_n_steps, options.validate_every_n_epochs, task.total_steps)
        self.validation = held_out and Validation(
            held_out, StepPlan(held_out.items, batch_sizes=batch_sizes, seed=0, world_size=task.runtime.world_size),
            options.max_validation_steps)

    @property
    def names(self) -> tuple[str, ...]:
        """What ``Measured.values`` may add to the name of the whole."""
        datasets = self.validation.datasets if self.validation else ()
        return tuple(f"/dataset {dataset + 1}" for dataset in datasets) if len(datasets) > 1 else ()

    def __call__(self, report: StepReport) -> Measured | None:
        """After a step; None when nothing is due."""
        if self.validation is None or not self.times.due(report.step, report.epoch + 1, report.epoch_ended):
            return None
        with delivered(self.task.updater, self.task.readable):
            return self.validation.measure(self.task)


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
