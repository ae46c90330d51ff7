"""Rectified flow with one scheme: levels, losses between estimates of the picture, weights of each sample's own."""

import math
from dataclasses import replace

import pytest
import torch

from library.config.loss_options import LossOptions
from library.config.weighted_flow_options import WeightedFlowOptions
from library.objectives.loss import per_sample
from library.objectives.noise import draw
from library.objectives.weighted_flow import WeightedFlow

MANY = 2000
SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")


def objective(loss=LossOptions(), **settings):
    return WeightedFlow(WeightedFlowOptions(**settings), loss)


def draws():
    return draw(0, 0, [str(index) for index in range(MANY)], (1, 1, 1))


def noisy_pair(flow, count=3):
    randomness = draw(0, 0, [str(index) for index in range(count)], (4, 2, 2))
    latents = torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    return flow.noise(latents, randomness, torch.linspace(0.2, 0.9, count)), latents


@pytest.mark.parametrize("scheme", SCHEMES)
def test_levels_are_whole_thousandths_within_their_bounds(scheme):
    level = objective(weighting_scheme=scheme).level(draws(), 1)
    assert level.dtype == torch.float32 and 0 <= level.min() and level.max() < 1
    assert torch.equal((level.double() * 1000).round() / 1000, (level.double() * 1e6).round() / 1e6)
    narrow = objective(weighting_scheme=scheme, min_timestep=200, max_timestep=600).level(draws(), 1)
    assert 0.2 <= narrow.min() < 0.25 and 0.55 < narrow.max() < 0.6


def test_densities_and_shift():
    plain = objective().level(draws(), 1)
    assert plain.mean().item() == pytest.approx(0.5, abs=0.02)
    shifted = objective(training_shift=3.0).level(draws(), 1)
    assert torch.allclose(shifted, (3 * draws().uniform / (1 + 2 * draws().uniform)), atol=1.1e-3)
    middle = objective(weighting_scheme="logit_normal").level(draws(), 1)
    assert middle.std() < 0.9 * plain.std() and objective(weighting_scheme="logit_normal", logit_mean=1.0).level(draws(), 1).mean() > 0.65
    assert not torch.equal(objective(weighting_scheme="mode").level(draws(), 1), plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_true_velocity_has_no_loss(scheme):
    flow = objective(weighting_scheme=scheme)
    noisy, latents = noisy_pair(flow)
    assert flow.losses(noisy.target, noisy).max() < 1e-10
    torch.testing.assert_close(noisy.x_t - noisy.level.view(-1, 1, 1, 1) * noisy.target, latents)


def test_squared_errors_of_pictures_are_those_of_velocities_times_the_squared_level():
    noisy, _ = noisy_pair(objective())
    output = noisy.target + torch.randn(noisy.target.shape, generator=torch.Generator().manual_seed(2))
    velocity = per_sample(output, noisy.target)
    torch.testing.assert_close(objective().losses(output, noisy), velocity * noisy.level**2)
    torch.testing.assert_close(objective(weighting_scheme="sigma_sqrt").losses(output, noisy), velocity)
    absolute = objective(LossOptions(loss_type="l1")).losses(output, noisy)
    torch.testing.assert_close(absolute, per_sample(output, noisy.target, kind="l1") * noisy.level)


def test_weights_are_each_samples_own():
    """One weight per sample, a function of its own level: batches mix nothing."""
    level = torch.tensor([0.25, 0.5, 1.0])
    weight = objective(weighting_scheme="cosmap").weight(level)
    assert weight.shape == (3,) and weight.tolist() == pytest.approx(
        [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in (0.25, 0.5, 1.0)])
    for scheme in ("sigma_sqrt", "logit_normal", "mode", "none", "uniform"):
        assert objective(weighting_scheme=scheme).weight(level).tolist() == [1, 1, 1]
    flow = objective(weighting_scheme="sigma_sqrt")
    noisy, _ = noisy_pair(flow)
    output = torch.randn(noisy.target.shape, generator=torch.Generator().manual_seed(2))
    alone = [flow.losses(output[index:index + 1], replace(noisy, x_t=noisy.x_t[index:index + 1], level=noisy.level[index:index + 1],
                                                          target=noisy.target[index:index + 1])) for index in range(3)]
    torch.testing.assert_close(torch.cat(alone), flow.losses(output, noisy))


def test_no_noise_at_all_is_no_reason_for_an_infinite_loss():
    for scheme in SCHEMES:
        flow = objective(weighting_scheme=scheme)
        noisy, _ = noisy_pair(flow)
        still = replace(noisy, level=torch.zeros(3))
        assert (flow.losses(torch.ones_like(noisy.target), still) * flow.weight(still.level)).isfinite().all()


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_masks_and_huber(schedule):
    flow = objective(LossOptions(loss_type="huber", huber_schedule=schedule))
    noisy, _ = noisy_pair(flow)
    output = torch.zeros_like(noisy.target)
    whole = flow.losses(output, noisy)
    assert flow.losses(output, noisy, torch.zeros(3, 1, 2, 2)).tolist() == [0, 0, 0] and whole.min() > 0
    torch.testing.assert_close(flow.losses(output, noisy, torch.full((3, 1, 2, 2), 0.5)), whole / 2)
