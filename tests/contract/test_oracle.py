"""A denoiser that knows the answer, in its own convention, must get loss 0, and one step must reach the picture."""

import importlib

import pytest
import torch

from library.config.parse import parse
from library.objectives.noise import draw

CPU, F32 = torch.device("cpu"), torch.float32
GEOMETRY = torch.tensor([[64, 96, 0, 0, 64, 96], [70, 99, 6, 3, 64, 96]])


def opened(case, checkpoint, *flags):
    config = parse(case.entry, ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(checkpoint),
                                "--output_dir", "unused", *flags])
    module = importlib.import_module(case.entry.architecture)
    return module.open_architecture(config.model, config.architecture, config.objective), config


def test_oracle_has_no_loss_and_lands_on_the_latents(case, checkpoint, setting):
    arch, config = opened(case, checkpoint, *setting)
    denoiser = arch.load_denoiser(CPU, F32)
    text = arch.encode_text(arch.load_text_encoders(arch.text_encoders, CPU, F32), ["a", "b"])
    latents = torch.randn(2, arch.latent.channels, 8, 12, generator=torch.Generator().manual_seed(1))
    draws = draw(0, 3, ["a", "b"], tuple(latents.shape[1:]))
    objective = arch.objective(config.loss)
    level = objective.level(draws, arch.latent.tokens(8, 12))
    noisy = objective.noise(latents, draws, level)
    denoiser.forward = lambda **_inputs: (case.oracle(noisy.target),)
    output = arch.predict(denoiser, noisy.x_t, level, text, GEOMETRY)
    assert objective.losses(output, noisy).max() < 1e-10
    torch.testing.assert_close(case.landed(objective, noisy, output), latents, rtol=0, atol=3e-5)


def test_time_reaches_the_model_exactly_under_bfloat16(case, checkpoint):
    """Without care bfloat16 leaves 129 distinct levels above one half; the embedding must see the true number."""
    arch, _ = opened(case, checkpoint)
    denoiser = arch.load_denoiser(CPU, torch.bfloat16)
    seen = []
    case.time_input(denoiser).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    text = arch.encode_text(arch.load_text_encoders(arch.text_encoders, CPU, F32), ["a"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        arch.predict(denoiser, torch.randn(1, arch.latent.channels, 8, 8), case.level, text, GEOMETRY[:1])
    assert seen[0].dtype in (torch.float32, torch.int64) and seen[0].item() == pytest.approx(case.time, rel=1e-6)


def test_text_is_that_of_the_encoders_that_are_asked(case, checkpoint):
    """Each encoder alone gives its share of what all give: some can be cached while others train."""
    arch, _ = opened(case, checkpoint)
    whole = arch.encode_text(arch.load_text_encoders(arch.text_encoders, CPU, F32), ["a red cat", ""])
    parts = [arch.encode_text(arch.load_text_encoders([name], CPU, F32), ["a red cat", ""]) for name in arch.text_encoders]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert all(torch.equal(value, whole[name]) for part in parts for name, value in part.items())
    identities = [arch.text_identity(names, F32) for names in (arch.text_encoders, *([name] for name in arch.text_encoders))]
    assert len(set(identities)) == (len(identities) if len(arch.text_encoders) > 1 else 1)


def test_blocks_are_called_in_their_order(case, checkpoint):
    """Once each, one after the other: what recompute and streaming build on."""
    arch, _ = opened(case, checkpoint)
    denoiser = arch.load_denoiser(CPU, F32)
    blocks, called = arch.blocks(denoiser), []
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _module, _inputs, number=index: called.append(number))
    text = arch.encode_text(arch.load_text_encoders(arch.text_encoders, CPU, F32), ["a"])
    with torch.no_grad():
        arch.predict(denoiser, torch.randn(1, arch.latent.channels, 8, 8), case.level, text, GEOMETRY[:1])
    assert called == list(range(len(blocks))) and len({id(block) for block in blocks}) == len(blocks)
