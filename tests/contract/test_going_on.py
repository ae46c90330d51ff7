"""A run that is stopped and goes on is the run that was never stopped, bit for bit: losses, weights, averages."""

import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from library import loop
from library.app import main
from library.interrupt import STOPPED_STATUS
from tests.cli.runs import column
from tests.contract.conftest import dataset_file, losses, make_pictures

STEPS, END = 6, "last-step00000006-state"  # of epochs of 3: the state of step 4 lies within an epoch, that of step 3 at its end
# Epochs of 2, the second one of a single micro-batch: here step 3 lies within and step 4 at the end
ALL = ("--gradient_accumulation_steps", "2", "--ema_decay", "0.9", "--lr_scheduler", "cosine")
MODES = {
    "standard": ALL,
    "fused": ("--fused_backward_pass", *ALL),
    "blockwise": ("--blockwise_fused_optimizers", "--mixed_precision", "bf16", "--full_bf16", "--optimizer_type", "Adafactor", *ALL),
    "streamed": ("--blocks_to_swap", "2", "--stream_optimizer_states", *ALL),
}
KEPT = {  # what an optimizer or the scale of gradients keeps, shown on one model
    "bf16": ("--mixed_precision", "bf16", "--full_bf16", "--optimizer_type", "AdamW8bit"),
    "summing": ("--optimizer_type", "Prodigy", "--learning_rate", "1", "--optimizer_args", "d0=3e-4"),
    "averaging": ("--optimizer_type", "AdamWScheduleFree", "--mixed_precision", "bf16", "--blocks_to_swap", "2", "--validation_split", "0.3",
                  "--gradient_accumulation_steps", "2"),
    "orthogonal": ("--optimizer_type", "Muon", "--fused_backward_pass", "--lr_scheduler_type", "OneCycleLR", "--lr_scheduler_args", "max_lr=2e-3"),
    "fp16": ("--mixed_precision", "fp16"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return dataset_file(folder / "data.toml", make_pictures(folder / "pictures", 5), num_repeats=1)


def content(folder):
    """The bytes of all that a state holds of the run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.stem in ("weights", "optimizer", "ema", "scaler")}


def same_files(ours, theirs, names):
    for name in names:
        one, other = load_file(ours / name), load_file(theirs / name)
        assert all(torch.equal(one[key], other[key]) for key in other), name


@pytest.mark.parametrize("mode", [*MODES, *KEPT])
def test_stopped_and_going_on_is_never_stopped(case, train, data, tmp_path, mode):
    if case.variant and mode != "streamed":
        pytest.skip("the architecture's first case goes through all of them")
    if mode in KEPT and case.name != "flux-dev":
        pytest.skip("what an optimizer keeps for itself is shown on one model")
    flags = (*{**MODES, **KEPT}[mode], "--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps", str(STEPS))
    every = ("--save_state_every_n_steps", "1", "--save_last_n_steps_state", "3")
    whole = train(tmp_path / "whole", data, *flags, *every)
    states = {path.name: path for path in whole.glob("*-state")}
    averaged = "--ema_decay" in flags
    for step in (3, 4):
        out = tmp_path / f"from{step}"
        train(out, data, *flags, "--save_state_on_train_end", "--resume", str(states[f"last-step{step:08d}-state"]))
        assert losses(out) == losses(whole)[step:], (mode, step)
        same_files(out, whole, ["last.safetensors", *(["last-ema.safetensors"] if averaged else [])])
        assert content(out / "last-state") == content(whole / END)
    if averaged:
        weights, averages = (load_file(whole / name) for name in ("last.safetensors", "last-ema.safetensors"))
        assert any(not torch.equal(weights[key], averages[key]) for key in weights)
    if mode == "fp16":
        assert json.loads((whole / END / "scaler.json").read_text())["_growth_tracker"] == STEPS  # so it was taken over


@pytest.mark.skipif(sys.platform == "win32", reason="there it would end this very process")
def test_a_signal_between_two_micro_batches(case, checkpoint, train, data, tmp_path, monkeypatch):
    """The step is finished. The other processes that read pictures when it goes on have nothing of the first run."""
    if case.name != "flux-dev":
        pytest.skip("shown on one model")
    flags = ("--max_train_steps", str(STEPS), "--fused_backward_pass", *ALL)
    whole = train(tmp_path / "whole", data, *flags, "--max_data_loader_n_workers", "0")
    draw, seen = loop.draw, []

    def signalled(seed, step, *rest):
        seen.append(step)
        if seen.count(2) == 1 and step == 2:  # within the first micro-batch of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(seed, step, *rest)

    monkeypatch.setattr(loop, "draw", signalled)
    again = ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(data), "--output_dir", str(tmp_path / "parts"),
             "--learning_rate", "1e-3", *flags, "--max_data_loader_n_workers", "2", "--resume", "latest"]
    assert main(case.entry, again) == STOPPED_STATUS and seen == [0, 0, 1, 2, 2]
    assert main(case.entry, again) == 0 and len(seen) == 9
    assert losses(tmp_path / "parts") == losses(whole)
    same_files(tmp_path / "parts", whole, ["last.safetensors", "last-ema.safetensors"])


def test_latest_goes_on_in_the_same_folder_and_the_log_has_each_step_once(case, train, data, tmp_path):
    if case.variant:
        pytest.skip("the architecture's first case shows it")
    flags = ("--cache_latents", "--cache_text_encoder_outputs", "--save_state_every_n_steps", "2")
    whole = train(tmp_path / "whole", data, *flags, "--max_train_steps", str(STEPS))
    train(tmp_path / "parts", data, *flags, "--max_train_steps", "5", "--resume", "latest")  # there is none yet
    train(tmp_path / "parts", data, *flags, "--max_train_steps", str(STEPS), "--resume", "latest")
    assert column(tmp_path / "parts", "step") == list(range(1, STEPS + 1))
    assert losses(tmp_path / "parts") == losses(whole)
    assert (tmp_path / "parts" / "last_report.html").stat().st_size > 10_000


@pytest.mark.parametrize("mode", ["standard", "streamed"])
def test_encoders_that_train_go_on_too(case, train, data, tmp_path, mode):
    if not case.encoders:
        pytest.skip("its text encoders do not train")
    flags = (*case.encoders, *MODES[mode], "--cache_latents", "--max_train_steps", "4", "--save_state_every_n_steps", "1",
             "--save_last_n_steps_state", "9")
    whole = train(tmp_path / "whole", data, *flags)
    rest = train(tmp_path / "rest", data, *flags, "--resume", str(whole / "last-step00000001-state"))
    assert losses(rest) == losses(whole)[1:]
    same_files(rest, whole, ["last.safetensors", "last-ema.safetensors"])
    assert content(rest / "last-step00000004-state") == content(whole / "last-step00000004-state")


def test_changed_settings_are_listed_and_must_be_confirmed(case, checkpoint, train, data, tmp_path, capfd):
    if case.name != "flux-dev":
        pytest.skip("shown on one model")
    flags = ["--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps", "4", "--save_state_every_n_steps", "2"]
    whole = train(tmp_path / "out", data, *flags)
    state = str(whole / "last-step00000002-state")
    again = ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(data), "--output_dir", str(tmp_path / "again"),
             *flags, "--resume", state]
    assert main(case.entry, [*again, "--learning_rate", "1e-4", "--seed", "9"]) == 2
    text = capfd.readouterr().err
    assert "--learning_rate was 0.001 and is 0.0001" in text and "--seed was 42 and is 9" in text and "--resume_anyway" in text
    assert main(case.entry, [*again, "--learning_rate", "1e-4", "--resume_anyway"]) == 0
    assert "going on although --learning_rate" in capfd.readouterr().err
    assert main(case.entry, [*again[:-2], "--resume", str(tmp_path)]) == 2
    assert "is no training state" in capfd.readouterr().err
