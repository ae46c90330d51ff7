import pytest
import torch
from torch import nn

from library.optim import rounding, table
from library.optim.groups import Group
from library.optim.rounding import StochasticRounding, round_stochastically
from tests.unit.optim_helpers import ALL, ARGS, rate

# The long course is run for one optimizer of each kind; what holds step by step is tested for all.
OPTIMIZERS = ["AdamW", "AdamW8bit", "Adafactor", "AdEMAMix8bit", "RMSprop"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(values, out, generator(seed))
    return out


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-20, 65504.5])
def test_rounding_is_to_one_of_the_two_neighbours_and_unbiased(value):
    many = torch.full((200_000,), value, dtype=torch.float32)
    out = rounded(many).double()
    lower = (many[:1].view(torch.int32) & -65536).view(torch.float32).item()  # towards zero
    upper = ((many[:1].view(torch.int32) & -65536) + 65536).view(torch.float32).item()
    assert set(out.unique().tolist()) <= {lower, upper}
    share = (value - lower) / (upper - lower)
    deviation = (share * (1 - share) / len(many)) ** 0.5
    assert (out == upper).double().mean().item() == pytest.approx(share, abs=5 * deviation + 1e-9)


def test_numbers_of_bfloat16_are_kept():
    exact = torch.randn(10_000, generator=generator()).bfloat16()
    assert torch.equal(rounded(exact.float()), exact)


def test_what_is_not_a_number_stays_visible():
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    for seed in range(20):
        out = rounded(patterns.view(torch.float32), seed)
        assert out[:4].isnan().all() and out[4] == float("inf") and out[5] == -float("inf")


@pytest.mark.parametrize("make", [
    lambda t: t[0, 0].clone(), lambda t: t.t(), lambda t: t[:, :1], lambda t: t.flatten(),
    lambda t: t.view(1, 4, 5, 5).contiguous(memory_format=torch.channels_last),
], ids=["scalar", "transposed", "column", "flat", "channels_last"])
def test_any_layout(make, monkeypatch):
    monkeypatch.setattr(rounding, "_ROUND_ELEMENTS", 30)  # several parts, each with a rest
    values = make(torch.randn(10, 10, generator=generator()))
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(values, out, generator())
    torch.testing.assert_close(out.float(), values, rtol=2**-7, atol=0)


def problem(dtype: torch.dtype, optimizer_name: str, seed: int, chunk_bytes: int = rounding.CHUNK_BYTES):
    """A linear regression with weights of the size of a network's; returns what a step needs."""
    weight = nn.Parameter(torch.randn(64, 80, generator=generator()).div(8).to(dtype))
    bias = nn.Parameter(torch.zeros(64, dtype=torch.float32))
    truth = weight.detach().float() + 0.01 * torch.randn(64, 80, generator=generator(1))
    groups = [Group("all", (("weight", weight), ("bias", bias)), 2e-5)]
    lifted = StochasticRounding(groups, seed, chunk_bytes)
    return weight, bias, truth, lifted, table.build(optimizer_name, [], lifted.groups, 2e-5)


def losses(dtype: torch.dtype, optimizer_name: str, stochastic: bool, steps: int = 120) -> list[float]:
    weight, bias, truth, lifted, optimizer = problem(dtype, optimizer_name, seed=0)
    if not stochastic:
        optimizer = table.build(optimizer_name, [], [Group("all", (("weight", weight), ("bias", bias)), 2e-5)], 2e-5)
    curve = []
    for step in range(steps):
        inputs = torch.randn(32, 80, generator=generator(100 + step))
        loss = (inputs @ (weight.float() - truth).T + bias).square().mean()
        loss.backward()
        curve.append((weight.detach().float() - truth).square().mean().item())
        if stochastic:
            lifted.step(optimizer, step)
        else:
            optimizer.step()
        weight.grad = bias.grad = None
    return curve


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_curve_of_float32_where_plain_bfloat16_stalls(name):
    exact, plain = losses(torch.float32, name, stochastic=False), losses(torch.bfloat16, name, stochastic=False)
    stochastic = losses(torch.bfloat16, name, stochastic=True)
    progress = exact[0] - exact[-1]
    assert progress > 0.1 * exact[0]
    assert plain[0] - plain[-1] < 0.35 * progress
    assert 0.85 * progress < stochastic[0] - stochastic[-1] < 1.15 * progress


@pytest.mark.parametrize("record", ALL)
def test_state_is_that_of_float32_training(record):
    """One step from the same numbers: the optimizer cannot tell a lifted weight from a float32 one."""
    name = record.name
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        weight, _, _, lifted, optimizer = problem(dtype, name, seed=0)
        with torch.no_grad():
            weight.copy_(weight.bfloat16())
        weight.grad = torch.randn(64, 80, generator=generator(5)).bfloat16().to(dtype)
        lifted.step(optimizer, 0)
        states.append(optimizer.state[lifted.groups[0].params[0][1]])
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == states[1][key].dtype and (value.dtype != torch.bfloat16 or name.startswith("ProdigyPlus"))
            assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 16 * 20 + 1])
@pytest.mark.parametrize("record", ALL)
def test_chunks_change_nothing(record, chunk_bytes):
    """Also where a statistic over all weights (Prodigy) or a count of calls (schedule-free) would notice the difference."""
    def train(limit):
        weights = [nn.Parameter(torch.randn(16, 20, generator=generator(i)).bfloat16()) for i in range(4)]
        plain = nn.Parameter(torch.randn(20, generator=generator(9)))
        groups = [Group("first", tuple((f"w{i}", w) for i, w in enumerate(weights[:2])), rate(record)),
                  Group("rest", (("w2", weights[2]), ("w3", weights[3]), ("plain", plain)), rate(record))]
        lifted = StochasticRounding(groups, 3, limit)
        optimizer = table.build(record.name, ARGS.get(record.name, []), lifted.groups, rate(record))
        for step in range(7 if record.name.startswith("RAdam") else 3):
            for index, weight in enumerate([*weights[:3], plain]):  # one never gets a gradient
                weight.grad = torch.randn(weight.shape, generator=generator(10 * step + index)).to(weight.dtype)
            lifted.step(optimizer, step)
            assert all(weight.grad is None for weight in [*weights, plain])
        shared = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return [*weights, plain], shared

    (weights, shared), (expected, numbers) = train(chunk_bytes), train(rounding.CHUNK_BYTES)
    assert all(torch.equal(one, other) for one, other in zip(weights, expected)) and shared == numbers
    assert not torch.equal(weights[0], torch.randn(16, 20, generator=generator(0)).bfloat16())  # it did step


def test_stand_ins_hold_no_memory_and_weights_keep_their_identity():
    weight, bias, _, lifted, optimizer = problem(torch.bfloat16, "AdamW", seed=0)
    (_, stand_in), (_, same_bias) = lifted.groups[0].params
    assert same_bias is bias and stand_in.shape == weight.shape and stand_in.dtype == torch.float32
    address, fired = weight.data_ptr(), []
    weight.register_post_accumulate_grad_hook(lambda p: fired.append(1))  # as DistributedDataParallel relies on
    for step in range(2):
        assert stand_in.untyped_storage().nbytes() == 4
        (weight.float().sum() + bias.sum()).backward()
        lifted.step(optimizer, step)
    assert weight.data_ptr() == address and weight.dtype == torch.bfloat16 and fired == [1, 1]


def test_largest_copy_stays_within_the_chunk(monkeypatch):
    weights = [nn.Parameter(torch.zeros(100, dtype=torch.bfloat16)) for _ in range(10)]
    lifted = StochasticRounding([Group("all", tuple((str(i), w) for i, w in enumerate(weights)), 1.0)], 0, chunk_bytes=1200)
    sizes = []

    class Spy(torch.optim.SGD):
        def step(self):
            sizes.append(sum(p.untyped_storage().nbytes() for p in self.param_groups[0]["params"] if p.grad is not None))
            super().step()

    optimizer = Spy([p for _, p in lifted.groups[0].params], lr=1.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    lifted.step(optimizer, 0)
    assert sizes == [1200, 1200, 1200, 400]
    assert all((weight == -1).all() for weight in weights)


def test_rounding_follows_seed_and_step():
    def after(seed, step):
        weight, _, _, lifted, optimizer = problem(torch.bfloat16, "AdamW", seed)
        weight.grad = torch.ones_like(weight)
        lifted.step(optimizer, step)
        return weight.detach()

    assert torch.equal(after(1, 5), after(1, 5))
    assert not torch.equal(after(1, 5), after(2, 5)) and not torch.equal(after(1, 5), after(1, 6))
