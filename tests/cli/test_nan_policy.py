"""``--nan_policy``: steps that fail stop the run, are left out, or send it back to its newest state; in every memory mode."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import library.outputs
from flux_train import ENTRY
from library.app import main
from library.checkpoint.train_state import open_state
from library.interrupt import STOPPED_STATUS
from library.optim.table import find
from library.nan_policy import MOST_IN_A_ROW, MOST_ROLLBACKS
from tests.cli.conftest import ROOT, environment, with_flag
from tests.cli.runs import checkpoints, column
from tests.nan_steps import spoil

STATES = ["--save_state_every_n_steps", "2", "--save_last_n_steps_state", "100", "--t5xxl_max_token_length", "16"]
MODES = {
    "plain": [],
    "accumulation": ["--gradient_accumulation_steps", "2"],
    "fp16": ["--mixed_precision", "fp16"],
    "bf16": ["--mixed_precision", "bf16", "--full_bf16"],
    "fused": ["--fused_backward_pass"],
    "blockwise": ["--blockwise_fused_optimizers", "--gradient_accumulation_steps", "2"],
    "streamed": ["--blocks_to_swap", "2", "--stream_optimizer_states"],
}


def train(flags: list[str], out: Path, steps: int, *more: object) -> int:
    flags = with_flag(with_flag(flags, "max_train_steps", steps), "output_dir", out)
    return main(ENTRY, [*flags, "--ema_decay", "0.9", "--lr_scheduler", "cosine", *STATES, *map(str, more)])


def weights(out: Path) -> list[torch.Tensor]:
    """Of the result and of its average."""
    return [tensor for name in ("last", "last-ema") for _, tensor in sorted(load_file(out / f"{name}.safetensors").items())]


def same(one: Path, two: Path) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(weights(one), weights(two), strict=True))


def content(state: Path) -> dict[str, bytes]:
    """The bytes of all that trains: weights, optimizer, average, scale."""
    names = ("weights.safetensors", "optimizer.safetensors", "optimizer.json", "ema.safetensors", "ema.json", "scaler.json")
    return {name: (state / name).read_bytes() for name in names if (state / name).exists()}


def state(out: Path, step: int) -> Path:
    return out / f"last-step{step:08d}-state"


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_left_out_changes_nothing(base, tmp_path, monkeypatch, capfd, mode):
    out = tmp_path / "out"
    spoil(monkeypatch.setattr, {3, 4})
    assert train(base, out, 6, "--nan_policy", "skip", "--save_state_every_n_steps", 1, *MODES[mode]) == 0
    assert content(state(out, 2)) == content(state(out, 3)) == content(state(out, 4))
    assert content(state(out, 4))["weights.safetensors"] != content(state(out, 5))["weights.safetensors"]
    assert open_state(state(out, 5)).facts.skipped == [3, 4]
    assert column(out, "step") == [1, 2, 3, 4, 5, 6] and column(out, "steps_left_out") == [0, 0, 1, 2, 2, 2]
    assert len(column(out, "loss")) == 4 and len(set(column(out, "learning_rate"))) == 6  # the schedule goes on
    told = [line for line in capfd.readouterr().err.splitlines() if "is left out" in line]
    assert len(told) == 2 and "step 4 is left out: the loss is NaN or infinite for" in told[1] and "2 in a row" in told[1]
    assert all(".png" in line for line in told)
    # going on from the state between them, or after them, is the same run
    for step in (3, 4):
        again = tmp_path / f"from{step}"
        assert train(base, again, 6, "--nan_policy", "skip", *MODES[mode], "--resume", state(out, step)) == 0
        assert same(again, out) and column(again, "steps_left_out")[-1] == 2


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fp16"])
def test_going_back_is_leaving_out_even_after_weights_were_touched(base, tmp_path, monkeypatch, capfd, mode):
    """NaN in the gradients alone, which is seen before the update or after it. The reference is a plain run."""
    back, left_out = tmp_path / "back", tmp_path / "left_out"
    kind = "loss" if mode == "plain" else "gradient"
    seen = spoil(monkeypatch.setattr, {4, 6}, kind)
    rounding = MODES["bf16"] if mode == "bf16" else []
    norm = ("--max_grad_norm", 0)
    assert train(base, back, 7, "--nan_policy", "rollback", "--save_state_every_n_steps", 3, *norm, *MODES[mode]) == 0
    every = 2 if "--gradient_accumulation_steps" in MODES[mode] else 1
    assert seen[::every] == [1, 2, 3, 4, 5, 6, 5, 7]  # twice back to the state of step 3
    accumulation = ["--gradient_accumulation_steps", "2"] if every == 2 else []
    assert train(base, left_out, 7, "--nan_policy", "skip", *norm, *rounding, *accumulation) == 0
    assert same(back, left_out) and column(back, "step") == list(range(1, 8))
    for name in ("loss", "mean_loss"):
        assert column(back, name) == column(left_out, name)


OPTIMIZERS = {
    "Muon": ["--learning_rate", "1e-3"], "Prodigy": ["--learning_rate", "1", "--optimizer_args", "d0=3e-4"],
    "DAdaptAdam": ["--learning_rate", "1", "--optimizer_args", "d0=3e-4"], "CAME": ["--learning_rate", "1e-3"],
    "AdamWScheduleFree": ["--learning_rate", "1e-3"], "ProdigyPlusScheduleFree": ["--learning_rate", "1", "--optimizer_args", "d0=3e-4"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_back_takes_counters_and_sums_of_the_optimizer_back(base, tmp_path, monkeypatch, name):
    """What it keeps for all weights together is that of the state, in the optimizer that has gone on meanwhile. With validation,
    which looks at other weights than those that train, and in bf16, where the step is taken apart."""
    record = find(name)
    if importlib.util.find_spec(record.path.partition(".")[0]) is None:
        pytest.skip(f"{record.package} is not installed")
    spoil(monkeypatch.setattr, {4, 6})
    flags = [*with_flag(base, "max_train_steps", 7), "--optimizer_type", name, *OPTIMIZERS[name], "--mixed_precision", "bf16", *STATES,
             "--validation_split", "0.25", "--validate_every_n_steps", "1", "--save_state"]
    apart = [["--fused_backward_pass"]] if record.per_parameter else [[]]
    runs = {"back": ["rollback", "--save_state_every_n_steps", "3", "--async_save"], "left_out": ["skip"], "once": ["rollback", *apart[0]]}
    for out, (policy, *more) in runs.items():
        assert main(ENTRY, with_flag([*flags, "--nan_policy", policy, "--max_grad_norm", "0", *more], "output_dir", tmp_path / out)) == 0
    for out in ("back", "once"):
        assert content(tmp_path / out / "last-state") == content(tmp_path / "left_out" / "last-state"), out
        one, other = (load_file(tmp_path / run / "last.safetensors") for run in (out, "left_out"))
        assert all(torch.equal(one[key], other[key]) for key in other)
        for values in ("loss", "mean_loss", "lr/denoiser", "validation_loss"):
            assert column(tmp_path / out, values) == column(tmp_path / "left_out", values), values


@pytest.mark.skipif(sys.platform == "win32", reason="there it would end this very process")
def test_stopped_on_the_way_again(base, tmp_path, monkeypatch):
    """The state that a signal leaves then knows of the failed step, which is yet to come."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--nan_policy", "rollback", "--save_state_every_n_steps", 4)
    spoil(monkeypatch.setattr, {7})
    assert train(base, whole, 9, *flags) == 0
    after_step = library.outputs.Outputs.after_step
    seen = spoil(monkeypatch.setattr, {7})

    def signalled(outputs, report):
        if report.step == 5 and seen.count(5) == 2:  # on the way from 4 to 7 for the second time
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(outputs, report)

    monkeypatch.setattr(library.outputs.Outputs, "after_step", signalled)
    assert train(base, parts, 9, *flags) == STOPPED_STATUS
    stopped = sorted(parts.glob("*-state"))[-1]
    assert open_state(stopped).facts.skipped == [7] and open_state(stopped).facts.step in (5, 6)
    monkeypatch.setattr(library.outputs.Outputs, "after_step", after_step)
    assert train(base, parts, 9, *flags, "--resume", "latest") == 0
    assert same(parts, whole) and column(parts, "loss") == column(whole, "loss") and seen.count(7) == 1


def test_killed_before_it_went_back(base, tmp_path, monkeypatch):
    """Going on from an older state finds the same NaN and comes to the same end."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    spoil(monkeypatch.setattr, {5})
    assert train(base, whole, 7, "--nan_policy", "rollback") == 0
    assert train(base, again, 7, "--nan_policy", "rollback", "--resume", state(whole, 2)) == 0
    assert same(again, whole) and column(again, "loss") == column(whole, "loss")[2:]


def test_a_damaged_state_is_not_gone_back_to(base, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    seen = spoil(monkeypatch.setattr, {5})
    after_step = library.outputs.Outputs.after_step

    def damage(outputs, report):
        after_step(outputs, report)
        if report.step == 4 and seen.count(4) == 1:
            file = state(out, 4) / "weights.safetensors"
            file.write_bytes(file.read_bytes()[:-1])

    monkeypatch.setattr(library.outputs.Outputs, "after_step", damage)
    assert train(base, out, 6, "--nan_policy", "rollback") == 0
    text = capfd.readouterr().err
    assert "passed over" in text and "went back to the state of step 2; left out on the way: 5" in text
    assert column(out, "step") == [1, 2, 3, 4, 5, 6]


def test_with_no_whole_state_left_the_run_ends_and_saves_nothing_mixed(base, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    spoil(monkeypatch.setattr, {3}, "gradient")
    after_step = library.outputs.Outputs.after_step

    def damage(outputs, report):
        after_step(outputs, report)
        for path in out.glob("*-state"):
            (path / "weights.safetensors").write_bytes(b"")

    monkeypatch.setattr(library.outputs.Outputs, "after_step", damage)
    assert train(base, out, 6, "--nan_policy", "rollback", "--fused_backward_pass") == 2
    assert "no state of this run is whole any more" in capfd.readouterr().err.splitlines()[-1]
    assert not checkpoints(out)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_model_that_is_broken_ends_the_run(base, tmp_path, capfd, policy):
    """A learning rate that wrecks the weights in the first step: every step fails from then on."""
    out = tmp_path / "out"
    flags = with_flag(base, "learning_rate", "1e18")
    assert train(flags, out, 40, "--nan_policy", policy, "--lr_scheduler", "constant", "--save_state_every_n_steps", 1) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"the {MOST_IN_A_ROW} steps before it, which were left out" in errors[0]
    assert ".png" in errors[0] and not checkpoints(out)


def test_going_back_to_one_state_has_an_end(base, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    spoil(monkeypatch.setattr, set(range(2, 99, 2)))
    assert train(base, out, 60, "--nan_policy", "rollback", "--save_state_every_n_steps", 1000) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"in {MOST_ROLLBACKS + 1} steps, and every time the state of step 0 was gone back to" in error


def test_what_weights_have_taken_already_cannot_be_left_out(base, tmp_path, monkeypatch, capfd):
    spoil(monkeypatch.setattr, {2}, "gradient")
    assert train(base, tmp_path / "out", 3, "--nan_policy", "skip", "--fused_backward_pass") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "step 2: " in error and "cannot be left out" in error and "--nan_policy rollback" in error and ".png" in error


def test_stop_names_pictures_for_gradients_too(base, tmp_path, monkeypatch, capfd):
    spoil(monkeypatch.setattr, {2}, "gradient")
    assert train(base, tmp_path / "out", 3) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "step 2: the gradient norm is nan" in error and "in a step of " in error and ".png" in error


def test_going_back_needs_states(base, tmp_path, capfd):
    assert main(ENTRY, [*base, "--nan_policy", "rollback", "--save_state"]) == 2
    assert "rollback needs states that are written during training; add --save_state_every_n_steps" in capfd.readouterr().err


SEVERAL = """
import os, signal, sys
sys.path.insert(0, {root!r})
from library import outputs
from tests.nan_steps import spoil
second = os.environ["RANK"] == "1"
spoil(setattr, {{3, 4}}, "loss", here=lambda: second)
after_step = outputs.Outputs.after_step
def signalled(self, report):
    if second and report.step == 4:
        os.kill(os.getpid(), signal.SIGUSR1)
    after_step(self, report)
outputs.Outputs.after_step = signalled
from flux_train import ENTRY
from library.app import main
sys.exit(main(ENTRY, sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_ranks_agree(base, tmp_path):
    """The NaN is on the second rank alone; both go back, and leave the steps out. So is the signal, after which both stop. The
    launcher makes a failure of it, and tells the status."""
    script, out = tmp_path / "several.py", tmp_path / "out"
    script.write_text(SEVERAL.format(root=str(ROOT)), encoding="utf-8")
    flags = with_flag(with_flag(base, "max_train_steps", 6), "output_dir", out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
                           str(script), *flags, *STATES, "--nan_policy", "rollback"],
                          cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and f"exitcode  : {STOPPED_STATUS}" in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("is left out") == 2 and done.stderr.count("went back to the state of step 2") == 2
    assert done.stderr.count("go on after step 5 with the same command") == 1
    assert column(out, "steps_left_out") == [0, 0, 1, 2, 2] and len(column(out, "loss")) == 3
    assert open_state(state(out, 5)).facts.skipped == [3, 4]
