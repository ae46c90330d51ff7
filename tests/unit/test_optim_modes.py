"""Schedule-free optimizers: looking at the delivered weights changes nothing in the training."""

import pytest
import torch
from torch import nn

from library.optim import rounding, table
from library.optim.groups import Group
from library.optim.rounding import StochasticRounding
from library.optim.schedule import Schedule
from library.optim.updater import StepAfterBackward
from tests.unit.optim_helpers import ARGS, WITH_MODES, rate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Run:
    def __init__(self, record, dtype, chunk_bytes=rounding.CHUNK_BYTES):
        generator = torch.Generator().manual_seed(0)
        self.weights = [nn.Parameter((torch.randn(shape, generator=generator) / 4).to(dtype)) for shape in ((48, 40), (40,), (8, 4, 3, 3))]
        self.weights.append(nn.Parameter(torch.ones(3)))  # float32 in every run
        pairs = [(f"w{index}", weight) for index, weight in enumerate(self.weights)]
        self.groups = [Group("a", tuple(pairs[:2]), rate(record)), Group("b", tuple(pairs[2:]), rate(record))]
        self.lifted = StochasticRounding(self.groups, 1, chunk_bytes) if dtype == torch.bfloat16 else None
        stepped = self.lifted.groups if self.lifted else self.groups
        self.optimizer = table.build(record.name, ARGS.get(record.name, []), stepped, rate(record))
        self.stepped = [parameter for group in stepped for _, parameter in group.params]
        self.updater = StepAfterBackward(self.optimizer, self.groups, Schedule("constant"), 0.0, self.lifted)

    def train(self, first, last):
        for step in range(first, last):
            for index, weight in enumerate(self.weights):
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + index))
                weight.grad = (weight.detach().float() + noise / 4).to(weight.dtype)
            self.updater.after_backward(step, 20, True)

    def values(self):
        return [weight.detach().clone() for weight in self.weights]


def equal(ours, others):
    return all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


@DTYPES
@pytest.mark.parametrize("record", WITH_MODES)
def test_looking_changes_nothing_at_all(record, dtype):
    watched, left_alone = Run(record, dtype), Run(record, dtype)
    for first, last in ((0, 7), (7, 9), (9, 12)):
        with watched.updater.evaluating():
            pass
        watched.train(first, last)
        left_alone.train(first, last)
        before = watched.values()
        addresses = [weight.data_ptr() for weight in watched.weights]
        with watched.updater.evaluating(), watched.updater.evaluating():  # a preview inside a save
            assert not equal(watched.values(), before)
        assert equal(watched.values(), before) and [weight.data_ptr() for weight in watched.weights] == addresses
    assert equal(watched.values(), left_alone.values())
    ours, theirs = watched.updater.state_dict(), left_alone.updater.state_dict()
    assert ours["group:a"] == theirs["group:a"] and equal([s["z"] for n, s in ours.items() if "z" in s],
                                                          [s["z"] for n, s in theirs.items() if "z" in s])


@pytest.mark.parametrize("record", WITH_MODES)
def test_what_is_seen_is_what_the_library_delivers(record):
    run, bare = Run(record, torch.float32), Run(record, torch.float32)
    run.train(0, 8)
    bare.train(0, 8)
    bare.optimizer.eval()
    with run.updater.evaluating():
        assert equal(run.values(), bare.values())


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 48 * 40 + 1, 10**9])
@pytest.mark.parametrize("record", WITH_MODES)
def test_bfloat16_weights_are_averaged_in_float32(record, chunk_bytes):
    """x = y + (1 - 1 / beta) (z - y), from the float32 z, rounded once."""
    run = Run(record, torch.bfloat16, chunk_bytes)
    run.train(0, 8)
    beta = run.optimizer.param_groups[0].get("betas", (run.optimizer.param_groups[0].get("momentum"),))[0]
    expected = [weight.float().lerp(run.optimizer.state[stepped]["z"], 1 - 1 / beta).to(weight.dtype)
                for weight, stepped in zip(run.values(), run.stepped, strict=True)]
    with run.updater.evaluating():
        assert equal(run.values(), expected)
        assert all(parameter.untyped_storage().nbytes() == 4 for parameter in run.stepped if parameter.numel() > 3)


@pytest.mark.parametrize("record", WITH_MODES)
def test_neither_state_nor_steps_inside(record):
    run = Run(record, torch.float32)
    run.train(0, 2)
    with run.updater.evaluating():
        with pytest.raises(AssertionError, match="not inside evaluating"):
            run.updater.state_dict()
        with pytest.raises(AssertionError, match="inside evaluating"):
            run.train(2, 3)


@pytest.mark.parametrize("record", WITH_MODES)
def test_an_error_inside_puts_the_weights_back(record):
    run = Run(record, torch.float32)
    run.train(0, 8)
    before = run.values()
    with pytest.raises(KeyError), run.updater.evaluating():
        raise KeyError
    assert equal(run.values(), before)
    run.train(8, 9)


@DTYPES
def test_all_others_are_left_alone(dtype):
    run = Run(table.find("AdamW"), dtype)
    run.train(0, 3)
    before = run.values()
    with run.updater.evaluating():
        assert equal(run.values(), before)
        run.updater.state_dict()
