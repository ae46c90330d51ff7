"""Colour augmentation of 8-bit pixels, channels red, green, blue."""

from __future__ import annotations

import numpy

from library.data.augment import Color

_ROWS = 32  # at a time: the intermediate planes stay in the processor's cache


def recolor(planes: numpy.ndarray, color: Color) -> numpy.ndarray:
    """(3, H, W) uint8 -> the same, anew."""
    if color.hue:
        planes = rotate_hue(planes, color.hue)
    if color.gamma != 1.0:
        table = numpy.linspace(0.0, 1.0, 256) ** color.gamma * 255.0
        planes = numpy.round(table).astype(numpy.uint8)[planes]
    return planes


def rotate_hue(planes: numpy.ndarray, degrees: float) -> numpy.ndarray:
    """(3, H, W) uint8, each pixel at the same saturation and value (largest channel) of the HSV hexcone, ``degrees``
    further in red -> yellow -> green -> blue. In float32 from 8 bits to 8 bits: grey stays exactly what it is."""
    sixths = (degrees + 180.0) % 360.0 / 60.0 - 3.0
    result = numpy.empty_like(planes)
    for start in range(0, planes.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        red, green, blue = planes[:, rows].astype(numpy.float32)
        lowest = numpy.minimum(numpy.minimum(red, green), blue)
        highest = numpy.maximum(numpy.maximum(red, green), blue)
        chroma = highest - lowest
        # Hue in sixths of the circle times chroma, which saves the division: red lies at 0, green at 2, blue at 4 chroma.
        hue = numpy.where(highest == red, green - blue,
                          numpy.where(highest == green, 2 * chroma + blue - red, 4 * chroma + red - green))
        hue += numpy.float32(sixths) * chroma
        for channel, primary in enumerate((0, 2, 4)):
            # A channel is full within one sixth of its primary and empty from two sixths on.
            distance = numpy.abs(hue - primary * chroma)
            distance = numpy.minimum(distance, numpy.abs(6 * chroma - distance))
            result[channel, rows] = lowest + numpy.clip(2 * chroma - distance, 0, chroma) + numpy.float32(0.5)
    return result
