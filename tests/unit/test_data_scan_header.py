"""Sizes read from first bytes are those that Pillow tells, or none."""

import io
import os
import zlib

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.data.header import open_picture, picture_size, upright_size
from library.data.quick_header import quick_size
from library.errors import UserError

FORMATS = [("JPEG", "RGB", {}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {}), ("PNG", "RGB", {}), ("PNG", "P", {}),
           ("PNG", "LA", {}), ("PNG", "I;16", {}), ("PNG", "1", {}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {}),
           ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {"lossless": True})]


def encoded(how, mode, size, turn=None, **save):
    """``turn``: EXIF orientation. Some EXIF data stands before it, as cameras write it."""
    pixels = numpy.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    picture = Image.fromarray(pixels).resize(size).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(numpy.asarray(picture).astype(numpy.uint16))
    if turn is not None:
        exif = Image.Exif()
        exif[0x010F], exif[0x0112], exif[0x8298] = "a maker of cameras", turn, "somebody"
        save["exif"] = exif
    file = io.BytesIO()
    picture.save(file, how, **save)
    return file.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "picture"


def quick(path, data):
    path.write_bytes(data)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        return quick_size(handle, len(data))
    finally:
        os.close(handle)


def pillow(path):
    with open_picture(path, str(path)) as opened:
        return upright_size(opened)


@given(st.sampled_from(FORMATS), st.tuples(st.integers(1, 300), st.integers(1, 300)),
       st.none() | st.integers(0, 9), st.sampled_from([0, 3000, 70000]))
def test_agrees_with_pillow(path, form, size, turn, filling):
    how, mode, save = form
    if filling and mode in ("RGB", "L"):
        save = {**save, "icc_profile": bytes(filling)}
    data = encoded(how, mode, size, turn, **save)
    found = quick(path, data)
    assert picture_size(str(path))[0] == pillow(path) in (size, size[::-1])
    assert found in (None, pillow(path))
    if turn in (None, *range(1, 9)):
        assert found is not None, "ordinary files are answered without Pillow"


@given(st.sampled_from(FORMATS), st.integers(0, 2000), st.integers(0, 255), st.booleans())
def test_damaged_files_are_left_to_pillow_or_agree(path, form, position, value, cut):
    data = bytearray(encoded(form[0], form[1], (90, 60), 6))
    position %= len(data)
    data = data[:position] if cut else data[:position] + bytes([value]) + data[position + 1:]
    found = quick(path, bytes(data))
    try:
        told = pillow(path)
    except UserError:
        told = None  # in the pixels of a WebP file, or the tables of a JPEG: found out when the picture is decoded
        assert found is None or form[0] != "PNG" and not cut
    assert found is None or told is None or found == told


def test_orientation_in_other_places_is_left_to_pillow(path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for data in (encoded("JPEG", "RGB", (40, 20), xmp=xmp), encoded("WEBP", "RGB", (40, 20), xmp=xmp)):
        assert quick(path, data) is None and picture_size(str(path))[0] == (20, 40)
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    assert quick(path, encoded("PNG", "RGB", (40, 20), pnginfo=info)) is None and picture_size(str(path))[0] == pillow(path)
    # The one in the EXIF data comes first
    assert quick(path, encoded("JPEG", "RGB", (40, 20), 1, xmp=xmp)) == (40, 20) == pillow(path)


def test_texts_in_a_png(path):
    info = PngInfo()
    info.add_text("parameters", "a cat, " * 2000)
    assert quick(path, encoded("PNG", "RGB", (40, 20), 8, pnginfo=info)) == (20, 40) == pillow(path)


def test_animations_and_other_formats_are_left_to_pillow(path):
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    for how in ("WEBP", "PNG", "GIF", "TIFF", "BMP"):
        file = io.BytesIO()
        frames[0].save(file, how, save_all=how != "BMP", **({} if how == "BMP" else {"append_images": frames[1:]}))
        assert quick(path, file.getvalue()) is None and picture_size(str(path))[0] == (30, 20)


def test_enormous_sizes_are_refused_by_pillow(path):
    data = bytearray(encoded("PNG", "RGB", (40, 20)))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    assert quick(path, bytes(data)) is None
    with pytest.raises(UserError, match="million pixels"):
        picture_size(str(path))
