"""sdxl_train.py as people use it: kinds of files, objectives, encoders on several processes, and mistakes only it can see."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import ROOT, environment, run_all, run_script, with_flag
from tests.cli.runs import header
from tests.contract.conftest import dataset_file, losses, make_pictures
from tests.tiny import make_flux_files
from tests.tiny_sdxl import UNET, make_sdxl_files

SCRIPT = "sdxl_train.py"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return make_sdxl_files(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def flags(sdxl, dataset, tmp_path) -> list[str]:
    return ["--pretrained_model_name_or_path", str(sdxl.checkpoint), "--dataset_config", str(dataset), "--output_dir",
            str(tmp_path / "out"), "--max_train_steps", "2", "--learning_rate", "1e-3", "--console_log_level", "WARNING"]


def succeed(*commands):
    done = run_all(*commands, script=SCRIPT)
    assert [one.status for one in done] == [0] * len(done), "\n".join(one.text for one in done)
    return done


def test_every_format_holds_the_same_weights_and_can_be_trained_on(flags, tmp_path):
    """One run saved in four ways; each result is the start of a run that changes nothing and saves one file."""
    formats = {"safetensors": "last.safetensors", "ckpt": "last.ckpt", "diffusers": "last", "diffusers_safetensors": "last"}
    succeed(*([*with_flag(flags, "output_dir", tmp_path / kind), "--save_model_as", kind, "--train_text_encoder"] for kind in formats))
    still = [*with_flag(with_flag(flags, "max_train_steps", 1), "learning_rate", 0), "--optimizer_args", "weight_decay=0",
             "--save_model_as", "safetensors"]
    beside = ["--tokenizer_cache_dir", str(Path(flags[1]).parent)]
    again = [with_flag(with_flag(still, "output_dir", tmp_path / "again" / kind), "pretrained_model_name_or_path", tmp_path / kind / name)
             + ([] if kind.startswith("diffusers") else beside) for kind, name in formats.items()]
    succeed(*again)
    first = load_file(tmp_path / "safetensors" / "last.safetensors")
    assert not torch.equal(first[f"{UNET}out.2.weight"], load_file(flags[1])[f"{UNET}out.2.weight"])
    for kind in formats:
        other = load_file(tmp_path / "again" / kind / "last.safetensors")
        assert all(torch.equal(tensor, first[name]) for name, tensor in other.items()), kind
        assert set(first) - set(other) <= {name for name in first if "position_ids" in name or "logit_scale" in name}


def test_a_folder_comes_back_as_a_folder_that_diffusers_opens(flags, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    succeed([*flags, "--save_model_as", "diffusers_safetensors", "--v_parameterization"])
    done = succeed([*with_flag(with_flag(flags, "pretrained_model_name_or_path", tmp_path / "out" / "last"), "output_dir", tmp_path / "two"),
                    "--save_every_n_steps", "1", "--save_last_n_steps", "0"])
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_dir()) == ["last", "last-step00000001", "last-step00000002"], done
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "two" / "last", local_files_only=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"  # as the folder said
    picture = pipeline("a red box", num_inference_steps=2, width=64, height=64, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)


def test_a_velocity_checkpoint_is_known_by_its_marks(flags, tmp_path):
    marked = make_sdxl_files(tmp_path / "marked", ("v_pred", "ztsnr"))
    succeed(with_flag(flags, "pretrained_model_name_or_path", marked.checkpoint),
            [*with_flag(flags, "output_dir", tmp_path / "flags"), "--v_parameterization", "--zero_terminal_snr"])
    names, _, metadata = header(tmp_path / "out" / "last.safetensors")
    assert {"v_pred", "ztsnr"} <= set(names) and metadata["modelspec.prediction_type"] == "v"
    assert {"v_pred", "ztsnr"} <= set(header(tmp_path / "flags" / "last.safetensors")[0])
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "flags"), rel=1e-6)


def test_settings_of_the_objective_change_the_training(flags, tmp_path):
    kinds = ["", "--v_parameterization", "--min_snr_gamma 0.05", "--noise_offset 0.1", "--multires_noise_iterations 4",
             "--ip_noise_gamma 0.2", "--min_timestep 300 --max_timestep 400", "--loss_type huber --huber_schedule exponential",
             "--max_token_length 150"]  # what each of all the settings does: tests/unit/test_objectives_ddpm.py
    succeed(*([*with_flag(flags, "output_dir", tmp_path / str(index)), *kind.split()] for index, kind in enumerate(kinds)))
    curves = [tuple(losses(tmp_path / str(index))) for index in range(len(kinds))]
    assert len(set(curves)) == len(kinds), [kind for index, kind in enumerate(kinds) if curves.index(curves[index]) != index]


def test_block_rates_and_the_samplers_of_previews(flags, tmp_path):
    (tmp_path / "prompts.txt").write_text("a box --w 64 --h 64 --s 2 --d 1\na box --w 64 --h 64 --s 2 --d 1 --ss k_euler_a\n")
    rates = ",".join(["0"] * 10 + ["1e-3"] * 3 + ["0"] * 10)
    (done,) = succeed([*with_flag(flags, "console_log_level", "INFO"), "--block_lr", rates, "--sample_prompts", str(tmp_path / "prompts.txt"),
                       "--sample_every_n_steps", "2", "--sample_sampler", "dpmsolver++"])
    assert "training unet block 10: " in done.text and "training unet block 9: " not in done.text
    before, after = load_file(flags[1]), load_file(tmp_path / "out" / "last.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(f"{UNET}middle_block.")}
    first, second = sorted((tmp_path / "out" / "sample").glob("last_0*.png"))
    assert first.read_bytes() != second.read_bytes()


def test_two_processes_train_encoders_as_one_that_accumulates(flags, tmp_path):
    three = dataset_file(tmp_path / "three.toml", make_pictures(tmp_path / "three", 3), batch_size=1)
    command = [*with_flag(with_flag(flags, "max_train_steps", 4), "dataset_config", three), "--train_text_encoder", "--learning_rate_te1", "1e-4",
               "--gradient_checkpointing"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
                              SCRIPT, *with_flag(command, "output_dir", tmp_path / "two")],
                             cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert several.returncode == 0, several.stderr[-3000:]
    succeed([*with_flag(command, "output_dir", tmp_path / "one"), "--gradient_accumulation_steps", "2"])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)


class Payload:
    """What a malicious checkpoint would run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the checkpoint was run')",)


def test_mistakes(flags, sdxl, tmp_path):
    """Each is told before training, in lines that name what to change; nothing is left behind."""
    flux = make_flux_files(tmp_path / "flux")
    evil, inpainting, other_vae = tmp_path / "evil.ckpt", tmp_path / "inpainting.safetensors", tmp_path / "flux" / "ae.safetensors"
    torch.save({"state_dict": {"x": torch.zeros(2)}, "more": Payload()}, evil, pickle_module=pickle)
    tensors = load_file(sdxl.checkpoint)
    name = f"{UNET}input_blocks.0.0.weight"
    save_file(tensors | {name: torch.zeros(tensors[name].shape[0], 9, 3, 3)}, inpainting)
    model = "pretrained_model_name_or_path"
    (tmp_path / "prompts.txt").write_text("a box --ss eulr\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "busy").mkdir()
    (tmp_path / "folder" / "vae").mkdir(parents=True)
    (tmp_path / "folder" / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    mistakes = [
        (with_flag(flags, model, tmp_path / "folder"), [f"--{model}", "StableDiffusion3Pipeline", "without the folder unet", "download"]),
        (with_flag(flags, model, flux.checkpoint), ["flux1-dev.safetensors", "flux_train.py"]),
        (with_flag(flags, model, evil), ["evil.ckpt", "safetensors"]),
        (with_flag(flags, model, inpainting), ["inpainting"]),
        (with_flag(flags, model, sdxl.checkpoint.with_name("sd_xl_tiny.safetensor")), ["sd_xl_tiny.safetensors"]),
        ([*flags, "--vae", str(other_vae)], ["--vae", "16"]),
        ([*flags, "--block_lr", "1e-5,1e-5"], ["--block_lr", "23"]),
        ([*flags, "--learning_rate_te1", "1e-5"], ["--learning_rate_te1", "--train_text_encoder"]),
        ([*flags, "--train_text_encoder", "--cache_text_encoder_outputs"], ["--cache_text_encoder_outputs", "--learning_rate_te1 0"]),
        ([*flags, "--scale_v_pred_loss_like_noise_pred"], ["--v_parameterization"]),
        ([*flags, "--max_token_length", "77"], ["--max_token_length", "75, 150 or 225"]),
        ([*flags, "--sample_sampler", "eulr"], ["--sample_sampler", "'euler'"]),
        ([*flags, "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first"], ["prompts.txt:1", "eulr", "euler"]),
        ([*flags, "--save_model_as", "diffusers", "--output_name", "busy"], ["busy", "--output_name"]),
        ([*flags, "--huber_c", "0.2"], ["--huber_c", "--loss_type"]),
        ([*flags, "--ae", str(flux.ae)], ["--ae", "another kind of model"]),
        (with_flag(flags, "output_dir", sdxl.folder) + ["--output_name", "sd_xl_tiny"], ["replace the model", "--output_name"]),
    ]
    before = sdxl.checkpoint.read_bytes()
    for (command, words), done in zip(mistakes, run_all(*(command for command, _ in mistakes), script=SCRIPT), strict=True):
        assert done.status == 2 and done.errors and "Traceback" not in done.text, (command, done.text)
        assert all(word in "\n".join(done.errors) for word in words), (words, done.errors)
    assert sdxl.checkpoint.read_bytes() == before and sorted(path.name for path in (tmp_path / "out").iterdir()) == ["busy"]


def test_a_checkpoint_of_this_model_in_the_script_of_another(sdxl, dataset, tmp_path):
    done = run_script("--pretrained_model_name_or_path", sdxl.checkpoint, "--dataset_config", dataset, "--output_dir", tmp_path / "out")
    assert done.status == 2 and "SDXL" in done.text and "sdxl_train.py" in done.text
