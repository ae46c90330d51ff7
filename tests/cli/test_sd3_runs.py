"""sd3_train.py as people use it: parts that train and parts that are cached, features that act at random, mistakes only it can see."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import run_all, run_script, with_flag
from tests.cli.runs import header
from tests.contract.conftest import losses
from tests.tiny_sd3 import DEPTH, MMDIT, make_sd3_files
from tests.tiny_sdxl import make_sdxl_files

SCRIPT = "sd3_train.py"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return make_sd3_files(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def flags(sd3, dataset, tmp_path) -> list[str]:
    return ["--pretrained_model_name_or_path", str(sd3.checkpoint), "--dataset_config", str(dataset), "--output_dir",
            str(tmp_path / "out"), "--max_train_steps", "2", "--learning_rate", "1e-3", "--console_log_level", "WARNING"]


def succeed(*commands):
    done = run_all(*commands, script=SCRIPT)
    assert [one.status for one in done] == [0] * len(done), "\n".join(one.text for one in done)
    return done


def moved(before, after):
    first, second = load_file(str(before)), load_file(str(after))
    return {name for name in first if not torch.equal(first[name].to(second[name].dtype), second[name])}


def test_clips_train_while_t5_is_cached_and_are_saved_beside(flags, sd3, tmp_path):
    command = [*flags, "--train_text_encoder", "--learning_rate_te2", "0", "--save_precision", "fp16",
               "--num_last_block_to_freeze", "1"]
    cached = ["--use_t5xxl_cache_only", "--cache_text_encoder_outputs", "--cache_latents"]
    succeed(command, [*with_flag(command, "output_dir", tmp_path / "cached"), *cached])
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "out"), rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["last.safetensors", "last_clip_l.safetensors"]
    assert header(tmp_path / "out/last_clip_l.safetensors")[1] == {"F16"}
    changed = moved(sd3.checkpoint, tmp_path / "out/last.safetensors")
    before = load_file(str(sd3.checkpoint))
    after = load_file(str(tmp_path / "out/last.safetensors"))
    last = f"{MMDIT}joint_blocks.{DEPTH - 1}."
    assert all(torch.equal(before[name].half(), after[name]) for name in before if name.startswith(last))
    assert any(name.startswith(f"{MMDIT}joint_blocks.0.") for name in changed)


def test_masks_act_alike_online_and_cached(flags, tmp_path):
    masks = ["--apply_lg_attn_mask", "--apply_t5_attn_mask"]
    runs = {"plain": [], "online": masks, "cached": [*masks, "--cache_text_encoder_outputs"],
            "disk": [*masks, "--cache_text_encoder_outputs_to_disk", "--cache_dir", str(tmp_path / "cache")]}
    succeed(*([*with_flag(flags, "output_dir", tmp_path / name), *more] for name, more in runs.items()))
    found = {name: losses(tmp_path / name) for name in runs}
    assert found["online"] == pytest.approx(found["cached"], rel=1e-6) and found["online"] == pytest.approx(found["disk"], rel=1e-6)
    assert found["online"] != pytest.approx(found["plain"], rel=1e-3)


def test_what_acts_at_random_is_repeated_by_the_seed(flags, tmp_path):
    more = ["--clip_l_dropout_rate", "0.5", "--t5_dropout_rate", "0.5", "--pos_emb_random_crop_rate", "0.5", "--max_train_steps", "4"]
    runs = {"a": more, "b": [*more, "--cache_text_encoder_outputs"], "c": more[-2:]}
    succeed(*([*with_flag(flags, "output_dir", tmp_path / name), *extra] for name, extra in runs.items()))
    found = {name: losses(tmp_path / name) for name in runs}
    assert found["a"] == pytest.approx(found["b"], rel=1e-6) and found["a"] != found["c"]


def test_mistakes(flags, sd3, tmp_path):
    """Each is told before training, in lines that name what to change."""
    sdxl = make_sdxl_files(tmp_path / "sdxl")
    model, part = "pretrained_model_name_or_path", tmp_path / "part.safetensors"
    tensors = load_file(str(sd3.checkpoint))
    save_file({name: tensor for name, tensor in tensors.items() if "pos_embed" not in name}, str(part))
    mistakes = [
        (with_flag(flags, model, sdxl.checkpoint), ["SDXL", "sdxl_train.py"]),
        (with_flag(flags, model, part), ["lacks pos_embed"]),
        ([*flags, "--t5xxl", str(sd3.encoders["clip_l"])], ["--t5xxl", "is not the T5-XXL text encoder", "CLIP"]),
        ([*flags, "--clip_g", "clip_g.safetensors"], ["--clip_g", "no such file"]),
        ([*flags, "--num_last_block_to_freeze", str(DEPTH + 1)], ["--num_last_block_to_freeze", f"up to {DEPTH}"]),
        ([*flags, "--train_text_encoder", "--train_t5xxl", "--cache_text_encoder_outputs"], ["nothing to cache"]),
        ([*flags, "--use_t5xxl_cache_only"], ["--cache_text_encoder_outputs"]),
        ([*flags, "--learning_rate_te3", "1e-5"], ["--learning_rate_te3", "--train_t5xxl"]),
        ([*flags, "--t5xxl_device", "gpu0"], ["--t5xxl_device", "cuda"]),
        ([*flags, "--blocks_to_swap", "10"], ["--blocks_to_swap", "at most"]),
        ([*flags, "--guidance_scale", "3.5"], ["--guidance_scale", "another kind of model"]),
        ([*flags, "--clip_l", "none", "--clip_g", "none", "--t5xxl", "none"], ["no text encoder is left"]),
        (with_flag(flags, "output_dir", sd3.folder) + ["--output_name", sd3.checkpoint.stem], ["--output_name"]),
    ]
    before = sd3.checkpoint.read_bytes()
    for (command, words), done in zip(mistakes, run_all(*(command for command, _ in mistakes), script=SCRIPT), strict=True):
        assert done.status == 2 and done.errors and "Traceback" not in done.text, (command, done.text)
        assert all(word in "\n".join(done.errors) for word in words), (words, done.errors)
    assert sd3.checkpoint.read_bytes() == before and not (tmp_path / "out").exists()


def test_a_checkpoint_of_this_model_in_the_script_of_another(sd3, dataset, tmp_path):
    done = run_script("--pretrained_model_name_or_path", sd3.checkpoint, "--dataset_config", dataset, "--output_dir", tmp_path / "out")
    assert done.status == 2 and "SD3" in done.text and "sd3_train.py" in done.text
