"""A denoiser that knows the answer, in its own convention, must get loss 0, and one Euler step must reach the picture."""

import importlib

import pytest
import torch

from library.config.parse import parse
from library.objectives.flow import Flow
from library.objectives.loss import per_sample
from library.objectives.noise import draw

SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")


class Oracle(torch.nn.Module):
    """Stands in for the denoiser: the real embedder (for its dtype) and configuration, the true velocity as output."""

    def __init__(self, real, answer):
        super().__init__()
        self.x_embedder, self.config, self.answer = real.x_embedder, real.config, answer

    def forward(self, **_inputs):
        return (self.answer,)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_oracle_has_no_loss_and_lands_on_the_latents(case, checkpoint, sampling):
    config = parse(case.entry, ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(checkpoint),
                                "--output_dir", "unused", "--timestep_sampling", sampling])
    arch = importlib.import_module(case.entry.architecture).open_architecture(config.model, config.architecture)
    denoiser = arch.load_denoiser(torch.device("cpu"), torch.float32)
    encoders = arch.load_text_encoders(torch.device("cpu"), torch.float32)
    text = arch.encode_text(encoders, ["a", "b"])
    latents = torch.randn(2, arch.latent.channels, 8, 12, generator=torch.Generator().manual_seed(1))
    draws = draw(0, 3, ["a", "b"], tuple(latents.shape[1:]))
    objective = Flow(config.objective)
    level = objective.level(draws, arch.latent.tokens(8, 12))
    noisy = objective.noise(latents, draws, level)
    oracle = Oracle(denoiser, case.oracle(draws.noise - latents, level))
    velocity = arch.predict(oracle, noisy.x_t, level, text)
    assert per_sample(objective.prediction(velocity, noisy), noisy.target).max() < 1e-10
    landed = noisy.x_t - level.view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(landed, latents, rtol=0, atol=2e-6)


def test_time_reaches_the_model_exactly_under_bfloat16(case, checkpoint):
    """Without care bfloat16 leaves 129 distinct levels above 0.5; the embedding must see the float32 value."""
    config = parse(case.entry, ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(checkpoint), "--output_dir", "unused"])
    arch = importlib.import_module(case.entry.architecture).open_architecture(config.model, config.architecture)
    denoiser = arch.load_denoiser(torch.device("cpu"), torch.bfloat16)
    seen = []
    denoiser.time_text_embed.time_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    text = arch.encode_text(arch.load_text_encoders(torch.device("cpu"), torch.float32), ["a"])
    level = torch.tensor([0.7071])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        arch.predict(denoiser, torch.randn(1, arch.latent.channels, 8, 8), level, text)
    assert seen[0].dtype is torch.float32 and seen[0].item() == pytest.approx(707.1, rel=1e-6)
