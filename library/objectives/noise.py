"""The randomness of one optimizer step: every row a function of (seed, step, sample id) and of nothing else.

So a sample gets the same noise and level whatever the batch it sits in, the rank, the number of workers, the device or the
steps that came before: resuming needs no stored generator, and accumulation or more GPUs change no draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """``noise`` (B, C, h, w) of N(0, 1); ``uniform`` (B,) of U[0, 1) and ``normal`` (B,) of N(0, 1) for the level. float32.

    ``rows`` says whose draws these are, one text per row. What only some objectives need is drawn from it when it is asked
    for, each purpose from a stream of its own: switching one feature on changes no draw of another.
    """

    noise: Tensor
    uniform: Tensor
    normal: Tensor
    rows: tuple[str, ...] = ()

    def normals(self, purpose: str, *shape: int) -> Tensor:
        """(B, *shape) float32 of N(0, 1), on the device of ``noise``."""
        values = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in self.streams(purpose)])
        return torch.from_numpy(values).to(self.noise.device)

    def uniforms(self, purpose: str) -> Tensor:
        """(B,) float32 of U[0, 1), on the device of ``noise``."""
        values = np.array([stream.random(dtype=np.float32) for stream in self.streams(purpose)], dtype=np.float32)
        return torch.from_numpy(values).to(self.noise.device)

    def streams(self, purpose: str) -> list[np.random.Generator]:
        """One generator per row, at its beginning."""
        assert len(self.rows) == len(self.noise), "these draws do not know their samples"
        return [_stream(f"{purpose}:{row}") for row in self.rows]


def perturbed(noise: Tensor, draws: Draws, size: float | None, varies: bool) -> Tensor:
    """The noise of the input where the target knows of ``noise`` (B, C, h, w) alone: ``size`` times more of it (Ning et al. 2023,
    "Input Perturbation Reduces Exposure Bias"). ``varies``: times a number that each sample draws from U[0, 1)."""
    if not size:
        return noise
    strength = size * draws.uniforms("input perturbation strength").view(-1, 1, 1, 1) if varies else size
    return noise + strength * draws.normals("input perturbation", *noise.shape[1:])


def draw(seed: int, step: int, sample_ids: Sequence[str], shape: tuple[int, int, int],
         device: torch.device | str = "cpu") -> Draws:
    """Draws for one batch; ``shape`` is (C, h, w) of a latent.

    The two numbers of the level come first in each row's stream, so that they do not depend on ``shape``.
    numpy's Philox is used instead of torch's CPU generator: its key has 128 bits (torch keeps 32 bits of a seed), it is
    cheap to construct, and its normals do not depend on the vector instructions of the machine.
    """
    count = len(sample_ids)
    noise = np.empty((count, *shape), dtype=np.float32)
    uniform = np.empty(count, dtype=np.float32)
    normal = np.empty(count, dtype=np.float32)
    rows = tuple(f"{seed}/{step}/{sample_id}" for sample_id in sample_ids)
    for index, row in enumerate(rows):
        stream = _stream(row)
        uniform[index] = stream.random(dtype=np.float32)
        normal[index] = stream.standard_normal(dtype=np.float32)
        stream.standard_normal(out=noise[index], dtype=np.float32)
    return Draws(*(torch.from_numpy(array).to(device) for array in (noise, uniform, normal)), rows)


def _stream(row: str) -> np.random.Generator:
    key = hashlib.blake2b(row.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
