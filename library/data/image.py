"""Picture file -> the part that is trained: (3, H, W) float32 in [-1, 1].

What becomes of the modes: transparency (RGBA, LA, a palette's or a key colour's) is laid on white; 16-bit grey is scaled,
not clipped, to 8 bits; CMYK goes through its embedded ICC profile where there is one; animations give their first frame.
Shrinking averages areas and enlarging uses Lanczos, as in the dialect.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageCms

from library.data.bucket import Placement
from library.data.header import TRANSPOSE, open_picture, orientation
from library.errors import UserError

_GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def load(source: Path | bytes, placement: Placement, place: str | None = None) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1], H and W those of the bucket. Raises UserError naming ``place`` (default: the path)."""
    return to_signal(load_bytes(source, placement, place))


def to_signal(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], any shape."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def load_bytes(source: Path | bytes, placement: Placement, place: str | None = None) -> torch.Tensor:
    """(3, H, W) uint8: a quarter of the memory, for the way between processes."""
    place = place or str(source)
    picture = decode(source, place)
    width, height = picture.size
    wide, high = placement.resized
    if 2 * abs(wide * height - high * width) > max(width, height):  # more than rounding explains
        raise UserError(f"the picture changed its shape to {width}x{height} after it was scanned", place=place,
                        remedy="start again")
    if picture.size != placement.resized:
        shrinks = wide <= width and high <= height
        picture = picture.resize(placement.resized, Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)
    left, top = placement.crop
    picture = picture.crop((left, top, left + placement.bucket[0], top + placement.bucket[1]))
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).contiguous()


def decode(source: Path | bytes, place: str) -> Image.Image:
    """The whole picture, upright, in mode RGB. Raises UserError for whatever keeps it from being decoded."""
    with open_picture(io.BytesIO(source) if isinstance(source, bytes) else source, place) as picture:
        turn = TRANSPOSE.get(orientation(picture))
        try:
            picture.load()
            rgb = _to_rgb(picture)
            return rgb.transpose(turn) if turn is not None else rgb
        except UserError as error:
            raise UserError(error.message, place=place, remedy=error.remedy) from None
        except Exception as error:  # each decoder has its own ways to fail on damaged data
            raise UserError(f"the picture is damaged and cannot be decoded ({error or type(error).__name__})", place=place,
                            remedy="replace or remove the file") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode in _GREY_16:
        return _grey_16(numpy.asarray(picture)).convert("RGB")
    if mode == "F":
        raise UserError("the picture has floating-point pixels", remedy="convert it to 8 or 16 bits a channel")
    if mode == "CMYK":
        return _cmyk(picture)
    if "A" in mode.upper().replace("LAB", "") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB") if mode != "RGB" else picture.copy()


def _grey_16(values: numpy.ndarray) -> Image.Image:
    """0..65535 -> 0..255, rounded. Mode ``I`` has 32 bits, of which files use 16."""
    values = values.astype(numpy.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError("the picture has 32-bit pixels outside 0..65535", remedy="convert it to 8 or 16 bits a channel")
    return Image.fromarray(((values + 128) // 257).astype(numpy.uint8))


def _cmyk(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile: the plain conversion below is what most programs show
    return picture.convert("RGB")
