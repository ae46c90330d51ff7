"""A loss mask lies over exactly the part of the picture that is trained."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.augment import Color
from library.data.image import load_view, mask_to_cells
from library.errors import UserError
from tests.unit.image_helpers import UNDO, gradient, noise, pixels, stored, view


def mask_of(source, given_view, mask):
    result = load_view(source, given_view, str(source), mask)[1]
    assert result is not None and result.dtype == torch.uint8 and result.is_contiguous()
    return result.numpy().astype(int)


VIEWS = [view((48, 32)), view((16, 16), (48, 32), (20, 9)), view((24, 16), (36, 24), (7, 5)), view((40, 30), (72, 48), (11, 2))]


@pytest.mark.parametrize("given_view", [each for plain in VIEWS for each in (plain, view(
    plain.placement.bucket, plain.placement.resized, plain.placement.crop, flip=True))])
@pytest.mark.parametrize("times", [1, 0.5, 2])
@pytest.mark.parametrize("turn", [1, 6, 8])
def test_a_mask_picture_is_cropped_as_the_picture(tmp_path, given_view, times, turn):
    """The mask is the picture's own red channel, at other sizes and as a turned camera would have stored it."""
    gradient((48, 32)).save(tmp_path / "a.png")
    size = (int(48 * times), int(32 * times))
    path = stored(gradient(size), tmp_path / "mask.png", turn)
    mask = mask_of(tmp_path / "a.png", given_view, path)
    red = pixels(tmp_path / "a.png", given_view)[..., 0]
    assert mask.shape == red.shape
    inner = numpy.abs(mask - red)[2:-2, 2:-2]
    assert inner.max() <= (1 if times == 1 and turn == 1 and given_view.placement.resized[0] <= 48 else 9)
    assert numpy.array_equal(mask, mask_of(tmp_path / "a.png", given_view, path.read_bytes()))


@pytest.mark.parametrize("mode, color, expected", [
    ("L", 90, 90), ("RGB", (90, 1, 2), 90), ("1", 1, 255), ("I;16", 90 * 257, 90), ("RGBA", (200, 0, 0, 51), 40),
    ("RGBA", (255, 255, 255, 0), 0), ("LA", (90, 255), 90)])
def test_mask_files_of_any_mode(tmp_path, mode, color, expected):
    """The red channel; what is transparent is masked, whatever colour a paint program left beneath it."""
    gradient().save(tmp_path / "a.png")
    Image.new(mode, (48, 32), color).save(tmp_path / "mask.png")
    assert (mask_of(tmp_path / "a.png", VIEWS[1], tmp_path / "mask.png") == expected).all()


def transparent(picture, alpha):
    rgba = picture.convert("RGBA")
    rgba.putalpha(alpha)
    return rgba


@pytest.mark.parametrize("turn", UNDO)
def test_alpha(tmp_path, turn):
    """The mask is the alpha channel, and the colours are those of the file, not laid on white."""
    upright, alpha = gradient(), noise((48, 32), seed=2, channels=1)
    path = stored(transparent(upright, alpha), tmp_path / "a.png", turn)
    upright.save(tmp_path / "opaque.png")
    alpha.save(tmp_path / "alpha.png")
    for given_view in VIEWS:
        assert numpy.abs(mask_of(path, given_view, "alpha")
                         - mask_of(tmp_path / "opaque.png", given_view, tmp_path / "alpha.png")).max() <= 2
        assert numpy.abs(pixels(path, given_view, "alpha") - pixels(tmp_path / "opaque.png", given_view)).max() <= 2
    assert numpy.abs(pixels(path, VIEWS[0]) - pixels(path, VIEWS[0], "alpha")).max() > 100  # without a mask: on white


def test_wholly_transparent_parts_keep_their_colours(tmp_path):
    path = tmp_path / "a.png"
    transparent(Image.new("RGB", (48, 32), (10, 20, 30)), Image.new("L", (48, 32), 0)).save(path)
    for given_view in VIEWS:
        assert (pixels(path, given_view, "alpha") == (10, 20, 30)).all() and (mask_of(path, given_view, "alpha") == 0).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_picture_without_alpha_counts_everywhere(tmp_path, name):
    gradient().save(tmp_path / name)
    assert (mask_of(tmp_path / name, VIEWS[2], "alpha") == 255).all()


def test_palette_transparency_is_a_mask(tmp_path):
    indexed = Image.new("P", (48, 32), 0)
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    indexed.paste(1, (24, 0, 48, 32))
    indexed.save(tmp_path / "a.png", transparency=0)
    mask = mask_of(tmp_path / "a.png", VIEWS[0], "alpha")
    assert (mask[:, :24] == 0).all() and (mask[:, 24:] == 255).all()


def test_colour_augmentation_leaves_the_mask_alone(tmp_path):
    gradient().save(tmp_path / "a.png")
    plain, colored = (view((16, 16), (36, 24), (4, 4), color=color) for color in (None, Color(gamma=0.5)))
    assert numpy.array_equal(mask_of(tmp_path / "a.png", plain, tmp_path / "a.png"),
                             mask_of(tmp_path / "a.png", colored, tmp_path / "a.png"))
    assert not numpy.array_equal(pixels(tmp_path / "a.png", plain), pixels(tmp_path / "a.png", colored))


@pytest.mark.parametrize("size, fits", [((24, 16), True), ((24, 15), True), ((23, 16), True), ((96, 64), True), ((97, 64), True),
                                        ((32, 48), False), ((48, 48), False), ((48, 30), False), ((30, 16), False)])
def test_a_mask_of_another_shape_is_refused(tmp_path, size, fits):
    gradient().save(tmp_path / "a.png")
    Image.new("L", size, 255).save(tmp_path / "mask.png")
    if fits:
        assert (mask_of(tmp_path / "a.png", VIEWS[1], tmp_path / "mask.png") == 255).all()
        return
    with pytest.raises(UserError, match=rf"mask has {size[0]}x{size[1]} pixels.*48x32") as caught:
        load_view(tmp_path / "a.png", VIEWS[1], str(tmp_path / "a.png"), tmp_path / "mask.png")
    assert str(caught.value).startswith(str(tmp_path / "mask.png"))


def test_damaged_and_missing_masks_name_the_mask(tmp_path):
    gradient().save(tmp_path / "a.png")
    (tmp_path / "mask.png").write_bytes(b"nothing")
    for name, words in (("mask.png", "not a picture"), ("none.png", "gone")):
        with pytest.raises(UserError, match=words) as caught:
            load_view(tmp_path / "a.png", VIEWS[0], "a.png", tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(UserError, match="the mask of a.png"):
        load_view(tmp_path / "a.png", VIEWS[0], "a.png", b"nothing")


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_cells_average_their_pixels(batch, high, wide, factor, seed):
    mask = torch.randint(0, 256, (batch, high * factor, wide * factor), generator=torch.Generator().manual_seed(seed),
                         dtype=torch.uint8)
    cells = mask_to_cells(mask, high, wide)
    assert cells.shape == (batch, 1, high, wide) and cells.dtype == torch.float32
    assert 0 <= cells.min() and cells.max() <= 1
    for row in range(high):
        for column in range(wide):
            part = mask[:, row * factor:(row + 1) * factor, column * factor:(column + 1) * factor].double().mean(dim=(1, 2))
            assert torch.allclose(cells[:, 0, row, column].double(), part / 255, atol=1e-6)


def test_a_full_mask_is_exactly_one():
    """So that training with a mask that hides nothing gives the numbers of training without one."""
    assert (mask_to_cells(torch.full((1, 64, 128), 255, dtype=torch.uint8), 8, 16) == 1).all()
