"""Small pictures whose pixels say where they come from, and views of them, for the tests of image.py."""

from __future__ import annotations

import numpy
from PIL import Image

from library.data.augment import View
from library.data.bucket import Placement
from library.data.image import load_view

RED, WHITE = (255, 0, 0), (255, 255, 255)
UNDO = {  # EXIF orientation -> how a camera would have stored the upright picture
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}


def view(size, resized=None, crop=(0, 0), **more) -> View:
    """The ``size`` part at ``crop`` of a picture scaled to ``resized`` (default: ``size``)."""
    return View(Placement(size, resized or size, crop), **more)


def pixels(source, given: View, mask=None) -> numpy.ndarray:
    """(H, W, 3) int."""
    return load_view(source, given, str(source), mask)[0].permute(1, 2, 0).numpy().astype(int)


def pixel_of(path, size=(8, 8)) -> tuple[int, ...]:
    """The middle pixel."""
    return tuple(pixels(path, view(size))[size[1] // 2, size[0] // 2].tolist())


def gradient(size=(48, 32)) -> Image.Image:
    """Red grows with x, green with y; blue marks the left third."""
    width, height = size
    values = numpy.zeros((height, width, 3), numpy.uint8)
    values[..., 0] = numpy.linspace(0, 250, width)[None]
    values[..., 1] = numpy.linspace(0, 250, height)[:, None]
    values[:, :width // 3, 2] = 200
    return Image.fromarray(values)


def noise(size=(48, 32), seed=0, channels=3) -> Image.Image:
    values = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=numpy.uint8)
    return Image.fromarray(values if channels > 1 else values[..., 0])


def stored(upright: Image.Image, path, turn: int, **save):
    """Saved as a camera held that way would have."""
    exif = Image.Exif()
    exif[0x0112] = turn
    (upright if UNDO[turn] is None else upright.transpose(UNDO[turn])).save(path, exif=exif, **save)
    return path
