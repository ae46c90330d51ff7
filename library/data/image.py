"""Picture file and view -> the pixels that are trained, and the part of the loss mask that lies over them.

Interpolations: ``auto`` averages areas when both sides shrink and is Lanczos otherwise, as in the dialect. All but
``nearest`` weigh the pixels of the file that fall into a new one. ``area`` is the exact average where the picture shrinks
by whole numbers, else Pillow's Hamming filter: over the quickstart's twelve photographs, shrunk 1.2 to 3.4 times, it is 1.1 of
255 from the exact average (median rms; at worst 3.1). Pillow's ``box`` takes each old pixel wholly or not at all: 3.3 (7.9),
with visible steps. Pillow offers no exact average for other ratios.

JPEG files are decoded in full. The decoder's own reduced sizes would halve the time of a picture three times too large, but
differ by up to 10 of 255 (measured on made-up 12-megapixel pictures), so the result would depend on the file's format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy
import torch
from PIL import Image

from library.data.augment import View
from library.data.bucket import Placement, Size
from library.data.color import recolor
from library.data.decode import Decoded, decoded, upright
from library.errors import UserError

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "cubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}


def load_view(source: Path | bytes, view: View, place: str,
              mask: Literal["alpha"] | Path | bytes | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(3, H, W) uint8 pixels and the (H, W) uint8 loss mask, H and W those of the view's bucket; no mask asked for, None.

    ``mask`` "alpha": the picture's transparency (255 everywhere without any), and the colours are those that the file
    holds beneath it; without it a transparent picture is laid on white. A mask picture (a path, or the file's bytes)
    counts with its red channel before black; it has the picture's shape in any size. Either is scaled by ``area`` and
    cropped and flipped with the picture. Raises UserError naming ``place``, or the mask's path.
    """
    with decoded(source, place) as picture:
        _check_shape(picture.upright_size, view.placement.resized, place)
        # With an alpha mask the colours stay: what is painted beneath the transparency is the picture that the mask
        # weighs, and white would shine through all half-transparent edges, which do count.
        rgb = picture.rgb if mask == "alpha" else picture.on("white")
        part = _part(rgb, picture.turn, view.placement, view.interpolation)
        size, over = picture.upright_size, None
        if mask == "alpha":
            over = Image.new("L", part.size, 255) if picture.alpha is None else _alpha_part(picture, view)
    if mask is not None and mask != "alpha":
        over = _mask_part(mask, size, view, place)
    planes = _planes(part, view.flip)
    if view.color is not None:
        planes = recolor(planes, view.color)
    return torch.from_numpy(planes), None if over is None else torch.from_numpy(_planes(over, view.flip)[0])


def to_signal(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], any shape."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def mask_to_cells(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H, W) uint8 -> (B, 1, height, width) float32 in 0..1: the average over the pixels of each latent cell."""
    batch, high, wide = mask.shape
    assert high % height == 0 and wide % width == 0, (mask.shape, height, width)
    cells = mask.to(torch.float32).reshape(batch, 1, height, high // height, width, wide // width)
    return cells.mean(dim=(3, 5)) / 255.0


def _check_shape(size: Size, resized: Size, place: str) -> None:
    if 2 * abs(resized[0] * size[1] - resized[1] * size[0]) > max(size):  # more than rounding explains
        raise UserError(f"the picture changed its shape to {size[0]}x{size[1]} after it was scanned", place=place,
                        remedy="start again, with --cache_check full if its time is still the old one")


def _alpha_part(picture: Decoded, view: View) -> Image.Image:
    assert picture.alpha is not None
    return _part(picture.alpha, picture.turn, view.placement, "area")


def _mask_part(source: Path | bytes, size: Size, view: View, place: str) -> Image.Image:
    mask_place = str(source) if isinstance(source, Path) else f"the mask of {place}"
    with decoded(source, mask_place) as picture:
        wide, high = picture.upright_size
        if abs(wide * size[1] - high * size[0]) > max(size):  # a pixel of the mask more or less is rounding
            raise UserError(f"the mask has {wide}x{high} pixels and {place} has {size[0]}x{size[1]}: another shape",
                            place=mask_place, remedy="make a mask of the picture's shape, in any size")
        return _part(picture.on("black").getchannel("R"), picture.turn, view.placement, "area")


def _part(picture: Image.Image, turn: int, place: Placement, interpolation: str) -> Image.Image:
    """The upright ``bucket``-sized part of ``picture`` as it would be after scaling all of it to ``resized``.

    Only that part is computed, and it is turned upright last, when there are fewer pixels to move."""
    width, height = size = picture.size[::-1] if turn >= 5 else picture.size
    (left, top), (wide, high) = place.crop, place.bucket
    # Fractions of whole numbers, so that the edges of the picture are met exactly. Upright first, then as stored.
    x = [edge * width / place.resized[0] for edge in (left, left + wide)]
    y = [edge * height / place.resized[1] for edge in (top, top + high)]
    if turn in (2, 3, 6, 7):
        x = [width - x[1], width - x[0]]
    if turn in (3, 4, 7, 8):
        y = [height - y[1], height - y[0]]
    target = (wide, high)
    if turn >= 5:
        x, y, target = y, x, (high, wide)
    if size == place.resized:
        part = picture.crop((round(x[0]), round(y[0]), round(x[1]), round(y[1])))
    else:
        part = picture.resize(target, _filter(interpolation, size, place.resized), box=(x[0], y[0], x[1], y[1]))
    return upright(part, turn)


def _filter(interpolation: str, size: Size, resized: Size) -> Image.Resampling:
    if interpolation == "auto":
        interpolation = "area" if resized[0] <= size[0] and resized[1] <= size[1] else "lanczos"
    if interpolation == "area":
        whole = size[0] % resized[0] == 0 and size[1] % resized[1] == 0
        return Image.Resampling.BOX if whole else Image.Resampling.HAMMING
    return _FILTERS[interpolation]


def _planes(picture: Image.Image, flip: bool) -> numpy.ndarray:
    """(channels, H, W) uint8."""
    bands = picture.split()
    planes = numpy.empty((len(bands), picture.height, picture.width), dtype=numpy.uint8)
    for plane, band in zip(planes, bands, strict=True):
        values = numpy.asarray(band)
        plane[...] = values[:, ::-1] if flip else values
    return planes
