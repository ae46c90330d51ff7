"""Every kind of picture file comes out as the right RGB values, upright; every damaged one as one line of error."""

import struct
import zlib

import numpy
import pytest
import torch
from PIL import Image, ImageCms

from library.data import header
from library.data.header import open_picture, upright_size
from library.data.image import load_view, to_signal
from library.errors import UserError
from tests.unit.image_helpers import RED, UNDO, WHITE, noise, pixel_of, pixels, stored, view

WHOLE = view((8, 8))


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


def png(header_fields, rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *header_fields, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_16_bit_rgb_is_scaled(tmp_path):
    """Pillow cannot write 16-bit colour, so the file is put together here: colour type 2, depth 16."""
    path = tmp_path / "a.png"
    path.write_bytes(png((8, 8, 16, 2), (b"\0" + struct.pack(">3H", 65535, 0x4020, 0) * 8) * 8))
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
    red, green, blue = pixel_of(path, (16, 16))
    assert red > 245 and green < 10 and blue < 10


def test_cmyk_goes_through_its_profile(tmp_path, monkeypatch):
    """Pillow ships no CMYK profile: that the profile is asked for, and that a broken one does no harm."""
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, icc_profile=b"not a profile")
    red, green, blue = pixel_of(path, (16, 16))
    assert red > 245 and green < 10 and blue < 10
    asked = []

    def convert(picture, source, target, outputMode):  # noqa: N803 (Pillow's name)
        asked.append(picture.mode)
        return Image.new(outputMode, picture.size, (1, 2, 3))
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: file.read())
    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    assert pixel_of(path, (16, 16)) == (1, 2, 3) and asked == ["CMYK"]


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


@pytest.mark.skipif(".avif" not in header.readable_suffixes(), reason="this Pillow reads no AVIF")
def test_avif(tmp_path):
    path = tmp_path / "a.avif"
    Image.new("RGB", (16, 16), (200, 40, 90)).save(path, quality=95)
    assert numpy.abs(numpy.subtract(pixel_of(path, (16, 16)), (200, 40, 90))).max() < 8


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("turn", UNDO)
def test_exif_orientation(tmp_path, turn, suffix):
    """A part off the middle, neither scaled nor so: exactly the upright picture's."""
    upright = noise((32, 16))
    path = stored(upright, tmp_path / f"a.{suffix}", turn, **({"lossless": True} if suffix == "webp" else {}))
    with open_picture(path, "a") as opened:
        assert upright_size(opened) == (32, 16)
    values = numpy.asarray(upright, int)
    assert numpy.array_equal(pixels(path, view((32, 16))), values)
    assert numpy.array_equal(pixels(path, view((16, 8), (32, 16), (5, 6))), values[6:14, 5:21])
    upright.save(tmp_path / "upright.png")
    scaled = view((10, 6), (22, 11), (9, 3))
    assert numpy.abs(pixels(path, scaled) - pixels(tmp_path / "upright.png", scaled)).max() <= 1


def test_exif_orientation_of_jpeg(tmp_path):
    path = stored(Image.linear_gradient("L").resize((32, 16)).convert("RGB"), tmp_path / "a.jpg", 6, quality=95)
    values = pixels(path, view((32, 16)))
    assert values[0].max() < 25 and values[-1].min() > 230


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_bad_exif_means_upright(tmp_path):
    path = tmp_path / "a.jpg"
    noise((32, 16)).save(path, exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    with open_picture(path, "a") as opened:
        assert upright_size(opened) == (32, 16)
    assert pixels(path, view((32, 16))).shape == (16, 32, 3)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_truncated_files_are_one_line_naming_the_picture(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise((64, 64)).save(path)
    cut(path, 0.6)
    with pytest.raises(UserError) as caught:
        load_view(path, view((64, 64)), str(path))
    assert str(path) in str(caught.value) and "replace" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (b"", "empty file"), (b"<html>404</html>", "not a picture"), (b"\xff\xd8\xff\xe0", "picture")])
def test_files_that_are_no_pictures(tmp_path, content, words):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(UserError, match=words) as caught:
            load_view(source, WHOLE, "a.png")
        assert str(caught.value).startswith("a.png: ")


def test_missing_and_changed_files(tmp_path):
    with pytest.raises(UserError, match="gone"):
        load_view(tmp_path / "a.png", WHOLE, "a.png")
    noise((96, 64)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="changed its shape to 96x64"):
        load_view(tmp_path / "b.png", WHOLE, "b.png")


def test_decompression_bombs_are_refused(tmp_path):
    assert Image.MAX_IMAGE_PIXELS * 2 == header.MAX_PIXELS
    path = tmp_path / "a.png"
    path.write_bytes(png((60000, 60000, 8, 2), bytes(1000)))
    with pytest.raises(UserError, match="million pixels"):
        load_view(path, WHOLE, str(path))


def test_32_bit_pixels(tmp_path):
    fine, large, floating = tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "c.tif"
    Image.new("I", (8, 8), 65535).save(fine)
    Image.new("I", (8, 8), 70000).save(large)
    Image.new("F", (8, 8), 0.5).save(floating)
    assert pixel_of(fine) == WHITE
    for path in (large, floating):
        with pytest.raises(UserError, match="convert it to 8 or 16 bits") as caught:
            load_view(path, WHOLE, str(path))
        assert str(caught.value).startswith(str(path))


def test_bytes_and_paths_agree(tmp_path):
    path = tmp_path / "a.jpg"
    noise((64, 64)).save(path)
    given = view((32, 24), (40, 40), (3, 9))
    assert torch.equal(load_view(path, given, "a")[0], load_view(path.read_bytes(), given, "a")[0])


def test_signal():
    signal = to_signal(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert signal.dtype == torch.float32
    assert torch.allclose(signal, torch.tensor([-1.0, -0.6, 1.0]))
