import gc

import pytest
import torch
from torch import nn

from library.memory.offload import Offload
from library.memory.recompute import Recompute, every
from library.memory.transport import CpuTransport
from tests.unit.memory_helpers import LateTransport, Run, Setting, assert_same

TRANSPORTS = pytest.mark.parametrize("transport", [CpuTransport, LateTransport], ids=["immediate", "late"])


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x, *, text, scale=1.0):
        return torch.tanh(self.linear(x) + text.mean()) * scale


def run(blocks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 16, generator=generator, requires_grad=True)
    text = torch.randn(32, 16, generator=generator)
    y = x * 1
    for block in blocks:
        y = block(y, text=text, scale=0.5)
    return x, y.square().sum()


def gradients(blocks, seed=0):
    x, loss = run(blocks, seed)
    loss.backward()
    result = [x.grad, *(p.grad for p in blocks.parameters())]
    blocks.zero_grad(set_to_none=True)
    return result


def model(count=6):
    torch.manual_seed(0)
    return nn.ModuleList(Mix() for _ in range(count))


@TRANSPORTS
@pytest.mark.parametrize("prefetch", [0, 1, 9])
@pytest.mark.parametrize("selective", [False, True])
def test_gradients_are_bit_equal_and_buffers_are_used_again(transport, prefetch, selective):
    plain, ours, transport = model(), model(), transport()
    offload = Offload(transport, prefetch, smallest_bytes=1)
    Recompute(ours, selective, offload)
    made = []
    for seed in range(4):
        assert all(map(torch.equal, gradients(ours, seed), gradients(plain, seed)))
        made.append(transport.allocations)
    assert len(set(made)) == 1
    sizes = 6 * 8 * 16 * 4 + 32 * 16 * 4  # inputs of all blocks, and the text once
    assert offload.bytes_out == 4 * sizes
    assert offload.bytes_in == 4 * (sizes - 2 * 8 * 16 * 4)  # the last two blocks' inputs have not left yet


@TRANSPORTS
def test_a_graph_that_is_thrown_away_gives_its_buffers_back(transport):
    plain, ours, transport = model(), model(), transport()
    Recompute(ours, offload=Offload(transport, smallest_bytes=1))
    gradients(ours)
    made = transport.allocations
    for _ in range(5):
        run(ours)
    gc.collect()
    assert all(map(torch.equal, gradients(ours, 3), gradients(plain, 3)))
    assert transport.allocations <= made + 3 * 3  # those two that leave last, of the graph before


@pytest.mark.parametrize("layout", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(2, 3),
                                    lambda x: x[:, :, ::2], lambda x: x[:1].expand(2, -1, -1, -1), lambda x: x[1:]],
                         ids=["channels_last", "transposed", "gaps", "expanded", "offset"])
def test_inputs_come_back_as_they_were(layout):
    strides = []

    class Convolution(nn.Conv2d):
        def forward(self, x):
            strides.append(x.stride())
            return super().forward(x).square()

    results = []
    for offload in (None, Offload(CpuTransport(), smallest_bytes=1)):
        torch.manual_seed(0)
        block = Convolution(4, 4, 3)
        Recompute([block], offload=offload)
        base = torch.randn(2, 4, 8, 6, requires_grad=True)
        kept = layout(base * 1)
        y = block(kept)
        if offload is not None:
            offload._leaving.popleft().let_go()  # as when two more blocks had run
        y.sum().backward()
        results.append([base.grad, block.weight.grad])
    assert all(map(torch.equal, *results)) and offload.bytes_in == offload.bytes_out > 0
    if layout(base).numel() and torch.empty_like(kept).stride() == kept.stride():
        assert len(set(strides)) == 1


def test_small_tensors_stay():
    ours = model()
    offload = Offload(CpuTransport())
    Recompute(ours, offload=offload)
    gradients(ours)
    assert offload.bytes_out == 0


def test_selective_recompute_does_no_product_twice():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = tanhs = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
            Count.tanhs += func is torch.ops.aten.tanh.default
            return func(*args, **(kwargs or {}))

    counts = {}
    for selective in (False, True):
        blocks = model(3)
        Recompute(blocks, selective)
        Count.products = Count.tanhs = 0
        with Count():
            gradients(blocks)
        counts[selective] = Count.products, Count.tanhs
    assert counts[True][1] == counts[False][1] == 6
    assert counts[False][0] - counts[True][0] == 3


def test_every_second_block():
    assert every("abcdef", 1) == list("abcdef") and every("abcdef", 2) == ["b", "d", "f"] and every("abcdef", 4) == ["d"]


@TRANSPORTS
@pytest.mark.parametrize("selective", [False, True])
def test_together_with_streaming(transport, selective):
    transport = transport()
    offload = Offload(transport, smallest_bytes=1)
    plain = Run(Setting(blocks=4))
    ours = Run(Setting(blocks=4, streamed=4, look_ahead=1, unit="block", stream_states=True, transport=lambda: transport,
                       poison=isinstance(transport, CpuTransport) and not isinstance(transport, LateTransport),
                       recompute=dict(selective=selective, offload=offload)))
    assert ours.train(0, 3) == plain.train(0, 3)
    assert_same(ours.weights(), plain.weights())
    assert offload.bytes_out > 0
