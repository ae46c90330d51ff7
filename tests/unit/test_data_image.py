"""Every kind of picture file comes out as the right RGB values, upright; every damaged one as one line of error."""

import io
import struct
import zlib

import numpy
import pytest
import torch
from PIL import Image, ImageCms

from library.data import header
from library.data.bucket import Placement, Rule
from library.data.header import open_picture, upright_size
from library.data.image import decode, load
from library.errors import UserError
from tests.unit.data_helpers import picture

RED, WHITE = (255, 0, 0), (255, 255, 255)
WHOLE = Placement((8, 8), (8, 8), (0, 0))


def pixel_of(path, at=(4, 4)):
    return decode(path, str(path)).getpixel(at)


@pytest.mark.parametrize("mode, color, expected", [
    ("RGB", (10, 20, 30), (10, 20, 30)), ("L", 77, (77, 77, 77)), ("1", 1, WHITE), ("RGBA", (255, 0, 0, 255), RED),
    ("RGBA", (255, 0, 0, 0), WHITE), ("RGBA", (255, 0, 0, 51), (255, 204, 204)), ("LA", (100, 255), (100, 100, 100)),
    ("LA", (100, 0), WHITE), ("I;16", 65535, WHITE), ("I;16", 32768, (128, 128, 128)), ("I;16", 300, (1, 1, 1)),
    ("I;16", 0, (0, 0, 0)),
])
def test_png_modes(tmp_path, mode, color, expected):
    path = tmp_path / "a.png"
    Image.new(mode, (8, 8), color).save(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
    assert pixel_of(path) == expected


def test_16_bit_rgb_is_scaled(tmp_path):
    """Pillow cannot write 16-bit colour, so the file is put together here: colour type 2, depth 16."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    row = b"\0" + struct.pack(">3H", 65535, 0x4020, 0) * 8
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b""))
    assert pixel_of(path) == (255, 0x40, 0)


@pytest.mark.parametrize("transparency, expected", [(None, RED), (0, WHITE), (b"\x33\xff", (255, 204, 204))])
def test_palette(tmp_path, transparency, expected):
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    path = tmp_path / "a.png"
    indexed.save(path, **({} if transparency is None else {"transparency": transparency}))
    with Image.open(path) as opened:
        assert opened.mode == "P"
    assert pixel_of(path) == expected


def test_key_colour_of_rgb_and_grey(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png", transparency=RED)
    Image.new("L", (8, 8), 9).save(tmp_path / "b.png", transparency=9)
    assert pixel_of(tmp_path / "a.png") == WHITE and pixel_of(tmp_path / "b.png") == WHITE


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
    with Image.open(path) as opened:
        assert opened.mode == "CMYK"
    red, green, blue = pixel_of(path)
    assert red > 245 and green < 10 and blue < 10


def test_cmyk_goes_through_its_profile(tmp_path, monkeypatch):
    """Pillow ships no CMYK profile: that the profile is asked for, and that a broken one does no harm."""
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, icc_profile=b"not a profile")
    red, green, blue = pixel_of(path)
    assert red > 245 and green < 10 and blue < 10
    asked = []

    def convert(picture, source, target, outputMode):  # noqa: N803 (Pillow's name)
        asked.append(picture.mode)
        return Image.new(outputMode, picture.size, (1, 2, 3))
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: file.read())
    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    assert pixel_of(path) == (1, 2, 3) and asked == ["CMYK"]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 255, 0), (0, 0, 255))]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as opened:
        assert opened.n_frames == 3
    assert pixel_of(path) == RED


def test_transparent_gif(tmp_path):
    path = tmp_path / "a.gif"
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
    assert pixel_of(path) == WHITE


def quarters():
    """Red top left, green top right, blue bottom left, black bottom right; 32 x 16."""
    upright = Image.new("RGB", (32, 16))
    for color, box in ((RED, (0, 0, 16, 8)), ((0, 255, 0), (16, 0, 32, 8)), ((0, 0, 255), (0, 8, 16, 16))):
        upright.paste(color, box)
    return upright


UNDO = {  # EXIF orientation -> how a camera would have stored the upright picture
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("value", UNDO)
def test_exif_orientation(tmp_path, value, suffix):
    path, upright = tmp_path / f"a.{suffix}", quarters()
    stored = upright if UNDO[value] is None else upright.transpose(UNDO[value])
    exif = Image.Exif()
    exif[0x0112] = value
    stored.save(path, exif=exif, **{"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {}))
    with open_picture(path, "a") as opened:
        assert upright_size(opened) == (32, 16)
    decoded = decode(path, "a")
    assert decoded.size == (32, 16)
    assert numpy.abs(numpy.asarray(decoded, float)[2:6:3, 4:30:8] - numpy.asarray(upright, float)[2:6:3, 4:30:8]).max() < 30
    assert max(decoded.getpixel((28, 13))) < 30 and decoded.getpixel((3, 13))[2] > 225


def test_bad_exif_means_upright(tmp_path):
    path = tmp_path / "a.jpg"
    quarters().save(path, exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    with open_picture(path, "a") as opened:
        assert upright_size(opened) == (32, 16)
    assert decode(path, "a").size == (32, 16)


def test_range_and_crop(tmp_path):
    path = tmp_path / "a.png"
    quarters().save(path)
    whole = load(path, Placement((32, 16), (32, 16), (0, 0)))
    assert whole.shape == (3, 16, 32) and whole.dtype == torch.float32
    assert whole[:, 0, 0].tolist() == [1, -1, -1] and whole[:, 15, 31].tolist() == [-1, -1, -1]
    part = load(path, Placement((16, 8), (32, 16), (16, 4)))
    assert torch.equal(part, whole[:, 4:12, 16:32])
    assert torch.equal(load(path.read_bytes(), Placement((16, 8), (32, 16), (16, 4))), part)


def test_shrinking_averages_areas_and_enlarging_is_smooth(tmp_path):
    path = tmp_path / "a.png"
    pixels = numpy.zeros((8, 8, 3), numpy.uint8)
    pixels[::2, ::2] = 200  # one of four
    Image.fromarray(pixels).save(path)
    small = load(path, Placement((4, 4), (4, 4), (0, 0)))
    assert torch.allclose(small, torch.full((3, 4, 4), 50 / 127.5 - 1), atol=1e-6)
    quarters().save(path)
    large = load(path, Placement((64, 32), (64, 32), (0, 0)))
    assert len(large[0, 4].unique()) > 2 and large[0, 4, 0] > 0.95


def test_placement_of_a_real_photograph_shape(tmp_path):
    path = picture(tmp_path / "a.jpg", (300, 200))
    placement = Rule((128, 128), True, 32, None, 16, False).place((300, 200))
    assert load(path, placement).shape == (3, placement.bucket[1], placement.bucket[0])


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_truncated_files_are_one_line_naming_the_picture(tmp_path, suffix):
    noise = Image.fromarray(numpy.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=numpy.uint8))
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    cut(path, 0.6)
    with pytest.raises(UserError) as caught:
        load(path, Placement((64, 64), (64, 64), (0, 0)))
    assert str(path) in str(caught.value) and "replace" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (b"", "empty file"), (b"<html>404</html>", "not a picture"), (b"\xff\xd8\xff\xe0", "picture")])
def test_files_that_are_no_pictures(tmp_path, content, words):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(UserError, match=words) as caught:
            load(source, WHOLE, "a.png")
        assert str(caught.value).startswith("a.png: ")


def test_missing_and_changed_files(tmp_path):
    with pytest.raises(UserError, match="gone"):
        load(tmp_path / "a.png", WHOLE)
    with pytest.raises(UserError, match="changed its shape to 96x64"):
        load(picture(tmp_path / "b.png", (96, 64)), WHOLE)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS * 2 == header.MAX_PIXELS
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="million pixels"):
        open_picture(path, str(path))


def test_32_bit_pixels(tmp_path):
    fine, large, floating = tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "c.tif"
    Image.new("I", (8, 8), 65535).save(fine)
    Image.new("I", (8, 8), 70000).save(large)
    Image.new("F", (8, 8), 0.5).save(floating)
    assert pixel_of(fine) == WHITE
    for path in (large, floating):
        with pytest.raises(UserError, match="convert it to 8 or 16 bits") as caught:
            load(path, WHOLE)
        assert str(caught.value).startswith(str(path))


def test_bytes_and_file_objects_agree(tmp_path):
    path = picture(tmp_path / "a.jpg", (64, 64))
    assert list(decode(path, "a").tobytes()) == list(decode(path.read_bytes(), "a").tobytes())
    with open_picture(io.BytesIO(path.read_bytes()), "a") as opened:
        assert opened.size == (64, 64)
