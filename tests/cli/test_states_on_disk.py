"""States on disks that are full, fail while they are written, are read-only or lie: told, tried again, and never at the cost of the
last good one. With --async_save and without."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

import library.outputs
import library.state_writing
from flux_train import ENTRY
from library.app import main
from library.checkpoint.state_find import find_state
from library.checkpoint.train_state import open_state
from tests.cli.conftest import with_flag
from tests.cli.runs import column, rows

BOTH = pytest.mark.parametrize("more", [[], ["--async_save"]], ids=["at once", "beside"])


def train(flags: list[str], steps: int, *more: object) -> int:
    return main(ENTRY, [*with_flag(flags, "max_train_steps", steps), "--t5xxl_max_token_length", "16", *map(str, more)])


def steps_of(out: Path) -> list[int]:
    """Of all states that can be seen; each is whole."""
    return sorted(open_state(path).facts.step for path in out.glob("*-state"))


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if "NOT SAVED" in line]


def when(line: str) -> tuple[int, int]:
    """(step, next try)."""
    return int(line.partition("at step ")[2].split(",")[0]), int(line.partition("next try after step ")[2].split(":")[0])


@BOTH
def test_a_full_disk_is_told_and_the_state_comes_later(base, tmp_path, monkeypatch, capfd, more):
    """Full after the steps 4 to 6: the state of step 4 is tried again after 5 and 7."""
    out, real = tmp_path / "out", shutil.disk_usage

    def usage(folder):
        return namedtuple("usage", "total used free")(10, 10, 1) if 4 <= len(rows(out)) <= 6 else real(folder)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert train(base, 9, "--save_state_every_n_steps", 4, *more) == 0
    lines = told(capfd.readouterr().err)
    assert [when(line) for line in lines] == [(4, 5), (5, 7)]
    assert all("training goes on" in line and "a state" in line and "free on its disk" in line for line in lines)
    assert steps_of(out) == [7, 8] and column(out, "step") == list(range(1, 10))


@BOTH
def test_a_disk_that_fills_up_while_a_state_is_written(base, tmp_path, monkeypatch, capfd, more):
    """Retention would keep two; the ones that stand stay until a newer one does."""
    out, real, failures = tmp_path / "out", os.fsync, iter(range(3))

    def fsync(handle):
        is_file = stat.S_ISREG(os.fstat(handle).st_mode)  # what a folder answers does not matter
        if is_file and len(rows(out)) >= 3 and next(failures, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr("library.atomic.os.fsync", fsync)
    seen = {}
    after_step = library.outputs.Outputs.after_step

    def look(outputs, report):
        after_step(outputs, report)
        seen[report.step] = steps_of(out)

    monkeypatch.setattr(library.outputs.Outputs, "after_step", look)
    assert train(base, 8, "--save_state_every_n_steps", 1, "--save_last_n_steps_state", 1, *more) == 0
    text = capfd.readouterr().err
    assert len(told(text)) == 3 and "no space left on the disk while writing" in text and "-state" in told(text)[0]
    assert all(seen[step] for step in range(2, 9)) and {1, 2} & set(seen[4])
    assert steps_of(out)[-1] == 8 and not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@BOTH
def test_a_disk_that_lies_costs_no_older_state(base, tmp_path, monkeypatch, capfd, more):
    """The state of step 3 loses its last byte on the way to its place: it is found out at once, and step 2 stays beside it."""
    out, real = tmp_path / "out", os.replace

    def replace(source, target):
        real(source, target)
        if Path(target).name == "last-step00000003-state":
            file = Path(target) / "weights.safetensors"
            os.truncate(file, file.stat().st_size - 1)

    monkeypatch.setattr("library.atomic.os.replace", replace)
    assert train(base, 3, "--save_state_every_n_steps", 1, "--save_last_n_steps_state", 0, *more) == 0
    assert train(base, 3, "--save_state_every_n_steps", 1, "--save_last_n_steps_state", 1, *more) == 0
    lines = told(capfd.readouterr().err)
    assert len(lines) == 2 and "step00000003-state" in lines[0] and "instead of" in lines[0]
    assert find_state(out, "last", "latest").facts.step == 2


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_becomes_read_only(base, tmp_path, monkeypatch, capfd):
    _read_only(base, tmp_path, monkeypatch, capfd, lambda out: out.chmod(0o555), lambda out: out.chmod(0o755))


def test_a_disk_that_becomes_read_only(base, tmp_path, monkeypatch, capfd):
    """As a kernel does after an error of the disk; also for root, who may write where permissions say no."""
    real, broken = library.atomic.tempfile.mkdtemp, []

    def mkdtemp(*arguments, **more):
        if broken:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(*arguments, **more)

    monkeypatch.setattr("library.atomic.tempfile.mkdtemp", mkdtemp)
    _read_only(base, tmp_path, monkeypatch, capfd, lambda out: broken.append(1), lambda out: broken.clear())


def _read_only(base, tmp_path, monkeypatch, capfd, lock, unlock):
    """From step 3 to step 5."""
    out, after_step = tmp_path / "out", library.outputs.Outputs.after_step

    def turn(outputs, report):
        if report.step == 3:
            lock(out)
        after_step(outputs, report)
        if report.step == 5:
            unlock(out)

    monkeypatch.setattr(library.outputs.Outputs, "after_step", turn)
    assert train(base, 8, "--save_state_every_n_steps", 2, "--save_last_n_steps_state", 2) == 0
    lines = told(capfd.readouterr().err)
    assert [when(line) for line in lines] == [(4, 5), (5, 7)] and "cannot write" in lines[0] and "writable" in lines[0]
    assert steps_of(out) == [6, 8]


def test_a_stopped_run_without_room_for_a_state_says_so(base, tmp_path, monkeypatch, capfd):
    """The state of step 2 is there; the one of the stop is not. With none at all there is nothing to go on from: status 2."""
    from library.interrupt import STOPPED_STATUS, StopRequest

    after_step, real = library.outputs.Outputs.after_step, shutil.disk_usage

    def stop(outputs, report):
        monkeypatch.setattr(StopRequest, "requested", property(lambda self: report.step >= 3))
        if report.step == 3:
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "total used free")(10, 10, 1))
        after_step(outputs, report)

    monkeypatch.setattr(library.outputs.Outputs, "after_step", stop)
    assert train(base, 9, "--save_state_every_n_steps", 2) == STOPPED_STATUS
    text = capfd.readouterr().err
    assert "NOT SAVED at step" in text and "go on after step 2 with the same command and --resume latest" in text
    monkeypatch.setattr(shutil, "disk_usage", real)
    monkeypatch.setattr(StopRequest, "requested", property(lambda self: False))
    other = with_flag(base, "output_dir", tmp_path / "other")
    assert train(other, 9) == 2
    assert "no state to go on from could be saved" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("memory", [(), ("--blocks_to_swap", 2, "--stream_optimizer_states"), ("--mixed_precision", "fp16")],
                         ids=["plain", "streamed", "fp16"])
def test_states_beside_the_steps_are_the_same_and_steps_do_not_wait(base, tmp_path, monkeypatch, memory):
    """A disk that takes 0.3 s for each state. What is copied is what was there at the step, also where the optimizer goes on."""
    from library.checkpoint import train_state

    real = train_state.save

    def slow(*arguments):
        time.sleep(0.3)
        return real(*arguments)

    flags = ("--save_state_every_n_steps", 3, "--ema_decay", 0.9, "--lr_scheduler", "cosine", *memory)
    assert train(base, 8, *flags) == 0
    monkeypatch.setattr(train_state, "save", slow)
    other = with_flag(base, "output_dir", tmp_path / "beside")
    spent, after_step = [], library.outputs.Outputs.after_step

    def timed(outputs, report):
        started = time.perf_counter()
        after_step(outputs, report)
        spent.append(time.perf_counter() - started)

    monkeypatch.setattr(library.outputs.Outputs, "after_step", timed)
    assert train(other, 8, *flags, "--async_save") == 0
    assert spent[2] < 0.2  # the first state; the second one may wait for it
    for name in ("last-step00000003-state", "last-step00000006-state"):
        one, two = (folder / name for folder in (tmp_path / "out", tmp_path / "beside"))
        for file in ("weights.safetensors", "optimizer.safetensors", "optimizer.json", "ema.safetensors", "ema.json"):
            assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_without_memory_for_copies_states_are_written_at_once(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(library.state_writing, "available_memory", lambda: 1000)
    assert train(base, 4, "--save_state_every_n_steps", 1, "--async_save") == 0
    text = capfd.readouterr().err
    assert text.count("states are written between two steps") == 1 and steps_of(tmp_path / "out") == [1, 2, 3, 4]
