import csv
import logging
from pathlib import Path

import pytest

from library.log import CSV_FIELDS, Progress, StepLog, log, setup_logging


@pytest.fixture(autouse=True)
def restored():
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


def test_messages_go_to_the_file_of_the_first_rank(tmp_path):
    path = tmp_path / "run.log"
    setup_logging("INFO", path, simple=True, is_main=True)
    log.info("one %d", 1)
    log.debug("hidden")
    assert path.read_text(encoding="utf-8") == "one 1\n"
    setup_logging("INFO", tmp_path / "other.log", simple=True, is_main=False)
    log.info("not from here")
    log.error("but this")
    assert (tmp_path / "other.log").read_text(encoding="utf-8") == "but this\n"
    assert log.level == logging.ERROR


def test_names_that_are_no_text_reach_the_file(tmp_path):
    path = tmp_path / "run.log"
    setup_logging("INFO", path, simple=True, is_main=True)
    log.info("picture \udcff.png")
    assert path.read_text(encoding="utf-8") == "picture \\udcff.png\n"


def test_step_log_rows_can_be_read_while_the_run_goes_on(tmp_path):
    steps = StepLog(tmp_path / "deeper" / "log.csv")
    steps.write({"step": 1, "loss": 0.5, "unknown": 3})
    with (tmp_path / "deeper" / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_FIELDS and rows[0]["loss"] == "0.5" and rows[0]["epoch"] == ""
    steps.close()
    StepLog(None).write({"step": 1})  # ranks other than the first


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_costs_rows_and_is_said_once(tmp_path):
    setup_logging("INFO", tmp_path / "run.log", simple=True, is_main=True)
    steps = StepLog(tmp_path / "log.csv")
    steps.file.close()
    steps.file = open("/dev/full", "w", encoding="utf-8", buffering=1)
    steps.rows = csv.DictWriter(steps.file, CSV_FIELDS)
    for step in (1, 2):
        steps.write({"step": step})
    steps.close()
    (line,) = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert "log.csv cannot be written, training goes on: No space left" in line


def test_progress_speaks_at_the_first_and_last_step_in_a_log_file(tmp_path):
    setup_logging("INFO", tmp_path / "run.log", simple=True, is_main=True)
    progress = Progress(total_steps=3, first_step=0, visible=True)
    progress.terminal = False
    for step in (1, 2, 3):
        progress.update(step, loss=float(step), seconds=0.5, images=4, peak_bytes=2**30)
    progress.close()
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and lines[0].startswith("step 1/3: loss 1.0000, 0.5 s/step, 8 images/s, peak 1.00 GiB") and "step 3/3" in lines[1]
