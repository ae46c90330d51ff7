import math
from dataclasses import replace

import pytest
import torch
from diffusers.optimization import get_scheduler as diffusers_scheduler
from transformers.optimization import Adafactor
from transformers.optimization import get_scheduler as transformers_scheduler

from library.config.schema import SCHEDULES, OptimizerOptions
from library.errors import UserError
from library.optim.schedule import NAMES, UNWARMED, Schedule, Shape, curve, from_options, learning_rates, multiplier, resolve_warmup

TOTAL = 40
# The dialect's settings, and the same in the words of the libraries (a number of cycles there counts half waves twice).
CASES = [
    ("constant", Shape(), {}), ("constant_with_warmup", Shape(), {}), ("linear", Shape(), {}), ("cosine", Shape(), {}),
    ("cosine_with_restarts", Shape(), {}), ("cosine_with_restarts", Shape(cycles=3), {"num_cycles": 3}),
    ("polynomial", Shape(), {"lr_end": 0.0}),
    ("polynomial", Shape(power=2.5, lowest=0.1), {"power": 2.5, "lr_end": 0.1}),
    ("inverse_sqrt", Shape(), {}), ("inverse_sqrt", Shape(timescale=15), {"timescale": 15}),
    ("cosine_with_min_lr", Shape(lowest=0.2), {"min_lr_rate": 0.2}),
    ("cosine_with_min_lr", Shape(cycles=3, lowest=0.2), {"num_cycles": 1.5, "min_lr_rate": 0.2}),
    ("warmup_stable_decay", Shape(decay_steps=8), {"num_decay_steps": 8}),
    ("warmup_stable_decay", Shape(cycles=3, decay_steps=20, lowest=0.1),
     {"num_decay_steps": 20, "min_lr_ratio": 0.1, "num_cycles": 1.5}),
    ("piecewise_constant", Shape(rules=((1.0, 10.0), (0.1, 25.0), (0.01, math.inf))), {"step_rules": "1:10,0.1:25,0.01"}),
]


def walked(name: str, warmup: int, specific: dict) -> list[float]:
    """The factors of transformers' scheduler of that name; of diffusers' where only that one has it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "piecewise_constant":
        reference = diffusers_scheduler(name, optimizer, **specific)
    else:
        reference = transformers_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL,
                                           scheduler_specific_kwargs=specific)
    values = []
    for _ in range(TOTAL):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    return values


@pytest.mark.parametrize("name, shape, specific, warmup", [
    (*case, warmup) for case in CASES for warmup in (0, 10) if not (warmup and case[0] in UNWARMED)])
def test_same_curve_as_the_usual_scheduler(name, shape, specific, warmup):
    """After the warm-up the values are equal; during it ours are one step ahead, as no update is made at a rate of 0."""
    theirs = walked(name, warmup, specific)
    ours = [multiplier(name, step, TOTAL, warmup, shape) for step in range(TOTAL)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    if name != "warmup_stable_decay" or not shape.lowest:  # theirs rises from the lowest factor
        assert ours[:warmup] == pytest.approx(theirs[1:warmup + 1])
    else:
        assert ours[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])


def test_all_schedules_are_compared_and_on_offer():
    assert {case[0] for case in CASES} | {"adafactor"} == set(NAMES) == set(SCHEDULES)


def test_adafactor_s_own_rate():
    """The weights after --lr_scheduler adafactor are those of its relative steps, which the table refuses as an argument."""
    results = []
    for own in (True, False):
        weight = torch.nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
        optimizer = Adafactor([weight], lr=None if own else 1.0, relative_step=own, scale_parameter=True)
        for step in range(20):
            weight.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
            if not own:
                optimizer.param_groups[0]["lr"] = multiplier("adafactor", step, 20, 0)
            optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)
    assert multiplier("adafactor", 39_999, 50_000, 0) == pytest.approx(1 / 200)
    assert multiplier("adafactor", 4_999, 50_000, 10_000) == pytest.approx(1e-6 * 5_000, rel=1e-3)  # its warmup_init


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("adafactor", "piecewise_constant")])
def test_no_update_is_wasted_at_zero(name):
    warmup = 0 if name == "constant" else 5
    values = [multiplier(name, step, TOTAL, warmup, Shape(decay_steps=10)) for step in range(TOTAL)]
    assert min(values) > 0 and max(values) == 1


def test_steps_past_the_end_stay_at_the_end():
    assert multiplier("linear", TOTAL + 5, TOTAL, 0) == 0
    assert multiplier("cosine", TOTAL + 5, TOTAL, 0) == pytest.approx(0)


@pytest.mark.parametrize("value, steps", [(None, 0), ("", 0), ("0", 0), ("0.0", 0), (0, 0), ("100", 100), (100, 100),
                                          ("0.05", 50), (0.05, 50), ("5%", 50), (" 12.5 %", 125), ("100%", 1000),
                                          ("1", 1), (1.0, 1), ("1000", 1000)])
def test_warm_up_as_steps_ratio_or_percentage(value, steps):
    assert resolve_warmup(value, 1000) == steps


@pytest.mark.parametrize("value", ["ten", "-5", "1.5", "101%", "nan", "inf", "%", "1001"])
def test_other_warm_ups_are_refused(value):
    with pytest.raises(UserError, match="--lr_warmup_steps"):
        resolve_warmup(value, 1000)


def test_schedule_refuses_what_it_cannot_do():
    assert Schedule("linear", 0)(0, 10) == 1
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        Schedule("cosin")
    with pytest.raises(UserError, match="constant_with_warmup"):
        Schedule("constant", 5)
    with pytest.raises(UserError, match="piecewise_constant needs its steps"):
        Schedule("piecewise_constant")


def test_options_become_a_schedule():
    options = replace(OptimizerOptions(), lr_scheduler="warmup_stable_decay", lr_warmup_steps=0.1, lr_decay_steps=0.25,
                      lr_scheduler_min_lr_ratio=0.5)
    rates = from_options(options, 40)
    values = [rates(step, 40) for step in range(40)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0] and set(values[4:31]) == {1.0} and 0.5 < values[39] < values[31] < 1
    options = replace(OptimizerOptions(), lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules=1:2,0.5:4,0.1",))
    assert [from_options(options, 6)(step, 6) for step in range(6)] == [1, 1, 0.5, 0.5, 0.1, 0.1]
    quoted = replace(options, lr_scheduler_args=("step_rules='1:2,0.5:4,0.1'",))
    assert from_options(quoted, 6) == from_options(options, 6)
    assert from_options(OptimizerOptions(), 6) == Schedule("constant")


@pytest.mark.parametrize("changes, said", [
    ({"lr_scheduler": "linear", "lr_warmup_steps": 41}, "--lr_warmup_steps: 41 steps of warm-up are more than the 40"),
    ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 41}, "--lr_decay_steps: 41 steps of decay are more"),
    ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 30, "lr_warmup_steps": 11}, "--lr_decay_steps: 11 .* give at most 29"),
    ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycles=2",)}, "--lr_scheduler_args: .*takes no 'num_cycles'"),
    *(({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": (f"step_rules={rules}",)}, "--lr_scheduler_args: ")
      for rules in ("1:10", "1:ten,2", "1:10,0.5:5,1", "1:0,1", "-1:10,1", "1:10,1:10,2", "nan", "1:2.5,1")),
])
def test_options_that_make_no_schedule(changes, said):
    with pytest.raises(UserError, match=said):
        from_options(replace(OptimizerOptions(), **changes), 40)


def test_the_curve_to_draw_has_both_ends():
    steps, (one, other) = curve(Schedule("linear"), 10_000, [1.0, 0.5], points=100)
    assert steps[0] == 1 and steps[-1] == 10_000 and 100 <= len(steps) <= 102 and one[0] == 1 and other[0] == 0.5
    assert one[-1] == pytest.approx(1e-4)
    assert curve(Schedule("constant"), 1, [2.0]) == ([1], [[2.0]])


def test_every_process_asks_for_the_same_steps():
    """A function of (step, total): nothing in it counts processes, calls or time."""
    rates = Schedule("cosine_with_restarts", 4, Shape(cycles=2))
    forwards = [rates(step, TOTAL) for step in range(TOTAL)]
    assert [rates(step, TOTAL) for step in reversed(range(TOTAL))] == forwards[::-1]
    assert learning_rates(rates, 7, TOTAL, [1.0, 0.1]) == [forwards[7], 0.1 * forwards[7]]
