"""Runs that are stopped: Ctrl-C, SIGTERM, kill -9, a launcher that dies, a loss that is not a number."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoint.train_state import open_state
from library.interrupt import STOPPED_STATUS
from tests.cli.conftest import ROOT, run_all, run_script, with_flag
from tests.cli.runs import SCRIPT, checkpoints, header, launcher, rows, running

PLAIN = [sys.executable, str(ROOT / SCRIPT)]
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@pytest.fixture
def endless(base) -> list[str]:
    """A command line whose run never ends by itself, with short steps."""
    return [*with_flag(base, "max_train_steps", 1_000_000), "--t5xxl_max_token_length", "16"]


def is_whole(path: Path, original: Path) -> bool:
    """Names and shapes of the checkpoint it came from, all values there and finite."""
    shapes, _, _ = header(path)
    return shapes == header(original)[0] and all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix == ".tmp"]


def told_once(text: str, words: str) -> str:
    """The one line of ``text`` with ``words``."""
    lines = [line for line in text.splitlines() if words in line]
    assert len(lines) == 1, text
    return lines[0]


@posix
@pytest.mark.parametrize(("name", "workers"), [("SIGINT", 0), ("SIGTERM", 0), ("SIGUSR1", 2)])
def test_a_signal_saves_the_last_step_and_ends_with_75(endless, files, tmp_path, name, workers):
    """The processes that read pictures get it too when it goes to the whole group."""
    out = tmp_path / "out"
    if workers:
        endless = [*(word for word in endless if not word.startswith("--cache_")), "--max_data_loader_n_workers", str(workers)]
    with running([*PLAIN, *endless], tmp_path / "log") as run:
        run.until(lambda: len(rows(out)) >= 3)
        os.killpg(run.process.pid, getattr(signal, name))
        assert run.end() == STOPPED_STATUS == 75, run.text
        text = run.text
    last = len(rows(out))
    assert checkpoints(out) == [f"last-step{last:08d}.safetensors"]
    assert is_whole(out / checkpoints(out)[0], files.checkpoint)
    assert header(out / checkpoints(out)[0])[2]["ss_steps"] == str(last)
    line = told_once(text, "stopped by")
    assert f"{name} after step {last} of" in line and checkpoints(out)[0] in line
    assert told_once(text, "finishing this step").startswith(name)
    assert f"go on after step {last} with the same command and --resume latest" in text
    assert open_state(out / f"last-step{last:08d}-state").facts.step == last
    assert "Traceback" not in text and not leftovers(tmp_path)
    assert (out / "last_loss.png").stat().st_size > 1000


@posix
def test_ctrl_c_before_training_ends_at_once(endless, tmp_path):
    """While torch is imported, and while the models are loaded."""
    for sign in ("bucket 64x64", "beside the checkpoint"):
        with running([*PLAIN, *endless], tmp_path / "log") as run:
            run.until_it_says(sign)
            run.process.send_signal(signal.SIGINT)
            assert run.end() == 130, run.text
            assert told_once(run.text, "Ctrl-C").startswith("error: ") and "Traceback" not in run.text
            assert "steps in all" not in run.text
    assert not checkpoints(tmp_path / "out") and not leftovers(tmp_path)


@posix
def test_a_second_ctrl_c_does_not_wait_for_the_step(endless, tmp_path):
    """A step of ten thousand micro-batches takes minutes."""
    slow = ["--gradient_accumulation_steps", "10000", "--dataset_repeats", "10000"]
    with running([*PLAIN, *endless, *slow], tmp_path / "log") as run:
        run.until_it_says("steps in all")
        time.sleep(1)  # the first forward pass: the handlers stand
        run.process.send_signal(signal.SIGINT)
        run.until_it_says("finishing this step")
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
        assert "Traceback" not in run.text and told_once(run.text, "error: ")
    assert not checkpoints(tmp_path / "out") and not leftovers(tmp_path)


@posix
def test_kill_9_while_saving_leaves_whole_files_and_the_next_run_works(endless, base, files, tmp_path):
    out = tmp_path / "out"
    with running([*PLAIN, *endless, "--save_every_n_steps", "1", "--save_last_n_steps", "20"], tmp_path / "log") as run:
        run.until(lambda: len(rows(out)) >= 4)
        run.until(lambda: list(out.glob(".last-step*.tmp")), pause=0)
        run.process.kill()
        run.end()
    assert 3 <= len(checkpoints(out)) <= 22
    assert all(is_whole(out / name, files.checkpoint) for name in checkpoints(out))
    assert all(path.name.startswith(".") for path in leftovers(out))
    again = run_script(*base, "--t5xxl_max_token_length", "16")
    assert again.status == 0, again.text
    assert is_whole(out / "last.safetensors", files.checkpoint) and len(rows(out)) == 2


@posix
def test_when_its_launcher_is_terminated_the_run_saves_and_ends(endless, files, tmp_path):
    """``accelerate launch`` dies of a SIGTERM without telling its child."""
    out = tmp_path / "out"
    with running([*launcher("no"), *endless], tmp_path / "log") as run:
        run.until(lambda: len(rows(out)) >= 2)
        run.process.terminate()
        run.end()
        end = time.monotonic() + 60
        while "loss curve" not in run.text and time.monotonic() < end:
            time.sleep(0.1)
        assert "the end of its launcher" in told_once(run.text, "stopped by")
        assert "Traceback" not in run.text
    last = len(rows(out))
    assert checkpoints(out) == [f"last-step{last:08d}.safetensors"] and is_whole(out / checkpoints(out)[0], files.checkpoint)


@posix
def test_ctrl_c_in_the_terminal_of_a_launched_run_saves(endless, files, tmp_path):
    """A terminal sends it to the launcher and to the script. The launcher's own trace is not ours."""
    out = tmp_path / "out"
    with running([*launcher("bf16"), *endless], tmp_path / "log") as run:
        run.until(lambda: len(rows(out)) >= 2)
        os.killpg(run.process.pid, signal.SIGINT)
        run.end()
        end = time.monotonic() + 60
        while "loss curve" not in run.text and time.monotonic() < end:
            time.sleep(0.1)
        assert "SIGINT after step" in told_once(run.text, "stopped by")
    last = len(rows(out))
    assert checkpoints(out) == [f"last-step{last:08d}.safetensors"] and is_whole(out / checkpoints(out)[0], files.checkpoint)


def test_a_loss_that_is_not_finite_names_step_and_pictures(base, files, tmp_path):
    """A learning rate that wrecks the weights in step 1, whose file stays; and weights that were wrecked before."""
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(files.checkpoint)
    tensors["final_layer.linear.weight"] = torch.full_like(tensors["final_layer.linear.weight"], 3e38)
    save_file(tensors, broken)
    names = ("ae", "clip_l", "t5xxl", "clip_l_tokenizer", "t5xxl_tokenizer")
    parts = [word for name in names for word in (f"--{name}", getattr(files, name))]
    steep = with_flag(with_flag(base, "learning_rate", "1e18"), "max_train_steps", 5)
    wrecked = with_flag(with_flag(base, "pretrained_model_name_or_path", broken), "output_dir", tmp_path / "wrecked")
    first, second = run_all([*steep, "--save_every_n_steps", "1"], [*wrecked, *parts])
    for done, step in ((first, 2), (second, 1)):
        assert done.status == 2 and "Traceback" not in done.text, done.text
        assert len(done.errors) == 1 and f"step {step}:" in done.errors[0] and "--learning_rate" in done.errors[0], done.text
        assert "picture" in done.errors[0] and ".png" in done.errors[0]
    assert checkpoints(tmp_path / "out") == ["last-step00000001.safetensors"]
    assert is_whole(tmp_path / "out" / "last-step00000001.safetensors", files.checkpoint)
    assert not checkpoints(tmp_path / "wrecked") and not leftovers(tmp_path)
    assert len(rows(tmp_path / "out")) == 1 and not rows(tmp_path / "wrecked")


def test_weights_that_do_not_fit_the_saved_format_are_kept_as_trained(files, base, tmp_path):
    """--save_precision fp16 with a weight beyond its range: the error names it, and the training is not lost."""
    tensors = load_file(files.checkpoint)
    tensors["img_in.bias"] = torch.full_like(tensors["img_in.bias"], 0.1)
    tensors["img_in.bias"][0] = 1e5
    for name in ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mlp.0.weight"):
        tensors[name] = tensors[name] * 1e-3  # so that the run itself stays finite
    save_file(tensors, tmp_path / "flux1-dev.safetensors")
    flags = with_flag(base, "pretrained_model_name_or_path", tmp_path / "flux1-dev.safetensors")
    for name in ("ae", "clip_l", "t5xxl", "clip_l_tokenizer", "t5xxl_tokenizer"):
        flags = with_flag(flags, name, getattr(files, name))
    done = run_script(*flags, "--save_precision", "fp16")
    assert done.status == 2 and "img_in.bias" in done.errors[-1] and "Traceback" not in done.text, done.text
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["last-step00000002.safetensors"]
