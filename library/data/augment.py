"""Which part of a picture one showing takes, which way round and in which colours. Pure draws; no pixels, no torch.

Each choice has its own stream of draws, so switching one of them on leaves the others as they were.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.data.bucket import Placement, Size
from library.data.keyed import Keyed

if TYPE_CHECKING:
    from library.data.items import Item

# The names of the dialect. "linear" is "bilinear", "cubic" is "bicubic"; what each does is said in image.py.
INTERPOLATIONS = ("auto", "lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")

# Colour augmentation as in the dialect: a third of the showings get either another hue or another gamma. Its hue limit of
# 8 counts OpenCV's half degrees.
COLOR_SHARE = 0.33
HUE_LIMIT_DEGREES = 16.0
GAMMA_LIMITS = (0.95, 1.05)

_FACE = re.compile(r"(?P<base>.+)_(?P<x>[0-9]+)_(?P<y>[0-9]+)_(?P<w>[0-9]+)_(?P<h>[0-9]+)", re.DOTALL)


@dataclass(frozen=True)
class Augment:
    """A subset's choices. ``face_crop`` (lo, hi): the crop's short side as a multiple of the face's longer side."""

    flip: bool = False
    color: bool = False
    random_crop: bool = False
    face_crop: tuple[float, float] | None = None

    @property
    def changes_pixels(self) -> bool:
        """Showings differ in more than left and right, so latents cannot be cached."""
        return self.color or self.random_crop or self.face_crop is not None


@dataclass(frozen=True)
class Color:
    """``hue`` is added, in degrees of 360; values in 0..1 are raised to the power of ``gamma`` (above 1 darkens)."""

    hue: float = 0.0
    gamma: float = 1.0


@dataclass(frozen=True)
class View:
    """Everything that decides the pixels of one showing. The placement counts from the left of the unflipped picture."""

    placement: Placement
    flip: bool = False
    color: Color | None = None
    interpolation: str = "auto"


def plain_view(item: Item) -> View:
    """The middle of the picture, not flipped, in its own colours."""
    return View(item.placement, interpolation=item.subset.interpolation)


def draw_view(item: Item, seed: int, epoch: int, sample_id: str) -> View:
    """The view of one showing, as the item's subset asks."""
    augment = item.subset.augment

    def draws(purpose: str) -> Keyed:
        return Keyed(seed, epoch, sample_id, purpose)

    place = item.placement
    face = face_box(item.path.stem) if augment.face_crop is not None else None
    if face is not None and (face[0] >= item.size[0] or face[1] >= item.size[1]):
        face = None  # numbers of another picture
    if face is not None:
        place = face_placement(item.size, place.bucket, face, augment.face_crop, augment.random_crop, draws("face"))
    elif augment.random_crop:
        place = _random_placement(place, draws("crop"))
    flip = augment.flip and draws("flip").uniform() < 0.5
    return View(place, flip, _color(draws("color")) if augment.color else None, item.subset.interpolation)


def face_box(stem: str) -> tuple[int, int, int, int] | None:
    """(centre x, centre y, width, height) in pixels of the upright picture, from a file name that ends in
    ``_<cx>_<cy>_<w>_<h>``; None without these fields or with an empty box, which stands for "no face found"."""
    match = _FACE.fullmatch(stem)
    if match is None or int(match["w"]) == 0 or int(match["h"]) == 0:
        return None
    return int(match["x"]), int(match["y"]), int(match["w"]), int(match["h"])


def without_face(stem: str) -> str:
    """The stem without its four face fields; the stem itself where it has none."""
    match = _FACE.fullmatch(stem)
    return stem if match is None else match["base"]


def face_placement(size: Size, bucket: Size, face: tuple[int, int, int, int], limits: tuple[float, float], anywhere: bool,
                   draws: Keyed) -> Placement:
    """A crop of ``bucket`` around a face of a picture of ``size`` pixels.

    With F the longer side of the face and S the shorter one of the bucket, the scale is uniform between S / (hi F) and
    S / (lo F), both first limited to what covers the bucket and to 1, so that nothing is enlarged which need not be.
    The face is in the middle of the crop as far as the picture reaches. With ``anywhere`` (random_crop) the crop is
    uniform among those that hold the whole face; where the face is larger than the crop, among those inside the face.
    """
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    low, high = (min(max(min(bucket) / (max(face[2:]) * limit), cover), max(cover, 1.0)) for limit in (limits[1], limits[0]))
    scale = draws.uniform(low, high)
    # The shorter side is rounded, and the longer one follows it: the picture keeps its shape within half a pixel.
    short, long = min(size), max(size)
    first = max(round(short * scale), 1)
    resized = (first, (2 * long * first + short) // (2 * short))
    resized = resized if size[0] <= size[1] else resized[::-1]
    if resized[0] < bucket[0] or resized[1] < bucket[1]:  # rounding at the cover
        resized = (max(resized[0], bucket[0]), max(resized[1], bucket[1]))
    crop = []
    for axis in (0, 1):
        ratio, spare = resized[axis] / size[axis], resized[axis] - bucket[axis]
        centre, extent = face[axis] * ratio, face[axis + 2] * ratio
        start = round(centre - bucket[axis] / 2)
        if anywhere:
            ends = sorted((round(centre + extent / 2) - bucket[axis], round(centre - extent / 2)))
            first_start, last_start = (min(max(end, 0), spare) for end in ends)
            start = first_start + draws.below(last_start - first_start + 1)
        crop.append(min(max(start, 0), spare))
    return Placement(bucket, resized, (crop[0], crop[1]))


def _random_placement(place: Placement, draws: Keyed) -> Placement:
    left, top = (draws.below(place.resized[axis] - place.bucket[axis] + 1) for axis in (0, 1))
    return Placement(place.bucket, place.resized, (left, top))


def _color(draws: Keyed) -> Color | None:
    if draws.uniform() >= COLOR_SHARE:
        return None
    if draws.uniform() < 0.5:
        return Color(hue=draws.uniform(-HUE_LIMIT_DEGREES, HUE_LIMIT_DEGREES))
    return Color(gamma=draws.uniform(*GAMMA_LIMITS))
