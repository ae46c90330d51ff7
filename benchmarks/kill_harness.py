"""Kills a training run with SIGKILL again and again, goes on each time, and compares the end with a run that nobody killed.

    python benchmarks/kill_harness.py [--kills 50] [--seed 0] [--steps 60] [--fork]

A tiny model on the CPU, with EMA, --async_save and a state, a checkpoint and an average after every step, so that the run spends
most of its time with a file half-written. Each life is killed at a moment drawn from the seed: half of them while a hidden
temporary file or folder is there, half at any time, start-up included. After every kill each state that can be seen must load
with all its checksums, ``--resume latest`` must take the newest one, it must be no older than before, and each checkpoint must
read back. The run that came to its end must have the weights, the averages and the log of the reference, bit for bit. When it
ends before there were enough kills, another one begins.

``--fork``: each life is a fork of this process, which has imported everything and trained nothing, so that a life costs half a
second and not six. Without it, each is the command that a user types.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SCRIPT = ROOT / "flux_train.py"
RESULTS = ("last.safetensors", "last-ema.safetensors")
COMPARED = ("step", "epoch", "loss", "learning_rate", "grad_norm")  # of the log; the rest are times and sizes
LIMIT = 300.0  # seconds of a life


@dataclass
class Tally:
    """What the kills hit. ``inside``: kind of file that was half-written, by count."""

    kills: int = 0
    runs: int = 0
    starting: int = 0
    training: int = 0
    inside: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    def text(self) -> str:
        inside = sum(self.inside.values())
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.inside.items()))
        return (f"{self.kills} kills in {self.seconds:.0f} s over {self.runs} runs: {self.starting} before the first step of a life, "
                f"{self.training} between files, {inside} inside a save ({kinds})\n"
                "after every kill the newest state loaded; weights, averages and logs are those of the run that was not killed")


class Life:
    """A process that trains; ``log`` takes what it says."""

    def __init__(self, arguments: Sequence[str], log: Path, fork: bool):
        self.pid = _forked(arguments, log) if fork else _spawned(arguments, log)

    def ended(self) -> int | None:
        """Its exit status (negative: the signal that killed it), or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        end = time.monotonic() + LIMIT
        while (status := self.ended()) is None:
            assert time.monotonic() < end, "a life takes too long"
            time.sleep(0.002)
        return status

    def kill(self) -> int:
        """Its exit status: that of the kill, or the one that it came to before."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def _spawned(arguments: Sequence[str], log: Path) -> int:
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], cwd=ROOT, stdout=file, stderr=file).pid


def _forked(arguments: Sequence[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from flux_train import ENTRY
        from library.app import main

        status = main(ENTRY, arguments)
    finally:
        os._exit(status)


def prepare(folder: Path, steps: int) -> list[str]:
    """A model, pictures and their caches; the arguments of the run, but for its folder."""
    from tests.contract.conftest import dataset_file, make_pictures
    from tests.tiny import make_flux_files

    files = make_flux_files(folder / "model")
    data = dataset_file(folder / "data.toml", make_pictures(folder / "pictures", 5))
    return ["--pretrained_model_name_or_path", str(files.checkpoint), "--dataset_config", str(data), "--max_train_steps", str(steps),
            "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--learning_rate", "1e-3", "--lr_scheduler", "cosine",
            "--ema_decay", "0.9", "--t5xxl_max_token_length", "16", "--async_save", "--resume", "latest",
            "--save_every_n_steps", "1", "--save_last_n_steps", "2", "--save_state_every_n_steps", "1", "--save_last_n_steps_state", "2"]


def import_all() -> None:
    """What a life would import, so that forks need not."""
    import diffusers.models.transformers.transformer_flux  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers.models.clip.modeling_clip  # noqa: F401
    import transformers.models.t5.modeling_t5  # noqa: F401

    import library.ending
    import library.states
    import library.validation  # noqa: F401
    from flux_train import ENTRY  # noqa: F401
    from library.architectures import flux  # noqa: F401

    torch.set_num_threads(1)


class Harness:
    """``out``: the folder of the run under way."""

    def __init__(self, folder: Path, steps: int, seed: int, fork: bool, say: Callable[[str], None]):
        self.folder, self.steps, self.fork, self.say = folder, steps, fork, say
        self.rng = random.Random(seed)
        self.arguments = prepare(folder, steps)
        self.tally = Tally()
        self.log = folder / "log.txt"
        self.reference = folder / "reference"
        assert self._life(self.reference).wait() == 0, self.log.read_text()
        started = time.monotonic()  # the caches are there now
        life = self._life(folder / "timed")
        while _rows(folder / "timed") < 2 and not _is_over(life):
            time.sleep(0.002)
        self.start = time.monotonic() - started
        life.kill()

    def run(self, kills: int) -> Tally:
        started = time.monotonic()
        while self.tally.kills < kills:
            self.tally.runs += 1
            self._one_run(self.folder / f"run{self.tally.runs}", kills)
        self.tally.seconds = time.monotonic() - started
        return self.tally

    def _life(self, out: Path) -> Life:
        return Life([*self.arguments, "--output_dir", str(out)], self.log, self.fork)

    def _one_run(self, out: Path, kills: int) -> None:
        """Kill and go on until it is complete."""
        newest = -1
        while True:
            leave = self.tally.kills >= kills
            status = self._life(out).wait() if leave else self._killed(out)
            if status == 0:
                self._compare(out)
                return
            assert status == -signal.SIGKILL and not leave, f"status {status}:\n{self.log.read_text()[-3000:]}"
            self.tally.kills += 1
            newest = self._look(out, newest)

    def _killed(self, out: Path) -> int:
        """One life and its end; 0 where it was complete before."""
        before, rows = _temporary(out), _rows(out)
        life = self._life(out)
        if self.rng.random() < 0.5:
            self._await_saves(life, out, before, self.rng.randint(1, 10))
        else:
            early = self.rng.random() < 0.3
            self._sleep(life, self.rng.uniform(0, self.start) if early else self.start + self.rng.uniform(0, 0.5))
        status = life.kill()
        if status == 0:
            return 0
        hit = {_kind(name) for name in _temporary(out) - before}
        if hit:
            self.tally.inside[" and ".join(sorted(hit))] += 1
        elif _rows(out) == rows:
            self.tally.starting += 1
        else:
            self.tally.training += 1
        return status

    def _await_saves(self, life: Life, out: Path, before: set[str], count: int) -> None:
        """Until ``count`` temporary names have been seen and a moment more, in which the file grows or is renamed."""
        seen: set[str] = set()
        end = time.monotonic() + LIMIT
        while len(seen) < count and time.monotonic() < end and not _is_over(life):
            seen |= _temporary(out) - before
        time.sleep(self.rng.uniform(0, 0.01))

    def _sleep(self, life: Life, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not _is_over(life):
            time.sleep(0.001)

    def _look(self, out: Path, newest: int) -> int:
        """Check what a kill has left; returns the step of the newest state, -1 without one."""
        from library.checkpoint.state_find import find_state, found_states
        from library.checkpoint.train_state import open_state
        from library.checkpoint.verify import verify

        states = [open_state(path) for path in found_states(out, "last")]  # which compares every checksum
        for path in out.glob("*.safetensors"):
            verify(path)
        if not states:
            assert newest < 0, "the states are gone"
            return -1
        found = find_state(out, "last", "latest").facts.step
        assert found == max(state.facts.step for state in states) and found >= newest, (found, newest)
        self.say(f"kill {self.tally.kills}: newest state {found}")
        return found

    def _compare(self, out: Path) -> None:
        from safetensors.torch import load_file

        for name in RESULTS:
            ours, theirs = load_file(out / name), load_file(self.reference / name)
            assert ours.keys() == theirs.keys(), name
            assert all(ours[key].numpy().tobytes() == theirs[key].numpy().tobytes() for key in theirs), f"{out / name} differs"
        assert _log(out) == _log(self.reference), "the logs differ"
        assert [row[0] for row in _log(out)] == [str(step) for step in range(1, self.steps + 1)]


def _is_over(life: Life) -> bool:
    """Whether it has ended, without taking its exit status away."""
    return os.waitid(os.P_PID, life.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _temporary(out: Path) -> set[str]:
    try:
        return {name for name in os.listdir(out) if name.startswith(".") and name.endswith((".tmp", ".previous"))}
    except FileNotFoundError:
        return set()


def _kind(name: str) -> str:
    return ("state" if "-state." in name else "averages" if name.startswith(".last-ema") else "weights" if ".safetensors" in name
            else "log or settings")


def _rows(out: Path) -> int:
    path = out / "last_log.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _log(out: Path) -> list[tuple[str, ...]]:
    with (out / "last_log.csv").open(encoding="utf-8", newline="") as file:
        return [tuple(row[name] for name in COMPARED) for row in csv.DictReader(file)]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.fork:
        import_all()
    with tempfile.TemporaryDirectory() as folder:
        say = (lambda line: None) if arguments.quiet else (lambda line: print(line, flush=True))
        harness = Harness(Path(folder), arguments.steps, arguments.seed, arguments.fork, say)
        say(f"{harness.start:.2f} s to the first step")
        print(harness.run(arguments.kills).text())


if __name__ == "__main__":
    main()
