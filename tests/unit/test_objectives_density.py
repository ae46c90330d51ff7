import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from library.objectives import density

MANY = 200_000


def normals() -> torch.Tensor:
    return torch.randn(MANY, generator=torch.Generator().manual_seed(0))


def uniforms() -> torch.Tensor:
    return torch.rand(MANY, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, 3.1582])
def test_table_holds_the_levels_of_the_euler_scheduler(factor):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=factor)
    middles = (torch.arange(1000) + 0.5) / 1000  # a position within each of the 1000 cells
    torch.testing.assert_close(density.table(middles, factor), scheduler.sigmas[:1000], rtol=1e-6, atol=0)


def test_table_at_its_ends():
    ends = density.table(torch.tensor([0.0, 1.0]), 1.0)
    assert ends.tolist() == pytest.approx([1.0, 0.001])


def test_shift_keeps_the_ends_and_moves_the_middle_to_noise():
    level = torch.linspace(0, 1, 101)
    shifted = density.shift(level, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] > level[1:-1]).all() and (shifted.diff() > 0).all()
    assert shifted[50] == pytest.approx(0.75)
    torch.testing.assert_close(density.shift(shifted, 1 / 3.0), level)


def test_resolution_shift_goes_through_its_two_points():
    assert density.resolution_shift_factor(256) == pytest.approx(math.exp(0.5))
    assert density.resolution_shift_factor(4096) == pytest.approx(math.exp(1.15))
    assert density.resolution_shift_factor((256 + 4096) // 2) == pytest.approx(math.exp((0.5 + 1.15) / 2))


def test_resolution_shift_is_the_published_formula():
    level, mu = torch.linspace(0.01, 0.99, 50), 0.8
    published = math.exp(mu) / (math.exp(mu) + (1 / level - 1))
    torch.testing.assert_close(density.shift(level, math.exp(mu)), published)


def test_logit_normal_has_its_quantiles():
    level = density.logit_normal(normals(), mean=0.5, std=2.0)
    for quantile, z in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
        expected = 1 / (1 + math.exp(-(0.5 + 2.0 * z)))
        assert level.quantile(quantile).item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29])
def test_mode_covers_the_interval_with_its_density(scale):
    level = density.mode(uniforms(), scale)
    assert 0 <= level.min() < 0.01 and 0.99 < level.max() <= 1
    middle = ((level > 0.4) & (level < 0.6)).float().mean()
    assert middle > 0.21 if scale > 0 else middle < 0.19  # 0.2 if it were uniform


def test_mode_with_zero_scale_is_uniform():
    uniform = uniforms()
    torch.testing.assert_close(density.mode(uniform, 0.0), 1 - uniform)


def test_between_scales_and_may_be_constant():
    level = torch.tensor([0.0, 0.5, 1.0])
    assert density.between(level, 0.2, 0.6).tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert density.between(level, 0.3, 0.3).tolist() == pytest.approx([0.3] * 3)
