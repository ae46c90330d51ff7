"""The facts about torch that the memory engine rests on."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from library.memory.boundaries import Boundaries, Listener
from library.memory.recompute import Recompute
from tests.unit.memory_helpers import Model


class Log(Listener):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def __getattribute__(self, key):
        if key in ("enter_forward", "enter_backward", "leave_backward", "abort"):
            return lambda *place: self.log.append((self.name, key, *place))
        return super().__getattribute__(key)


def watched(count=3, recompute=True, listeners=("a",)):
    model, log = Model(count), []
    if recompute:
        Recompute(model.blocks)
    boundaries = Boundaries(model.blocks)
    boundaries.listeners += [Log(name, log) for name in listeners]
    return model, boundaries, log


def loss(model):
    output, side = model(torch.randn(2, 3, 5))
    return output.square().mean() + side


@pytest.mark.parametrize("recompute", [False, True])
def test_order(recompute):
    model, _, log = watched(recompute=recompute)
    loss(model).backward()
    assert log == [("a", "enter_forward", 0), ("a", "enter_forward", 1), ("a", "enter_forward", 2),
                   ("a", "enter_backward", 2), ("a", "leave_backward", 2), ("a", "enter_backward", 1), ("a", "leave_backward", 1),
                   ("a", "enter_backward", 0), ("a", "leave_backward", 0)]


def test_listeners_are_left_in_reverse():
    model, _, log = watched(1, listeners=("a", "b"))
    loss(model).backward()
    assert [name for name, *_ in log] == ["a", "b", "a", "b", "b", "a"]


def test_gradients_of_a_block_are_complete_when_it_is_left_and_none_is_begun():
    model, boundaries, _ = watched(4)
    seen = []

    class Look(Listener):
        def leave_backward(self, place):
            seen.append([sum(p.grad is not None for p in block.parameters()) for block in model.blocks])

    boundaries.listeners.append(Look())
    loss(model).backward()
    complete = len(list(model.blocks[0].parameters())) - 1  # one of them is unused
    assert seen == [[complete if index >= left else 0 for index in range(4)] for left in (3, 2, 1, 0)]


def test_a_block_that_the_model_itself_recomputes_is_entered_once():
    model, _, log = watched(1, recompute=False)
    x = torch.randn(2, 3, 24, requires_grad=True)
    checkpoint(model.blocks[0], x, shift=torch.zeros(1, 24), use_reentrant=False)[0].sum().backward()
    assert [entry[1] for entry in log] == ["enter_forward", "enter_backward", "leave_backward"]


def test_no_gradients_no_backward_and_an_exception_is_noticed():
    model, boundaries, log = watched(2)
    with torch.no_grad():
        loss(model)
    loss(model)
    assert [entry[1:] for entry in log] == [("enter_forward", 0), ("enter_forward", 1)] * 2
    hook = model.blocks[0].rise.weight.register_hook(lambda gradient: 1 / 0)
    log.clear()
    with pytest.raises(ZeroDivisionError):
        loss(model).backward()
    assert log[-1] == ("a", "enter_backward", 0)
    boundaries.notice_abort()
    boundaries.notice_abort()
    assert log[-1] == ("a", "abort") and log[-2] == ("a", "enter_backward", 0)
    hook.remove()
    log.clear()
    loss(model).backward()
    assert log[-1] == ("a", "leave_backward", 0) and ("a", "abort") not in log


def test_outputs_whose_gradients_nobody_would_see_are_caught():
    class Nested(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, (y,)

    block = Nested(2, 2)
    Boundaries([block])
    with pytest.raises(AssertionError, match="Nested returns .'Tensor', 'tuple'.: its backward pass cannot be seen"):
        block(torch.ones(1, 2))


def test_keyword_inputs_give_no_warning():
    model, _, _ = watched(1)
    model.blocks[0].requires_grad_(True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Boundaries(model.blocks)
        x, _ = model.blocks[0](x=torch.randn(1, 2, 24), shift=torch.zeros(1, 24))
        x.sum().backward()
    assert not said
