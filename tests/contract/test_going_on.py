"""A run that is stopped and goes on is the run that was never stopped, bit for bit: losses, weights, averages."""

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.runs import column
from tests.contract.conftest import dataset_file, losses, make_pictures

STEPS = 7  # of epochs of 3: the state of step 4 lies within an epoch, that of step 3 at its end
MODES = {
    "standard": (),
    "accumulation": ("--gradient_accumulation_steps", "2"),
    "bf16": ("--mixed_precision", "bf16", "--full_bf16", "--optimizer_type", "AdamW8bit"),
    "fused": ("--fused_backward_pass", "--ema_decay", "0.9"),
    "blockwise": ("--blockwise_fused_optimizers", "--mixed_precision", "bf16", "--full_bf16", "--optimizer_type", "Adafactor"),
    "summing": ("--optimizer_type", "Prodigy", "--learning_rate", "1", "--optimizer_args", "d0=3e-4"),
    "averaging": ("--optimizer_type", "AdamWScheduleFree", "--mixed_precision", "bf16", "--blocks_to_swap", "2", "--validation_split", "0.3"),
    "streamed": ("--blocks_to_swap", "2", "--stream_optimizer_states", "--ema_decay", "0.9", "--lr_scheduler", "cosine"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return dataset_file(folder / "data.toml", make_pictures(folder / "pictures", 5), num_repeats=1)


@pytest.mark.parametrize("mode", MODES)
def test_stopped_and_going_on_is_never_stopped(case, train, data, tmp_path, mode):
    if case.variant and mode != "streamed":
        pytest.skip("the architecture's first case goes through all of them")
    if mode in ("summing", "averaging") and case.name != "flux-dev":
        pytest.skip("what an optimizer keeps for itself is shown on one model")
    flags = (*MODES[mode], "--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps", str(STEPS))
    whole = train(tmp_path / "whole", data, *flags, "--save_state_every_n_steps", "1", "--save_last_n_steps_state", "100")
    states = {path.name: path for path in whole.glob("*-state")}
    for step in (3, 4):
        out = tmp_path / f"from{step}"
        train(out, data, *flags, "--resume", str(states[f"last-step{step:08d}-state"]))
        assert losses(out) == losses(whole)[step:], (mode, step)
        for name in ("last.safetensors", *(["last-ema.safetensors"] if "--ema_decay" in flags else [])):
            ours, theirs = load_file(out / name), load_file(whole / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), (mode, step, name)
    if "--ema_decay" in flags:
        weights, averages = (load_file(whole / name) for name in ("last.safetensors", "last-ema.safetensors"))
        assert any(not torch.equal(weights[key], averages[key]) for key in weights)


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


def test_encoders_that_train_go_on_too(case, train, data, tmp_path):
    if not case.encoders:
        pytest.skip("its text encoders do not train")
    flags = (*case.encoders, "--cache_latents", "--max_train_steps", "4", "--save_state_every_n_steps", "2")
    whole = train(tmp_path / "whole", data, *flags)
    train(tmp_path / "rest", data, *flags, "--resume", str(whole / "last-step00000002-state"))
    assert losses(tmp_path / "rest") == losses(whole)[2:]
    ours, theirs = load_file(tmp_path / "rest" / "last.safetensors"), load_file(whole / "last.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_changed_settings_are_listed_and_must_be_confirmed(case, checkpoint, train, data, tmp_path, capfd):
    if case.name != "flux-dev":
        pytest.skip("shown on one model")
    from library.app import main

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
