import torch
from torch import nn

from library.memory.recompute import Recompute


class Block(nn.Module):
    """Counts its runs; takes keyword arguments and returns a pair, as real blocks do."""

    def __init__(self):
        super().__init__()
        self.linear, self.runs = nn.Linear(4, 4), 0

    def forward(self, x, *, scale):
        self.runs += 1
        return torch.tanh(self.linear(x)) * scale, x


def model():
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(3))


def gradients(blocks, x):
    for block in blocks:
        x, _ = block(x, scale=2.0)
    x.square().sum().backward()
    return [parameter.grad.clone() for parameter in blocks.parameters()]


def test_gradients_are_bit_equal_and_each_block_runs_twice():
    x = torch.randn(5, 4)
    plain, recomputed = model(), model()
    names = list(recomputed.state_dict())
    Recompute(recomputed)
    assert all(map(torch.equal, gradients(plain, x), gradients(recomputed, x)))
    assert [block.runs for block in plain] == [1, 1, 1] and [block.runs for block in recomputed] == [2, 2, 2]
    assert list(recomputed.state_dict()) == names


def test_no_recompute_without_gradients_and_none_after_detach():
    blocks = model()
    recompute = Recompute(blocks)
    with torch.no_grad():
        blocks[0](torch.randn(1, 4), scale=1.0)
    assert blocks[0].runs == 1
    recompute.detach()
    gradients(blocks, torch.randn(1, 4))
    assert [block.runs for block in blocks] == [2, 1, 1]
