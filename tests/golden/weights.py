"""Test weights without a file: every value is a function of the tensor's name and its position in it.

The definition is that of the recorded training steps (``README.md`` here); the recorder filled its models in the same way, so the
formulas and constants must not change. They are two public hash functions, FNV-1a for the name and SplitMix64 for the position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

_FNV_START, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _name_hash(name: str) -> int:
    value = _FNV_START
    for byte in name.encode():
        value = (value ^ byte) * _FNV_PRIME % 2**64
    return value


def _uniform(name: str, count: int) -> np.ndarray:
    """``count`` numbers in [-1, 1): multiples of 2^-23, so exact in float32."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        bits = np.arange(count, dtype=np.uint64) * _STEP + np.uint64(_name_hash(name))
        for distance, factor in _MIX:
            bits = (bits ^ (bits >> np.uint64(distance))) * np.uint64(factor)
        bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def fill(name: str, shape: Sequence[int]) -> torch.Tensor:
    """float32 tensor called ``name``: scales around 1, small biases, embeddings of 0.5, matrices of unit gain."""
    if not shape:
        return torch.tensor(2.6592)  # CLIP's logit scale
    values = _uniform(name, math.prod(shape))
    if len(shape) == 1:
        values = np.float32(1) + np.float32(0.1) * values if name.endswith((".weight", ".scale")) else np.float32(0.05) * values
    elif "pos_embed" in name or "embedding" in name or name.endswith(("shared.weight", "embed_tokens.weight")):
        values = np.float32(0.5) * values
    else:
        values = np.float32(math.sqrt(3 / math.prod(shape[1:]))) * values
    return torch.from_numpy(values.reshape(tuple(shape)))


def fill_all(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """``fill`` for every (name, shape)."""
    return {name: fill(name, shape) for name, shape in shapes.items()}
