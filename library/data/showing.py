"""What the model is shown of a picture in one step: which part, which way round, with which words. A pure function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from library.data import augment, caption
from library.data.augment import View
from library.data.caption import CaptionRules
from library.data.items import Item
from library.data.keyed import Keyed

EMPTY = -1  # the variant of a caption that was dropped


@dataclass(frozen=True)
class Course:
    """What all showings of a run have in common. ``variants``: of each caption, when text is cached; None when each caption
    is made anew. ``augmented`` False (validation): the fixed middle crop, and captions that nothing is dropped from."""

    seed: int
    total_steps: int
    variants: int | None = None
    prior_loss_weight: float = 1.0
    augmented: bool = True


@dataclass(frozen=True)
class Showing:
    """``variant`` counts from 0 among the cached variants of the caption; ``EMPTY`` for a dropped one."""

    sample_id: str
    path: Path
    mask: Literal["alpha"] | Path | None
    view: View
    caption: str
    variant: int
    weight: float
    geometry: tuple[int, int, int, int, int, int]  # original height, width; crop top, left; target height, width


def show(item: Item, repeat: int, course: Course, epoch: int, step: int) -> Showing:
    """The ``repeat``-th showing of ``item`` in ``epoch``. ``step`` (from 0) matters to token warm-up alone."""
    sample_id, rules = f"{item.sample_id}#{repeat}", item.subset.captions
    weight = item.weight * (course.prior_loss_weight if item.subset.is_reg else 1.0)
    if not course.augmented:
        view = augment.plain_view(item)
        words = variant_text(item.caption, rules, item.sample_id, course)
        return Showing(sample_id, item.path, item.mask, view, words, 0, weight, _geometry(item, view))
    view = augment.draw_view(item, course.seed, epoch, sample_id)
    variant, words = EMPTY, ""
    if not caption.dropped(rules, course.seed, epoch, sample_id):
        if course.variants is None:
            variant, words = 0, caption.render(item.caption, rules, course.seed, epoch, sample_id, step, course.total_steps)
        else:
            variant = Keyed(course.seed, epoch, sample_id, "variant").below(variant_count(rules, course))
            words = variant_text(item.caption, rules, item.sample_id, course, variant)
    return Showing(sample_id, item.path, item.mask, view, words, variant, weight, _geometry(item, view))


def variant_count(rules: CaptionRules, course: Course) -> int:
    """How many cached texts the showings of one caption draw from: one where they would all be the same, and for validation."""
    if not course.augmented or not rules.varies:
        return 1
    assert course.variants is not None, "only cached captions have a number of variants"
    return course.variants


def variant_text(words: str, rules: CaptionRules, item_id: str, course: Course, number: int = 0) -> str:
    """One of the ``variant_count`` texts of a caption, from 0; for validation with all its tags."""
    if not course.augmented:
        rules = replace(rules, tag_dropout_rate=0.0)
    return caption.variant(words, rules, course.seed, item_id, number)


def _geometry(item: Item, view: View) -> tuple[int, int, int, int, int, int]:
    """The size conditioning of the crop really made: of a flipped picture, what was cut off counts from its own left side."""
    (width, height), place = item.size, view.placement
    left, top = place.crop
    if view.flip:
        left = place.resized[0] - place.bucket[0] - left
    return height, width, top, left, place.bucket[1], place.bucket[0]
