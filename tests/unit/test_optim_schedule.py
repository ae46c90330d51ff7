import pytest
import torch
from diffusers.optimization import get_scheduler

from library.errors import UserError
from library.optim.schedule import NAMES, Schedule, multiplier, resolve_warmup

TOTAL = 40


@pytest.mark.parametrize("name, warmup", [(name, 0) for name in NAMES] + [(name, 10) for name in NAMES if name != "constant"])
def test_same_curve_as_the_usual_scheduler(name, warmup):
    """After the warm-up the values are equal; during it ours are one step ahead, as no update is made at a rate of 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL)
    theirs = []
    for _ in range(TOTAL):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    ours = [multiplier(name, step, TOTAL, warmup) for step in range(TOTAL)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert ours[:warmup] == pytest.approx(theirs[1:warmup + 1])


@pytest.mark.parametrize("name", NAMES)
def test_no_update_is_wasted_at_zero(name):
    warmup = 0 if name == "constant" else 5
    values = [multiplier(name, step, TOTAL, warmup) for step in range(TOTAL)]
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
