"""Scheduler classes as functions of the step."""

from dataclasses import replace

import pytest
import torch
from torch.optim import lr_scheduler

from library.config.schema import OptimizerOptions
from library.errors import UserError
from library.optim.class_schedule import ClassSchedule
from library.optim.schedule import from_options, learning_rates

TOTAL = 30
BASE = [0.1, 0.02]


def walked(make) -> list[list[float]]:
    """What the class writes into a real optimizer of two groups."""
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in BASE], lr=1.0)
    scheduler = make(optimizer)
    values = []
    for _ in range(TOTAL):
        values.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return values


CASES = [
    ("StepLR", ["step_size=7", "gamma=0.5"], lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
    ("torch.optim.lr_scheduler.ExponentialLR", ["gamma=0.9"], lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    ("CosineAnnealingLR", ["eta_min=0.01"], lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.01)),
    ("CosineAnnealingWarmRestarts", ["T_0=8", "T_mult=2"], lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 8, 2)),
    ("OneCycleLR", ["max_lr=0.5"], lambda o: lr_scheduler.OneCycleLR(o, 0.5, TOTAL, cycle_momentum=False)),
    ("CyclicLR", ["base_lr=0.01", "max_lr=0.1", "step_size_up=5"],
     lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 5, cycle_momentum=False)),
    ("MultiStepLR", ["milestones=[5,9]", "gamma=0.3"], lambda o: lr_scheduler.MultiStepLR(o, [5, 9], 0.3)),
    ("transformers.optimization.get_cosine_schedule_with_warmup", ["num_warmup_steps=5"],
     lambda o: __import__("transformers").get_cosine_schedule_with_warmup(o, 5, TOTAL)),
]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("name, args, make", CASES, ids=[case[0].rpartition(".")[2] for case in CASES])
def test_the_values_are_those_of_the_class(name, args, make):
    schedule = ClassSchedule(name, args, TOTAL, BASE[0])
    expected = walked(make)
    assert [learning_rates(schedule, step, TOTAL, BASE) for step in range(TOTAL)] == expected
    assert [schedule(step, TOTAL) * BASE[0] for step in range(TOTAL)] == pytest.approx([one for one, _ in expected])


def test_any_step_can_be_asked_for_in_any_order():
    """So a resumed run, which begins in the middle, follows the same curve."""
    ahead, resumed = (ClassSchedule("CyclicLR", ["base_lr=0.01", "max_lr=0.1", "step_size_up=4"], TOTAL, 0.1) for _ in range(2))
    values = [ahead.rates(step, TOTAL, BASE) for step in range(TOTAL)]
    assert [resumed.rates(step, TOTAL, BASE) for step in (17, 3, 29, 0)] == [values[step] for step in (17, 3, 29, 0)]


@pytest.mark.parametrize("name, args, said", [
    ("StepLr", [], "did you mean 'StepLR'"),
    ("no_such_package.Scheduler", [], "--lr_scheduler_type: .*cannot be imported"),
    ("math.pi", [], "there is no 'pi' in math"),
    ("StepLR", [], "--lr_scheduler_args: StepLR refuses its arguments"),
    ("StepLR", ["step=3"], "has no argument 'step'; did you mean 'step_size'"),
    ("StepLR", ["step_size=3", "last_epoch=5"], "a resumed run goes on by itself"),
    ("StepLR", ["step_size=3", "optimizer=1"], "it is filled in"),
    ("StepLR", ["step_size=3", "gamma='x'"], "gamma is a number"),
    ("OneCycleLR", ["max_lr=1.0", "cycle_momentum=True"], "only learning rates are scheduled"),
    ("ReduceLROnPlateau", [], "follows the loss"),
    ("LambdaLR", ["lr_lambda=2"], "refuses its arguments"),
])
def test_what_cannot_be_followed_is_told_before_the_run(name, args, said):
    with pytest.raises(UserError, match=said):
        ClassSchedule(name, args, TOTAL, 0.1)


def test_options_name_a_class():
    options = replace(OptimizerOptions(), lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=10", "gamma=0.1"),
                      learning_rate=0.5)
    rates = from_options(options, TOTAL)
    assert learning_rates(rates, 15, TOTAL, [0.5, 0.1]) == pytest.approx([0.05, 0.01])
    assert rates(15, TOTAL) == pytest.approx(0.1)
