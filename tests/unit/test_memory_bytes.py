"""The formulas against what a run counts, and what a run may not do once it is in its stride."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory import bytes as formulas
from library.memory.ring import Ring
from library.memory.schedule import evenly, make_schedule
from library.memory.streaming import Streaming
from library.memory.transport import CpuTransport
from tests.unit.memory_helpers import Run, Setting


@settings(max_examples=20)
@given(data=st.data())
def test_copies_of_a_step_are_those_of_the_formulas(data):
    blocks = data.draw(st.integers(1, 7), "blocks")
    streamed, micro = data.draw(st.integers(1, blocks), "streamed"), data.draw(st.integers(1, 3), "micro")
    look_ahead, states = data.draw(st.integers(0, 7), "look_ahead"), data.draw(st.booleans(), "states")
    run = Run(Setting(blocks=blocks, streamed=streamed, look_ahead=look_ahead, micro=micro, unit="block", stream_states=states))
    run.train(0, 2)
    streaming = run.streaming
    rings = [streaming.weights, *streaming.step_rings]
    before = [(ring.bytes_in, ring.bytes_out) for ring in rings]
    run.train(2, 3)
    counted = [formulas.Copies(ring.bytes_in - i, ring.bytes_out - o) for ring, (i, o) in zip(rings, before, strict=True)]
    sizes = [layout.size for layout in streaming.layouts]
    trained = [formulas.region_bytes((p.shape, p.dtype) for p in parameters) for parameters in streaming.trained]
    expected = [formulas.weight_copies(sizes, trained, look_ahead, micro)]
    if states:
        expected.append(formulas.state_copies(run.updater._states.sizes, look_ahead))
    if micro > 1:
        expected.append(formulas.gradient_copies(trained, look_ahead, micro))
    assert counted == expected
    assert sum(region.numel() for region in streaming.weights.host) == formulas.host_bytes(sizes)
    slots = {view.data_ptr(): 0 for view in streaming.weights.device}
    assert len(slots) * max(sizes) == formulas.ring_bytes(sizes, look_ahead)


@settings(max_examples=30)
@given(blocks=st.integers(1, 9), look_ahead=st.integers(0, 9))
def test_copies_of_a_forward_pass_are_those_of_the_formula(blocks, look_ahead):
    transport = CpuTransport()
    sizes = [3 + i for i in range(blocks)]
    schedule = make_schedule(blocks, range(blocks), look_ahead)
    ring = Ring([transport.host(size) for size in sizes], sizes, schedule.slots, transport)
    ring.filled = [True] * blocks
    for passes in range(3):
        before = ring.bytes_in
        for place in range(blocks):
            for number in schedule.forward_only[place]:
                ring.bring(number)
            ring.use(place)
    assert ring.bytes_in - before == formulas.forward_copies(sizes, look_ahead).into


@settings(max_examples=60)
@given(data=st.data())
def test_schedule(data):
    count = data.draw(st.integers(1, 20))
    chosen = data.draw(st.integers(1, count))
    places = evenly(count, chosen)
    assert len(set(places)) == chosen and list(places) == sorted(places) and 0 <= places[0] and places[-1] < count
    gaps = [b - a for a, b in zip(places, places[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1
    schedule = make_schedule(count, places, data.draw(st.integers(0, 20)))
    for table in (schedule.forward, schedule.forward_only, schedule.backward):
        assert len(table) == count
        for place, wanted in enumerate(table):
            assert len(wanted) == schedule.slots == len({number % schedule.slots for number in wanted})
            if place in places:
                assert wanted[0] == places.index(place)
    assert schedule.turn[0] == chosen - 1


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("unit", ["parameter", "block"])
def test_nothing_is_allocated_and_no_tensor_is_handled_in_steady_state(states, micro, unit, monkeypatch):
    """While streaming itself is at work, torch is asked for copies of whole blocks and for nothing else."""
    asked = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(str(func))
            return func(*args, **(kwargs or {}))

    def listening(method):
        def run(self, *args):
            with Listen():
                return method(self, *args)
        return run

    for name in ("enter_forward", "enter_backward", "leave_backward"):
        monkeypatch.setattr(Streaming, name, listening(getattr(Streaming, name)))
    run = Run(Setting(blocks=6, streamed=6, look_ahead=1, unit=unit, micro=micro, stream_states=states))
    run.train(0, 2)
    asked.clear()
    made = run.transport.allocations
    run.train(2, 4)
    assert set(asked) == {"aten.copy_.default"} and run.transport.allocations == made
    lanes = [run.streaming.weights, *run.streaming.step_rings]
    per_step = 6 + micro * 8  # weights: out, and 4 in each way
    per_step += 12 if states else 0  # all out, all in but for what is there: none of the last two is among the first two
    per_step += 12 if micro == 2 else 0
    assert len(asked) == 2 * per_step and len(lanes) == 1 + states + (micro > 1)


def test_regions_are_of_exact_size():
    """Tensors lie side by side, rounded up to 256 bytes each."""
    assert formulas.region_bytes([((3,), torch.float32), ((64, 2), torch.bfloat16), ((), torch.int64)]) == 768
    assert formulas.region_bytes([]) == 0
