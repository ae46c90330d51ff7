import pytest
import torch

from library.objectives.noise import draw

SHAPE = (4, 6, 8)


def test_a_row_depends_on_its_sample_and_not_on_its_batch():
    together = draw(7, 3, ["a", "b", "c"], SHAPE)
    assert together.noise.shape == (3, *SHAPE) and together.uniform.shape == together.normal.shape == (3,)
    assert {tensor.dtype for tensor in (together.noise, together.uniform, together.normal)} == {torch.float32}
    for row, name in enumerate("abc"):
        alone = draw(7, 3, [name], SHAPE)
        assert torch.equal(alone.noise[0], together.noise[row])
        assert alone.uniform[0] == together.uniform[row] and alone.normal[0] == together.normal[row]


@pytest.mark.parametrize("other", [(8, 3, "a"), (7, 4, "a"), (7, 3, "a#1"), (3, 7, "a")])
def test_seed_step_and_sample_each_change_every_draw(other):
    first, second = draw(7, 3, ["a"], SHAPE), draw(other[0], other[1], [other[2]], SHAPE)
    assert not (first.noise == second.noise).any()
    assert first.uniform != second.uniform and first.normal != second.normal


def test_the_level_does_not_depend_on_the_size_of_the_picture():
    small, large = draw(1, 2, ["a"], (4, 2, 2)), draw(1, 2, ["a"], (16, 32, 32))
    assert small.uniform == large.uniform and small.normal == large.normal


def test_no_global_generator_is_used_or_touched():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(1, 2, ["a"], SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw(1, 2, ["a"], SHAPE).noise, first.noise)


def test_distributions():
    names = [f"picture{index}" for index in range(4000)]
    draws = draw(42, 0, names, (1, 8, 8))
    assert draws.noise.mean().abs() < 0.01 and abs(draws.noise.std() - 1) < 0.01
    assert draws.normal.mean().abs() < 0.06 and abs(draws.normal.std() - 1) < 0.05
    assert abs(draws.uniform.mean() - 0.5) < 0.02 and 0 <= draws.uniform.min() and draws.uniform.max() < 1
    rows = torch.stack([draws.uniform, draws.normal, draws.noise[:, 0, 0, 0], draws.noise[:, 0, 0, 1]])
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 0.06


FROZEN = [0.6223816, 0.6847535, -0.3976946, 0.9483167]  # uniform, normal, noise


def test_values_are_frozen():
    """Runs of earlier versions repeat only as long as these numbers stay."""
    draws = draw(42, 10, ["photos/cat.png#0"], (1, 1, 2))
    values = [draws.uniform.item(), draws.normal.item(), *draws.noise.flatten().tolist()]
    assert values == pytest.approx(FROZEN, abs=1e-6)


def test_further_draws_have_streams_of_their_own():
    together, alone = draw(7, 3, ["a", "b"], SHAPE), draw(7, 3, ["b"], (1, 1, 1))
    for purpose in ("offset", "strength"):
        assert torch.equal(together.normals(purpose, 4, 1, 1)[1], alone.normals(purpose, 4, 1, 1)[0])
        assert torch.equal(together.uniforms(purpose)[1:], alone.uniforms(purpose))
    assert together.normals("offset", 4, 1, 1).shape == (2, 4, 1, 1) and together.uniforms("offset").shape == (2,)
    assert not (together.normals("offset", 8) == together.normals("strength", 8)).any()
    assert not torch.equal(together.normals("offset", 8), draw(7, 4, ["a", "b"], SHAPE).normals("offset", 8))
    assert not (together.normals("offset", *SHAPE) == together.noise).any()


def test_names_that_are_not_utf_8():
    draws = [draw(1, 0, [f"0.0/{letter}.png"], (1, 2, 2)).noise for letter in ("\udcff", "\udcfe")]
    assert not torch.equal(*draws)
