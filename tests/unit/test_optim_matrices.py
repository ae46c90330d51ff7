"""Adafactor, CAME and Muon on convolutions: as on the matrix with a row for each filter."""

import pytest
import torch
from torch import nn

from library.optim import table
from library.optim.groups import Group
from library.optim.matrices import as_matrices
from library.optim.records import RECORDS
from tests.unit.optim_helpers import param

OVER_MATRICES = [param(record) for record in RECORDS if record.matrices or record.name == "Muon"]


def build(record, weight, args=()):
    return table.build(record.name, list(args), [Group("all", (("weight", weight),), 1e-2)], 1e-2)


def weights(shape=(32, 16, 3, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 8


def step(optimizer, weight, number, shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(10 + number))
    weight.grad = gradient.reshape(weight.shape).to(memory_format=torch.channels_last) if weight.ndim == 4 and \
        not weight.is_contiguous() else gradient.reshape(weight.shape)
    optimizer.step()
    weight.grad = None


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (32, 16, 1, 1), (8, 4, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("record", OVER_MATRICES)
def test_a_convolution_is_stepped_as_the_matrix_of_its_filters(record, shape):
    conv, matrix = nn.Parameter(weights(shape)), nn.Parameter(weights(shape).flatten(1))
    over_conv, over_matrix = build(record, conv), build(record, matrix)
    for number in range(3):
        step(over_conv, conv, number, shape)
        step(over_matrix, matrix, number, shape)
    assert torch.equal(conv.flatten(1), matrix) and conv.shape == shape and conv.grad is None
    for key, value in over_conv.state[conv].items():
        other = over_matrix.state[matrix][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("record", OVER_MATRICES)
def test_channels_last_weights_take_the_same_steps(record):
    """The order of a filter's numbers is another one, and so is the order of sums: equal up to rounding."""
    plain, last = nn.Parameter(weights()), nn.Parameter(weights().to(memory_format=torch.channels_last))
    address = last.data_ptr()
    optimizers = build(record, plain), build(record, last)
    for number in range(3):
        step(optimizers[0], plain, number, plain.shape)
        step(optimizers[1], last, number, plain.shape)
    tolerance = 2e-3 if record.name == "Muon" else 1e-6  # its iteration runs in bfloat16
    torch.testing.assert_close(plain.detach(), last.detach().contiguous(), rtol=0, atol=tolerance)
    assert last.data_ptr() == address and last.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(last.detach(), weights())


def test_factors_of_a_3x3_kernel_are_small():
    """Of its last two dimensions they would hold 6 numbers for every 9 of the weight."""
    weight = nn.Parameter(weights((64, 64, 3, 3)))
    optimizer = build(table.find("Adafactor"), weight)
    step(optimizer, weight, 0, weight.shape)
    held = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.ndim)
    assert held == 64 + 64 * 9


def test_hooks_and_identity_survive():
    """DistributedDataParallel keeps hooks on the gradient accumulators of the parameters."""
    module, fired = nn.Conv2d(4, 8, 3), []
    module.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.shape))
    accumulator = module.weight.expand_as(module.weight).grad_fn.next_functions[0][0]
    optimizer = build(table.find("Adafactor"), module.weight)
    for number in range(3):
        module(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        optimizer.step()
        module.weight.grad = None
        assert module.weight.expand_as(module.weight).grad_fn.next_functions[0][0] is accumulator
    assert fired == [torch.Size([8, 4, 3, 3])] * 3


def test_an_error_inside_puts_the_shapes_back():
    weight = nn.Parameter(weights())
    weight.grad = torch.ones_like(weight)
    with pytest.raises(KeyError), as_matrices([weight]):
        assert weight.shape == weight.grad.shape == (32, 144)
        raise KeyError
    assert weight.shape == weight.grad.shape == (32, 16, 3, 3)


def test_muon_is_torch_s_for_matrices_and_adamw_for_the_rest():
    shapes = [(24, 16), (16,), (), (1, 16), (16, 1), (8, 2, 3, 3)]
    parameters = [nn.Parameter(weights(shape)) for shape in shapes]
    groups = [Group("a", tuple((str(i), p) for i, p in enumerate(parameters[:3])), 1e-2),
              Group("b", tuple((str(i), p) for i, p in enumerate(parameters[3:], 3)), 2e-2)]
    optimizer = table.build("Muon", ["weight_decay=0.1", "adamw_betas=0.8,0.9"], groups, 1e-2)
    references = []
    for index, shape in enumerate(shapes):
        twin = nn.Parameter(weights(shape).flatten(1) if len(shape) > 2 else weights(shape))
        lr = 1e-2 if index < 3 else 2e-2
        references.append((twin, torch.optim.Muon([twin], lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
                           if index in (0, 5) else torch.optim.AdamW([twin], lr=lr, weight_decay=0.1, betas=(0.8, 0.9))))
    for number in range(3):
        for index, (parameter, (twin, _)) in enumerate(zip(parameters, references)):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * number + index))
            twin.grad = parameter.grad.clone().reshape(twin.shape)
        optimizer.step()
        for _, reference in references:
            reference.step()
    for parameter, (twin, _) in zip(parameters, references):
        assert torch.equal(parameter.detach().reshape(twin.shape), twin.detach())


def test_muon_follows_changed_learning_rates():
    parameters = [nn.Parameter(weights((8, 8))), nn.Parameter(weights((8,)))]
    optimizer = table.build("Muon", [], [Group("a", (("m", parameters[0]), ("v", parameters[1])), 1e-2)], 1e-2)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before))
