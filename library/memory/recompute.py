"""Activation recompute: keep each block's inputs, run the block again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint


class Recompute:
    """Recomputes ``blocks`` from outside, so that it works for modules with and without support of their own.

    Only a block's ``forward`` is replaced on the instance: parameter names, hooks and state dicts stay as they are.
    Acts only while gradients are enabled. ``detach()`` puts the blocks back.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = tuple(blocks)
        for block in self.blocks:
            block.forward = _recomputed(block.forward)

    def detach(self) -> None:
        for block in self.blocks:
            del block.forward  # the class's own forward shows again


def _recomputed(forward):
    def run(*args, **kwargs):
        # Blocks of a denoiser draw no random numbers, so there is no generator state to save for each of them.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
