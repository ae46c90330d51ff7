"""Runs the scripts as a user does: a process of its own, real files, stdout and stderr as they come."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cli import warm
from tests.contract.conftest import dataset_file, make_pictures
from tests.tiny import make_flux_files

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """A finished command. ``errors`` are its lines of error; ``text`` is all it printed on both streams."""

    status: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def environment(**extra: str) -> dict[str, str]:
    """No hub, one thread, and nothing that a launcher around the tests may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def run_script(*arguments: object, script: str = "flux_train.py", cwd: Path = ROOT, fresh: bool = False, **extra: str) -> Done:
    """The script in a process of its own, run to its end; ``fresh``: started from nothing, for what is read at import."""
    words = [str(argument) for argument in arguments]
    if fresh or not warm.AVAILABLE:
        done = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, text=True, cwd=cwd,
                              env=environment(**extra), timeout=300, encoding="utf-8", errors="replace")
        return Done(done.returncode, done.stdout, done.stderr)
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "stdout", Path(folder) / "stderr"
        status = warm.run(ROOT / script, words, cwd, environment(**extra), out, err)
        return Done(status, *(path.read_text(encoding="utf-8", errors="replace") for path in (out, err)))


def run_all(*commands: Sequence[object], script: str = "flux_train.py") -> list[Done]:
    """The script once with each list of arguments, one after the other."""
    return [run_script(*command, script=script) for command in commands]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return make_flux_files(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures", 4)


@pytest.fixture
def dataset(tmp_path, pictures) -> Path:
    return dataset_file(tmp_path / "data.toml", pictures)


@pytest.fixture
def base(files, dataset, tmp_path) -> list[str]:
    """A command line that works: tests change one thing."""
    return ["--pretrained_model_name_or_path", str(files.checkpoint), "--dataset_config", str(dataset), "--output_dir", str(tmp_path / "out"),
            "--max_train_steps", "2", "--cache_latents", "--cache_text_encoder_outputs", "--learning_rate", "1e-4"]


def with_flag(base: list[str], flag: str, value: object) -> list[str]:
    """``base`` with another value for ``flag``."""
    changed = list(base)
    if f"--{flag}" in changed:
        changed[changed.index(f"--{flag}") + 1] = str(value)
        return changed
    return [*changed, f"--{flag}", str(value)]
