"""Everything a run leaves besides its caches: checkpoints, previews, logs, curves, the resolved configuration, uploads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from library.architectures.base import DENOISER, Architecture, TextEncoders
from library.atomic import sweep, write_atomic
from library.checkpoint.metadata import modelspec, thumbnail_url
from library.checkpoint.train_state import Logged
from library.checkpoint.verify import Damaged
from library.checkpoint.writer import free_bytes, require_room
from library.config.parse import Config, to_toml
from library.config.save_formats import SUFFIXES, size_of
from library.dist import Runtime
from library.encode import Encoded
from library.errors import UserError
from library.log import CSV_FIELDS, Progress, StepLog, log
from library.loop import StepReport
from library.measures import HeldOut, Measures, for_trackers, peak_flops
from library.optim.updater import NonFinite
from library.plots import write_loss_curve
from library.previewing import Previews
from library.prompts import Prompt
from library.report.html import BROKEN, FINISHED, STOPPED
from library.report.rows import Rows, keep_rows, last_value
from library.run_metadata import Facts, Moment, fields
from library.saving import Saver, final_name, is_full, may_pass
from library.state_saving import StateSaver
from library.state_upload import StateUploads
from library.state_writing import Contents, StateWriter
from library.states import Keeping, averaged
from library.trackers import open_tracker, public_settings
from library.upload import Uploader
from library.validation import Validating
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
                 total_steps: int, steps_per_epoch: int, validate: Validating, facts: Facts,
                 rates: Callable[[int], Mapping[str, float]], uploader: Uploader, keeping: Keeping,
                 step_flops: Callable[[StepReport], float | None] | None = None,
                 reading: Callable[[], AbstractContextManager] = nullcontext,
                 delivered: Callable[[], AbstractContextManager] = nullcontext):
        self.config, self.runtime, self.arch, self.method = config, runtime, arch, method
        self.modules: dict[str, nn.Module] = {DENOISER: denoiser, **encoders.modules}
        self.resolution = resolution
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
        beside = saving.async_save and main
        self.writer = Writer(self.modules, self._write, needed, beside=beside and saving.on_the_way, reading=self._delivered,
                             on_failure=lambda error: self._not_saved(error, self.saver, "the weights"))
        self.saver = Saver(
            self.folder, self.name, total_epochs=math.ceil(total_steps / steps_per_epoch), write=self.writer.write,
            every_n_steps=saving.save_every_n_steps, every_n_epochs=saving.save_every_n_epochs,
            n_epoch_ratio=saving.save_n_epoch_ratio, last_n_steps=saving.save_last_n_steps,
            last_n_epochs=saving.save_last_n_epochs, protected=arch.files(), suffix=suffix,
            in_use=uploader.in_use, on_saved=uploader.upload,
        )
        self.state_writer = StateWriter(self._state, reading, beside=beside,
                                        on_failure=lambda error: self._not_saved(error, self.states, "a state"))
        self.state_uploads = StateUploads(uploader) if config.state.save_state_to_huggingface and main else None
        hub = {"on_saved": self.state_uploads.upload, "in_use": self.state_uploads.in_use} if self.state_uploads else {}
        self.states = StateSaver(self.folder, self.name, config.state, saving, write=self.state_writer.write,
                                 total_epochs=math.ceil(total_steps / steps_per_epoch), **hub,
                                 begun=(keeping.first_step, keeping.first_state) if keeping.first_state else None)
        self.average_saver = self._average_saver(suffix) if keeping.ema is not None else None
        if main:
            # Better now than after a day of training.
            require_room(self.folder / final_name(self.name, suffix), needed)
            for path in sweep(self.folder, self.name):
                log.info("removed %s, left half-written by a run that was killed", path)
            write_atomic(self.folder / f"{self.name}_config.toml", to_toml(config))
        peak = peak_flops(runtime.device, runtime.compute_dtype)
        self.measures = Measures(rates, step_flops, peak and peak * runtime.world_size, keeping.logged.mean_loss)
        averages = [f"validation_loss_ema{part}" for part in ("", *validate.names)] if keeping.ema is not None else []
        held_out = [f"validation_loss{part}" for part in validate.names] + averages
        self.log_columns = [*(f"lr/{name}" for name in rates(1)), *held_out,
                            *(["steps_left_out"] if config.training.nan_policy != "stop" else [])]
        self.step_log = self._open_log(keeping.first_step)
        self.tracker = open_tracker(config.logging, public_settings(config) if config.logging.log_config else None, main,
                                    resumed=keeping.logged.run_ids, done=keeping.first_step)
        self.previews = Previews(config.sampling, runtime, arch, denoiser, encoders, encoded, prompts, self.folder / "sample",
                                 self.name, self.tracker, delivered)
        self.progress = Progress(total_steps, keeping.first_step, main)
        self.done = keeping.first_step

    def _open_log(self, first_step: int) -> StepLog:
        """Anew, or with the rows of the steps up to ``first_step``."""
        path = self.folder / f"{self.name}_log.csv" if self.runtime.is_main else None
        self.held_out = HeldOut()
        if path is not None and first_step:
            keep_rows(path, first_step, (*CSV_FIELDS, *self.log_columns))
            rows = Rows(path)
            rows.read()
            steps, losses = rows.points("validation_loss")
            self.held_out = HeldOut(zip(steps.astype(int).tolist(), losses.tolist(), strict=True))
        return StepLog(path, self.log_columns, append=bool(first_step))

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

        writer = Writer(self.modules, partial(self._write, averaged=True), needed, reading=reading)
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
        self._wait_for_files()
        self.step_log.close()
        self.tracker.close()
        if kind is not KeyboardInterrupt:
            if self.state_uploads is not None:
                self.state_uploads.close()
            self.uploader.close()

    def _state(self, step: int, epoch: int) -> Contents:
        return self.keeping.state(step, epoch, Logged(self.tracker.run_ids, self.measures.known_mean))

    def before_training(self) -> None:
        """A state to go back to, and previews of the untrained model, when asked for."""
        if self.config.training.nan_policy == "rollback" and self.runtime.is_main:
            self.states.first()
        if self.keeping.first_step:
            return
        self.previews(step=0, epoch=0, epoch_ended=False, at_first=self.config.sampling.sample_at_first)

    def after_step(self, report: StepReport) -> None:
        """Log, save and draw what is due after one optimizer step."""
        self.done = report.step
        values = self.measures.of(report)
        self.progress.update(report.step, values["mean_loss"], report.seconds, report.samples, report.peak_bytes,
                             values["data_wait"])
        if not report.stopping:
            values |= self._measure(report)
        if self.config.training.nan_policy != "stop":
            values["steps_left_out"] = report.left_out
        self.step_log.write({"step": report.step, "epoch": report.epoch + 1, **values})
        self.tracker.write(report.step, for_trackers(values))
        if self.runtime.is_main:
            self._save_what_is_due(report)
        if not report.stopping:  # a job scheduler that asked to stop does not wait for pictures
            self.previews(report.step, report.epoch + 1, report.epoch_ended)
        if self.keeping.report is not None:
            self.keeping.report.update()

    def _measure(self, report: StepReport) -> dict[str, float]:
        """The loss on the held-out pictures where that is due: of the weights as they are, and of their average."""
        measured = self.validate(report)
        if measured is None:
            return {}
        values = measured.values("validation_loss")
        log.info("loss on the held-out pictures after step %d: %.5f", report.step, measured.loss)
        if note := self.held_out.add(report.step, measured.loss):
            log.warning(note)
        if self.keeping.ema is not None:
            with averaged(self.keeping.ema, self.reading):
                values |= self.validate(report).values("validation_loss_ema")
        return values

    def _save_what_is_due(self, report: StepReport) -> None:
        """A file that cannot be written now, on a full disk say, is no reason to give up the training: it is tried again."""
        self.writer.collect()
        self.state_writer.collect()
        epoch = report.epoch + 1
        for saver, what in ((self.saver, "the weights"), (self.average_saver, "the averaged weights"), (self.states, "a state")):
            if saver is None:
                continue
            try:
                saved = saver.after_step(report.step, epoch)
                if report.epoch_ended:
                    saved = saver.after_epoch(epoch, report.step) or saved
                owed = saver.retry.step
                if saved is None and owed is not None and report.step >= owed:
                    saver.late(report.step, epoch)
            except (UserError, OSError) as error:
                self._not_saved(error, saver, what)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """What can be missed is told and missed."""
        try:
            yield
        except (UserError, OSError) as error:
            log.error("NOT SAVED at step %d: %s: %s", self.done, what, error)

    def _not_saved(self, error: Exception, saver: Saver | StateSaver, what: str) -> None:
        """Say it as loudly as a log can; what the disk is to blame for is owed and tried again."""
        if not may_pass(error):
            log.error("NOT SAVED at step %d, training goes on: %s: %s", self.done, what, error)
            return
        again = saver.retry.failed(self.done)
        when = f"next try after step {again}" if again <= self.total_steps else f"{self.total_steps} steps end before another try"
        log.error("NOT SAVED at step %d, training goes on, %s: %s: %s; %s", self.done, when, what, error, self._room())

    def _wait_for_files(self) -> None:
        """Until nothing is being written beside the training."""
        self.writer.wait()
        self.state_writer.wait()

    def _room(self) -> str:
        free = free_bytes(self.folder / self.name)
        known = "unknown" if free is None else f"{free / 1e9:.2f} GB"
        return f"a file of weights takes {self.writer.needed_bytes / 1e9:.2f} GB, free on its disk: {known}"

    def finish(self, done: int, signal_name: str | None) -> None:
        """The final file or, when training was stopped early, a file of the last complete step."""
        if not self.runtime.is_main:
            return
        self.progress.close()
        self._wait_for_files()
        epoch = math.ceil(done / self.steps_per_epoch)
        if done == self.total_steps:
            try:
                self._save_result(done, epoch)
            except UserError:
                self._keep_in_trained_dtype(done, epoch)
                raise
            with self._going_on("the averaged weights"):
                if self.average_saver is not None:
                    self.average_saver.final(done, epoch)
            with self._going_on("the last state"):
                self.states.final(done, epoch)
        else:
            saved = self._keep(done, epoch)
            log.warning("stopped by %s after step %d of %d; %s", signal_name or "the end of its launcher", done, self.total_steps,
                        f"the weights are in {saved}" if saved else "the weights could not be saved")
            if self.states.latest is None:
                raise UserError(f"stopped after step {done}, and no state to go on from could be saved", place=str(self.folder),
                                remedy="look at the lines above: free some space, or choose another --output_dir")
            log.warning("go on after step %d with the same command and --resume latest", self.states.latest[0])

    def _keep(self, done: int, epoch: int) -> Path | None:
        """Weights and a state of a run that ends before its time, so that it can go on; the path of the weights. What cannot be
        saved does not keep the rest from it."""
        saved = None
        with self._going_on("the weights"):
            saved = self.saver.emergency(done, epoch)
        with self._going_on("the averaged weights"):
            if self.average_saver is not None:
                self.average_saver.emergency(done, epoch)
        with self._going_on("a state to go on from"):
            self.states.emergency(done, epoch)
        return saved

    def go_back(self) -> int:
        """Weights, optimizer and averages become those of the newest state of this run; the log ends there. Returns its step."""
        self._wait_for_files()
        self.done = 0  # if it fails on the way, weights of two moments are mixed: nothing to rescue
        self.done = self.keeping.go_back(self.states.newest_whole() if self.runtime.is_main else None)
        self.step_log.close()
        self.step_log = StepLog(None)
        with self._going_on("the log"):
            self.step_log = self._open_log(self.done)
            self.measures.mean_loss = last_value(self.folder / f"{self.name}_log.csv", "mean_loss")
        self.tracker.go_back(self.done)
        return self.done

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
        batch that did not fit the memory. Keep them. Not after a NaN: then earlier files are the better ones."""
        if not self.runtime.is_main or self.done == 0 or isinstance(error, NonFinite):
            return
        try:
            self._wait_for_files()
            saved = self._keep(self.done, math.ceil(self.done / self.steps_per_epoch))
            log.warning("broke off after step %d of %d; %s", self.done, self.total_steps,
                        f"the weights are in {saved}" if saved else "the weights could not be saved")
            if self.states.latest is not None:
                log.warning("go on after step %d with the same command and --resume latest", self.states.latest[0])
            if self.keeping.report is not None:
                self.keeping.report.finish(BROKEN, str(error))
        except Exception as second:  # the first error is the one to tell
            if str(second) != str(error):
                log.error("the weights of step %d could not be saved: %s", self.done, second)

    def _write(self, modules: Mapping[str, nn.Module], path: Path, info: Mapping[str, int], averaged: bool = False) -> None:
        """One checkpoint file, with metadata that is true of it."""
        started = time.monotonic()
        moment = Moment(info["step"], info["epoch"], time.time(), averaged)
        metadata = {} if self.config.metadata.no_metadata else self._metadata(moment)
        self.method.export(self.arch, modules, path, self.stored_dtype, metadata, self.format)
        log.info("saved %s (%.2f GB in %.1f s)", path, size_of(path) / 1e9, time.monotonic() - started)

    def _metadata(self, moment: Moment) -> dict[str, str]:
        given = self.config.metadata
        low, high = (getattr(self.facts.objective, name, None) for name in ("min_timestep", "max_timestep"))
        limits = None if low is None and high is None else (low or 0, 1000 if high is None else high)
        return modelspec(
            **self.arch.modelspec(), title=given.metadata_title or self.name, resolution=self.resolution,
            date=datetime.fromtimestamp(moment.now), author=given.metadata_author, description=given.metadata_description,
            license=given.metadata_license, tags=given.metadata_tags, usage_hint=given.metadata_usage_hint,
            thumbnail=thumbnail_url(given.metadata_thumbnail) if given.metadata_thumbnail else None,
            merged_from=given.metadata_merged_from, trigger_phrase=given.metadata_trigger_phrase, timestep_range=limits,
            extra=fields(self.facts, moment),
        )
