"""Whole runs, started as users start them: under the launcher, from a configuration file, with caches, previews and logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.cli.conftest import run_all, with_flag
from tests.cli.runs import checkpoints, column, header, launch, launcher
from tests.contract.conftest import dataset_file, losses, make_pictures
from tests.tiny import make_flux_files

SHORT = ("--t5xxl_max_token_length", "16")


def worked(*runs) -> None:
    for done in runs:
        assert done.status == 0 and "Traceback" not in done.text, done.text


def test_accelerate_launch_decides_the_precision_and_paths_may_have_any_letters(tmp_path):
    """Folders with blanks, umlauts and other scripts, for every path there is."""
    folder = tmp_path / "Größe 日本語 & more"
    files = make_flux_files(folder / "my models")
    data = dataset_file(folder / "data set.toml", make_pictures(folder / "фото mit Leerzeichen", 2))
    (folder / "prömpts.txt").write_text("ein rotes Kästchen 箱 --w 32 --h 32 --s 1\n", encoding="utf-8")
    out = folder / "das Ergebnis"
    worked(launch(launcher("bf16"), "--pretrained_model_name_or_path", files.checkpoint, "--dataset_config", data,
                  "--output_dir", out, "--output_name", "größer 2", "--max_train_steps", 1, "--cache_latents_to_disk",
                  "--cache_text_encoder_outputs", "--logging_dir", folder / "logs ü", "--sample_prompts", folder / "prömpts.txt",
                  "--sample_every_n_steps", 1, *SHORT))
    assert checkpoints(out) == ["größer 2.safetensors"]
    shapes, dtypes, metadata = header(out / "größer 2.safetensors")
    assert dtypes == {"BF16"} and shapes == header(files.checkpoint)[0]
    assert metadata["modelspec.title"] == "größer 2" and metadata["modelspec.architecture"] == "flux-1-dev"
    assert 'mixed_precision = "bf16"' in (out / "größer 2_config.toml").read_text(encoding="utf-8")
    assert len(list((folder / "фото mit Leerzeichen" / ".kiln_cache").rglob("*.safetensors"))) == 2
    assert (out / "sample" / "größer 2_000001_00_1000.png").is_file() and list((folder / "logs ü").rglob("events.out.*"))


@pytest.fixture(scope="module")
def launched(files, pictures, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run under ``accelerate launch`` in float32 with all that a run can leave behind, and its flags without the folders."""
    folder = tmp_path_factory.mktemp("launched")
    prompts = [{"prompt": "a red box", "width": 48, "height": 32, "sample_steps": 1, "seed": 7}, "a blue box --w 32 --h 64 --s 2"]
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    data = dataset_file(folder / "data.toml", pictures)
    flags = ["--pretrained_model_name_or_path", str(files.checkpoint), "--dataset_config", str(data),
             "--max_train_steps", "4", "--cache_latents", "--cache_text_encoder_outputs", "--learning_rate", "1e-3", *SHORT]
    done = launch(launcher("no"), *flags, "--output_dir", folder / "out", "--logging_dir", folder / "logs", "--log_config",
                  "--sample_prompts", folder / "prompts.json", "--sample_every_n_steps", 2, "--sample_at_first")
    worked(done)
    return folder, flags


def test_tensorboard_csv_and_loss_curve(launched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = launched
    (events,) = (folder / "logs").rglob("events.out.*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    assert [point.step for point in curves.Scalars("loss/step")] == [1, 2, 3, 4]
    assert [point.value for point in curves.Scalars("loss/step")] == pytest.approx(losses(folder / "out"), rel=1e-6)
    assert column(folder / "out", "step") == [1, 2, 3, 4] and column(folder / "out", "epoch") == [1, 1, 2, 2]
    assert column(folder / "out", "learning_rate") == [1e-3] * 4 and all(norm > 0 for norm in column(folder / "out", "grad_norm"))
    assert all(value > 0 for name in ("seconds", "images_per_second", "peak_bytes") for value in column(folder / "out", name))
    with Image.open(folder / "out" / "last_loss.png") as curve:
        assert curve.format == "PNG" and min(curve.size) > 300


def test_previews_and_their_sheet(launched):
    folder = launched[0] / "out" / "sample"
    names = [f"last_{step:06d}_{index:02d}_{seed}.png" for step in (0, 2, 4) for index, seed in ((0, 7), (1, 1001))]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "last_contact_sheet.png"])
    for name in names:
        with Image.open(folder / name) as picture:
            assert picture.size == ((48, 32) if "_00_" in name else (32, 64)), name
    first, last = (Image.open(folder / f"last_00000{step}_00_7.png").tobytes() for step in (0, 4))
    assert first != last  # the model has changed
    with Image.open(folder / "last_contact_sheet.png") as sheet:
        assert sheet.size[0] > 3 * 128 and sheet.size[1] > 2 * 128


def test_plain_python_and_configuration_files_repeat_a_launched_run(launched, tmp_path):
    """All settings from a TOML file, the command line over it; then once more from the configuration that run saved."""
    folder, flags = launched
    values = {"pretrained_model_name_or_path": flags[1], "dataset_config": flags[3], "learning_rate": 1e-3, "cache_latents": True,
              "cache_text_encoder_outputs": True, "t5xxl_max_token_length": 16, "max_train_steps": 99, "output_name": "from_file"}
    prompts = tmp_path / "prompts.toml"
    prompts.write_text('[prompt]\nwidth = 32\nheight = 32\nsample_steps = 1\n[[prompt.subset]]\nprompt = "a red box"\n'
                       '[[prompt.subset]]\nprompt = "a blue box"\nseed = 5\nwidth = 64\n', encoding="utf-8")
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    lines = ["[any_section]", *lines, "[other]", f"sample_prompts = {json.dumps(str(prompts))}", "sample_every_n_epochs = 2"]
    (tmp_path / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    first = ["--config_file", tmp_path / "run", "--max_train_steps", 4, "--output_dir", tmp_path / "one"]
    saved = tmp_path / "one" / "from_file_config.toml"
    again = ["--config_file", saved, "--output_dir", tmp_path / "two", "--output_name", "again"]
    worked(*run_all(first, again))
    assert losses(tmp_path / "one", "from_file") == losses(tmp_path / "two", "again") == losses(folder / "out")
    three = (folder / "out" / "last.safetensors",
             tmp_path / "one" / "from_file.safetensors", tmp_path / "two" / "again.safetensors")
    weights, *others = (load_file(path) for path in three)
    assert all(torch.equal(other[name], weights[name]) for other in others for name in weights)
    assert sorted(path.name for path in (tmp_path / "two" / "sample").iterdir()) == [
        "again_000004_00_1000.png", "again_000004_01_5.png", "again_contact_sheet.png"]
    with Image.open(tmp_path / "two" / "sample" / "again_000004_01_5.png") as picture:
        assert picture.size == (64, 32)


def test_names_retention_and_precision_of_saved_files(base, tmp_path):
    """Two steps are an epoch."""
    base = with_flag(base, "max_train_steps", 8)
    steps = [*base, *SHORT, "--save_every_n_steps", 2, "--save_last_n_steps", 2,
             "--save_every_n_epochs", 1, "--save_last_n_epochs", 2]
    ratio = [*with_flag(base, "output_name", "b"), *SHORT, "--save_n_epoch_ratio", 2, "--save_precision", "fp16", "--no_metadata"]
    length = [*with_flag(base, "output_name", "c"), *SHORT, "--max_train_epochs", 2, "--mixed_precision", "bf16",
              "--save_precision", "float"]
    worked(*run_all(steps, ratio, length))
    out = tmp_path / "out"
    assert checkpoints(out) == sorted([
        "last-step00000006.safetensors", "last-step00000008.safetensors", "last-000002.safetensors", "last-000003.safetensors",
        "last.safetensors", "b-000002.safetensors", "b.safetensors", "c.safetensors"])
    kinds = {name: header(out / f"{name}.safetensors")[1] for name in ("last", "b-000002", "c")}
    assert kinds == {"last": {"F32"}, "b-000002": {"F16"}, "c": {"F32"}}
    assert header(out / "b.safetensors")[2] == {} and header(out / "last-000003.safetensors")[2]["ss_steps"] == "6"
    assert column(out, "epoch", "c") == [1, 1, 2, 2]
    third, final = load_file(out / "last-000003.safetensors"), load_file(out / "last.safetensors")
    assert any(not torch.equal(third[name], final[name]) for name in final)


def test_optimizers_and_schedules(base, tmp_path):
    base = [*with_flag(with_flag(base, "max_train_steps", 10), "learning_rate", "1e-3"), *SHORT]
    flags = {
        "adamw": ["--optimizer_type", "adamw", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 4],
        "adamw8bit": ["--optimizer_type", "AdamW8bit", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20%",
                      "--mixed_precision", "bf16", "--full_bf16"],
        "adafactor": ["--optimizer_type", "Adafactor", "--lr_scheduler", "linear", "--lr_warmup_steps", 0.5,
                      "--gradient_checkpointing", "--gradient_accumulation_steps", 2,
                      "--optimizer_args", "clip_threshold=0.5", "weight_decay=0.01"],
    }
    worked(*run_all(*([*base, "--output_name", name, *more] for name, more in flags.items())))
    rates = {name: [rate / 1e-3 for rate in column(tmp_path / "out", "learning_rate", name)] for name in flags}
    assert all(len(course) == 10 and max(course) <= 1 for course in rates.values())
    assert rates["adamw"][:4] == sorted(rates["adamw"][:4]) and rates["adamw"][4:] == [1] * 6
    assert rates["adamw8bit"][2] == pytest.approx(1, abs=0.1)
    assert rates["adamw8bit"][2:] == sorted(rates["adamw8bit"][2:], reverse=True) and rates["adamw8bit"][-1] < 0.2
    assert max(rates["adafactor"]) == rates["adafactor"][5] == pytest.approx(1) and rates["adafactor"][-1] < 0.3
    for name in flags:
        course = losses(tmp_path / "out", name)
        assert sum(course[-4:]) < sum(course[:4]), (name, course)
    assert header(tmp_path / "out" / "adamw8bit.safetensors")[1] == {"BF16"}
    assert column(tmp_path / "out", "epoch", "adafactor") == list(range(1, 11))  # two micro-batches are a step and an epoch
