"""Previews of a run: drawn when they are due, from the weights of that moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from library import preview
from library.architectures.base import Architecture, TextEncoders
from library.config.schema import SamplingOptions
from library.contact_sheet import write_contact_sheet
from library.dist import Runtime
from library.encode import Encoded
from library.errors import UserError
from library.log import log
from library.out_of_memory import DRAWING, telling
from library.prompts import Prompt
from library.step import evaluating
from library.trackers import Tracker


class Previews:
    """``prompts`` as pictures in ``folder`` and in the trackers; the processes beside the first rank draw a part each,
    others wait. ``delivered()``: a context in which the model has the weights that the optimizer delivers."""

    def __init__(self, options: SamplingOptions, runtime: Runtime, arch: Architecture, denoiser: nn.Module,
                 encoders: TextEncoders, encoded: Encoded, prompts: Sequence[Prompt], folder: Path, name: str, tracker: Tracker,
                 delivered: Callable[[], AbstractContextManager] = nullcontext):
        self.options, self.runtime, self.arch = options, runtime, arch
        self.denoiser, self.encoders, self.encoded = denoiser, encoders, encoded
        self.prompts, self.folder, self.name, self.tracker = prompts, folder, name, tracker
        self.delivered = delivered
        self.images: tuple[Path, ...] = ()  # of the last round
        self.batch_size = options.sample_batch_size  # as long as the memory is there

    def __call__(self, step: int, epoch: int, epoch_ended: bool, at_first: bool = False) -> None:
        """Draw them if they are due after ``step``. What goes wrong is told and missed, except before the first step: then it is
        raised, as UserError."""
        options = self.options
        if not self.prompts or not preview.due(step, epoch, epoch_ended, every_n_steps=options.sample_every_n_steps,
                                               every_n_epochs=options.sample_every_n_epochs, at_first=at_first):
            return
        error = self._attempt(lambda: self._draw(step)) if self.runtime.rank < self.runtime.beside_main else None
        errors, sizes = zip(*self.runtime.exchange((error, self.batch_size)), strict=True)
        self.batch_size = min(sizes)  # batches must be the same everywhere
        error = next(filter(None, errors), None)
        if error is None:
            error = self.runtime.exchange(self._attempt(lambda: self._show(step)) if self.runtime.is_main else None)[0]
        if error is not None and step == 0:
            raise UserError(error)
        if error is not None and self.runtime.is_main:
            log.error("no previews at step %d, training goes on: %s", step, error)

    @staticmethod
    def _attempt(action: Callable[[], None]) -> str | None:
        """What is wrong: a full disk, too little memory, on Windows a contact sheet that a viewer has open."""
        try:
            with telling(*DRAWING):
                action()
        except UserError as error:
            return str(error)
        return None

    def _draw(self, step: int) -> None:
        """The part of this process."""
        vae = self.encoded.vae.to(self.runtime.device)

        def draw(prompts: Sequence[Prompt]):
            return self.arch.sample(self.denoiser, vae, prompts, self._together([prompt.text for prompt in prompts]),
                                    self._together([prompt.negative for prompt in prompts]), self.runtime.compute_dtype)

        try:
            with self.delivered(), evaluating([self.denoiser, *self.encoders.modules.values()]):
                rendered = preview.render_all(self.prompts, draw, self.folder, self.name, step, self.batch_size,
                                              (self.runtime.rank, self.runtime.beside_main))
        finally:
            if self.encoded.train.latents is not None:
                vae.to("cpu")  # its device memory belongs to training again
        self.batch_size, self.images = rendered.batch_size, rendered.images

    def _show(self, step: int) -> None:
        """All of them, in the trackers and on the contact sheet."""
        for index, picture in enumerate(self.images):
            self.tracker.picture(step, f"previews/{index:02d}", picture)
        log.info("previews of step %d: %s", step, write_contact_sheet(self.folder, self.name, self.prompts, step))

    def _together(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """One by one and then joined, so that they are the same in any company."""
        singles = [self._text(words) for words in texts]
        return {name: torch.cat([single[name] for single in singles]) for name in singles[0]}

    def _text(self, words: str) -> Mapping[str, torch.Tensor]:
        """What was encoded before the run, and what encoders that train say now."""
        with self.runtime.autocast():
            now = self.arch.encode_text(self.encoders, [words]) if self.encoders.modules else {}
        return {**self.encoded.prompts[words], **now}
