"""lumina_train.py as people use it: both families, kinds of files, attention, and mistakes only it can see."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import run_all, with_flag
from tests.cli.runs import column, header
from tests.tiny_lumina import make_all_in_one, make_image_2_files, make_next_files

SCRIPT = "lumina_train.py"


@pytest.fixture(scope="module")
def image_2(tmp_path_factory):
    return make_image_2_files(tmp_path_factory.mktemp("image_2"))


@pytest.fixture(scope="module")
def next_files(tmp_path_factory):
    return make_next_files(tmp_path_factory.mktemp("next"))


@pytest.fixture
def flags(image_2, dataset, tmp_path) -> list[str]:
    return ["--pretrained_model_name_or_path", str(image_2.checkpoint), "--dataset_config", str(dataset), "--output_dir",
            str(tmp_path / "out"), "--max_train_steps", "2", "--learning_rate", "1e-3", "--console_log_level", "WARNING"]


def succeed(*commands):
    done = run_all(*commands, script=SCRIPT)
    assert [one.status for one in done] == [0] * len(done), "\n".join(one.text for one in done)
    return done


def test_folders_come_back_as_folders_and_files_as_files(flags, next_files, tmp_path):
    """A file saved as a folder, the folder trained on, and what came of it saved as a file again, for both families."""
    for family, start in (("2.0", flags[1]), ("next", next_files.checkpoint)):
        first = with_flag(with_flag(flags, "pretrained_model_name_or_path", start), "output_dir", tmp_path / family / "a")
        still = [*with_flag(with_flag(first, "max_train_steps", 1), "learning_rate", 0), "--optimizer_args", "weight_decay=0"]
        still = with_flag(still, "pretrained_model_name_or_path", tmp_path / family / "a" / "last")
        succeed([*first, "--save_model_as", "diffusers_safetensors"], with_flag(still, "output_dir", tmp_path / family / "b"),
                [*with_flag(still, "output_dir", tmp_path / family / "c"), "--save_model_as", "safetensors"])
        folder, again = (tmp_path / family / name / "last" for name in "ab")
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file())
        for name in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
            one, two = (load_file(place / f"{name}.safetensors") for place in (folder, again))
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        assert header(tmp_path / family / "c" / "last.safetensors")[0] == header(start)[0]


def test_all_in_one_with_flash_attention_recompute_and_an_instruction(flags, tmp_path):
    whole = make_all_in_one(tmp_path / "neta.safetensors")
    more = ["--timestep_sampling", "nextdit_shift", "--system_prompt", "a picture of", "--gemma2_max_token_length", "96"]
    base = with_flag(with_flag(flags, "pretrained_model_name_or_path", whole), "console_log_level", "INFO")
    commands = [[*with_flag(base, "output_dir", tmp_path / str(number)), *more, *extra]
                for number, extra in enumerate(([], ["--use_flash_attn"], ["--gradient_checkpointing"]))]
    plain, flash, _ = succeed(*commands)
    assert "flash-attn" not in plain.text
    assert flash.text.count("flash-attn is not installed: attention runs through torch's own flash kernel") == 1
    losses = [column(tmp_path / str(number), "loss") for number in range(3)]
    assert losses[0] == losses[2] and losses[1] == pytest.approx(losses[0], rel=1e-5)
    shapes, dtypes, metadata = header(tmp_path / "0" / "last.safetensors")
    assert shapes == header(whole)[0] and dtypes == {"F32", "U8"} and metadata["modelspec.architecture"] == "lumina-2"


def test_previews_validation_and_bf16_weights_of_lumina_next(flags, next_files, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a cat --w 64 --h 64 --s 2 --l 3 --n a dog\n", encoding="utf-8")
    succeed([*with_flag(flags, "pretrained_model_name_or_path", next_files.checkpoint), "--sample_prompts",
             str(tmp_path / "prompts.txt"), "--sample_at_first", "--full_bf16", "--mixed_precision", "bf16", "--cache_latents",
             "--timestep_sampling", "sigmoid"])
    assert len(list((tmp_path / "out" / "sample").glob("last_*_00_*.png"))) == 1
    assert header(tmp_path / "out" / "last.safetensors")[1] == {"BF16"}


def test_parts_of_the_other_family_and_sage_attention_are_refused(flags, image_2, next_files, tmp_path):
    wrong = [*with_flag(flags, "pretrained_model_name_or_path", next_files.checkpoint), "--gemma2", str(image_2.gemma), "--vae",
             str(image_2.ae)]
    parts, sage = run_all(wrong, [*flags, "--use_sage_attn"], script=SCRIPT)
    assert parts.status == sage.status == 2
    assert ["--gemma2" in parts.errors[0], "--vae" in parts.errors[1]] == [True, True] and "Gemma-2B" in parts.errors[0]
    assert "SageAttention has no backward pass" in sage.errors[0] and not (tmp_path / "out").exists()
