"""Which positions SD3's picture tokens are given: rows of the table in the checkpoint, in its middle, elsewhere, or rescaled.

The table holds a vector for each cell of a square of P x P tokens; a picture of h x w tokens reads the h x w cells in the middle
(Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.3.2). Each vector is sines and cosines of the cell's column,
then of its row, with positions that count in steps of the table's own (``spacing``).
Letters: B batch, N = h w picture tokens, h w their rows and columns, D width of the model, P cells of a side of the table.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from library.errors import UserError

BASE_TOKENS = 64  # a side of the pictures that SD3 was trained on: 1024 pixels
_SLOWEST = 10000.0  # periods go from 2 pi to this many times 2 pi
_TOLERANCE = 2e-2  # of table values, which files hold in 16 bits


class Positions:
    """Takes the place of ``PatchEmbed.cropped_pos_embed``: gives each forward pass its rows of the table.

    ``corners`` (B, 2) in [0, 1), or None, are those of the batch at hand: where between the upper left and the lower right end of
    the table each picture lies, by row and column; a negative number means the middle. Whoever sets them takes them away again.
    """

    def __init__(self, patch_embed: nn.Module, scaled: bool):
        self.size: int = patch_embed.pos_embed_max_size
        self.patch: int = patch_embed.patch_size
        self.module = [patch_embed]  # in a list, so that it does not become a submodule of anything
        self.spacing = read_spacing(patch_embed.pos_embed, self.size) if scaled else None
        self.corners: torch.Tensor | None = None

    def rows(self, height: int, width: int) -> torch.Tensor:
        """(1 or B, N, D) for latents of ``height`` x ``width`` cells. UserError when the table is too small for them."""
        h, w = height // self.patch, width // self.patch
        table = self.module[0].pos_embed  # (1, P * P, D)
        if max(h, w) > self.size and self.spacing is None:
            side = self.size * self.patch * 8
            raise UserError(f"pictures of {width * 8} x {height * 8} pixels are larger than the model's table of positions, "
                            f"which ends at {side} x {side}", remedy="lower the resolution, or give --enable_scaled_pos_embed")
        if self.spacing is not None:
            return self._computed(h, w, table)
        cells = table.view(self.size, self.size, -1)
        if self.corners is None:
            return self._cut(cells, (self.size - h) // 2, (self.size - w) // 2, h, w)[None]
        return torch.stack([self._cut(cells, *corner, h, w) for corner in self._whole_corners(h, w)])

    @staticmethod
    def _cut(cells: torch.Tensor, top: int, left: int, h: int, w: int) -> torch.Tensor:
        return cells[top:top + h, left:left + w].reshape(h * w, -1)

    def _whole_corners(self, h: int, w: int) -> list[tuple[int, int]]:
        room = (self.size - h, self.size - w)
        pairs = self.corners.tolist()  # a few numbers, once per step and only with random crops
        return [tuple(free // 2 if share < 0 else min(int(share * (free + 1)), free)
                      for share, free in zip(pair, room, strict=True)) for pair in pairs]

    def _computed(self, h: int, w: int, table: torch.Tensor) -> torch.Tensor:
        """Positions closer together the larger the picture is, so that every size covers as much as the base size does."""
        step = self.spacing * BASE_TOKENS / math.sqrt(h * w)
        span = self.spacing * (self.size - 1)
        shares = torch.full((1, 2), -1.0) if self.corners is None else self.corners
        shares = torch.where(shares < 0, 0.5, shares).to(table.device, torch.float64)  # (1 or B, 2)
        halves = []
        for share, count in ((shares[:, 1], w), (shares[:, 0], h)):
            first = share * (span - step * (count - 1))  # the middle at one half, also where a picture is wider than the table
            where = first[:, None] + step * torch.arange(count, dtype=torch.float64, device=table.device)  # (1 or B, count)
            halves.append(waves(where, table.shape[-1] // 2))  # (1 or B, count, D / 2)
        columns, rows = halves
        batch = len(columns)
        grid = torch.cat([columns[:, None].expand(batch, h, w, -1), rows[:, :, None].expand(batch, h, w, -1)], dim=-1)
        return grid.reshape(batch, h * w, -1).float()


def waves(where: torch.Tensor, width: int) -> torch.Tensor:
    """Positions (...) -> (..., width): sines, then cosines, from period 2 pi up (Vaswani et al. 2017, section 3.5)."""
    pairs = width // 2
    speeds = _SLOWEST ** -(torch.arange(pairs, dtype=torch.float64, device=where.device) / pairs)
    angles = where.double()[..., None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def table(size: int, spacing: float, width: int) -> torch.Tensor:
    """The table of positions as SD3's authors computed it, (1, size * size, width) float32: column first, then row."""
    line = waves(torch.arange(size) * spacing, width // 2)  # (P, D / 2)
    grid = torch.cat([line[None].expand(size, size, -1), line[:, None].expand(size, size, -1)], dim=-1)
    return grid.reshape(1, size * size, width).float()


def read_spacing(stored: torch.Tensor, size: int) -> float:
    """How far neighbouring cells of a stored table (1, P * P, D) lie apart. UserError where it holds no sines and cosines."""
    width = stored.shape[-1]
    row = stored[0, :size].double().cpu()  # the first row of cells: (P, D)
    angle = torch.atan2(row[:, 0], row[:, width // 4])  # of the fastest pair, by which positions are themselves angles
    turns = torch.remainder(angle.diff() + math.pi, 2 * math.pi) - math.pi
    spacing = float(turns.mean())
    if spacing <= 0 or not torch.allclose(row[:, :width // 2], waves(torch.arange(size) * spacing, width // 2), atol=_TOLERANCE):
        raise UserError("the table of positions in this checkpoint is not made of sines and cosines: it cannot be rescaled",
                        place="--enable_scaled_pos_embed", remedy="leave it out")
    return spacing
