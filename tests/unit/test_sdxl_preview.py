"""Previews: every sampler of the dialect draws, and with a model that knows the answer the usual ones arrive at it."""

from dataclasses import replace

import diffusers
import pytest
import torch

from library.architectures.sdxl import open_architecture
from library.architectures.sdxl_options import SAMPLERS as NAMES
from library.architectures.sdxl_options import SdxlOptions
from library.architectures.sdxl_preview import SAMPLERS, scheduler
from library.config.ddpm_options import DdpmOptions
from library.config.schema import ModelOptions
from library.errors import UserError
from library.objectives.ddpm import signal_shares, without_terminal_signal
from library.prompts import Prompt
from tests.tiny_sdxl import make_sdxl_files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore:__array")  # numpy 2 in diffusers
PROMPT = Prompt("a cat", width=64, height=96, seed=3, steps=3, cfg=5.0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """``drawn(prompt, **options)``: a picture of the tiny model."""
    model = ModelOptions(str(make_sdxl_files(tmp_path_factory.mktemp("sdxl")).checkpoint))
    arch = open_architecture(model, SdxlOptions(), DdpmOptions())
    cpu, f32 = torch.device("cpu"), torch.float32
    denoiser, vae = arch.load_denoiser(cpu, f32), arch.load_vae(cpu, f32)
    encoders = arch.load_text_encoders(arch.text_encoders, cpu, f32)
    positive, negative = (arch.encode_text(encoders, [words]) for words in ("a cat", ""))

    def draw(prompt=PROMPT, sampler="ddim", objective=DdpmOptions(), dtype=f32):
        adapter = open_architecture(model, SdxlOptions(), objective)
        return adapter.sample(denoiser.to(dtype), vae, [replace(prompt, sampler=sampler)], positive, negative, f32)[0]

    return draw


@pytest.mark.parametrize("sampler", NAMES)
def test_every_sampler_draws(drawn, sampler):
    if sampler.endswith("lms"):
        pytest.importorskip("scipy", reason="this sampler needs scipy")
    picture = drawn(sampler=sampler)
    assert picture.size == (64, 96) and picture.mode == "RGB"
    assert picture.tobytes() == drawn(sampler=sampler).tobytes()  # the same seed, the same picture


def test_every_sampler_has_a_name():
    assert {name.removeprefix("k_") for name in NAMES} == set(SAMPLERS)


def test_a_sampler_whose_package_is_missing_is_told(monkeypatch):
    def missing(*_args, **_settings):
        raise ImportError

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", missing)
    with pytest.raises(UserError, match="the sampler lms needs the package scipy"):
        scheduler("lms", False, False)


def test_seed_guidance_and_kind_of_prediction_count(drawn):
    pictures = [drawn().tobytes(), drawn(replace(PROMPT, seed=4)).tobytes(), drawn(replace(PROMPT, cfg=1.0)).tobytes(),
                drawn(objective=DdpmOptions(v_parameterization=True)).tobytes(),
                drawn(objective=DdpmOptions(v_parameterization=True, zero_terminal_snr=True)).tobytes()]
    assert len(set(pictures)) == len(pictures)


def test_bfloat16_weights_draw(drawn):
    assert drawn(dtype=torch.bfloat16).size == (64, 96)
    drawn(dtype=torch.float32)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("velocity, zero", [(False, False), (True, False), (True, True)])
def test_a_model_that_knows_the_answer_leads_to_it(sampler, velocity, zero):
    """Training's convention of level and target is the sampler's: the same table, the same meaning of the output."""
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    shares = signal_shares()
    shares = without_terminal_signal(shares) if zero and sampler != "dpmsolver++" else shares
    steps = scheduler(sampler, velocity, zero and sampler != "dpmsolver++")
    steps.set_timesteps(20)
    x = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)) * steps.init_noise_sigma
    for level in steps.timesteps:
        seen = steps.scale_model_input(x, level)
        share = shares[round(level.item())]
        noise = (seen - share.sqrt() * latents) / (1 - share).sqrt()
        answer = share.sqrt() * noise - (1 - share).sqrt() * latents if velocity else noise
        x = steps.step(answer, level, x).prev_sample
    torch.testing.assert_close(x, latents, atol=0.02, rtol=0.02)
