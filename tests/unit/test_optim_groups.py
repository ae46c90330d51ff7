import pytest
import torch
from torch import nn

from library.optim.groups import Group, assert_partition, named_parameters


def model() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[1].bias.requires_grad_(False)
    return module


def trainable(module: nn.Module) -> list:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def test_a_partition_passes():
    module = model()
    pairs = trainable(module)
    groups = [Group("first", tuple(pairs[:1]), 1e-3), Group("rest", tuple(pairs[1:]), 1e-4)]
    assert_partition(groups, module.named_parameters())
    assert list(named_parameters(groups)) == ["0.weight", "0.bias", "1.weight"]


@pytest.mark.parametrize("breach, message", [
    (lambda pairs, module: pairs[1:], "in no group: ['0.weight']"),
    (lambda pairs, module: pairs + [("again", pairs[0][1])], "more than one group"),
    (lambda pairs, module: pairs + [("1.bias", module[1].bias)], "not trainable: ['1.bias']"),
    (lambda pairs, module: pairs + [("foreign", nn.Parameter(torch.zeros(1)))], "not trainable: ['foreign']"),
    (lambda pairs, module: pairs + [pairs[0]], "used twice: ['0.weight']"),
])
def test_every_breach_is_named(breach, message):
    module = model()
    groups = [Group("all", tuple(breach(trainable(module), module)), 1e-3)]
    with pytest.raises(AssertionError) as caught:
        assert_partition(groups, module.named_parameters())
    assert message in str(caught.value)
