"""The size of optimizer states, predicted from a few small parameters, against those of real ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from library.optim import table
from library.optim.groups import Group
from library.optim.states import state_bytes

SHAPES = [(3072, 64), (77, 130), (5000,), (320, 4, 3, 3), (64, 32, 3, 3), (128,), (31,), (8, 8), (2, 4096), (16, 16, 1, 1)]
ARGUMENTS = {"AdamW": [(), ("amsgrad=True",)], "Adafactor": [(), ("beta1=0.9",)]}


@pytest.mark.parametrize(("name", "args"), [(record.name, args) for record in table.RECORDS
                                            for args in ARGUMENTS.get(record.name, [()])])
def test_predicted_bytes_are_those_of_real_states(name, args):
    if name == "PagedAdEMAMix8bit" and not torch.cuda.is_available():
        pytest.skip("pages of this one exist in bitsandbytes for CUDA only")
    parameters = [Parameter(torch.rand(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = table.build(name, args, [Group("all", tuple((str(i), p) for i, p in enumerate(parameters)), 1e-3)], 1e-3)
    optimizer.step()
    tables = [id(value) for state in optimizer.state.values() for value in state.values()]
    predict = state_bytes(name, args)
    loose = 0.2 if name == "ProdigyPlusScheduleFree" else 0  # it has another way to fold a 3x3 kernel of few inputs
    for parameter in parameters:
        real = sum(value.numel() * value.itemsize for value in optimizer.state[parameter].values()
                   if isinstance(value, torch.Tensor) and value.numel() > 1 and tables.count(id(value)) == 1)
        assert predict(parameter.shape) == pytest.approx(real, abs=256 if loose else 12, rel=loose), parameter.shape  # scales of blocks that are not full
        assert real > 0 or name == "SGD"


def test_the_published_figures():
    eight = state_bytes("AdamW8bit", ())
    assert eight((12288, 3072)) / (12288 * 3072) == pytest.approx(2.03, abs=0.002) and eight((3072,)) == 8 * 3072
    assert state_bytes("AdamW", ())((12288, 3072)) == 8 * 12288 * 3072
    assert state_bytes("Adafactor", ())((12288, 3072)) == 4 * (12288 + 3072) and state_bytes("AdamW", ())(()) == 0
