"""The SDXL adapter: its flags and their conflicts, what trains at which rate, what the checkpoint decides, a step end to end."""

import math

import pytest
import torch

from library.architectures.base import DENOISER
from library.architectures.sdxl import open_architecture
from library.architectures.sdxl_options import SdxlOptions
from library.checkpoint.source import open_source
from library.config.check import check
from library.config.ddpm_options import DdpmOptions
from library.config.loss_options import LossOptions
from library.config.parse import parse
from library.config.schema import ModelOptions
from library.errors import UserError
from library.objectives.noise import draw
from library.optim.groups import assert_partition
from sdxl_train import ENTRY
from tests.tiny_sdxl import make_sdxl_files

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_sdxl_files(tmp_path_factory.mktemp("sdxl")).checkpoint


def opened(checkpoint, objective=DdpmOptions(), **options):
    return open_architecture(ModelOptions(str(checkpoint)), SdxlOptions(**options), objective)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.toml").write_text("")

    def run(*argv):
        return parse(ENTRY, [*"--pretrained_model_name_or_path org/model --dataset_config data.toml --output_dir out".split(),
                             *argv], {})
    return run


def test_defaults(read):
    options = read().architecture
    assert (options.max_token_length, options.chunks, options.block_rates, options.encoder_rates(1e-5)) == (75, 1, None, {})
    assert read("--max_token_length", "225").architecture.chunks == 3


def test_learning_rates_of_the_encoders(read):
    both = read("--train_text_encoder", "--learning_rate_te1", "5e-6").architecture
    assert both.encoder_rates(1e-5) == {"clip_l": 5e-6, "clip_g": 1e-5}
    one = read("--train_text_encoder", "--learning_rate_te1", "0", "--learning_rate_te2", "2e-6").architecture
    assert one.encoder_rates(1e-5) == {"clip_g": 2e-6}


def test_block_rates_from_the_command_line_and_from_toml(read, tmp_path):
    text = "0," + ",".join(["1e-5"] * 22)
    assert read("--block_lr", text).architecture.block_rates == (0.0, *[1e-5] * 22)
    (tmp_path / "run.toml").write_text(f"block_lr = [{text}]\n")
    assert read("--config_file", "run.toml").architecture.block_rates == (0.0, *[1e-5] * 22)


@pytest.mark.parametrize("argv, expected", [
    ("--block_lr 1e-5,1e-5", "--block_lr: '1e-5,1e-5' is not 23 learning rates: it has 2;"),
    ("--block_lr " + ",".join(["1"] * 22 + ["fast"]), "is not 23 learning rates: value 23 is 'fast', not a number of 0 or more"),
    ("--block_lr " + ",".join(["-1"] + ["1"] * 22), "is not 23 learning rates: value 1 is '-1'"),
    ("--block_lr " + ",".join(["0"] * 23), "--block_lr: every block has a learning rate of 0"),
    ("--learning_rate_te1 1e-5", "--learning_rate_te1: has no effect without --train_text_encoder"),
    ("--train_text_encoder --learning_rate_te1 0 --learning_rate_te2 0", "both text encoders have a learning rate of 0"),
    ("--train_text_encoder --cache_text_encoder_outputs", "--train_text_encoder: there is nothing to cache"),
    ("--sample_sampler eulr", "--sample_sampler: 'eulr' is not one of"),
    ("--max_token_length 100", "--max_token_length: '100' is not 75, 150 or 225"),
    ("--tokenizer_cache_dir nowhere", "--tokenizer_cache_dir: no such file or folder")])
def test_mistakes(read, argv, expected):
    with pytest.raises(UserError) as caught:
        check(read(*argv.split(" ")))
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


# --- what trains ------------------------------------------------------------------------------------------------------


def parts_of(arch):
    return arch.load_denoiser(CPU, F32), arch.load_text_encoders(arch.text_encoders, CPU, F32)


def test_the_unet_alone(checkpoint):
    arch = opened(checkpoint)
    denoiser, encoders = parts_of(arch)
    groups = arch.groups(denoiser, encoders, 1e-5)
    assert [(group.name, group.learning_rate) for group in groups] == [("unet", 1e-5)]
    assert_partition(groups, denoiser.named_parameters())


def test_unet_blocks_and_encoders(checkpoint):
    rates = [0.0, *(index * 1e-6 for index in range(1, 22)), 0.0]
    arch = opened(checkpoint, block_lr=",".join(map(str, rates)), train_text_encoder=True, learning_rate_te1=3e-6)
    denoiser, encoders = parts_of(arch)
    groups = arch.groups(denoiser, encoders, 1e-5)
    assert [group.learning_rate for group in groups] == [*rates[1:22], 3e-6, 1e-5]
    assert [group.name for group in groups][-3:] == ["unet block 21", "clip_l", "clip_g"]
    everything = [*denoiser.named_parameters(), *((f"{name}.{key}", parameter) for name, module in encoders.modules.items()
                                                  for key, parameter in module.named_parameters())]
    assert_partition(groups, everything)
    assert not denoiser.time_embedding.linear_1.weight.requires_grad and not denoiser.conv_out.weight.requires_grad
    assert [len(arch.text_blocks(name, module)) for name, module in encoders.modules.items()] == [2, 3]


def test_a_rate_of_zero_leaves_the_unet_out_when_encoders_train(checkpoint):
    arch = opened(checkpoint, train_text_encoder=True, learning_rate_te1=1e-6, learning_rate_te2=0.0)
    denoiser, encoders = parts_of(arch)
    assert [group.name for group in arch.groups(denoiser, encoders, 0.0)] == ["clip_l"]
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


# --- what the checkpoint decides --------------------------------------------------------------------------------------


def test_a_velocity_checkpoint_sets_the_objective(tmp_path, checkpoint):
    marked = make_sdxl_files(tmp_path, ("v_pred", "ztsnr")).checkpoint
    options = opened(marked, DdpmOptions(min_snr_gamma=5.0, scale_v_pred_loss_like_noise_pred=True)).objective(LossOptions()).options
    assert options.v_parameterization and options.zero_terminal_snr and options.min_snr_gamma == 5.0
    with pytest.raises(UserError, match="--v_pred_like_loss: .* predicts velocity"):
        opened(marked, DdpmOptions(v_pred_like_loss=1.0))
    assert opened(checkpoint).objective(LossOptions()).options == DdpmOptions()
    with pytest.raises(UserError, match="--scale_v_pred_loss_like_noise_pred: acts on velocity prediction only"):
        opened(checkpoint, DdpmOptions(scale_v_pred_loss_like_noise_pred=True))


def test_half_precision_of_the_autoencoder(checkpoint):
    bf16, f16 = torch.bfloat16, torch.float16
    arch, careful = opened(checkpoint), opened(checkpoint, no_half_vae=True)
    assert arch.load_vae(CPU, bf16).dtype == bf16 and arch.load_vae(CPU, f16).dtype == F32
    assert careful.load_vae(CPU, bf16).dtype == F32
    assert arch.vae_identity(f16) == arch.vae_identity(F32) == careful.vae_identity(bf16) != arch.vae_identity(bf16)


def test_text_identity_follows_its_settings(checkpoint):
    both = ("clip_l", "clip_g")
    identities = {opened(checkpoint, **options).text_identity(names, F32)
                  for options, names in (({}, both), ({}, both[:1]), ({"max_token_length": 150}, both), ({"weighted_captions": True}, both))}
    assert len(identities) == 4


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("velocity", [False, True])
def test_steps_with_unet_and_encoders_lower_the_loss_and_are_saved(tmp_path, checkpoint, velocity):
    """Pictures and captions to losses, gradients into all three modules, one file that holds the change."""
    arch = opened(checkpoint, DdpmOptions(v_parameterization=velocity, min_snr_gamma=5.0), train_text_encoder=True,
                  max_token_length=150)
    objective = arch.objective(LossOptions())
    denoiser, encoders = parts_of(arch)
    groups = arch.groups(denoiser, encoders, 1e-3)
    optimizer = torch.optim.AdamW([{"params": [p for _, p in group.params], "lr": group.learning_rate} for group in groups])
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = arch.encode_image(arch.load_vae(CPU, F32), pixels)
    geometry = torch.tensor([[40, 70, 4, 3, 32, 64], [32, 64, 0, 0, 32, 64]])
    draws = draw(0, 0, ["a", "b"], tuple(latents.shape[1:]))
    losses = []
    for _ in range(4):
        level = objective.level(draws, arch.latent.tokens(*latents.shape[2:]))
        noisy = objective.noise(latents, draws, level)
        text = arch.encode_text(encoders, ["a red cat", "the dog " * 60])
        output = arch.predict(denoiser, noisy.x_t, noisy.level, text, geometry)
        loss = (objective.losses(output, noisy) * objective.weight(level)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(math.isfinite(value) for value in losses)
    modules = {DENOISER: denoiser, **encoders.modules}
    arch.export(modules, tmp_path / "out.safetensors", None, {"modelspec.title": "test"}, "safetensors")
    before, after = open_source(checkpoint), open_source(tmp_path / "out.safetensors")
    assert set(after.tensors) - set(before.tensors) == ({"v_pred"} if velocity else set())
    moved = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    still = {name for name in before.tensors if name not in moved}
    untouched = ("position_ids", "logit_scale", "final_layer_norm", ".layers.1.", "embedding", "first_stage_model.")
    assert all(any(part in name for part in untouched) for name in still)
    assert after.metadata["modelspec.title"] == "test" and after.metadata["modelspec.hash_sha256"].startswith("0x")
