"""The average of the weights: its values, the same with and without delay, exchanged and put back bit for bit, resumed exactly."""

import math
import threading

import pytest
import torch

from library import ema as module
from library.checkpoint.train_state import open_state, save
from library.ema import Ema, decay_at
from library.errors import UserError
from tests.unit.state_helpers import facts, same

SHAPES = {"a": (33, 7), "b": (), "c": (4, 3, 2, 2), "d": (500,)}


def weights(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}
    made["c"].data = made["c"].data.to(memory_format=torch.channels_last)
    return made


@torch.no_grad()
def step(held, number):
    generator = torch.Generator().manual_seed(100 + number)
    for weight in held.values():
        weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.1)


def run(held, average, first, stop):
    for number in range(first, stop):
        average.wait()
        step(held, number)
        average.update()
    average.wait()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 600)


def test_the_decay_warms_up():
    assert [round(decay_at(0.999, updates), 4) for updates in (0, 1, 90, 10**6)] == [0.1, 0.1818, 0.91, 0.999]
    assert decay_at(0.05, 0) == 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lagged", [False, True])
def test_it_is_the_average_of_the_formula(dtype, lagged, small_chunks):
    held = weights(dtype)
    wanted = {name: weight.detach().double() for name, weight in held.items()}
    average = Ema(held, 0.9, lagged=lagged)
    for number in range(30):
        run(held, average, number, number + 1)
        decay = decay_at(0.9, number)
        wanted = {name: decay * wanted[name] + (1 - decay) * weight.detach().double() for name, weight in held.items()}
    assert average.updates == 30
    for name, tensor in average.average.items():
        assert tensor.dtype == torch.float32 and torch.allclose(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)
    average.close()


def test_the_delay_changes_no_bit(small_chunks):
    averages = []
    for lagged in (False, True):
        held = weights(torch.bfloat16)
        average = Ema(held, 0.99, lagged=lagged)
        run(held, average, 0, 20)
        averages.append(average.average)
        average.close()
    assert all(same(averages[0][name], averages[1][name]) for name in SHAPES)


def test_it_follows_behind(monkeypatch):
    """``update`` returns while the weights are still being taken in; ``wait`` does not."""
    held, gate = weights(), threading.Event()
    average = Ema(held, 0.9, lagged=True)
    real = average._staging.fetch
    monkeypatch.setattr(average._staging, "fetch", lambda index: gate.wait(10) and real(index))
    before = {name: tensor.clone() for name, tensor in average.average.items()}
    step(held, 1)
    average.update()
    assert all(same(before[name], average.average[name]) for name in SHAPES)
    gate.set()
    average.wait()
    assert not same(before["a"], average.average["a"])
    average.close()


def test_errors_of_the_thread_are_told(monkeypatch):
    average = Ema(weights(), 0.9, lagged=True)
    monkeypatch.setattr(average, "_move", lambda *_: 1 / 0)
    average.update()
    with pytest.raises(ZeroDivisionError):
        average.wait()
    average.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchanged_and_put_back_bit_for_bit(dtype):
    held = weights(dtype)
    average = Ema(held, 0.9)
    run(held, average, 0, 5)
    own, kept = ({name: tensor.detach().clone() for name, tensor in some.items()} for some in (held, average.average))
    places = {name: weight.data_ptr() for name, weight in held.items()}
    with average.swapped():
        for name, weight in held.items():
            assert torch.equal(weight, kept[name].to(dtype)) or dtype is torch.bfloat16
            assert torch.allclose(weight.float(), kept[name], rtol=2**-8, atol=0) and not torch.equal(weight, own[name])
        with pytest.raises(AssertionError):
            average.update()
        with pytest.raises(AssertionError):
            average.state_dict()
    with pytest.raises(RuntimeError), average.swapped():
        raise RuntimeError
    assert all(same(held[name], own[name]) and same(average.average[name], kept[name]) for name in SHAPES)
    assert places == {name: weight.data_ptr() for name, weight in held.items()}


def test_every_bfloat16_and_every_half_can_be_put_back():
    """All upper halves, with lower halves around the middle and the ends, infinities and NaN included."""
    upper = torch.arange(-2**15, 2**15, dtype=torch.int32)
    lows = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    bits = torch.cat([(upper << 16) | low for low in lows])
    own = torch.arange(len(bits), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    average, weight = bits.clone().view(torch.float32), own.clone()
    module._exchange(weight, average, show=True)
    finite = bits.view(torch.float32).isfinite() & weight.isfinite()
    exact, shown = bits.view(torch.float32)[finite].double(), weight[finite].double()
    nearest = bits.view(torch.float32)[finite].to(torch.bfloat16).double()
    assert bool(((shown - exact).abs() <= (nearest - exact).abs()).all())  # as near as rounding to nearest, ties apart
    module._exchange(weight, average, show=False)
    assert torch.equal(average.view(torch.int32), bits) and torch.equal(weight.view(torch.int16), own.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_bit_for_bit(tmp_path, dtype):
    held = weights(dtype)
    average = Ema(held, 0.99)
    run(held, average, 0, 4)
    save(tmp_path / "s", facts(4), held, {"ema": average.state_dict()})
    run(held, average, 4, 9)
    again = weights(dtype, seed=5)
    second = Ema(again, 0.99, lagged=True)
    saved = open_state(tmp_path / "s")
    saved.load_weights(again)
    second.load_state_dict(saved.part("ema"))
    run(again, second, 4, 9)
    assert second.updates == 9 and all(same(second.average[name], average.average[name]) for name in SHAPES)
    second.close()


def test_a_state_of_other_weights():
    average = Ema(weights(), 0.9)
    state = average.state_dict()
    state.pop("weight/b")
    with pytest.raises(UserError, match="the saved average is of other weights .1 names stand on one side only, such as 'b'"):
        average.load_state_dict(state)


def test_small_moves_are_not_lost():
    """Why float32: weights that settle one bfloat16 step away from the average would never be reached by rounding to nearest."""
    held = {"w": torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))}
    average = Ema(held, 0.999)
    average.updates = 10**6  # past the warm-up
    with torch.no_grad():
        held["w"].fill_(1 + 2**-7)
    for _ in range(3000):
        average.update()
    assert math.isclose(float(average.average["w"][0]), 1 + 2**-7 * (1 - 0.999**3000), rel_tol=1e-5)
