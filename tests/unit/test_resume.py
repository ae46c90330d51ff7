"""Which states a run may go on from, and which changes of settings have to be confirmed."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from flux_train import ENTRY
from library.config.parse import parse, to_toml
from library.errors import UserError
from library.resume import compare, data_settings, identity, require_same, stride_of, version_notes, versions
from library.resume_rules import RULES, SECTION, rule_of
from tests.unit.data_helpers import scan_folder
from tests.unit.state_helpers import facts

REQUIRED = {"pretrained_model_name_or_path": "model.safetensors", "dataset_config": "data.toml", "output_dir": "out"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "data.toml", "other.toml", "prompts.txt"):
        Path(name).write_text("")


def read(*argv):
    given = {**REQUIRED, **dict(zip((word.removeprefix("--") for word in argv[::2]), argv[1::2], strict=True))}
    return parse(ENTRY, [f"--{name}={value}" for name, value in given.items()], {})


def state(*argv, **more):
    return facts(**{"config": to_toml(read(*argv)), **more})


@pytest.mark.parametrize("before, now, listed", [
    ("", "", []),
    ("", "--output_name other --sample_every_n_steps 5 --save_every_n_steps 3 --metadata_title x --console_log_simple true", []),
    ("", "--dataset_config other.toml --cache_latents true --vae_batch_size 4 --gradient_checkpointing true", []),
    ("--max_train_steps 10", "--max_train_steps 2000 --gradient_accumulation_steps 2", []),
    ("", "--learning_rate 1e-5", ["--learning_rate was 2e-06 and is 1e-05 (the updates of the weights)"]),
    ("--seed 7", "", ["--seed was 7 and is 42 (noise, order and captions follow from it)"]),
    ("", "--optimizer_args weight_decay=0.1", ['--optimizer_args was [] and is ["weight_decay=0.1"] (the updates of the weights)']),
    ("", "--mixed_precision bf16", ['--mixed_precision was "no" and is "bf16" (the arithmetic)']),
    ("", "--min_timestep 5", ["--min_timestep was not set and is 5 (what the model is asked for)"]),
    ("", "--guidance_scale 2", ["--guidance_scale was 1.0 and is 2.0 (the model is called otherwise)"]),
    ("", "--cache_text_encoder_outputs true",
     ["--cache_text_encoder_outputs was false and is true (cached captions vary less than fresh ones)"]),
    ("--cache_text_encoder_outputs true", "--cache_text_encoder_outputs_to_disk true", []),
    ("", "--optimizer_type Adafactor",
     ['--optimizer_type was "AdamW" and is "Adafactor" (the saved state of one optimizer says nothing to another)']),
])
def test_what_is_listed(before, now, listed):
    assert [str(change) for change in compare(to_toml(read(*before.split())), read(*now.split()))] == listed


def test_every_flag_of_every_script_has_a_rule():
    scripts = sorted(path.stem for path in Path(__file__).parents[2].glob("*_train*.py"))
    assert "flux_train" in scripts
    for script in scripts:
        for name, setting in importlib.import_module(script).ENTRY.settings().items():
            rule = rule_of(setting.section, name, False)
            assert rule is not None and rule.reason, f"{setting.section}.{name}: say in resume_rules whether it changes the run"
    sections = {section for section, _ in RULES}
    assert all((section, SECTION) in RULES for section in sections)


def test_paths_never_count():
    """Where the autoencoder lies says nothing; its content is part of the model's identity."""
    saved = to_toml(read()).replace("[architecture]", '[architecture]\nae = "/elsewhere/ae.safetensors"')
    assert compare(saved, read()) == []


def test_changes_have_to_be_confirmed():
    config = read("--learning_rate", "1e-5", "--loss_type", "l1")
    now = facts(0, config=to_toml(config))
    with pytest.raises(UserError) as caught:
        require_same(state(), now, config, "--resume x", anyway=False)
    lines = caught.value.problems
    assert len(lines) == 2 and lines[0].startswith("--resume x: --learning_rate was 2e-06 and is 1e-05")
    assert all("or add --resume_anyway" in line for line in lines)
    assert [change.name for change in require_same(state(), now, config, "--resume x", anyway=True)] == [
        "--learning_rate", "--loss_type"]


def test_what_no_flag_can_confirm():
    config = read("--optimizer_type", "Adafactor")
    with pytest.raises(UserError, match="no state can go on with another value"):
        require_same(state(), facts(0, config=to_toml(config)), config, "x", anyway=True)
    with pytest.raises(UserError, match="another model"):
        require_same(state(model="other"), facts(0, config=to_toml(read())), read(), "x", anyway=True)
    with pytest.raises(UserError, match="this state is of step 11, and the run has 10; raise --max_train_steps"):
        require_same(state(step=11), facts(11, config=to_toml(read())), read(), "x", anyway=True)


def refused(saved, now, config=None):
    config = config or read()
    try:
        return require_same(saved, dataclasses.replace(now, config=to_toml(config)), config, "x", anyway=False) or []
    except UserError as error:
        return [line.partition(": ")[2].partition(" was")[0] for line in error.problems]


def test_identities():
    assert identity("a", "bc") == identity("a", "bc") != identity("ab", "c")


def test_other_pictures():
    assert refused(state(), facts(0)) == []
    assert refused(state(data="other"), facts(0)) == ["the set of pictures and captions"]


def test_batches_of_a_step():
    """On another number of processes a step keeps its samples; on the same number it was changed by a setting."""
    assert refused(state(stride=4), facts(0, stride=2)) == ["the number of batches in a step"]
    assert refused(state(stride=4, world_size=4), facts(0, stride=1)) == []
    assert stride_of(facts(stride=4, world_size=4), facts(stride=1)) == 4
    assert stride_of(facts(stride=4), facts(stride=1)) == 1


@pytest.mark.parametrize("argv, warmup_step, counts", [
    ("", 0, False), ("--lr_scheduler constant_with_warmup --lr_warmup_steps 5", 0, False), ("", 100, False), ("", 0.5, True),
    ("--lr_scheduler cosine", 0, True), ("--lr_scheduler constant_with_warmup --lr_warmup_steps 10%", 0, True),
])
def test_the_length_of_the_run(argv, warmup_step, counts):
    settings = {"dataset 1, subset 1: captions.warmup_step": str(warmup_step)}
    listed = refused(state(*argv.split(), data_settings=settings, total_steps=10),
                     facts(0, total_steps=20, data_settings=settings), read(*argv.split()))
    assert listed == (["the length of the run in steps"] if counts else [])


def test_settings_of_the_dataset_file(tmp_path):
    """Flat, without places, and complete: batch size and augmentations are in no flag."""
    from tests.unit.data_helpers import picture

    picture(tmp_path / "a" / "1.png")
    before = data_settings(scan_folder(tmp_path / "a").items.specs)
    now = data_settings(scan_folder(tmp_path / "a", more="batch_size = 2", subset="flip_aug = true").items.specs)
    assert before["dataset 1: batch_size"] == "1" and before["dataset 1, subset 1: captions.warmup_step"] == "0.0"
    assert not any(str(tmp_path) in text for text in before.values()) and all(isinstance(text, str) for text in now.values())
    assert refused(state(data_settings=before), facts(0, data_settings=now)) == [
        "dataset 1, subset 1: augment.flip", "dataset 1: batch_size"]


def test_versions():
    assert {"python", "torch", "diffusers"} <= versions().keys() and version_notes(versions()) == []
    assert version_notes({**versions(), "torch": "1.0"}) == [
        f"the state was written with torch 1.0; here it is {versions()['torch']}, so numbers may differ a little"]
