"""The part of a picture that a view names: scaled, cropped, turned round and coloured as it says."""

import colorsys

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.augment import INTERPOLATIONS, Color
from library.data.bucket import Placement, Rule
from library.data.color import recolor, rotate_hue
from library.data.image import View, load_view
from tests.unit.image_helpers import gradient, noise, pixels, view


def area_average(values, count):
    """The exact mean over ``count`` equal parts along the first axis, old pixels shared where an edge cuts them."""
    total = numpy.concatenate([numpy.zeros((1, *values.shape[1:])), numpy.cumsum(values, 0)])
    edges = numpy.linspace(0, len(values), count + 1)
    below = numpy.minimum(edges.astype(int), len(values) - 1)
    share = (edges - below).reshape(-1, *[1] * (values.ndim - 1))
    return numpy.diff(total[below] * (1 - share) + total[below + 1] * share, axis=0) * count / len(values)


def exact_area(picture, size):
    values = area_average(numpy.asarray(picture, float), size[1])
    return area_average(values.swapaxes(0, 1), size[0]).swapaxes(0, 1)


@pytest.fixture
def smooth(tmp_path):
    noise((12, 8), seed=3).resize((48, 32), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("resized", [(24, 16), (36, 24), (72, 48)])
def test_every_interpolation_gives_the_picture(smooth, interpolation, resized):
    """None moves the picture or changes its brightness; the pixel copies of ``nearest`` are off the most."""
    got = pixels(smooth, view(resized, interpolation=interpolation))
    with Image.open(smooth) as picture:
        wanted = exact_area(picture, resized)
    off = numpy.abs(got - wanted)
    assert off.mean() < (16 if interpolation in ("nearest", "box") else 8)
    assert numpy.abs((got - wanted).mean(axis=(0, 1))).max() < 3


def test_the_names_mean_different_things(smooth):
    made = {name: pixels(smooth, view((36, 24), interpolation=name)).tobytes() for name in INTERPOLATIONS}
    assert made["linear"] == made["bilinear"] and made["cubic"] == made["bicubic"] and made["auto"] == made["area"]
    assert len(set(made.values())) == len(INTERPOLATIONS) - 3
    assert pixels(smooth, view((72, 48))).tobytes() == pixels(smooth, view((72, 48), interpolation="lanczos")).tobytes()


def test_shrinking_averages_areas(tmp_path):
    values = numpy.zeros((8, 8, 3), numpy.uint8)
    values[::2, ::2] = 200  # one of four
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png", view((4, 4))) == 50).all()


def test_shrinking_by_broken_numbers_is_closer_to_the_area_than_box(tmp_path):
    """What the docstring of image.py says: Pillow's box takes old pixels wholly or not at all."""
    noise((65, 52), seed=1).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        wanted = exact_area(picture, (50, 40))
    error = {name: (pixels(tmp_path / "a.png", view((50, 40), interpolation=name)) - wanted).std() for name in ("auto", "box")}
    assert error["auto"] < error["box"] / 2


@given(st.integers(20, 90), st.integers(20, 90), st.data())
def test_a_part_is_the_part_of_the_whole(tmp_path_factory, width, height, data):
    """Computing only the crop changes no pixel by more than rounding. Pillow chooses which side it scales first by the shape
    of the result, so the picture has no extremes: between the two it would cut off what overshoots."""
    path = tmp_path_factory.mktemp("views") / "a.png"
    noise((width, height)).point(lambda value: 64 + value // 2).save(path)
    scale = data.draw(st.floats(0.3, 2.0))
    short = max(round(min(width, height) * scale), 8)
    long = (2 * max(width, height) * short + min(width, height)) // (2 * min(width, height))
    resized = (short, long) if width <= height else (long, short)
    wide, high = (data.draw(st.integers(4, side)) for side in resized)
    left, top = data.draw(st.integers(0, resized[0] - wide)), data.draw(st.integers(0, resized[1] - high))
    whole = pixels(path, view(resized))
    part = pixels(path, view((wide, high), resized, (left, top)))
    assert numpy.abs(part - whole[top:top + high, left:left + wide]).max() <= 2


def test_flip_mirrors_the_part_that_was_cropped(tmp_path):
    gradient().save(tmp_path / "a.png")
    for resized in ((48, 32), (36, 24)):
        plain = pixels(tmp_path / "a.png", view((16, 16), resized, (3, 5)))
        assert numpy.array_equal(pixels(tmp_path / "a.png", view((16, 16), resized, (3, 5), flip=True)), plain[:, ::-1])


def test_result_is_planar_and_contiguous(tmp_path):
    gradient().save(tmp_path / "a.png")
    result, mask = load_view(tmp_path / "a.png", view((16, 32), (48, 32), (16, 0), flip=True, color=Color(hue=5)), "a")
    assert result.shape == (3, 32, 16) and result.dtype == torch.uint8 and result.is_contiguous() and mask is None


def test_every_bucket_of_a_rule(tmp_path):
    rule = Rule((128, 128), True, 32, None, 16, False)
    for size in ((300, 200), (200, 300), (64, 64), (901, 77)):
        path = tmp_path / f"{size[0]}.png"
        noise(size).save(path)
        place: Placement = rule.place(size)
        assert pixels(path, View(place)).shape == (place.bucket[1], place.bucket[0], 3)


@given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(-180, 180))
def test_hue_is_rotated_as_in_hsv(color, degrees):
    got = rotate_hue(numpy.array(color, numpy.uint8).reshape(3, 1, 1), degrees).reshape(3)
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    wanted = numpy.array(colorsys.hsv_to_rgb((hue + degrees / 360) % 1.0, saturation, value)) * 255
    assert numpy.abs(got - wanted).max() <= 0.51


def test_hue_direction_and_grey():
    red = numpy.array([255, 0, 0], numpy.uint8).reshape(3, 1, 1)
    assert rotate_hue(red, 120).reshape(3).tolist() == [0, 255, 0] and rotate_hue(red, -120).reshape(3).tolist() == [0, 0, 255]
    grey = numpy.broadcast_to(numpy.arange(256, dtype=numpy.uint8), (3, 40, 256))
    assert numpy.array_equal(rotate_hue(grey, 16.0), grey)


def test_gamma():
    ramp = numpy.broadcast_to(numpy.arange(256, dtype=numpy.uint8), (3, 1, 256))
    darker = recolor(ramp, Color(gamma=1.05))
    assert darker[0, 0, 128] == round(255 * (128 / 255) ** 1.05) and darker[0, 0, [0, 255]].tolist() == [0, 255]
    assert (recolor(ramp, Color(gamma=0.95)) >= ramp).all() and numpy.array_equal(recolor(ramp, Color()), ramp)


def test_colour_is_applied_to_the_channels_in_their_order(tmp_path):
    """Red towards yellow is more green; the dialect's own augmentation takes red for blue."""
    Image.new("RGB", (8, 8), (200, 40, 40)).save(tmp_path / "a.png")
    red, green, blue = pixels(tmp_path / "a.png", view((8, 8), color=Color(hue=10)))[0, 0]
    assert (red, blue) == (200, 40) and 60 < green < 75
