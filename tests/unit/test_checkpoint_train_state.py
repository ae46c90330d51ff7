"""A state is whole or it is none: round trips bit for bit, faults of disks, and refusals."""

import builtins
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from library.checkpoint import train_state, writer
from library.checkpoint.state_tree import pack, unpack
from library.checkpoint.train_state import open_state, save
from library.errors import UserError
from tests.unit.state_helpers import Trainer, facts, same


def weights(value=1.0):
    return {"a": torch.full((64, 8), value), "b": torch.full((5,), value, dtype=torch.bfloat16)}


def parts(value=1.0):
    return {"optimizer": {"a": {"step": 3, "exp_avg": torch.full((64, 8), value)}, "b": {}}}


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "run-step00000003-state"
    save(path, facts(), weights(), parts())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, args", [("AdamW", ()), ("AdamW8bit", ()), ("Adafactor", ()), ("Adafactor", ("beta1=0.9",))])
def test_training_goes_on_bit_for_bit(tmp_path, name, args, dtype):
    whole, first = Trainer(name, dtype, args), Trainer(name, dtype, args)
    whole.run(0, 7)
    first.run(0, 4)
    save(tmp_path / "s", facts(4), first.weights, {"optimizer": first.updater.state_dict()})
    second = Trainer(name, dtype, args, seed=1)
    assert not second.same(first)
    saved = open_state(tmp_path / "s")
    saved.load_weights(second.weights)
    second.updater.load_state_dict(saved.part("optimizer"))
    assert second.same(first) and saved.facts.step == 4
    second.run(4, 7)
    assert second.same(whole)


def test_every_kind_of_value_comes_back(tmp_path):
    value = {"numbers": [1, -2, 2**70, 0.1, math.inf, -math.inf, True, None, 1e-320], "nan": math.nan, "text": "é\n", "pair": (1, (2, [3])),
             "by number": {3: torch.arange(3), 4: "four"}, "empty": {}, "$odd": 1, "none": []}
    value |= {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in (
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.uint16,
        torch.complex64, torch.float8_e4m3fn)}
    value |= {"scalar": torch.tensor(2.5), "no elements": torch.empty(0, 4), "strided": torch.arange(6.0).reshape(2, 3).t()}
    save(tmp_path / "s", facts(), weights(), {"odd": {"all": value}})
    back = open_state(tmp_path / "s").part("odd")["all"]
    assert list(back) == list(value) and back["nan"] != back["nan"]
    assert [repr(item) for item in back["numbers"]] == [repr(item) for item in value["numbers"]]
    assert back["pair"] == value["pair"] and isinstance(back["pair"], tuple) and back["by number"].keys() == {3, 4}
    for key, item in value.items():
        if isinstance(item, torch.Tensor):
            assert same(back[key], item.contiguous()), key


def test_what_cannot_be_kept_is_told():
    with pytest.raises(UserError, match="optimizer: a/x is a builtins.set, which a saved state cannot hold"):
        pack({"a": {"x": {1}}}, "optimizer")
    packed, tensors = pack({"a": torch.ones(2)}, "x")
    assert unpack(packed, tensors.__getitem__)["a"] is tensors["a"]


def test_facts_and_parts(tmp_path):
    told = facts(7, run_ids={"wandb": "abc"}, data_settings={"dataset 1: batch_size": "2"}, config="seed = 'é'\n")
    save(tmp_path / "s", told, weights(), {"scaler": {"scale": 65536.0}, "ema": None})
    saved = open_state(tmp_path / "s")
    assert saved.facts == told and saved.part("ema") is None and dict(saved.part("scaler")) == {"scale": 65536.0}
    assert (tmp_path / "s" / "config.toml").read_text(encoding="utf-8") == told.config


def test_weights_are_loaded_in_place(state):
    into = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    into["a"] = torch.zeros(8, 64).t()  # not contiguous
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    open_state(state).load_weights(into)
    assert all(torch.equal(into[name], weights()[name]) for name in into)
    assert places == {name: tensor.data_ptr() for name, tensor in into.items()}


@pytest.mark.parametrize("change, message", [
    (lambda into: into.pop("b"), "'b' is only in the state"),
    (lambda into: into.update(c=torch.zeros(1)), "'c' is not in the state"),
    (lambda into: into.update(a=torch.zeros(8, 64)), r"'a' is F32 \[64, 8\] in it and F32 \[8, 64\] now"),
    (lambda into: into.update(b=torch.zeros(5)), r"'b' is BF16 \[5\] in it and F32 \[5\] now"),
])
def test_a_state_of_another_model(state, change, message):
    into = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    change(into)
    with pytest.raises(UserError, match=message):
        open_state(state).load_weights(into)
    assert not any(tensor.any() for tensor in into.values())


def every_file(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FILES = ["config.toml", "manifest.json", "optimizer.json", "optimizer.safetensors", "state.json", "weights.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fault", ["flip", "cut", "longer", "missing", "empty"])
def test_every_damage_is_noticed(state, file, fault):
    assert every_file(state) == FILES
    path = state / file
    data = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= fault == "flip"
        path.write_bytes({"flip": data, "cut": data[:-1], "longer": data + b"\0", "empty": b""}[fault])
    with pytest.raises(UserError, match="broken|no manifest.json"):
        open_state(state)


def test_every_flipped_byte_of_the_small_files(state):
    for file in ("manifest.json", "state.json"):
        data = (state / file).read_bytes()
        for place in range(len(data)):
            (state / file).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
            with pytest.raises(UserError):
                open_state(state)
        (state / file).write_bytes(data)
    assert open_state(state).facts == facts()


def test_a_state_of_a_later_format(state):
    content = json.loads((state / "manifest.json").read_text())
    content.pop("digest")
    (state / "manifest.json").write_text(train_state._json(train_state._signed({**content, "format": 2})))
    with pytest.raises(UserError, match="format 2, and this program reads format 1; resume with the version"):
        open_state(state)


@pytest.mark.parametrize("step", range(9))
def test_a_disk_that_fills_up_at_any_file(tmp_path, state, monkeypatch, step):
    """The n-th file cannot be written: what was there before is whole, and nothing half-written is left."""
    opened, real = [], os.fdopen

    def fdopen(handle, *arguments, **more):
        file = real(handle, *arguments, **more)
        opened.append(file)
        if len(opened) == step + 1:
            def full(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return _Refusing(file, full)
        return file

    monkeypatch.setattr(os, "fdopen", fdopen)
    new = state if step % 2 else tmp_path / "run-step00000004-state"
    if step < len(FILES):
        with pytest.raises(UserError, match="no space left on the disk") as caught:
            save(new, facts(4), weights(2), parts(2))
        assert str(new) in str(caught.value) and ".tmp" not in str(caught.value)
        assert every_file(tmp_path) == [state.name] and open_state(state).facts.step == 3
    else:  # no more files than that are written
        save(new, facts(4), weights(2), parts(2))
        assert len(opened) == len(FILES) and open_state(new).facts.step == 4


class _Refusing:
    """A file that lets nothing be written."""

    def __init__(self, file, write):
        self._file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_room_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: usage._replace(free=4500))
    with pytest.raises(UserError, match="not enough space on the disk"):
        save(tmp_path / "s", facts(), weights(), parts())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, code):
    def refuse(*_arguments, **_more):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr("library.atomic.tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match="cannot write .*make the folder writable"):
        save(tmp_path / "s", facts(), weights(), parts())


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="make the folder writable"):
            save(tmp_path / "s", facts(), weights(), parts())
    finally:
        tmp_path.chmod(0o755)


def test_nothing_but_a_state_is_replaced(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is no training state that could be replaced"):
        save(tmp_path / "s", facts(), weights(), parts())
    assert (tmp_path / "s" / "thesis.tex").read_text() == "x"
    with pytest.raises(UserError, match="is no training state: it has no manifest.json"):
        open_state(tmp_path / "s")
    with pytest.raises(UserError, match="no such folder"):
        open_state(tmp_path / "none")


def test_a_state_of_the_same_name_is_replaced(state):
    save(state, facts(9), weights(2), parts(2))
    into = weights(0)
    saved = open_state(state)
    saved.load_weights(into)
    assert saved.facts.step == 9 and float(into["a"][0, 0]) == 2 and every_file(state.parent) == [state.name]


def test_weights_that_are_no_numbers_are_not_saved(state):
    with pytest.raises(UserError, match="'a' holds values that are not finite"):
        save(state, facts(4), {**weights(), "a": torch.full((2,), math.nan)}, {})
    assert open_state(state).facts.step == 3


def test_memory_stays_small(tmp_path):
    """One tensor at a time both ways: the reads of a state of 32 tensors never hold two of them."""
    many = {f"w{index}": {"exp_avg": torch.full((1000,), float(index))} for index in range(32)}
    save(tmp_path / "s", facts(), weights(), {"optimizer": many})
    part = open_state(tmp_path / "s").part("optimizer")
    reads = []
    real = part._source.read
    part._source.read = lambda name: reads.append(name) or real(name)
    assert part.keys() == many.keys() and not reads
    for name in part:
        if part[name]:
            assert float(part[name]["exp_avg"][0]) == float(name[1:])
    assert len(reads) == 32


def test_reading_needs_no_pickle(state, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(builtins, "eval", None)
    open_state(state).load_weights(weights(0.0))


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from library.checkpoint.state_find import find_state, next_serial
from library.checkpoint.train_state import leftovers, save
from tests.unit.state_helpers import facts
torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(4)

def tensors(step):
    return {f"w{index}": torch.full((200, 300), float(step)) for index in range(8)}

def write(step, path):
    save(path, facts(step, serial=next_serial(folder, "run")), tensors(step), {"optimizer": {n: {"m": t} for n, t in tensors(-step).items()}})

def child(first, confirmed):
    for step in range(first, first + 1000):
        write(step, folder / ("run-state" if step % 2 else f"run-step{step % 6:08d}-state"))
        os.write(confirmed, step.to_bytes(8, "little"))

done, seen = 0, 0
write(0, folder / "run-state")
for _ in range(kills):
    reader, confirmed = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(done + 1, confirmed)
    os.close(confirmed)
    time.sleep(rng.uniform(0.0, 0.4))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
    os.close(reader)
    told = int.from_bytes(said[-8:], "little") if said else done
    state = find_state(folder, "run", "latest")
    seen += bool(list(folder.glob(".*")))
    assert state.facts.step in (told, told + 1), (state.facts.step, told)
    step = state.facts.step
    into = tensors(-1)
    state.load_weights(into)
    assert all(bool((t == step).all()) for t in into.values())
    assert all(bool((entry["m"] == -step).all()) for entry in state.part("optimizer").values())
    done = step
print("steps", done, "half-written", seen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes, which Windows does not have")
def test_killed_at_any_moment(tmp_path):
    """40 processes that write one state after the other, over each other's too, killed with SIGKILL: the newest that was finished
    (or the one that was just renamed) is always found whole."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), "40"], capture_output=True, text=True,
                          timeout=300, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    assert int(words[1]) > 10 and int(words[3]) > 10, done.stdout  # it got on, and many were killed inside a save
