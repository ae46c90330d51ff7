import math

import pytest
import torch

from library.config.flow_options import FlowOptions
from library.config.loss_options import LossOptions
from library.objectives.flow import Flow, Noisy
from library.objectives.loss import per_sample
from library.objectives.noise import Draws, draw

SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
MANY = 20_000


def flow(**options) -> Flow:
    return Flow(FlowOptions(**options))


def draws(count: int = MANY, shape: tuple[int, int, int] = (1, 1, 1)) -> Draws:
    generator = torch.Generator().manual_seed(0)
    noise, normal = (torch.randn(count, *rest, generator=generator) for rest in (shape, ()))
    return Draws(noise, torch.rand(count, generator=generator), normal)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_levels_are_in_range_and_float32(sampling):
    level = flow(timestep_sampling=sampling).level(draws(), tokens=1024)
    assert level.shape == (MANY,) and level.dtype == torch.float32
    assert 0 <= level.min() < 0.1 and 0.9 < level.max() <= 1


@pytest.mark.parametrize("scheme", ["none", "uniform", "logit_normal", "mode", "cosmap", "sigma_sqrt"])
def test_sigma_sampling_under_every_scheme_takes_levels_of_the_table(scheme):
    level = flow(timestep_sampling="sigma", weighting_scheme=scheme, discrete_flow_shift=1.0).level(draws(), tokens=1024)
    thousandths = level * 1000
    torch.testing.assert_close(thousandths, thousandths.round(), atol=1e-3, rtol=0)
    assert thousandths.min() >= 1 - 1e-3


def test_schemes_are_densities_in_sigma_sampling_only():
    for sampling, differ in (("sigma", True), ("shift", False), ("uniform", False)):
        plain, shaped = (flow(timestep_sampling=sampling, weighting_scheme=scheme).level(draws(), 1024)
                         for scheme in ("none", "logit_normal"))
        assert torch.equal(plain, shaped) != differ


@pytest.mark.parametrize("sampling, option", [
    ("sigma", "discrete_flow_shift"), ("shift", "discrete_flow_shift"), ("sigmoid", "sigmoid_scale"), ("shift", "sigmoid_scale"),
    ("flux_shift", "sigmoid_scale")])
def test_parameters_move_the_levels_where_they_apply(sampling, option):
    low, high = (flow(timestep_sampling=sampling, **{option: value}).level(draws(), 1024) for value in (1.0, 2.0))
    assert not torch.equal(low, high)


def test_flux_shift_asks_more_noise_of_larger_pictures():
    objective = flow(timestep_sampling="flux_shift")
    assert objective.level(draws(), 4096).mean() > objective.level(draws(), 256).mean() + 0.1


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_min_and_max_timestep_bound_the_levels(sampling):
    level = flow(timestep_sampling=sampling, min_timestep=200, max_timestep=600).level(draws(), 1024)
    assert 0.2 <= level.min() < 0.25 and 0.55 < level.max() <= 0.6 + 1e-6
    lower = flow(timestep_sampling=sampling, max_timestep=500).level(draws(), 1024)
    assert lower.min() < 0.1 and lower.max() <= 0.5
    fixed = flow(timestep_sampling=sampling, min_timestep=400, max_timestep=400).level(draws(), 1024)
    assert fixed.tolist() == pytest.approx([0.4] * MANY)


def test_mixing_and_target_are_float32_for_half_latents():
    randomness = draw(0, 0, ["a", "b"], (4, 2, 2))
    latents = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1)).half()
    noisy = flow().noise(latents, randomness, torch.tensor([0.0, 1.0]))
    assert noisy.x_t.dtype == noisy.target.dtype == torch.float32
    assert torch.equal(noisy.x_t[0], latents[0].float()) and torch.equal(noisy.x_t[1], randomness.noise[1])
    assert torch.equal(noisy.target, randomness.noise - latents.float())


@pytest.mark.parametrize("kind", ["raw", "additive", "sigma_scaled"])
def test_an_output_that_is_right_gives_no_loss(kind):
    """Solve each prediction type for the output that meets the target; with raw it is the velocity itself."""
    objective = flow(model_prediction_type=kind)
    randomness = draw(0, 0, ["a", "b", "c"], (4, 2, 2))
    latents = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    noisy = objective.noise(latents, randomness, objective.level(randomness, 1))
    sigma = noisy.level.view(-1, 1, 1, 1)
    output = {"raw": noisy.target, "additive": noisy.target - noisy.x_t, "sigma_scaled": (noisy.x_t - noisy.target) / sigma}[kind]
    assert per_sample(objective.prediction(output, noisy), noisy.target).max() < 1e-10
    assert per_sample(objective.prediction(output + 1, noisy), noisy.target).min() > 1e-3


def test_one_euler_step_along_the_true_velocity_lands_on_the_latents():
    objective = flow()
    randomness = draw(0, 0, ["a", "b"], (4, 2, 2))
    latents = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    noisy = objective.noise(latents, randomness, objective.level(randomness, 1))
    torch.testing.assert_close(noisy.x_t - noisy.level.view(-1, 1, 1, 1) * noisy.target, latents, atol=1e-6, rtol=1e-5)


def test_weights_act_on_sigma_scaled_predictions_only():
    level = torch.tensor([0.25, 0.5, 1.0])
    for scheme in ("sigma_sqrt", "cosmap", "none", "uniform", "logit_normal", "mode"):
        assert flow(weighting_scheme=scheme, model_prediction_type="raw").weight(level).tolist() == [1, 1, 1]
    scaled = {"model_prediction_type": "sigma_scaled"}
    assert flow(weighting_scheme="sigma_sqrt", **scaled).weight(level).tolist() == [16, 4, 1]
    assert flow(weighting_scheme="cosmap", **scaled).weight(level).tolist() == pytest.approx(
        [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in (0.25, 0.5, 1.0)])
    assert flow(weighting_scheme="logit_normal", **scaled).weight(level).tolist() == [1, 1, 1]


def test_weight_of_a_clean_sample_is_finite():
    objective = flow(weighting_scheme="sigma_sqrt", model_prediction_type="sigma_scaled")
    assert objective.weight(torch.tensor([0.0])).isfinite().all()


def test_noisy_is_immutable():
    noisy = Noisy(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with pytest.raises(AttributeError):
        noisy.level = torch.ones(1)


@pytest.mark.parametrize("varies", [False, True])
def test_a_perturbed_input_leaves_levels_and_targets_alone(varies):
    """x_t has more noise than the target knows of, by a draw of its own: nothing at level 0, its whole size at level 1."""
    randomness, level = draw(0, 0, ["a", "b", "c"], (4, 32, 32)), torch.tensor([0.0, 0.5, 1.0])
    latents = torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    plain, other = flow().noise(latents, randomness, level), flow(ip_noise_gamma=0.2, ip_noise_gamma_random_strength=varies)
    perturbed = other.noise(latents, randomness, level)
    assert torch.equal(perturbed.target, plain.target) and torch.equal(other.level(randomness, 16), flow().level(randomness, 16))
    sizes = (perturbed.x_t - plain.x_t).std(dim=(1, 2, 3))
    strengths = 0.2 * (randomness.uniforms("input perturbation strength") if varies else torch.ones(3))
    torch.testing.assert_close(sizes, level * strengths, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_kinds_of_loss_reach_the_reduction(kind, schedule):
    """A flow's noise is sigma / (1 - sigma) times as large as its signal, so the width by snr is (1 - c) (1 - sigma)^2 + c."""
    objective = Flow(FlowOptions(), LossOptions(loss_type=kind, huber_schedule=schedule, huber_c=0.2, huber_scale=1.5))
    level, target = torch.tensor([0.0, 0.25, 1.0]), torch.ones(3, 4, 2, 2)
    width = {"constant": torch.full((3,), 0.3), "exponential": 1.5 * 0.2**level, "snr": 0.8 * (1 - level) ** 2 + 0.2}[schedule]
    root = (0.3**2 + width**2).sqrt() - width
    expected = {"l1": torch.full((3,), 0.3), "l2": torch.full((3,), 0.09), "huber": 2 * width * root, "smooth_l1": 2 * root}[kind]
    noisy = Noisy(target, level, target)
    torch.testing.assert_close(objective.losses(target + 0.3, noisy), expected, rtol=1e-4, atol=1e-6)
    mask = torch.tensor([1.0, 0.0]).expand(3, 1, 2, 2)  # half of the cells; the mean runs over all of them
    torch.testing.assert_close(objective.losses(target + 0.3, noisy, mask), expected / 2, rtol=1e-4, atol=1e-6)
