import io

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from library.errors import UserError
from library.optim import table
from library.optim.groups import Group
from library.optim.records import NOTHING
from library.optim.rounding import StochasticRounding
from library.optim.schedule import Schedule
from library.optim.updater import NonFinite, StepAfterBackward
from tests.unit.optim_helpers import ALL, ARGS, rate

TOTAL = 10


class Run:
    """A small network with its updater; every input is a function of the step."""

    def __init__(self, dtype=torch.float32, optimizer="AdamW", max_grad_norm=1.0, schedule=Schedule("cosine", 2)):
        record = table.find(optimizer)
        learning_rate = rate(record)
        self.model = nn.Sequential(nn.Linear(80, 64), nn.Tanh(), nn.Linear(64, 4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        self.model.to(dtype)
        named = list(self.model.named_parameters())
        self.groups = [Group("first", tuple(named[:2]), learning_rate), Group("last", tuple(named[2:]), learning_rate / (1 if record.one_rate else 10))]
        lifted = StochasticRounding(self.groups, seed=3) if dtype == torch.bfloat16 else None
        built = table.build(optimizer, ARGS.get(optimizer, []), lifted.groups if lifted else self.groups, learning_rate)
        self.optimizer = built
        self.updater = StepAfterBackward(built, self.groups, schedule, max_grad_norm, lifted)

    def backward(self, step: int, scale: float = 1.0) -> None:
        inputs = torch.randn(16, 80, generator=torch.Generator().manual_seed(step))
        output = self.model(inputs.to(self.model[0].weight.dtype)).float()
        ((output - inputs[:, :4]).square().mean() * scale).backward()

    def train(self, first: int, last: int) -> list:
        infos = []
        for step in range(first, last):
            self.backward(step)
            infos.append(self.updater.after_backward(step, TOTAL, last_microbatch=True))
        return infos

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def equal(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


def test_same_as_the_bare_sequence_of_calls():
    run, bare = Run(max_grad_norm=0.5), Run()
    optimizer = torch.optim.AdamW(bare.model.parameters(), lr=1e-2, fused=True)
    for step in range(5):
        run.backward(step)
        bare.backward(step)
        norm = clip_grad_norm_(bare.model.parameters(), 0.5)
        factor = Schedule("cosine", 2)(step, TOTAL)
        info = run.updater.after_backward(step, TOTAL, True)
        for parameter, base in zip(bare.model.parameters(), (1e-2, 1e-2, 1e-3, 1e-3)):
            optimizer.param_groups[0]["params"], optimizer.param_groups[0]["lr"] = [parameter], base * factor
            optimizer.step()
        optimizer.param_groups[0]["params"] = list(bare.model.parameters())
        optimizer.zero_grad()
        assert info.grad_norm == norm.item() > 0.5 and info.learning_rate == 1e-2 * factor and not info.skipped
        assert equal(run.weights(), bare.weights())


def test_nothing_happens_before_the_last_micro_batch():
    run = Run()
    before = run.weights()
    run.backward(0)
    assert run.updater.after_backward(0, TOTAL, last_microbatch=False) is None
    assert equal(run.weights(), before) and all(p.grad is not None for p in run.model.parameters())
    run.backward(1)
    run.updater.after_backward(0, TOTAL, last_microbatch=True)
    assert not equal(run.weights(), before) and all(p.grad is None for p in run.model.parameters())


def test_small_gradients_are_left_alone_and_zero_turns_clipping_off():
    results = [Run(max_grad_norm=limit, optimizer="Adafactor") for limit in (0.0, 1e6)]
    infos = [run.train(0, 3) for run in results]
    assert equal(results[0].weights(), results[1].weights())
    assert [info.grad_norm for info in infos[0]] == [info.grad_norm for info in infos[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_a_weight(bad, dtype):
    run = Run(dtype)
    run.train(0, 2)
    before = run.weights()
    run.backward(2)
    run.model[2].weight.grad[1, 2] = bad
    with pytest.raises(NonFinite) as caught:
        run.updater.after_backward(2, TOTAL, True)
    assert "step 3" in str(caught.value) and "(in 2.weight)" in str(caught.value) and isinstance(caught.value, UserError)
    assert equal(run.weights(), before)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("record", ALL)
def test_stop_and_resume_is_bit_exact(record, dtype):
    optimizer = record.name
    whole = Run(dtype, optimizer)
    whole.train(0, 6)
    first = Run(dtype, optimizer)
    first.train(0, 3)
    weights, state = through_a_file((first.model.state_dict(), first.updater.state_dict()))
    resumed = Run(dtype, optimizer)
    resumed.train(7, 8)  # whatever was there before
    resumed.model.load_state_dict(weights)
    resumed.updater.load_state_dict(state)
    resumed.train(3, 6)
    assert equal(resumed.weights(), whole.weights())
    again, expected = resumed.updater.state_dict(), whole.updater.state_dict()
    names = dict(whole.model.named_parameters()).keys()
    assert again.keys() == expected.keys() == state.keys() >= names
    assert expected.keys() - names <= {"group:first", "group:last", "optimizer:"}
    assert ("group:last" in expected) == (record.keeps != NOTHING)
    for name, values in expected.items():
        for key, value in values.items():
            same = torch.equal(again[name][key], value) if isinstance(value, torch.Tensor) else again[name][key] == value
            assert same, (name, key)
    if optimizer != "ProdigyPlusScheduleFree":  # keeps its own statistics in bfloat16 on purpose
        assert not any(v.dtype == torch.bfloat16 for values in again.values() for v in values.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("record", ALL)
def test_ten_steps_lower_the_loss(record, dtype):
    run = Run(dtype, record.name, max_grad_norm=0.0, schedule=Schedule("constant"))

    def loss() -> float:
        with run.updater.evaluating(), torch.no_grad():
            inputs = torch.randn(256, 80, generator=torch.Generator().manual_seed(99))
            return (run.model(inputs.to(dtype)).float() - inputs[:, :4]).square().mean().item()

    before = loss()
    run.train(0, 10)
    assert loss() < 0.98 * before


@pytest.mark.parametrize("entry, message", [("group:other", "a group 'other'"), ("weight.of.another", "other weights")])
def test_state_of_other_groups_is_refused(entry, message):
    run = Run()
    with pytest.raises(UserError, match=message):
        run.updater.load_state_dict({**run.updater.state_dict(), entry: {"k": 3}})


def test_loaded_state_is_a_copy():
    run, other = Run(), Run()
    run.train(0, 2)
    state = run.updater.state_dict()
    kept = state["0.weight"]["exp_avg"].clone()
    other.updater.load_state_dict(state)
    other.train(2, 4)
    assert torch.equal(state["0.weight"]["exp_avg"], kept)


def test_state_of_a_run_that_never_stepped():
    run, other = Run(), Run()
    state = run.updater.state_dict()
    assert all(values == {} for values in state.values())
    other.train(0, 1)
    other.updater.load_state_dict(state)
    assert other.updater.state_dict() == state


@pytest.mark.parametrize("change", [lambda state: state.pop("0.bias"), lambda state: state.update({"lora_up": {}})])
def test_state_of_other_weights_is_refused(change):
    run = Run()
    run.train(0, 1)
    state = run.updater.state_dict()
    change(state)
    with pytest.raises(UserError, match="other weights .*1 names"):
        run.updater.load_state_dict(state)


def test_float16_scaling_gives_the_same_weights():
    scaled, plain = Run(), Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain_infos = plain.train(0, 4)
    for step in range(4):
        scaled.backward(step, scaler.get_scale() if step else scaler.scale(torch.ones(())).item())
        info = scaled.updater.after_backward(step, TOTAL, True, scaler)
        assert info.grad_norm == pytest.approx(plain_infos[step].grad_norm, rel=1e-6) and not info.skipped
    for ours, others in zip(scaled.weights(), plain.weights()):
        torch.testing.assert_close(ours, others, rtol=1e-5, atol=1e-7)


def test_float16_overflow_skips_the_step_and_lowers_the_scale():
    run = Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    before = run.weights()
    run.backward(0, 2.0**10)
    run.model[0].weight.grad[0, 0] = float("inf")
    info = run.updater.after_backward(0, TOTAL, True, scaler)
    assert info.skipped and scaler.get_scale() == 2.0**9
    assert equal(run.weights(), before) and all(p.grad is None for p in run.model.parameters())
    run.backward(1, scaler.get_scale())
    assert not run.updater.after_backward(1, TOTAL, True, scaler).skipped
    assert not equal(run.weights(), before)


def test_endless_float16_overflow_is_an_error():
    run = Run()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(NonFinite):
        for step in range(100):
            run.backward(step)
            run.model[0].weight.grad.fill_(float("nan"))
            assert run.updater.after_backward(step, TOTAL, True, scaler).skipped
    assert 10 < step < 99


def test_an_optimizer_over_other_parameters_is_caught():
    run, other = Run(), Run()
    with pytest.raises(AssertionError, match="other parameters"):
        StepAfterBackward(other.optimizer, run.groups, Schedule("constant"), 1.0)


def test_a_step_without_any_gradient_is_caught():
    with pytest.raises(AssertionError, match="no gradient"):
        Run().updater.after_backward(0, TOTAL, True)
