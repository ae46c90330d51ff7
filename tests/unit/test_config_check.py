"""Conflicts between settings: each is found, names its setting first, and the settings around it are accepted."""

import os
from pathlib import Path

import pytest

from flux_train import ENTRY
from library.config.check import check, problems
from library.config.parse import parse, to_toml
from library.errors import UserError

REQUIRED = ["--pretrained_model_name_or_path", "model.safetensors", "--dataset_config", "data.toml", "--output_dir", "out"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "data.toml", "prompts.txt"):
        Path(name).write_text("")
    Path("folder").mkdir()


def lines(*argv):
    config = parse(ENTRY, [*REQUIRED, *argv], {})
    try:
        check(config)
    except UserError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("argv, expected", [
    ("--ae nowhere/ae.safetensors", "--ae: no such file or folder: nowhere"),
    ("--dataset_config dat.toml", "did you mean 'data.toml'?"),
    ("--dataset_config folder", "--dataset_config: folder is a folder, not a file"),
    ("--pretrained_model_name_or_path modle.safetensors", "did you mean 'model.safetensors'?"),
    ("--sample_prompts none.txt --sample_at_first", "--sample_prompts: no such file"),
    ("--output_dir data.toml/out", "--output_dir: data.toml is a file, not a folder"),
    ("--output_name a/b", "--output_name: 'a/b' is not a file name"),
    ("--output_dir . --output_name model", "--output_name: the result would replace the model it starts from"),
    ("--full_bf16", "--full_bf16: needs bf16 arithmetic, not --mixed_precision no"),
    ("--full_bf16 --mixed_precision bf16 --weights_dtype fp32", "--weights_dtype: fp32 contradicts --full_bf16"),
    ("--weights_dtype bf16 --mixed_precision fp16", "--weights_dtype: bf16 weights need bf16 arithmetic"),
    ("--lr_warmup_steps 10", "--lr_warmup_steps: the constant schedule has no warm-up"),
    ("--lr_warmup_steps 1600 --lr_scheduler cosine", "--lr_warmup_steps: warm-up of 1600 steps fills the whole run"),
    ("--lr_warmup_steps 10 --lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:5,0.1",
     "--lr_warmup_steps: the piecewise constant schedule has no warm-up"),
    ("--lr_scheduler piecewise_constant", "--lr_scheduler_args: piecewise_constant needs its steps"),
    ("--lr_scheduler warmup_stable_decay", "--lr_decay_steps: warmup_stable_decay needs the length of its fall"),
    ("--lr_scheduler_type StepLR --lr_scheduler cosine", "--lr_scheduler_type: contradicts --lr_scheduler cosine"),
    ("--lr_scheduler_type StepLR --lr_warmup_steps 5", "--lr_warmup_steps: a scheduler class is not warmed up"),
    ("--lr_scheduler_args gamma=0.1", "--lr_scheduler_args: --lr_scheduler constant takes no such arguments"),
    ("--lr_scheduler_type StepLR --lr_scheduler_args gamma", "--lr_scheduler_args: 'gamma' is not name=value"),
    ("--use_8bit_adam --use_lion_optimizer", "--use_lion_optimizer: contradicts --use_8bit_adam"),
    ("--use_8bit_adam --optimizer_type Lion", "--use_8bit_adam: contradicts --optimizer_type Lion"),
    ("--optimizer_args weight_decay", "--optimizer_args: 'weight_decay' is not name=value"),
    ("--optimizer_args a=1 a=2", "--optimizer_args: a stands twice"),
    ("--min_timestep 500 --max_timestep 500", "--min_timestep: 500 leaves nothing below max_timestep 500"),
    ("--timestep_sampling uniform --discrete_flow_shift 3", "--discrete_flow_shift: 3 would have no effect"),
    ("--timestep_sampling flux_shift --discrete_flow_shift 2", "--discrete_flow_shift: 2 would have no effect"),
    ("--timestep_sampling uniform --sigmoid_scale 2", "--sigmoid_scale: 2 would have no effect"),
    ("--logit_mean 0.5", "--logit_mean: 0.5 would have no effect"),
    ("--timestep_sampling sigma --weighting_scheme mode --logit_std 2", "--logit_std: 2 would have no effect"),
    ("--timestep_sampling sigma --mode_scale 1", "--mode_scale: 1 would have no effect"),
    ("--weighting_scheme logit_normal", "--weighting_scheme: logit_normal is a density"),
    ("--weighting_scheme cosmap", "--weighting_scheme: cosmap is a weight of the loss"),
    ("--min_bucket_reso 512 --max_bucket_reso 256", "--min_bucket_reso: 512 is larger than max_bucket_reso 256"),
    ("--skip_cache_check --cache_check full", "--skip_cache_check: contradicts --cache_check full"),
    ("--dataset_config= --in_json folder", "--in_json: folder is a folder, not a file"),
    ("--dataset_config= --in_json prompt.txt", "--in_json: no such file or folder: prompt.txt; did you mean 'prompts.txt'?"),
    ("--dataset_config= --train_data_dir data.toml", "--train_data_dir: data.toml is a file, not a folder"),
    ("--dataset_config= --train_data_dir foldr", "--train_data_dir: no such file or folder: foldr; did you mean 'folder'?"),
    ("--dataset_config= --train_data_dir folder --reg_data_dir none", "--reg_data_dir: no such file or folder: none"),
    ("--dataset_config= --in_json data.toml --reg_data_dir folder", "--reg_data_dir: has no effect beside --in_json"),
    ("--dataset_class a.b.C", "--dataset_class: describes all pictures, and so does --dataset_config"),
    ("--dataset_config= --dataset_class a.b.C --conditioning_data_dir folder --masked_loss",
     "--dataset_class: describes all pictures, and so does --conditioning_data_dir"),
    ("--alpha_mask --masked_loss --conditioning_data_dir folder", "--alpha_mask: masks come from transparency or from pictures"),
    ("--conditioning_data_dir folder", "--conditioning_data_dir: mask pictures are not used without --masked_loss"),
    ("--masked_loss --conditioning_data_dir nowhere", "--conditioning_data_dir: no such file or folder"),
    ("--caption_extension .txt --caption_extention .cap", "--caption_extention: contradicts --caption_extension"),
    ("--dataset_config= --train_data_dir folder --validate_every_n_steps 5",
     "--validate_every_n_steps: there is nothing to validate on; add --validation_split 0.1"),
    ("--save_model_as ckpt", "--save_model_as: this model is not saved as ckpt; use --save_model_as safetensors"),
    ("--save_model_as diffusers", "--save_model_as: this model is not saved as diffusers; use"),
    ("--save_last_n_steps 5", "--save_last_n_steps: there is nothing to keep without --save_every_n_steps"),
    ("--save_last_n_epochs 5", "--save_last_n_epochs: there is nothing to keep"),
    ("--save_n_epoch_ratio 4 --save_every_n_epochs 1", "--save_n_epoch_ratio: contradicts"),
    ("--sample_every_n_steps 5", "--sample_every_n_steps: there is nothing to draw; add --sample_prompts FILE"),
    ("--sample_at_first", "--sample_at_first: there is nothing to draw"),
    ("--log_with tensorboard", "--log_with: TensorBoard needs a folder"),
    ("--log_with mlflow", "--log_with: the package mlflow is not installed; run `pip install mlflow`"),
    ("--log_config", "--log_config: would have no effect without a tracker"),
    ("--log_prefix x", "--log_prefix: would have no effect without a tracker"),
    ("--async_save", "--async_save: no file is written during training; add --save_every_n_steps N"),
    ("--huggingface_repo_type dataset", "--huggingface_repo_type: nothing is uploaded without --huggingface_repo_id"),
    ("--async_upload", "--async_upload: nothing is uploaded without --huggingface_repo_id"),
    ("--huggingface_repo_id a/b/c", "--huggingface_repo_id: 'a/b/c' is not the name of a repository"),
    ("--huggingface_repo_id https://huggingface.co/a/b", "is not the name of a repository; write OWNER/NAME"),
    ("--wandb_run_name x", "--wandb_run_name: would have no effect without wandb"),
    ("--model_type chroma", "--model_type: not built yet: Chroma"),
])
def test_conflict(argv, expected):
    (line,) = lines(*argv.split())
    assert expected in line and "; " in line


def test_no_upload_from_a_machine_that_is_told_to_stay_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (line,) = lines("--huggingface_repo_id", "me/x")
    assert "--huggingface_repo_id: nothing can be uploaded with HF_HUB_OFFLINE set" in line


@pytest.mark.parametrize("argv", [
    "", "--output_dir new/deeper/out", "--pretrained_model_name_or_path folder", "--ae model.safetensors",
    "--full_bf16 --mixed_precision bf16", "--weights_dtype bf16 --mixed_precision bf16", "--mixed_precision fp16",
    "--lr_warmup_steps 10 --lr_scheduler constant_with_warmup", "--lr_warmup_steps 0.1 --lr_scheduler linear --max_train_steps 1",
    "--lr_warmup_steps 5000 --lr_scheduler linear --max_train_epochs 9", "--timestep_sampling uniform",
    "--timestep_sampling sigma --discrete_flow_shift 2", "--timestep_sampling sigma --weighting_scheme mode --mode_scale 1",
    "--timestep_sampling sigma --weighting_scheme logit_normal --logit_mean 1", "--weighting_scheme none",
    "--model_prediction_type sigma_scaled --weighting_scheme sigma_sqrt", "--min_timestep 0 --max_timestep 1",
    "--save_every_n_steps 5 --save_last_n_steps 10", "--save_n_epoch_ratio 4 --save_last_n_epochs 2",
    "--sample_prompts prompts.txt --sample_every_n_steps 5", "--logging_dir logs",
    "--cache_dir c --cache_latents_to_disk", "--cache_dir c", "--skip_cache_check", "--cache_check full",
    "--dataset_config= --train_data_dir folder --reg_data_dir folder", "--dataset_config= --dataset_class a.b.C",
    "--dataset_config= --in_json data.toml --train_data_dir folder", "--train_data_dir nowhere", "--validate_every_n_steps 5",
    "--dataset_config= --train_data_dir folder --validate_every_n_epochs 5 --validation_split 0.1", "--caption_extention .cap",
    "--masked_loss --conditioning_data_dir folder", "--alpha_mask",
    "--save_every_n_steps 5 --async_save", "--save_n_epoch_ratio 5 --async_save", "--logging_dir logs --log_config --log_prefix x",
    "--huggingface_repo_id me/x --async_upload", "--huggingface_repo_id my-model_1.0",
    "--sample_every_n_steps 0", "--optimizer_args betas=(0.9,0.99) weight_decay=1e-2",
])
def test_no_conflict(argv, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert lines(*argv.split()) == ()


def test_all_conflicts_at_once_with_the_line_of_the_file():
    Path("train.toml").write_text('full_bf16 = true\nsave_model_as = "ckpt"\n')
    found = lines("--config_file", "train.toml", "--sample_at_first", "--ae", "nowhere")
    assert len(found) == 4
    assert any(line.startswith("train.toml:1: full_bf16:") for line in found)
    assert any(line.startswith("train.toml:2: save_model_as:") for line in found)


def test_a_path_that_stands_beside_the_configuration_file():
    Path("folder/data2.toml").write_text("")
    Path("folder/train.toml").write_text("dataset_config = 'data2.toml'\n")
    config = parse(ENTRY, ["--config_file", "folder/train.toml", *REQUIRED[:2], *REQUIRED[4:]], {})
    with pytest.raises(UserError) as caught:
        check(config)
    (line,) = caught.value.problems
    assert line.startswith("folder/train.toml:1: dataset_config: no such file or folder: data2.toml; paths in this file are looked up")
    assert line.endswith("write folder/data2.toml, or start there")


def test_the_nearest_name_is_one_of_the_same_kind():
    Path("log_data2.txt").write_text("")
    (line,) = lines("--dataset_config", "data2.toml")
    assert line.endswith("did you mean 'data.toml'?")


def test_nothing_given():
    with pytest.raises(UserError) as caught:
        check(parse(ENTRY, [], {}))
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "--pretrained_model_name_or_path", "--output_dir", "--dataset_config"]


@pytest.mark.skipif(os.name == "nt", reason="folders have no such permission there")
def test_output_folder_without_write_access(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    (line,) = lines()
    assert line.startswith("--output_dir:") and "not writable" in line


def test_wandb_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = lines("--log_with", "wandb", "--wandb_run_name", "x")
    assert "pip install wandb" in line


@pytest.mark.parametrize("argv", ["--timestep_sampling flux_shift", "--timestep_sampling uniform", "--timestep_sampling sigma"])
def test_a_saved_configuration_has_no_conflicts(argv):
    """All values stand in it, also those that have no effect: they are the defaults, so nobody asked for them."""
    config = parse(ENTRY, [*REQUIRED, *argv.split()], {})
    Path("saved.toml").write_text(to_toml(config))
    assert problems(parse(ENTRY, ["--config_file", "saved.toml"], {})) == []


def test_no_description_of_the_data():
    found = lines("--dataset_config=", "--reg_data_dir", "folder")
    assert found == ("--dataset_config: is required; add --dataset_config FILE, or --train_data_dir DIR",
                     "--reg_data_dir: there are no pictures to learn; add --train_data_dir DIR")


def test_remarks_about_old_names():
    notes = parse(ENTRY, [*REQUIRED, "--caption_extention", ".cap", "--skip_latents_validity_check"], {}).notes
    assert notes == ("--caption_extention is taken for --caption_extension",
                     "cached files are trusted without a look at the pictures, as --cache_check none does")


def test_remarks():
    config = parse(ENTRY, [*REQUIRED, "--max_train_epochs", "2", "--max_train_steps", "5", "--sample_prompts", "prompts.txt"], {})
    check(config)
    assert len(config.notes) == 2
    assert config.notes[0].startswith("--max_train_epochs 2 overrules max_train_steps")
    assert config.notes[1].startswith("--sample_prompts has no effect")
    alone = parse(ENTRY, [*REQUIRED, "--sample_batch_size", "4"], {})
    check(alone)
    assert alone.notes == ("--sample_batch_size has no effect: there is no --sample_prompts",)


def test_a_hub_id_is_left_to_the_search_for_files():
    assert not lines("--pretrained_model_name_or_path", "some-org/some-model.1")
    assert lines("--pretrained_model_name_or_path", "some-folder/some-model.safetensors")


@pytest.mark.parametrize("argv, expected", [
    ("--lr_scheduler_num_cycles 3", "--lr_scheduler_num_cycles has no effect with the schedule constant: read by cosine_with_restarts"),
    ("--lr_scheduler_power 2 --lr_scheduler cosine", "--lr_scheduler_power has no effect with the schedule cosine: read by polynomial"),
    ("--lr_scheduler_timescale 9 --lr_scheduler_type StepLR", "--lr_scheduler_timescale has no effect with the schedule StepLR"),
    ("--use_8bit_adam", "--use_8bit_adam is taken for --optimizer_type AdamW8bit"),
    ("--use_lion_optimizer --optimizer_type Lion", "--use_lion_optimizer is taken for --optimizer_type Lion"),
])
def test_settings_of_other_schedules_and_old_names_are_named(argv, expected):
    (note,) = parse(ENTRY, [*REQUIRED, *argv.split()], {}).notes
    assert note.startswith(expected)


@pytest.mark.parametrize("argv", [
    "--lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3", "--lr_scheduler polynomial --lr_scheduler_power 2",
    "--lr_scheduler warmup_stable_decay --lr_decay_steps 20% --lr_scheduler_min_lr_ratio 0.1",
    "--lr_scheduler inverse_sqrt --lr_scheduler_timescale 500 --lr_warmup_steps 100", "--lr_scheduler_num_cycles 1",
])
def test_settings_that_the_schedule_reads_pass_in_silence(argv):
    assert lines(*argv.split()) == () and parse(ENTRY, [*REQUIRED, *argv.split()], {}).notes == ()


def test_old_names_of_optimizers():
    chosen = [parse(ENTRY, [*REQUIRED, *argv.split()], {}).optimizer.chosen_type
              for argv in ("", "--use_8bit_adam", "--use_lion_optimizer", "--optimizer_type Adafactor")]
    assert chosen == ["AdamW", "AdamW8bit", "Lion", "Adafactor"]
