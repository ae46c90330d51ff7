"""What a run says: console messages from the first rank, a progress bar, trackers, and a CSV of every step."""

from __future__ import annotations

import csv
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOGGER_NAME = "kiln"
log = logging.getLogger(LOGGER_NAME)

CSV_FIELDS = ("step", "epoch", "loss", "mean_loss", "learning_rate", "grad_norm", "seconds", "images_per_second", "data_wait",
              "mfu", "peak_bytes", "validation_loss")


class _Formatter(logging.Formatter):
    """Whatever a message or an exception quotes, ``secrets`` are not in it."""

    def __init__(self, simple: bool, secrets: Iterable[str]):
        super().__init__("%(message)s" if simple else "%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        self.secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        return without(self.secrets, super().format(record))


def without(secrets: Iterable[str], text: str) -> str:
    """``text`` with a mark in place of every secret."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return text


def setup_logging(level: str, file: Path | None, simple: bool, is_main: bool, secrets: Iterable[str] = ()) -> None:
    """Messages of the first rank go to ``file`` or stderr, without ``secrets``; other ranks speak from level ERROR on."""
    handler: logging.Handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace") if file else _TqdmHandler()
    handler.setFormatter(_Formatter(simple, secrets))
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    log.propagate = False
    for library in ("transformers", "diffusers", "bitsandbytes", "accelerate", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)  # what they advise is not for the users of a script
    # Autocast over float32 weights: what torch then says about its fused kernel, nobody can act on.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    log.setLevel(level if is_main else logging.ERROR)


class _TqdmHandler(logging.Handler):
    """Prints above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class Progress:
    """Loss, speed, memory and time left: a bar on a terminal, a line every half minute in a log file."""

    def __init__(self, total_steps: int, first_step: int, visible: bool):
        self.total, self.visible = total_steps, visible
        self.terminal = visible and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True,
                        disable=not self.terminal, smoothing=0.1)
        self.first_step, self.started, self.spoke = first_step, time.monotonic(), time.monotonic()

    def update(self, step: int, loss: float, seconds: float, images: int, peak_bytes: int, data_wait: float = 0.0) -> None:
        """After step number ``step`` (counted from 1) of ``images`` pictures over all ranks. ``loss``: a running mean;
        ``data_wait``: the share of the step in which pictures were not ready, told where it is worth a thought."""
        waiting = f", {data_wait:.0%} of it waiting for pictures" if data_wait > 0.2 else ""
        facts = (f"loss {loss:.4f}, {seconds:.3g} s/step, {images / max(seconds, 1e-9):.3g} images/s, "
                 f"peak {peak_bytes / 2**30:.2f} GiB{waiting}")
        if self.terminal:
            self.bar.set_postfix_str(facts, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if self.visible and (now - self.spoke > 30 or step in (self.first_step + 1, self.total)):
            self.spoke = now
            left = (now - self.started) / max(1, step - self.first_step) * (self.total - step)
            log.info("step %d/%d: %s, %s left", step, self.total, facts, tqdm.format_interval(left))

    def close(self) -> None:
        self.bar.close()


class StepLog:
    """One CSV row per step, flushed as it is written; a file of the same name from an earlier run is started anew, or with
    ``append`` written on.

    ``more``: columns behind ``CSV_FIELDS``.
    """

    def __init__(self, path: Path | None, more: Sequence[str] = (), append: bool = False):
        self.path, self.file, self.failed, self.fields = path, None, False, (*CSV_FIELDS, *more)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a" if append else "w", newline="", encoding="utf-8", buffering=1)
            self.rows = csv.DictWriter(self.file, self.fields)
            if not append:
                self.rows.writeheader()

    def write(self, row: Mapping[str, Any]) -> None:
        if self.file is not None:
            self._try(lambda: self.rows.writerow({name: row.get(name, "") for name in self.fields}))

    def close(self) -> None:
        if self.file is not None:
            self._try(self.file.close)

    def _try(self, action: Callable[[], object]) -> None:
        """A full disk costs rows, not the training; it is said once."""
        try:
            action()
        except OSError as error:
            if not self.failed:
                log.error("%s cannot be written, training goes on: %s", self.path, error.strerror or error)
            self.failed = True
