"""Picture files opened as far as their headers; the decoding is in ``decode.py``. Imports no torch."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from library.data.quick_header import ORIENTATION_TAG, quick_size
from library.errors import UserError

MAX_PIXELS = 256 * 1024**2  # 800 MB as RGB; larger than any camera's single picture, smaller than a decompression bomb
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses above twice this number, and warns from it on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# The dialect's list plus GIF (first frame) and TIFF. AVIF and JPEG XL only where Pillow can read them; it cannot read what
# telephones write (HEIF), which is said rather than passed over.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl", ".heic", ".heif")

# Without waiting: a pipe that somebody named like a picture would be waited for without end.
READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
TRANSPOSE = {  # EXIF orientation -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


def readable_suffixes() -> frozenset[str]:
    """Those of ``SUFFIXES`` that this installation of Pillow can open."""
    registered = Image.registered_extensions()
    return frozenset(suffix for suffix in SUFFIXES if suffix in registered)


def open_picture(source: Path | BinaryIO, place: str) -> Image.Image:
    """The opened, not yet decoded picture; ``place`` is the path to show. The caller closes it.

    Raises UserError when the file is missing, empty, no picture, damaged in its header or unreasonably large.
    """
    remedy = "replace or remove the file"
    try:
        return Image.open(source)
    except FileNotFoundError:
        raise UserError("the picture is gone", place=place, remedy="put it back, or start again without it") from None
    except Image.DecompressionBombError:
        raise UserError(f"the picture has more than {MAX_PIXELS // 10**6} million pixels", place=place,
                        remedy="make a smaller copy of it") from None
    except PermissionError:
        raise UserError("no permission to read this picture", place=place, remedy="change its permissions or remove it") from None
    except UnidentifiedImageError:
        if _byte_count(source) == 0:
            raise UserError("the picture is an empty file (0 bytes)", place=place, remedy=remedy) from None
        raise UserError("not a picture in a format that can be read", place=place, remedy=remedy) from None
    except Exception as error:  # whatever a format's parser trips over in a damaged header
        raise UserError(f"the picture cannot be opened ({_words(error)})", place=place, remedy=remedy) from None


def orientation(picture: Image.Image) -> int:
    """EXIF orientation 1 to 8 as far as it stands before the pixels (a PNG may hold it behind them, where no reader
    looks). Call before ``load``. TIFF gives 1: Pillow itself turns those upright."""
    if picture.format == "TIFF":
        return 1
    try:
        # The base class's method: that of PNG would decode the whole picture first.
        value = Image.Image.getexif(picture).get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data is as good as none
        return 1
    return value if value in TRANSPOSE else 1


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation."""
    width, height = picture.size
    return (height, width) if orientation(picture) >= 5 else (width, height)


def picture_size(path: str) -> tuple[tuple[int, int], os.stat_result]:
    """(width, height) after the EXIF orientation, and the state the file was in when it was read.

    Raises UserError as ``open_picture`` does.
    """
    size, state = None, None
    try:
        handle = os.open(path, READ_FLAGS)
        try:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise UserError("not a file that can be read as a picture", place=path, remedy="rename or remove it")
            size = quick_size(handle, state.st_size)
        finally:
            os.close(handle)
    except OSError:
        pass  # open_picture says in words what it is
    if size is None or state is None:
        with open_picture(Path(path), path) as picture:
            size, state = upright_size(picture), state or os.stat(path)
    return size, state


def _byte_count(source: Path | BinaryIO) -> int:
    return os.path.getsize(source) if isinstance(source, (str, os.PathLike)) else source.seek(0, os.SEEK_END)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
