"""Flags of resuming that would do nothing are refused. The classes are tried in a script of their own."""

import dataclasses
from pathlib import Path

import pytest

from flux_train import ENTRY
from library.config.parse import Config, parse
from library.config.schema import HubOptions, SavingOptions
from library.config.state_options import EmaOptions, StateOptions


def problems(options, saving=None, changed=(), hub=None):
    """The options' own conflicts, beside settings of saving."""
    config = parse(ENTRY, ["--pretrained_model_name_or_path=m.safetensors", "--dataset_config=d.toml", "--output_dir=o"], {})

    class Changed(Config):
        def changed(self):
            return frozenset(changed)
    fields = {each.name: getattr(config, each.name) for each in dataclasses.fields(Config)} | {
        "saving": saving or SavingOptions(), "hub": hub or HubOptions()}
    return [str(error) for _, error in options.problems(Changed(**fields))]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m.safetensors", "d.toml"):
        Path(name).write_text("")


@pytest.mark.parametrize("options, saving, expected", [
    (StateOptions(), {}, ""),
    (StateOptions(resume="latest", resume_anyway=True), {}, ""),
    (StateOptions(resume_anyway=True), {}, "--resume_anyway: has no effect without --resume; add --resume latest"),
    (StateOptions(save_last_n_steps_state=5), {"save_every_n_steps": 5}, "--save_last_n_steps_state: has no effect: no states"),
    (StateOptions(save_last_n_steps_state=5, save_state=True), {"save_every_n_steps": 5}, ""),
    (StateOptions(save_last_n_steps_state=5, save_state_every_n_steps=2), {}, ""),
    (StateOptions(save_last_n_epochs_state=5, save_state=True), {}, "--save_last_n_epochs_state: has no effect: no states"),
    (StateOptions(save_last_n_epochs_state=5, save_state=True), {"save_n_epoch_ratio": 2}, ""),
])
def test_conflicts_of_states(options, saving, expected):
    found = problems(options, SavingOptions(**saving))
    assert len(found) == bool(expected) and all(line.startswith(expected) for line in found)


@pytest.mark.parametrize("options, repo, expected", [
    (StateOptions(save_state_to_huggingface=True, save_state=True), "a/b", ""),
    (StateOptions(save_state_to_huggingface=True, save_state=True), None, "--save_state_to_huggingface: nothing is uploaded"),
    (StateOptions(save_state_to_huggingface=True), "a/b", "--save_state_to_huggingface: no states are written, except"),
    (StateOptions(resume_from_huggingface=True), None, "--resume_from_huggingface: has no effect without --resume"),
    (StateOptions(resume_from_huggingface=True, resume="latest"), None, "--resume: of which repository 'latest' is"),
    (StateOptions(resume_from_huggingface=True, resume="latest"), "a/b", ""),
    (StateOptions(resume_from_huggingface=True, resume="c/d"), "a/b", "--resume: 'c/d' is a repository"),
    (StateOptions(resume_from_huggingface=True, resume="c/d/e-state:main"), None, ""),
])
def test_conflicts_of_states_on_the_hub(options, repo, expected):
    found = problems(options, hub=HubOptions(huggingface_repo_id=repo))
    assert len(found) == bool(expected) and all(line.startswith(expected) for line in found)


def test_whether_states_are_written():
    assert not StateOptions(resume="latest").wanted and StateOptions(save_state_every_n_steps=1).wanted
    assert StateOptions(save_state=True).wanted and StateOptions(save_state_on_train_end=True).wanted


def test_conflicts_of_the_average():
    assert problems(EmaOptions()) == [] == problems(EmaOptions(0.99, "gpu"), changed={"ema_device", "ema_decay"})
    assert problems(EmaOptions(None, "gpu"), changed={"ema_device"})[0].startswith("--ema_device: has no effect without --ema_decay")
