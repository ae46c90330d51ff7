"""Sizes of JPEG, PNG and WebP files from their first bytes, several times faster than opening them with Pillow.

Only what is entirely ordinary is answered. Whatever is damaged, unusual or large enough to be refused gives None, and
Pillow has the word: ``header.picture_size`` asks both, so a picture is never told to have another size than it decodes to.

The sources: ITU-T T.81 annex B (JPEG), TIFF 6.0 and Exif 2.3 (orientation), the PNG specification (third edition), RFC 9649
(WebP).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable

Size = tuple[int, int]

FIRST_BYTES = 2048  # of a file; most headers end before
LONGEST_PART = 1 << 20  # of a header; longer ones are left to Pillow

_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # JPEG: baseline, extended, progressive
_SEGMENT, _FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
_WITHOUT_INTEREST = frozenset({0xC4, 0xDD, 0xE0, *range(0xE3, 0xF0), 0xFE})  # codes, restarts, what programs add, comments
ORIENTATION_TAG = 0x0112  # EXIF
_TIFF_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # bytes of a value by its type
# Bit depths that each colour type of PNG allows
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_CRITICAL = (b"IHDR", b"PLTE")
# Keywords of PNG texts in which programs hide an orientation
_PNG_HIDDEN = (b"XML:com.adobe.xmp\0", b"Raw profile type", b"xmp\0", b"exif\0")


class _Odd(Exception):
    """For Pillow to judge."""


def quick_size(handle: int, file_bytes: int) -> Size | None:
    """(width, height) of an open file of that many bytes after the EXIF orientation; None when Pillow has to be asked.

    Reads from the start of the file. Raises OSError.
    """
    head = os.read(handle, FIRST_BYTES)
    if head[:3] == b"\xff\xd8\xff":
        parser: Callable[[_Reader], tuple[Size, int]] = _jpeg
    elif head[:8] == b"\x89PNG\r\n\x1a\n":
        parser = _png
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        parser = _webp
    else:
        return None
    try:
        (width, height), turn = parser(_Reader(handle, head, file_bytes))
    except (_Odd, struct.error):
        return None
    if width < 1 or height < 1 or width * height > 64 * 1024**2:  # Pillow warns of and refuses the largest ones
        return None
    return (height, width) if turn >= 5 else (width, height)


class _Reader:
    """Bytes of the file by position, without reading what lies between."""

    def __init__(self, handle: int, head: bytes, file_bytes: int):
        self.handle, self.window, self.start, self.file_bytes = handle, head, 0, file_bytes

    def bytes(self, position: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``position`` on."""
        if count > LONGEST_PART or position + count > self.file_bytes:
            raise _Odd
        offset = position - self.start
        if not 0 <= offset <= len(self.window) - count:
            os.lseek(self.handle, position, os.SEEK_SET)
            self.window, self.start, offset = os.read(self.handle, max(count, FIRST_BYTES)), position, 0
            if len(self.window) < count:
                raise _Odd
        return self.window[offset:offset + count]


def _jpeg(reader: _Reader) -> tuple[Size, int]:
    size, exif, turn, xmp, position = None, False, 0, False, 2
    while True:
        offset = position - reader.start
        if offset + 4 > len(reader.window):
            reader.bytes(position, 4)
            offset = 0
        ff, marker, length = _SEGMENT.unpack_from(reader.window, offset)
        if ff != 0xFF or length < 2:
            raise _Odd
        if marker in _WITHOUT_INTEREST:
            pass
        elif marker == 0xDB:
            _check_tables(reader.bytes(position + 4, length - 2))
        elif marker == 0xDA:  # the pixels begin; what comes before them is what Pillow reads as well
            if size is None or (xmp and not turn) or position + 2 + length > reader.file_bytes:
                raise _Odd
            return size, turn or 1
        elif marker in _FRAMES:
            bits, height, width, layers = _FRAME.unpack(reader.bytes(position + 4, 6))
            if size is not None or bits != 8 or layers not in (1, 3, 4) or length != 8 + 3 * layers:
                raise _Odd
            size = (width, height)
        elif marker == 0xE1:
            kind = reader.bytes(position + 4, min(length - 2, 29))
            if kind.startswith(b"Exif\0\0") and not exif:
                exif, turn = True, _exif_orientation(reader.bytes(position + 10, length - 8))
            elif kind.startswith(b"Exif"):  # a second block
                raise _Odd
            elif kind.startswith(b"http://ns.adobe.com/xap/"):  # where Pillow looks next
                xmp = xmp or b"tiff:Orientation" in reader.bytes(position + 4, length - 2)
        elif marker != 0xE2 or reader.bytes(position + 4, 4) == b"MPF\0":
            raise _Odd  # other ways to code, heights given later, markers in the wrong place; several pictures in a file
        position += 2 + length


def _check_tables(tables: bytes) -> None:
    """Quantization tables end where they should."""
    position = 0
    while position < len(tables):
        position += 65 if tables[position] < 16 else 129
    if position != len(tables):
        raise _Odd


def _exif_orientation(data: bytes) -> int:
    """1 to 8 from the first directory of a TIFF block, 0 without it."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        raise _Odd
    offset, = struct.unpack_from(order + "I", data, 4)
    count, = struct.unpack_from(order + "H", data, offset)
    turn, total, entry = 0, 0, struct.Struct(order + "HHII")
    for index in range(count):
        place = offset + 2 + 12 * index
        tag, kind, values, where = entry.unpack_from(data, place)
        width = _TIFF_WIDTHS.get(kind, 0) * values  # readers give up at an entry that is damaged
        total += width
        if not width or total > len(data) or (width > 4 and where + width > len(data)):
            raise _Odd
        if tag == ORIENTATION_TAG:
            value, = struct.unpack_from(order + "H", data, place + 8)
            if turn or kind != 3 or values != 1 or not 1 <= value <= 8:
                raise _Odd
            turn = value
    return turn


def _png(reader: _Reader) -> tuple[Size, int]:
    size, turn, position = None, 0, 8
    while True:
        length, kind = struct.unpack(">I4s", reader.bytes(position, 8))
        if kind == b"IDAT":
            if size is None:
                raise _Odd
            return size, turn or 1
        data = reader.bytes(position + 8, length + 4)
        body, stated = data[:-4], int.from_bytes(data[-4:], "big")
        if zlib.crc32(body, zlib.crc32(kind)) != stated:
            raise _Odd
        if (size is None) != (kind == b"IHDR"):
            raise _Odd
        if kind == b"IHDR":
            width, height, depth, color, compression, filters, interlace = struct.unpack(">IIBBBBB", body)
            if depth not in _PNG_DEPTHS.get(color, ()) or compression or filters or interlace > 1:
                raise _Odd
            size = (width, height)
        elif kind == b"eXIf":
            turn = _exif_orientation(body)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            if body.startswith(_PNG_HIDDEN):
                raise _Odd
        elif kind in (b"acTL", b"fcTL", b"CgBI", b"IEND") or (kind[0] < 97 and kind not in _PNG_CRITICAL):
            raise _Odd
        position += 12 + length


def _webp(reader: _Reader) -> tuple[Size, int]:
    inside, = struct.unpack("<I", reader.bytes(4, 4))
    end = 8 + inside
    if end > reader.file_bytes or inside % 2:
        raise _Odd
    kind, length = struct.unpack("<4sI", reader.bytes(12, 8))
    if 20 + length > end:
        raise _Odd
    if kind == b"VP8 ":
        return _vp8(reader.bytes(20, 10)), 1
    if kind == b"VP8L":
        return _vp8l(reader.bytes(20, 5)), 1
    if kind != b"VP8X" or length != 10:
        raise _Odd
    flags, canvas = struct.unpack("<B3x6s", reader.bytes(20, 10))
    if flags & 0x06:  # animations, XMP
        raise _Odd
    size = 1 + int.from_bytes(canvas[:3], "little"), 1 + int.from_bytes(canvas[3:], "little")
    return size, _webp_chunks(reader, 30, end, size, bool(flags & 0x08))


def _webp_chunks(reader: _Reader, position: int, end: int, size: Size, has_exif: bool) -> int:
    """The orientation. Checks that there is one picture, and that it fills the canvas."""
    turn, pictures = None, 0
    while position < end:
        kind, length = struct.unpack("<4sI", reader.bytes(position, 8))
        if position + 8 + length + length % 2 > end:
            raise _Odd
        if kind in (b"VP8 ", b"VP8L"):
            pictures += 1
            own = _vp8(reader.bytes(position + 8, 10)) if kind == b"VP8 " else _vp8l(reader.bytes(position + 8, 5))
            if own != size:
                raise _Odd
        elif kind == b"EXIF" and has_exif:
            block = reader.bytes(position + 8, length)
            turn = _exif_orientation(block.removeprefix(b"Exif\0\0"))
        elif kind not in (b"ALPH", b"ICCP"):
            raise _Odd
        position += 8 + length + length % 2
    if pictures != 1 or has_exif != (turn is not None):
        raise _Odd
    return turn or 1


def _vp8(start: bytes) -> Size:
    """A lossy key frame that is shown."""
    if start[0] & 1 or not start[0] & 0x10 or start[3:6] != b"\x9d\x01\x2a":
        raise _Odd
    width, height = struct.unpack("<HH", start[6:])
    if width >> 14 or height >> 14:  # to be enlarged when shown
        raise _Odd
    return width, height


def _vp8l(start: bytes) -> Size:
    bits = int.from_bytes(start[1:], "little")
    if start[0] != 0x2F or bits >> 29:  # the top three bits are the version
        raise _Odd
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
