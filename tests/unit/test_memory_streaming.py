import pytest
import torch
from torch import nn

from library.errors import UserError
from library.memory.boundaries import Boundaries
from library.memory.recompute import Recompute
from library.memory.streaming import Streaming
from library.memory.transport import CpuTransport
from tests.unit.memory_helpers import LateTransport, Model, Run, Setting, assert_same

TRANSPORTS = pytest.mark.parametrize("transport", [CpuTransport, LateTransport], ids=["immediate", "late"])
STEPS = 3


def resident(**changes) -> Run:
    return Run(Setting(**changes))


def check(setting: Setting, **same) -> Run:
    """Three steps equal to the resident run with the plain updater: losses, weights and optimizer state, bit for bit."""
    plain, ours = resident(**same), Run(setting)
    assert ours.train(0, STEPS) == plain.train(0, STEPS)
    assert_same(ours.weights(), plain.weights())
    assert_same(ours.updater.state_dict(), plain.updater.state_dict())
    return ours


@TRANSPORTS
@pytest.mark.parametrize("unit", ["parameter", "block"])
@pytest.mark.parametrize("streamed", [1, 3, 5])
def test_equal_to_the_resident_run(streamed, unit, transport):
    check(Setting(streamed=streamed, unit=unit, transport=transport))
