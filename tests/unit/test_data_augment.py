"""The draws of a showing: right shares, right ranges, each a function of its key alone; faces stay in their crops."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.augment import (
    COLOR_SHARE, GAMMA_LIMITS, HUE_LIMIT_DEGREES, Augment, View, draw_view, face_box, face_placement, plain_view, without_face,
)
from library.data.bucket import Rule
from library.data.keyed import Keyed

RULE = Rule((128, 128), True, 32, None, 16, False)


def item(size=(300, 200), name="a.png", interpolation="auto", **augment):
    """As much of an Item as the draws look at."""
    subset = SimpleNamespace(augment=Augment(**augment), interpolation=interpolation)
    return SimpleNamespace(path=Path(name), size=size, placement=RULE.place(size), subset=subset)


def drawn(given_item, count=2000):
    return [draw_view(given_item, 7, epoch, f"0.0/a.png#{repeat}") for epoch in range(count // 10) for repeat in range(10)]


def test_what_can_be_cached():
    assert not Augment().changes_pixels and not Augment(flip=True).changes_pixels
    for given_augment in (Augment(color=True), Augment(random_crop=True), Augment(face_crop=(2, 4))):
        assert given_augment.changes_pixels


def test_nothing_asked_for_is_the_plain_view():
    plain = item(interpolation="bicubic")
    assert plain_view(plain) == View(plain.placement, interpolation="bicubic")
    assert set(drawn(plain, 100)) == {plain_view(plain)}
    assert plain_view(item(flip=True, color=True, random_crop=True)) == View(plain.placement)


def test_flips_are_half():
    views = drawn(item(flip=True))
    assert 900 < sum(view.flip for view in views) < 1100
    assert {view.placement for view in views} == {item().placement}


def test_colours():
    colors = [view.color for view in drawn(item(color=True))]
    touched = [color for color in colors if color is not None]
    assert abs(len(touched) / len(colors) - COLOR_SHARE) < 0.04
    hues, gammas = [color.hue for color in touched if color.hue], [color.gamma for color in touched if color.gamma != 1.0]
    assert len(hues) + len(gammas) == len(touched) and abs(len(hues) - len(gammas)) < 100
    assert -HUE_LIMIT_DEGREES <= min(hues) < -14 and 14 < max(hues) <= HUE_LIMIT_DEGREES
    assert GAMMA_LIMITS[0] <= min(gammas) < 0.955 and 1.045 < max(gammas) <= GAMMA_LIMITS[1]


def test_random_crop_is_uniform_over_all_offsets():
    place = RULE.place((300, 190))
    (spare_x, spare_y) = (place.resized[axis] - place.bucket[axis] for axis in (0, 1))
    spare = max(spare_x, spare_y)
    assert spare >= 2
    crops = Counter(view.placement.crop for view in drawn(item((300, 190), random_crop=True)))
    assert set(crops) == {(x, y) for x in range(spare_x + 1) for y in range(spare_y + 1)}
    assert max(crops.values()) < 1.5 * min(crops.values())


def test_draws_depend_on_seed_epoch_and_sample_and_on_no_other_choice():
    everything = item((300, 190), flip=True, color=True, random_crop=True)
    first = [draw_view(everything, 7, epoch, "0.0/a.png#0") for epoch in range(50)]
    assert first == [draw_view(everything, 7, epoch, "0.0/a.png#0") for epoch in range(50)]
    for other in ([draw_view(everything, 8, epoch, "0.0/a.png#0") for epoch in range(50)],
                  [draw_view(everything, 7, epoch, "0.0/a.png#1") for epoch in range(50)], first[1:] + first[:1]):
        assert first != other
    flips = [draw_view(item(flip=True), 7, epoch, "0.0/a.png#0").flip for epoch in range(50)]
    assert flips == [view.flip for view in first]
    crops = [draw_view(item((300, 190), random_crop=True), 7, epoch, "0.0/a.png#0").placement for epoch in range(50)]
    assert crops == [view.placement for view in first]


@pytest.mark.parametrize("stem, box, rest", [
    ("a_10_20_30_40", (10, 20, 30, 40), "a"), ("my_photo_2_0010_0020_0030_0040", (10, 20, 30, 40), "my_photo_2"),
    ("a_b", None, "a_b"), ("a_10_20_30", None, "a_10_20_30"), ("_10_20_30_40", None, "_10_20_30_40"),
    ("a_10_20_30_40_50", (20, 30, 40, 50), "a_10"), ("a_10_20_30_4x", None, "a_10_20_30_4x"), ("a_0_0_0_0", None, "a"),
    ("a_1_2_-3_4", None, "a_1_2_-3_4"), ("a_\u0661_2_3_4", None, "a_\u0661_2_3_4"), ("a\n_1_2_3_4", (1, 2, 3, 4), "a\n"),
])
def test_face_fields(stem, box, rest):
    assert face_box(stem) == box and without_face(stem) == rest


SIZES = st.tuples(st.integers(16, 3000), st.integers(16, 3000))


@given(SIZES, st.data(), st.booleans(), st.integers(0, 999))
def test_face_crops_are_real_parts_of_the_picture(size, data, anywhere, seed):
    face = (data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1)),
            data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1])))
    low = data.draw(st.floats(0.5, 6))
    limits = (low, low + data.draw(st.floats(0, 4)))
    bucket = RULE.place(size).bucket
    place = face_placement(size, bucket, face, limits, anywhere, Keyed(seed))
    resized = place.resized
    assert place.bucket == bucket
    for axis in (0, 1):
        assert 0 <= place.crop[axis] <= resized[axis] - bucket[axis]
    assert 2 * abs(resized[0] * size[1] - resized[1] * size[0]) <= max(size), "what load_view takes for an unchanged shape"
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    scale = min(resized) / min(size)
    assert scale <= max(cover, 1.0) * 1.0001 + 0.5 / min(size), "nothing is enlarged that need not be"
    wanted = [min(bucket) / (max(face[2:]) * limit) for limit in limits]
    if wanted[0] <= 1 and wanted[1] >= cover:  # both ends can be had
        slack = 1.0 / min(size)
        assert wanted[1] - slack <= scale <= wanted[0] + slack


@given(st.integers(0, 999), st.booleans(), st.integers(20, 980), st.integers(20, 980))
def test_the_whole_face_is_in_the_crop(seed, anywhere, x, y):
    """A crop of at least twice the face holds all of it that lies in the picture."""
    face = (x, y, 90, 120)
    place = face_placement((1000, 1000), (128, 128), face, (2.0, 4.0), anywhere, Keyed(seed))
    ratio = place.resized[0] / 1000
    for axis in (0, 1):
        start, end = place.crop[axis] / ratio, (place.crop[axis] + 128) / ratio
        assert start <= max(face[axis] - face[axis + 2] / 2, 0) + 1.5 / ratio
        assert end >= min(face[axis] + face[axis + 2] / 2, 1000) - 1.5 / ratio


def test_without_random_crop_the_face_is_in_the_middle():
    place = face_placement((1000, 800), (128, 128), (500, 400, 100, 100), (3.0, 3.0), False, Keyed(1))
    ratio = place.resized[0] / 1000
    assert abs(place.crop[0] + 64 - 500 * ratio) <= 0.5 and abs(place.crop[1] + 64 - 400 * ratio) <= 0.5
    assert 128 / ratio == pytest.approx(300, rel=0.01)  # three faces wide


def test_a_face_at_the_edge_moves_off_the_middle():
    assert face_placement((1000, 1000), (128, 128), (0, 999, 100, 100), (3.0, 3.0), False, Keyed(1)).crop[0] == 0


def test_face_crop_asks_the_file_name():
    faced = item((1000, 800), "b_500_400_100_100.png", face_crop=(2.0, 4.0))
    resized = {view.placement.resized for view in drawn(faced, 200)}
    assert len(resized) > 20 and RULE.place((1000, 800)).resized not in resized
    for name in ("b.png", "b_0_0_0_0.png", "b_2000_400_100_100.png"):
        assert {view.placement for view in drawn(item((1000, 800), name, face_crop=(2.0, 4.0)), 50)} == {faced.placement}
        crops = {view.placement for view in drawn(item((1000, 790), name, face_crop=(2.0, 4.0), random_crop=True), 200)}
        assert len(crops) > 1 and {place.resized for place in crops} == {RULE.place((1000, 790)).resized}
    unasked = item((1000, 800), "b_500_400_100_100.png")
    assert set(drawn(unasked, 50)) == {plain_view(unasked)}
