"""Everything a run leaves besides its caches: checkpoints, previews, logs, curves, the resolved configuration, uploads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from library import preview
from library.architectures.base import DENOISER, Architecture, TextEncoders
from library.atomic import sweep, write_atomic
from library.checkpoint.metadata import modelspec, thumbnail_url
from library.checkpoint.verify import Damaged
from library.checkpoint.writer import free_bytes, require_room
from library.config.parse import Config, to_toml
from library.config.save_formats import SUFFIXES, size_of
from library.dist import Runtime
from library.encode import Encoded
from library.errors import UserError
from library.log import CSV_FIELDS, Progress, StepLog, log
from library.loop import StepReport
from library.measures import Measures, for_trackers, peak_flops
from library.optim.updater import NonFinite
from library.plots import write_loss_curve
from library.prompts import Prompt
from library.report.html import BROKEN, FINISHED, STOPPED
from library.report.rows import keep_rows
from library.run_metadata import Facts, Moment, fields
from library.saving import Saver, final_name, is_full, may_pass
from library.state_saving import StateSaver
from library.states import Keeping, averaged
from library.step import evaluating
from library.trackers import open_tracker, public_settings
from library.upload import Uploader
from library.writing import Writer

FINAL_TRIES, FINAL_PAUSE = 60, 10.0  # of the result on a full disk; seconds
STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Outputs:
    """Decides after each step what is due and writes it, on the first rank; the others wait. A context manager.

    ``rates(step)``: each group's learning rate in step number ``step``; ``step_flops``: see ``Measures``; ``reading()``: a
    context in which the weights of all modules can be read; ``delivered()``: one in which they are those to save and draw with.
    """

    def __init__(self, config: Config, runtime: Runtime, arch: Architecture, method: ModuleType, denoiser: nn.Module,
                 encoders: TextEncoders, encoded: Encoded, prompts: tuple[Prompt, ...], resolution: tuple[int, int], *,
                 total_steps: int, steps_per_epoch: int, validate: Callable[[StepReport], float | None], facts: Facts,
                 rates: Callable[[int], Mapping[str, float]], uploader: Uploader, keeping: Keeping,
                 step_flops: Callable[[StepReport], float] | None = None,
                 reading: Callable[[], AbstractContextManager] = nullcontext,
                 delivered: Callable[[], AbstractContextManager] = nullcontext):
        self.config, self.runtime, self.arch, self.method = config, runtime, arch, method
        self.denoiser, self.encoders, self.encoded = denoiser, encoders, encoded
        self.modules: dict[str, nn.Module] = {DENOISER: denoiser, **encoders.modules}
        self.prompts, self.resolution = prompts, resolution
        self.total_steps, self.steps_per_epoch, self.validate = total_steps, steps_per_epoch, validate
        self.facts, self.uploader, self.keeping, self.reading = facts, uploader, keeping, reading
        self.delivered = delivered
        saving = config.saving
        self.folder: Path = saving.output_dir
        self.name = saving.output_name
        self.format = saving.save_model_as or arch.save_format
        suffix = SUFFIXES[self.format]
        self.stored_dtype = STORED[saving.stored_dtype(config.weights_dtype)]
        main = runtime.is_main
        needed = method.saved_bytes(arch, self.modules, self.stored_dtype, self.format) if main else 0
        self.writer = Writer(self.modules, self._write, needed, beside=saving.async_save and main, reading=self._delivered,
                             on_failure=self._not_saved)
        self.saver = Saver(
            self.folder, self.name, total_epochs=math.ceil(total_steps / steps_per_epoch), write=self.writer.write,
            every_n_steps=saving.save_every_n_steps, every_n_epochs=saving.save_every_n_epochs,
            n_epoch_ratio=saving.save_n_epoch_ratio, last_n_steps=saving.save_last_n_steps,
            last_n_epochs=saving.save_last_n_epochs, protected=arch.files(), suffix=suffix,
            in_use=uploader.in_use, on_saved=uploader.upload,
        )
        self.states = StateSaver(self.folder, self.name, config.state, saving, write=keeping.write_state,
                                 total_epochs=math.ceil(total_steps / steps_per_epoch))
        self.average_saver = self._average_saver(suffix) if keeping.ema is not None else None
        if main:
            # Better now than after a day of training.
            require_room(self.folder / final_name(self.name, suffix), needed)
            for path in sweep(self.folder, self.name):
                log.info("removed %s, left half-written by a run that was killed", path)
            write_atomic(self.folder / f"{self.name}_config.toml", to_toml(config))
        peak = peak_flops(runtime.device, runtime.compute_dtype)
        self.measures = Measures(rates, step_flops, peak and peak * runtime.world_size)
        self.step_log = self._open_log([f"lr/{name}" for name in rates(1)])
        self.tracker = open_tracker(config.logging, public_settings(config) if config.logging.log_config else None, main)
        self.progress = Progress(total_steps, keeping.first_step, main)
        self.done = keeping.first_step

    def _open_log(self, rates: list[str]) -> StepLog:
        path, first = self.folder / f"{self.name}_log.csv" if self.runtime.is_main else None, self.keeping.first_step
        columns = [*rates, *(["validation_loss_ema"] if self.keeping.ema is not None else [])]
        if path is not None and first:
            keep_rows(path, first, (*CSV_FIELDS, *columns))
        return StepLog(path, columns, append=bool(first))

    @contextmanager
    def _delivered(self) -> Iterator[None]:
        with self.delivered(), self.reading():
            yield

    def _average_saver(self, suffix: str) -> Saver:
        """Files of the averaged weights, at the same moments as the others and under a name of their own."""
        saving, needed = self.config.saving, self.writer.needed_bytes

        @contextmanager
        def reading() -> Iterator[None]:
            with averaged(self.keeping.ema, self.reading), self.reading():
                yield

        writer = Writer(self.modules, self._write, needed, reading=reading)
        return Saver(
            self.folder, f"{self.name}-ema", total_epochs=self.saver.total_epochs, write=writer.write,
            every_n_steps=saving.save_every_n_steps, every_n_epochs=saving.save_every_n_epochs,
            n_epoch_ratio=saving.save_n_epoch_ratio, last_n_steps=saving.save_last_n_steps,
            last_n_epochs=saving.save_last_n_epochs, protected=self.arch.files(), suffix=suffix,
            in_use=self.uploader.in_use, on_saved=self.uploader.upload,
        )

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception) -> None:
        """What is being written is finished, whatever ends the run; uploads are not waited for after a second Ctrl-C."""
        self.progress.close()
        self.writer.wait()
        self.step_log.close()
        self.tracker.close()
        if kind is not KeyboardInterrupt:
            self.uploader.close()

    def before_training(self) -> None:
        """Previews of the untrained model, when asked for."""
        if self.keeping.first_step:
            return
        self._preview(step=0, epoch=0, epoch_ended=False, at_first=self.config.sampling.sample_at_first)

    def after_step(self, report: StepReport) -> None:
        """Log, save and draw what is due after one optimizer step."""
        self.done = report.step
        values = self.measures.of(report)
        self.progress.update(report.step, values["mean_loss"], report.seconds, report.samples, report.peak_bytes,
                             values["data_wait"])
        validation_loss = None if report.stopping else self.validate(report)
        if validation_loss is not None:
            values["validation_loss"] = validation_loss
            log.info("loss on the held-out pictures after step %d: %.5f", report.step, validation_loss)
            if self.keeping.ema is not None:
                with averaged(self.keeping.ema, self.reading):
                    values["validation_loss_ema"] = self.validate(report)
        self.step_log.write({"step": report.step, "epoch": report.epoch + 1, **values})
        self.tracker.write(report.step, for_trackers(values))
        if self.runtime.is_main:
            self._save_what_is_due(report)
        if not report.stopping:  # a job scheduler that asked to stop does not wait for pictures
            self._preview(report.step, report.epoch + 1, report.epoch_ended)
        if self.keeping.report is not None:
            self.keeping.report.update()

    def _save_what_is_due(self, report: StepReport) -> None:
        """A file that cannot be written now, on a full disk say, is no reason to give up the training: it is tried again."""
        self.writer.collect()
        epoch = report.epoch + 1
        try:
            saved = self.saver.after_step(report.step, epoch)
            if report.epoch_ended:
                saved = self.saver.after_epoch(epoch, report.step) or saved
            owed = self.saver.retry.step
            if saved is None and owed is not None and report.step >= owed:
                self.saver.late(report.step, epoch)
        except (UserError, OSError) as error:
            self._not_saved(error)
        for saver, what in ((self.average_saver, "the averaged weights"), (self.states, "a state")):
            if saver is not None:
                with self._going_on(what):
                    saver.after_step(report.step, epoch)
                    if report.epoch_ended:
                        saver.after_epoch(epoch, report.step)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """What can be missed is told and missed."""
        try:
            yield
        except (UserError, OSError) as error:
            log.error("NOT SAVED at step %d: %s: %s", self.done, what, error)

    def _not_saved(self, error: Exception) -> None:
        """Say it as loudly as a log can; what the disk is to blame for is owed and tried again."""
        if not may_pass(error):
            log.error("NOT SAVED at step %d, training goes on: %s", self.done, error)
            return
        again = self.saver.retry.failed(self.done)
        log.error("NOT SAVED at step %d, training goes on, next try after step %d: %s; %s", self.done, again, error, self._room())

    def _room(self) -> str:
        free = free_bytes(self.folder / self.name)
        known = "unknown" if free is None else f"{free / 1e9:.2f} GB"
        return f"a file takes {self.writer.needed_bytes / 1e9:.2f} GB, free on its disk: {known}"

    def finish(self, done: int, signal_name: str | None) -> None:
        """The final file or, when training was stopped early, a file of the last complete step."""
        if not self.runtime.is_main:
            return
        self.progress.close()
        self.writer.wait()
        epoch = math.ceil(done / self.steps_per_epoch)
        if done == self.total_steps:
            try:
                self._save_result(done, epoch)
            except UserError:
                self._keep_in_trained_dtype(done, epoch)
                raise
            with self._going_on("the averaged weights or the last state"):
                if self.average_saver is not None:
                    self.average_saver.final(done, epoch)
                self.states.final(done, epoch)
        else:
            saved = self.saver.emergency(done, epoch) if done > self.keeping.first_step else None
            log.warning("stopped by %s after step %d of %d; %s", signal_name or "the end of its launcher", done, self.total_steps,
                        f"the weights are in {saved}" if saved else "nothing had been trained yet")
            if saved:
                self._keep_state(done, epoch)

    def _keep_state(self, done: int, epoch: int) -> None:
        """Of a run that ends before its time, so that it can go on."""
        with self._going_on("a state to go on from"):
            if self.average_saver is not None:
                self.average_saver.emergency(done, epoch)
            self.states.emergency(done, epoch)
            log.info("go on from there with the same command and --resume latest")

    def _save_result(self, done: int, epoch: int) -> None:
        """On a full disk the run waits some minutes for room: nothing is lost yet, and everything would be."""
        for left in reversed(range(FINAL_TRIES)):
            try:
                self.saver.final(done, epoch)
                return
            except (UserError, OSError) as error:
                if not left or not (is_full(error) or isinstance(error, Damaged)):
                    raise
                log.error("THE RESULT IS NOT SAVED, next try in %.0f s (%d more): %s; %s", FINAL_PAUSE, left, error, self._room())
                time.sleep(FINAL_PAUSE)

    def _keep_in_trained_dtype(self, done: int, epoch: int) -> None:
        """The final file could not be written, for instance because a weight exceeds fp16: save the weights without a cast."""
        trained = STORED[self.config.weights_dtype]
        if self.stored_dtype is trained:
            return
        self.stored_dtype = trained
        log.error("the final file could not be written; the weights are in %s, as trained", self.saver.emergency(done, epoch))

    def draw_curve(self, done: int) -> None:
        """The loss curve, on disk and in the trackers."""
        curve = self.folder / f"{self.name}_loss.png"
        if self.runtime.is_main and write_loss_curve(self.folder / f"{self.name}_log.csv", curve, self.name):
            self.tracker.picture(done, "loss", curve)
            log.info("loss curve: %s", curve)
        if self.keeping.report is not None:
            self.keeping.report.finish(FINISHED if done == self.total_steps else STOPPED)

    def rescue(self, error: Exception) -> None:
        """Training broke off, perhaps after days, for a reason that leaves the weights good: a picture that went away, a
        preview that did not fit the memory. Keep them. Not after a NaN: then earlier files are the better ones."""
        if not self.runtime.is_main or self.done == 0 or isinstance(error, NonFinite):
            return
        try:
            self.writer.wait()
            saved = self.saver.emergency(self.done, math.ceil(self.done / self.steps_per_epoch))
            log.warning("broke off after step %d of %d; the weights are in %s", self.done, self.total_steps, saved)
            self._keep_state(self.done, math.ceil(self.done / self.steps_per_epoch))
            if self.keeping.report is not None:
                self.keeping.report.finish(BROKEN, str(error))
        except Exception as second:  # the first error is the one to tell
            if str(second) != str(error):
                log.error("the weights of step %d could not be saved: %s", self.done, second)

    def _preview(self, step: int, epoch: int, epoch_ended: bool, at_first: bool = False) -> None:
        sampling = self.config.sampling
        if not self.prompts or not preview.due(step, epoch, epoch_ended, every_n_steps=sampling.sample_every_n_steps,
                                               every_n_epochs=sampling.sample_every_n_epochs, at_first=at_first):
            return
        if self.runtime.is_main:
            try:
                self._draw(step)
            except UserError as error:  # a full disk, or on Windows a contact sheet that a viewer has open
                if step == 0:
                    raise
                log.error("no previews at step %d, training goes on: %s", step, error)
        self.runtime.wait()

    def _draw(self, step: int) -> None:
        """All previews of one step."""
        vae = self.encoded.vae.to(self.runtime.device)

        def text(words: str) -> dict[str, torch.Tensor]:
            with self.runtime.autocast():
                now = self.arch.encode_text(self.encoders, [words]) if self.encoders.modules else {}
            return {**self.encoded.prompts[words], **now}

        def draw(prompt: Prompt, _index: int):
            return self.arch.sample(self.denoiser, vae, prompt, text(prompt.text), text(prompt.negative),
                                    self.runtime.compute_dtype)

        try:
            with self.delivered(), evaluating(self.modules.values()):
                rendered = preview.render_all(self.prompts, draw, self.folder / "sample", self.name, step)
        finally:
            if self.encoded.train.latents is not None:
                vae.to("cpu")  # its device memory belongs to training again
        for index, picture in enumerate(rendered.images):
            self.tracker.picture(step, f"previews/{index:02d}", picture)
        log.info("previews of step %d: %s", step, rendered.sheet)

    def _write(self, modules: Mapping[str, nn.Module], path: Path, info: Mapping[str, int]) -> None:
        """One checkpoint file, with metadata that is true of it."""
        started = time.monotonic()
        metadata = {} if self.config.metadata.no_metadata else self._metadata(info)
        self.method.export(self.arch, modules, path, self.stored_dtype, metadata, self.format)
        log.info("saved %s (%.2f GB in %.1f s)", path, size_of(path) / 1e9, time.monotonic() - started)

    def _metadata(self, info: Mapping[str, int]) -> dict[str, str]:
        given, now = self.config.metadata, time.time()
        low, high = (getattr(self.facts.objective, name, None) for name in ("min_timestep", "max_timestep"))
        limits = None if low is None and high is None else (low or 0, 1000 if high is None else high)
        return modelspec(
            **self.arch.modelspec(), title=given.metadata_title or self.name, resolution=self.resolution,
            date=datetime.fromtimestamp(now), author=given.metadata_author, description=given.metadata_description,
            license=given.metadata_license, tags=given.metadata_tags, usage_hint=given.metadata_usage_hint,
            thumbnail=thumbnail_url(given.metadata_thumbnail) if given.metadata_thumbnail else None,
            merged_from=given.metadata_merged_from, trigger_phrase=given.metadata_trigger_phrase, timestep_range=limits,
            extra=fields(self.facts, Moment(info["step"], info["epoch"], now)),
        )
