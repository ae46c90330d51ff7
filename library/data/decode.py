"""Picture file -> 8-bit RGB with its alpha channel, or one line that says why not.

What becomes of the modes: transparency (RGBA, LA, a palette's or a key colour's) gives an alpha channel; 16-bit grey is
scaled, not clipped, to 8 bits; CMYK goes through its embedded ICC profile where there is one; animations give their first
frame.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image, ImageCms

from library.data.bucket import Size
from library.data.header import TRANSPOSE, open_picture, orientation
from library.errors import UserError

_GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@dataclass(frozen=True)
class Decoded:
    """``rgb`` (mode RGB) and ``alpha`` (mode L; None when opaque by its format) as they stand in the file; ``turn`` (EXIF
    orientation 1 to 8) is what still has to be done to them. The colours are those of the file, whatever alpha says."""

    rgb: Image.Image
    alpha: Image.Image | None
    turn: int

    @property
    def upright_size(self) -> tuple[int, int]:
        return self.rgb.size[::-1] if self.turn >= 5 else self.rgb.size

    def on(self, color: str) -> Image.Image:
        """The picture as it looks before a background of that colour."""
        if self.alpha is None:
            return self.rgb
        return Image.composite(self.rgb, Image.new("RGB", self.rgb.size, color), self.alpha)


def upright(picture: Image.Image, turn: int) -> Image.Image:
    """A picture as it stands in the file -> as it is to be seen."""
    return picture.transpose(TRANSPOSE[turn]) if turn in TRANSPOSE else picture


@contextmanager
def decoded(source: Path | bytes, place: str, at_least: Size | None = None) -> Iterator[Decoded]:
    """The decoded picture, valid inside the ``with``: its memory is the decoder's own. ``place`` is the path to show.

    ``at_least``: where the format has reduced sizes, one of those that is no smaller than this will do (it is quicker). Raises
    UserError for whatever keeps the file from being decoded."""
    with open_picture(io.BytesIO(source) if isinstance(source, bytes) else source, place) as picture:
        turn = orientation(picture)
        try:
            if at_least is not None:
                picture.draft(None, at_least)
            picture.load()
            result = Decoded(*_channels(picture), turn)
        except UserError as error:
            raise UserError(error.message, place=place, remedy=error.remedy) from None
        except Exception as error:  # each decoder has its own ways to fail on damaged data
            raise UserError(f"the picture is damaged and cannot be decoded ({error or type(error).__name__})", place=place,
                            remedy="replace or remove the file") from None
        yield result


def _channels(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    mode = picture.mode
    if mode in _GREY_16:
        return _grey_16(numpy.asarray(picture)).convert("RGB"), None
    if mode == "F":
        raise UserError("the picture has floating-point pixels", remedy="convert it to 8 or 16 bits a channel")
    if mode == "CMYK":
        return _cmyk(picture), None
    if "A" in mode.upper().replace("LAB", "") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return picture if mode == "RGB" else picture.convert("RGB"), None


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
