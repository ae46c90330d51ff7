"""Copies of modules' weights: those of the moment, whatever the modules do afterwards."""

import pytest
import torch
from torch import nn

from library.checkpoint import snapshot
from library.checkpoint.keymap import module_shapes
from library.checkpoint.snapshot import Snapshot, available_memory
from library.errors import UserError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(3, 5)
        self.second.weight = self.first.weight
        self.narrow = nn.Parameter(torch.randn(3).bfloat16())
        self.scalar = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("mean", torch.arange(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_parameter("missing", None)
        self.config = {"width": 3}


def equal(one, other):
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_the_double_is_the_module_as_it_was():
    module = Tied()
    module.first.register_forward_pre_hook(lambda *given: None)
    module.forward = lambda: None  # as wrappers set it
    copy = Snapshot({"m": module})
    copy.take()
    double = copy.modules["m"]
    assert type(double) is Tied and double.config is module.config and equal(double, module)
    assert module_shapes(double) == module_shapes(module)
    assert double.second.weight is not None and double.second.weight.data_ptr() == double.first.weight.data_ptr()
    assert not double.first._forward_pre_hooks and len(module.first._forward_pre_hooks) == 1 and "forward" not in vars(double)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
        module.mean.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in double.state_dict().items())
    copy.take()
    assert copy.modules["m"] is double and equal(double, module)  # the same memory again


def test_the_copy_is_as_large_as_the_weights():
    copy = Snapshot({"m": Tied()})
    assert copy.nbytes == 64 + 64 + 64 + 64 + 64 + 64 + 64  # 15 weights, 2 x 5 biases, 3, 1, 3, 2: each on a line of 64 bytes
    copy.take()
    assert copy._buffer.numel() == copy.nbytes


def test_too_little_memory_is_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(snapshot, "available_memory", lambda: 1 << 29)
    copy = Snapshot({"m": nn.Linear(1000, 1000)})
    for refused in (copy.require_memory, copy.take):
        with pytest.raises(UserError, match=r"--async_save: the copy of the weights takes 0.0 GB .* only 0.5 GB are free"):
            refused()


def test_memory_that_is_left():
    assert 0 < available_memory() < 1 << 50
