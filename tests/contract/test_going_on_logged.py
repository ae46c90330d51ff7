"""What is drawn goes on too: one run, and the same run stopped and resumed, leave the same curves in TensorBoard."""

import shutil
import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.contract.conftest import dataset_file, make_pictures

CHOOSE = lambda case: case.name == "flux-dev"  # noqa: E731  the loop is the same for all
TIMED = {"speed/seconds_per_step", "speed/images_per_second", "speed/data_wait_share", "memory/peak_bytes"}


def curves(folder):
    """Tag -> (step, value) of a folder with the events of one run."""
    (run,) = folder.iterdir()
    events = EventAccumulator(str(run / "finetuning"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, None if tag in TIMED else point.value) for point in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


def test_curves_of_a_resumed_run_are_those_of_one_that_never_stopped(train, tmp_path):
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 3))
    flags = ("--cache_latents", "--cache_text_encoder_outputs", "--save_state_every_n_steps", "2")
    train(tmp_path / "whole", data, *flags, "--max_train_steps", "6", "--logging_dir", str(tmp_path / "a"))
    parts = train(tmp_path / "parts", data, *flags, "--max_train_steps", "5", "--logging_dir", str(tmp_path / "b"))
    shutil.rmtree(parts / "last-step00000004-state")  # as if it had been killed before: steps 3 to 5 are done again
    state = json.loads((parts / "last-step00000002-state" / "state.json").read_text(encoding="utf-8"))
    assert state["run_ids"] == {"tensorboard": next((tmp_path / "b").iterdir()).name} and state["mean_loss"] > 0
    train(parts, data, *flags, "--max_train_steps", "6", "--logging_dir", str(tmp_path / "b"), "--resume", "latest")
    whole, resumed = curves(tmp_path / "a"), curves(tmp_path / "b")
    assert resumed == whole and [step for step, _ in whole["loss/average"]] == [1, 2, 3, 4, 5, 6]
    assert {"loss/step", "loss/grad_norm", *TIMED} <= whole.keys() and any(tag.startswith("lr/") for tag in whole)
