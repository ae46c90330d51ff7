"""Files written at once and beside the training: the same bytes, the weights of the moment, errors, waits."""

import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library import writing
from library.checkpoint.export import export_module
from library.checkpoint.verify import Damaged
from library.checkpoint.writer import NoRoom, write_safetensors
from library.errors import UserError
from library.writing import DAMAGED, Writer


def export(modules, path, info):
    tensors = export_module(modules["m"], None)
    write_safetensors(path, tensors.entries, tensors.get, {"ss_steps": str(info["step"])}, add_hash_key="modelspec.hash_sha256")


class Run:
    """A module that trains; ``done`` are the files that stand."""

    def __init__(self, export=export, **settings):
        self.module, self.done, self.failed = nn.Linear(64, 64), [], []
        self.writer = Writer({"m": self.module}, export, 20_000, on_failure=self.failed.append, **settings)

    def save(self, path, step=1, **settings):
        self.writer.write(path, {"step": step, "epoch": 1}, lambda: self.done.append(path.name), **settings)

    def train(self):
        with torch.no_grad():
            self.module.weight.add_(1)


def test_the_same_bytes_in_both_ways(tmp_path):
    torch.manual_seed(0)
    run = Run(beside=True)
    run.save(tmp_path / "beside.safetensors")
    run.writer.wait()
    run.save(tmp_path / "at_once.safetensors", at_once=True)
    assert (tmp_path / "beside.safetensors").read_bytes() == (tmp_path / "at_once.safetensors").read_bytes()
    assert run.done == ["beside.safetensors", "at_once.safetensors"] and not run.failed


def test_steps_go_on_while_the_weights_of_then_are_written(tmp_path):
    gate = threading.Event()

    def slow(modules, path, info):
        gate.wait()
        export(modules, path, info)

    run = Run(slow, beside=True)
    before = run.module.weight.detach().clone()
    run.save(tmp_path / "a.safetensors")
    run.train()  # at once, though nothing is written yet
    assert run.done == [] and not list(tmp_path.iterdir())
    gate.set()
    run.writer.wait()
    assert run.done == ["a.safetensors"] and torch.equal(load_file(tmp_path / "a.safetensors")["weight"], before)


def test_the_next_file_waits_for_the_last(tmp_path):
    running, most = [], []

    def watched(modules, path, info):
        running.append(path)
        most.append(len(running))
        export(modules, path, info)
        running.remove(path)

    run = Run(watched, beside=True)
    kept = []
    for step in range(4):
        kept.append(run.module.weight.detach().clone())
        run.save(tmp_path / f"{step}.safetensors", step)
        run.train()
    run.save(tmp_path / "last.safetensors", 4, at_once=True)
    assert most == [1] * 5 and run.done == [*(f"{step}.safetensors" for step in range(4)), "last.safetensors"]
    assert all(torch.equal(load_file(tmp_path / f"{step}.safetensors")["weight"], weight) for step, weight in enumerate(kept))


def test_errors_of_the_thread_reach_the_caller_of_the_next_call(tmp_path):
    def fails(modules, path, info):
        raise UserError("no space left")

    run = Run(fails, beside=True)
    run.save(tmp_path / "a.safetensors")
    run.writer.wait()
    assert [str(error) for error in run.failed] == ["no space left"] and not run.done
    run.save(tmp_path / "b.safetensors")
    with pytest.raises(UserError):  # in the caller's own thread it is raised
        run.save(tmp_path / "c.safetensors", at_once=True)
    assert len(run.failed) == 2


def test_defects_are_not_hidden(tmp_path):
    def breaks(modules, path, info):
        raise AssertionError("ours")

    run = Run(breaks, beside=True)
    run.save(tmp_path / "a.safetensors")
    with pytest.raises(AssertionError):
        run.writer.wait()


@pytest.mark.parametrize("beside", [False, True])
def test_room_is_asked_for_before_anything_is_copied(tmp_path, monkeypatch, beside):
    import shutil
    from collections import namedtuple

    run = Run(beside=beside)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "total used free")(1, 1, 100))
    with pytest.raises(NoRoom, match="0.00 GB are free"):
        run.save(tmp_path / "a.safetensors")
    assert not run.done and not list(tmp_path.iterdir()) and (not beside or run.writer.snapshot._buffer is None)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_file_that_does_not_read_back_is_no_file(tmp_path, at_once):
    def corrupts(modules, path, info):
        export(modules, path, info)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    run = Run(corrupts)
    for _ in range(2):
        with pytest.raises(Damaged):
            run.save(tmp_path / "a.safetensors", at_once=at_once)
    assert not run.done
    assert [path.name for path in tmp_path.iterdir()] == ([f"a.safetensors{DAMAGED}"] if at_once else [])


def test_weights_are_read_where_they_can_be(tmp_path):
    """Streamed weights are in host memory only inside such a context."""
    log = []

    @contextmanager
    def reading():
        log.append("in")
        yield
        log.append("out")

    def seen(modules, path, info):
        log.append("export")
        export(modules, path, info)

    run = Run(seen, beside=True, reading=reading)
    run.save(tmp_path / "a.safetensors", at_once=True)
    run.save(tmp_path / "b.safetensors")
    run.writer.wait()
    assert log == ["in", "export", "out", "in", "out", "export"]


def test_a_copy_that_does_not_fit_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(writing, "Snapshot", type("Full", (writing.Snapshot,), {"require_memory": lambda self: (_ for _ in ()).throw(
        UserError("too little memory"))}))
    with pytest.raises(UserError, match="too little memory"):
        Run(beside=True)
    Run(beside=False)
