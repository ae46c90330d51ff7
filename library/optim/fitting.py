"""Whether the optimizer and the schedule of a run fit each other and its other settings: told before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from library.errors import UserError, raise_all
from library.log import log
from library.optim import schedule, table
from library.optim.records import RECORDS, Record

if TYPE_CHECKING:
    from library.config.memory_options import MemoryOptions
    from library.config.parse import Config
    from library.optim.groups import Group

_IN_BACKWARD = ("fused_backward_pass", "blockwise_fused_optimizers", "blocks_to_swap")


def require_fit(config: Config) -> None:
    """Raise every UserError that takes no torch: the optimizer's name, and flags that it cannot work with."""
    record = table.find(config.optimizer.chosen_type)
    raise_all(list(_problems(record, config)))


def try_out(config: Config) -> None:
    """Raise the other UserErrors by a trial on a few numbers; what might surprise goes into the log."""
    options, training = config.optimizer, config.training
    table.check(options.chosen_type, options.optimizer_args, options.learning_rate, averaged=bool(config.ema.ema_decay))
    if not training.max_train_epochs:  # else with the length, once that is known
        schedule.from_options(options, training.max_train_steps)
    for remark in table.remarks(options.chosen_type, options.lr_scheduler_type or options.lr_scheduler,
                                config.memory.max_grad_norm(options.max_grad_norm)):
        log.info(remark)


def planned_rates(config: Config, rates: schedule.Curve, groups: Sequence[Group],
                  total_steps: int) -> Callable[[int], Mapping[str, float]] | None:
    """The learning rate of each group in a step (from 1) of the run; None where the optimizer will find it out by itself."""
    if table.find(config.optimizer.chosen_type).own_rate:
        return None
    return partial(schedule.by_name, rates, groups, total_steps)


def steps_in_backward(record: Record) -> bool:
    """Whether it can update some weights before the gradients of all are known."""
    return record.per_parameter


def streams_states(record: Record) -> bool:
    """Whether its states can wait in CPU memory beside the weights of their block."""
    return record.per_parameter and not record.paged and not record.modes


def _problems(record: Record, config: Config) -> Iterator[UserError]:
    memory, place = config.memory, config.place("optimizer_type")
    cause = _cause(memory)
    if cause and not steps_in_backward(record):
        why = "sums over all gradients before it updates any weight" if record in RECORDS else \
            "is not in the table, so whether it may update some weights before others is not known"
        yield UserError(f"{record.name} {why}; --{cause} updates weights during the backward pass", place=place,
                        remedy=f"leave --{cause} out, or use another optimizer such as AdamW, Lion or AdamWScheduleFree")
    elif memory.stream_optimizer_states and not streams_states(record):
        why = "moves its states to CPU memory and back by itself" if record.paged else \
            "needs all its states at once for the weights to save and to draw with"
        yield UserError(f"{record.name} {why}", place=config.place("stream_optimizer_states"),
                        remedy="leave --stream_optimizer_states out")


def _cause(memory: MemoryOptions) -> str:
    return next((name for name in _IN_BACKWARD if getattr(memory, name)), "") if memory.unit else ""
