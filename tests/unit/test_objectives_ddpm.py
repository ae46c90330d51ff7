import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from library.config.ddpm_options import DdpmOptions
from library.config.loss_options import LossOptions
from library.objectives.ddpm import LEVELS, Ddpm, multires, signal_shares, without_terminal_signal
from library.objectives.flow import Noisy
from library.objectives.loss import per_sample
from library.objectives.noise import Draws, draw

SHAPE = (4, 6, 8)
NAMES = ["a", "b", "c"]
LATENTS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
SHARES = signal_shares()
RATIOS = SHARES / (1 - SHARES)


def ddpm(loss: LossOptions = LossOptions(), **options) -> Ddpm:
    return Ddpm(DdpmOptions(**options), loss)


def draws(names=NAMES, step=0) -> Draws:
    return draw(7, step, names, SHAPE)


def uniform(values) -> Draws:
    return Draws(torch.zeros(len(values), 1, 1, 1), torch.tensor(values), torch.zeros(len(values)))


# --- schedule and levels ----------------------------------------------------------------------------------------------


def test_schedule_is_that_of_diffusers():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(SHARES, scheduler.alphas_cumprod)
    rescaled = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    torch.testing.assert_close(without_terminal_signal(SHARES), rescaled.alphas_cumprod, atol=1e-6, rtol=1e-4)
    assert without_terminal_signal(SHARES)[-1] == 0 and without_terminal_signal(SHARES)[0] == pytest.approx(SHARES[0].item())


def test_levels_are_integers_spread_evenly():
    level = ddpm().level(uniform([0.0, 0.2501, 0.9999999]), tokens=1)
    assert level.dtype == torch.int64 and level.tolist() == [0, 250, 999]
    many = ddpm().level(draw(0, 0, [str(index) for index in range(4000)], (1, 1, 1)), 1)
    assert many.min() >= 0 and many.max() <= 999 and abs(many.float().mean() - 499.5) < 15


@pytest.mark.parametrize("low, high, expected", [
    (200, 600, [200, 399, 599]), (None, 10, [0, 4, 9]), (990, None, [990, 994, 999]), (500, 500, [500] * 3), (0, 1, [0] * 3)])
def test_min_and_max_timestep(low, high, expected):
    level = ddpm(min_timestep=low, max_timestep=high).level(uniform([0.0, 0.4999, 0.9999999]), 1)
    assert level.tolist() == expected


# --- what is added and what is asked for ------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
def test_mixing_and_targets_are_those_of_diffusers(zero):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero)
    level = torch.tensor([0, 500, 999])
    noise = draws().noise
    for velocity in (False, True):
        noisy = ddpm(v_parameterization=velocity, zero_terminal_snr=zero).noise(LATENTS, draws(), level)
        torch.testing.assert_close(noisy.x_t, scheduler.add_noise(LATENTS, noise, level), atol=2e-4, rtol=1e-4)
        expected = scheduler.get_velocity(LATENTS, noise, level) if velocity else noise
        torch.testing.assert_close(noisy.target, expected, atol=2e-4, rtol=1e-4)
        assert torch.equal(noisy.level, level)
    if zero:
        assert torch.equal(noisy.x_t[2], noise[2]) and torch.equal(noisy.target[2], -LATENTS[2])


def test_half_latents_are_mixed_in_float32():
    noisy = ddpm(v_parameterization=True).noise(LATENTS.half(), draws(), torch.tensor([1, 2, 3]))
    assert noisy.x_t.dtype == noisy.target.dtype == torch.float32


@pytest.mark.parametrize("velocity", [False, True])
def test_a_true_answer_leads_back_to_the_latents(velocity):
    level = torch.tensor([10, 400, 950])
    objective = ddpm(v_parameterization=velocity)
    noisy = objective.noise(LATENTS, draws(), level)
    assert objective.losses(noisy.target, noisy).max() == 0
    share = SHARES[level].view(-1, 1, 1, 1)
    signal, rest = share.sqrt(), (1 - share).sqrt()
    clean = signal * noisy.x_t - rest * noisy.target if velocity else (noisy.x_t - rest * noisy.target) / signal
    torch.testing.assert_close(clean, LATENTS, atol=1e-4, rtol=1e-4)


FEATURES = {
    "offset": {"noise_offset": 0.1},
    "offset of random strength": {"noise_offset": 0.1, "noise_offset_random_strength": True},
    "adaptive offset": {"noise_offset": 0.1, "adaptive_noise_scale": 0.5},
    "multires": {"multires_noise_iterations": 4},
    "perturbed input": {"ip_noise_gamma": 0.1},
    "input perturbed at random strength": {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_noise_of_a_sample_does_not_depend_on_its_batch(feature):
    objective, level = ddpm(**FEATURES[feature]), torch.tensor([5, 500, 995])
    together = objective.noise(LATENTS, draws(), level)
    plain = ddpm().noise(LATENTS, draws(), level)
    for row, name in enumerate(NAMES):
        alone = objective.noise(LATENTS[row:row + 1], draws([name]), level[row:row + 1])
        torch.testing.assert_close(alone.x_t[0], together.x_t[row])
        torch.testing.assert_close(alone.target[0], together.target[row])
        assert not torch.allclose(together.x_t[row], plain.x_t[row], atol=1e-4)
    other = objective.noise(LATENTS, draws(step=1), level)
    assert not torch.allclose(other.x_t, together.x_t, atol=1e-4)


def test_offset_moves_each_channel_as_a_whole():
    level = torch.tensor([5, 500, 995])
    shift = ddpm(noise_offset=0.1).noise(LATENTS, draws(), level).target - draws().noise
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    names = [str(index) for index in range(500)]
    many = draw(0, 0, names, (4, 1, 1))
    zeros = torch.zeros(500, 4, 1, 1)
    offsets = ddpm(noise_offset=0.1).noise(zeros, many, torch.zeros(500, dtype=torch.int64)).target - many.noise
    assert offsets.std().item() == pytest.approx(0.1, rel=0.1) and abs(offsets.mean().item()) < 0.01
    weaker = ddpm(noise_offset=0.1, noise_offset_random_strength=True).noise(zeros, many, torch.zeros(500, dtype=torch.int64))
    strength = (weaker.target - many.noise)[:, 0, 0, 0] / offsets[:, 0, 0, 0]
    assert 0 <= strength.min() and strength.max() < 1 and strength.mean().item() == pytest.approx(0.5, abs=0.05)


def test_adaptive_offset_grows_with_the_mean_of_the_channel_and_never_turns_round():
    latents = torch.zeros(1, 4, 2, 2)
    latents[0, :, :, :] = torch.tensor([0.0, 1.0, -1.0, 4.0]).view(4, 1, 1)
    drawn, level = draw(0, 0, ["a"], (4, 2, 2)), torch.tensor([0])

    def offsets(**options):
        return (ddpm(noise_offset=0.1, **options).noise(latents, drawn, level).target - drawn.noise)[0, :, 0, 0]

    assert (offsets(adaptive_noise_scale=0.2) / offsets()).tolist() == pytest.approx([1, 3, 3, 9], rel=1e-3)
    assert (offsets(adaptive_noise_scale=-0.05) / offsets()).tolist() == pytest.approx([1, 0.5, 0.5, 0], abs=1e-3)


def test_perturbed_input_and_clean_target():
    level = torch.tensor([5, 500, 995])
    plain, perturbed = (ddpm(ip_noise_gamma=gamma).noise(LATENTS, draws(), level) for gamma in (None, 0.1))
    assert torch.equal(plain.target, perturbed.target)
    added = (perturbed.x_t - plain.x_t) / (1 - SHARES[level]).sqrt().view(-1, 1, 1, 1)
    assert added.std().item() == pytest.approx(0.1, rel=0.1)


def test_multires_noise_has_unit_variance_and_coarse_structure():
    drawn = draw(3, 0, NAMES, (4, 32, 32))
    noise = multires(drawn.noise, drawn, iterations=6, discount=0.5)
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-5)

    def coarse(values):
        return torch.nn.functional.avg_pool2d(values, 8).var().item()

    assert coarse(noise) > 2 * coarse(drawn.noise)
    assert torch.equal(multires(drawn.noise, drawn, 6, 0.5), noise)
    small = draw(3, 0, NAMES, (4, 1, 9))
    assert multires(small.noise, small, 50, 0.3).isfinite().all()  # stops at a side of one cell


def test_features_do_not_change_each_others_draws():
    level = torch.tensor([5, 500, 995])
    both = ddpm(noise_offset=0.1, ip_noise_gamma=0.1).noise(LATENTS, draws(), level)
    offset = ddpm(noise_offset=0.1).noise(LATENTS, draws(), level)
    assert torch.equal(both.target, offset.target)


# --- weights ----------------------------------------------------------------------------------------------------------

LEVEL = torch.tensor([0, 100, 500, 999])
R = RATIOS[LEVEL].tolist()


@pytest.mark.parametrize("options, expected", [
    ({}, [1] * 4),
    ({"min_snr_gamma": 5.0}, [min(r, 5) / r for r in R]),
    ({"min_snr_gamma": 5.0, "v_parameterization": True}, [min(r, 5) / (r + 1) for r in R]),
    ({"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True}, [min(r, 1000) / (min(r, 1000) + 1) for r in R]),
    ({"v_pred_like_loss": 0.5}, [1 + 0.5 * (min(r, 1000) + 1) / min(r, 1000) for r in R]),
    ({"debiased_estimation_loss": True}, [1 / math.sqrt(min(r, 1000)) for r in R]),
    ({"debiased_estimation_loss": True, "v_parameterization": True}, [1 / (min(r, 1000) + 1) for r in R]),
    ({"min_snr_gamma": 5.0, "debiased_estimation_loss": True}, [min(r, 5) / r / math.sqrt(min(r, 1000)) for r in R]),
])
def test_weights(options, expected):
    weight = ddpm(**options).weight(LEVEL)
    assert weight.shape == (4,) and weight.dtype == torch.float32
    assert weight.tolist() == pytest.approx(expected, rel=1e-4)


def test_weights_follow_the_schedule_before_it_is_stretched():
    for options in ({"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}, {"v_pred_like_loss": 1.0}):
        plain, stretched = (ddpm(zero_terminal_snr=zero, **options).weight(LEVEL) for zero in (False, True))
        assert torch.equal(plain, stretched) and stretched.isfinite().all()


# --- kinds of loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_kinds_of_loss_reach_the_reduction(kind, schedule):
    loss = LossOptions(loss_type=kind, huber_schedule=schedule, huber_c=0.2, huber_scale=1.5)
    objective = ddpm(loss)
    noisy = Noisy(LATENTS, torch.tensor([0, 500, 999]), LATENTS)
    output = LATENTS + 0.3
    sigma = ((1 - SHARES[noisy.level]) / SHARES[noisy.level]).sqrt()
    width = {"constant": torch.full((3,), 0.3), "exponential": 1.5 * 0.2 ** (noisy.level / LEVELS),
             "snr": 0.8 / (1 + sigma) ** 2 + 0.2}[schedule]
    root = (0.3**2 + width**2).sqrt() - width
    expected = {"l1": torch.full((3,), 0.3), "l2": torch.full((3,), 0.09), "huber": 2 * width * root, "smooth_l1": 2 * root}[kind]
    torch.testing.assert_close(objective.losses(output, noisy), expected, rtol=1e-4, atol=1e-6)
    mask = torch.zeros(3, 1, *SHAPE[1:])
    mask[:, :, :3] = 1
    torch.testing.assert_close(objective.losses(output, noisy, mask), expected / 2, rtol=1e-4, atol=1e-6)


def test_the_loss_by_default_is_the_squared_error():
    noisy = Noisy(LATENTS, torch.tensor([0, 500, 999]), LATENTS)
    assert torch.equal(ddpm().losses(LATENTS + 1, noisy), per_sample(LATENTS + 1, LATENTS))


def test_huber_width_is_finite_where_no_signal_is_left():
    objective = Ddpm(DdpmOptions(zero_terminal_snr=True), LossOptions(loss_type="huber"))
    noisy = objective.noise(LATENTS, draws(), torch.tensor([998, 999, 999]))
    output = torch.zeros_like(LATENTS, requires_grad=True)
    losses = objective.losses(output, noisy)
    losses.sum().backward()
    assert losses.isfinite().all() and output.grad.isfinite().all()


def test_further_draws_need_to_know_their_samples():
    with pytest.raises(AssertionError, match="do not know their samples"):
        ddpm(noise_offset=0.1).noise(LATENTS, replace(draws(), rows=()), torch.tensor([1, 2, 3]))
