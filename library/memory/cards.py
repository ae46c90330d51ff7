"""What common graphics cards can do, for predictions.

``peak``: dense bfloat16 products with float32 sums, of NVIDIA's tables: "Ampere GA102 architecture" (GeForce 30, RTX A6000), "Ada
GPU architecture" (GeForce 40), "RTX Blackwell GPU architecture" (GeForce 50), and the data sheets of L40S, A100, H100 SXM, H200.
Where a table gives the rate with float16 sums, or with structured sparsity, it is halved: GeForce cards run bfloat16 at half.
``single``: float32 products, which torch does not round to TF32 unless told to. ``bandwidth``: of memory. Both from the same
tables. ``bus``: what PCIe carries each way in practice, about 80 % of 31.5 GB/s for 4.0 x16 and of 63 GB/s for 5.0 x16, and half
of it for cards with eight lanes. ``memory``: what nvidia-smi calls total.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1024**2


@dataclass(frozen=True)
class Card:
    """``memory`` in bytes, ``peak`` and ``single`` in operations per second, ``bandwidth`` and ``bus`` in bytes per second."""

    name: str
    memory: int
    peak: float
    single: float
    bandwidth: float
    bus: float


CARDS = (
    Card("RTX 4060", 8188 * _MIB, 30.2e12, 15.1e12, 272e9, 12.5e9),
    Card("RTX 3060", 12288 * _MIB, 25.5e12, 12.7e12, 360e9, 25e9),
    Card("RTX 4060 Ti 16GB", 16380 * _MIB, 44.1e12, 22.1e12, 288e9, 12.5e9),
    Card("RTX 4070 Ti SUPER", 16376 * _MIB, 88.2e12, 44.1e12, 672e9, 25e9),
    Card("RTX 3090", 24576 * _MIB, 71e12, 35.6e12, 936e9, 25e9),
    Card("RTX 4090", 24564 * _MIB, 165.2e12, 82.6e12, 1008e9, 25e9),
    Card("RTX 5090", 32607 * _MIB, 209.5e12, 104.8e12, 1792e9, 50e9),
    Card("RTX A6000", 49140 * _MIB, 154.8e12, 38.7e12, 768e9, 25e9),
    Card("L40S", 46068 * _MIB, 362e12, 91.6e12, 864e9, 25e9),
    Card("A100 80GB", 81920 * _MIB, 312e12, 19.5e12, 2039e9, 25e9),
    Card("H100 80GB", 81559 * _MIB, 989e12, 66.9e12, 3350e9, 50e9),
    Card("H200", 143771 * _MIB, 989e12, 66.9e12, 4800e9, 50e9),
)


def named(name: str) -> Card | None:
    """The card that a driver calls ``name``, as "NVIDIA GeForce RTX 4090"; None when it is not listed."""
    words = set(name.lower().replace("-", " ").split())
    fitting = [card for card in CARDS if {word for word in card.name.lower().split() if not word.endswith("gb")} <= words]
    return max(fitting, key=lambda card: len(card.name.split()), default=None)


def with_memory(budget: int) -> Card:
    """The smallest card that has so much memory: all that a budget tells of the machine."""
    fitting = [card for card in CARDS if card.memory >= budget] or [CARDS[-1]]
    return min(fitting, key=lambda card: (card.memory, -card.peak))
