"""Flags of resuming: when states are written, which are kept, and what to go on from. And of the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.config.check import Problem, conflict
from library.config.hub_place import hub_place
from library.config.values import flag

if TYPE_CHECKING:
    from library.config.parse import Config
    from library.config.schema import SavingOptions


@dataclass(frozen=True)
class StateOptions:
    """A state is a folder with all that an exact resume needs; a checkpoint is a model for other programs."""

    title: ClassVar[str] = "States and resuming"

    save_state: bool = flag(False, "with every checkpoint also write a state: a folder from which training can go on exactly")
    save_state_on_train_end: bool = flag(False, "write a state at the end of training (implied by --save_state)")
    save_state_every_n_steps: int | None = flag(None, "write a state after every N steps, whether or not a checkpoint is due",
                                                minimum=0, off="0")
    save_last_n_epochs_state: int | None = flag(None, "of the states of epochs keep the last N", minimum=0, off="0",
                                                default_text="--save_last_n_epochs")
    save_last_n_steps_state: int | None = flag(None, "of the states of steps keep those not older than N steps", minimum=0,
                                               off="0", default_text="--save_last_n_steps")
    resume: str | None = flag(None, "go on from this state; latest: from the newest whole one of --output_name, or from the "
                              "beginning while there is none", metavar="DIR|latest", saved=False)
    save_state_to_huggingface: bool = flag(False, "also upload every state to --huggingface_repo_id, while training goes on; old "
                                           "ones are removed there by the same settings as here")
    resume_from_huggingface: bool = flag(False, "--resume names a state on the hub: latest, a name (both in "
                                         "--huggingface_repo_id), or OWNER/REPO/STATE[:REVISION[:TYPE]]", saved=False)
    resume_anyway: bool = flag(False, "go on although settings differ that change the run (they are listed without this flag)",
                               saved=False)

    @property
    def wanted(self) -> bool:
        """Whether states are written at all, stopping apart."""
        return self.save_state or self.save_state_on_train_end or bool(self.save_state_every_n_steps)

    def on_the_way(self, saving: SavingOptions) -> bool:
        """Whether states are written before training ends."""
        return bool(self.save_state_every_n_steps or (self.save_state and saving.on_the_way))

    def problems(self, config: Config) -> Iterator[Problem]:
        """Settings that would do nothing."""
        if self.resume_anyway and not self.resume:
            yield conflict(config, "resume_anyway resume", "has no effect without --resume",
                           "add --resume latest, or leave it out")
        yield from self._hub_problems(config)
        if self.save_last_n_steps_state and not self.save_state_every_n_steps and not (
                self.save_state and config.saving.save_every_n_steps):
            yield conflict(config, "save_last_n_steps_state save_state_every_n_steps",
                           "has no effect: no states are written between epochs", "add --save_state_every_n_steps, or "
                           "--save_state and --save_every_n_steps, or leave it out")
        epochs = config.saving.save_every_n_epochs or config.saving.save_n_epoch_ratio
        if self.save_last_n_epochs_state and not (self.save_state and epochs):
            yield conflict(config, "save_last_n_epochs_state save_state", "has no effect: no states are written after epochs",
                           "add --save_state and --save_every_n_epochs, or leave it out")

    def _hub_problems(self, config: Config) -> Iterator[Problem]:
        if self.save_state_to_huggingface and config.hub.huggingface_repo_id is None:
            yield conflict(config, "save_state_to_huggingface huggingface_repo_id",
                           "nothing is uploaded without --huggingface_repo_id",
                           "add --huggingface_repo_id OWNER/NAME, or leave it out")
        elif self.save_state_to_huggingface and not self.wanted:
            yield conflict(config, "save_state_to_huggingface save_state", "no states are written, except when a run is stopped",
                           "add --save_state, --save_state_every_n_steps N or --save_state_on_train_end")
        if not self.resume_from_huggingface:
            return
        if not self.resume:
            yield conflict(config, "resume_from_huggingface resume", "has no effect without --resume",
                           "add --resume latest, or leave it out")
            return
        try:
            hub_place(self.resume, config.hub)
        except ValueError as error:
            yield conflict(config, "resume resume_from_huggingface huggingface_repo_id", *error.args)


@dataclass(frozen=True)
class EmaOptions:
    title: ClassVar[str] = "Averaged weights"

    ema_decay: float | None = flag(None, "also keep a running average of the weights, of which this share stays at each step, "
                                   "such as 0.999; it is saved beside them", minimum=0, maximum=0.999999, off="0")
    ema_device: str = flag("cpu", "where the average is kept: in main memory, or on the graphics card (4 bytes a weight)",
                           choices=("cpu", "gpu"))

    def problems(self, config: Config) -> Iterator[Problem]:
        """A place for an average that is not made."""
        if self.ema_decay and self.ema_device == "gpu" and config.memory.blocks_to_swap:
            yield conflict(config, "ema_device blocks_to_swap", "the average of blocks that wait in CPU memory is kept there too",
                           "use --ema_device cpu, or leave --blocks_to_swap out")
        if "ema_device" in config.changed() and not self.ema_decay:
            yield conflict(config, "ema_device ema_decay", "has no effect without --ema_decay",
                           "add --ema_decay 0.999, or leave it out")
