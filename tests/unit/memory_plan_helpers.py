"""A model on paper, of which every number can be worked out by hand."""

from __future__ import annotations

from library.memory.amounts import Work
from library.memory.measured import Measured, Segment, Weight
from library.memory.setting import Fixed, Optimizer

BLOCKS = 8
MIB = 1024**2
WEIGHT = Weight((1024, 1024), 2, True)  # 2 MiB
OUTSIDE = Weight((256, 512), 2, True)  # 256 KiB
FIXED = Fixed(Optimizer("two numbers", lambda weight: 8 * weight.count), cuda=False)


def model(blocks: int = BLOCKS, weight: Weight = WEIGHT) -> Measured:
    """Each block keeps its input (8 MiB), an intermediate result (4 MiB) and the result of a product (16 MiB), all its own."""
    sizes: list[int] = []
    segments: list[Segment] = [Segment("gap", (OUTSIDE,))]

    def storage(size: int) -> int:
        sizes.append(size)
        return len(sizes) - 1

    for _ in range(blocks):
        given, between, product = storage(8 * MIB), storage(4 * MIB), storage(16 * MIB)
        block = Segment("Block", (weight,), frozenset((given, between, product)), frozenset((given,)), frozenset((product,)),
                        forward=Work(10**12, 10**8, 10), backward=Work(2 * 10**12, 2 * 10**8, 20),
                        forward_peak=30 * MIB, backward_peak=3 * MIB, carried=MIB, output_bytes=8 * MIB)
        segments += [block, Segment("gap")]
    return Measured(tuple(segments), tuple(sizes))
