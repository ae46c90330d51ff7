"""The contact sheet of the data page: pictures as the model will be shown them, small and ready to stand in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import torch
from PIL import Image

from library.data.augment import View
from library.data.decode import decoded, upright
from library.data.image import load_view
from library.data.items import Item, Items
from library.data.keyed import hash64, mix_array
from library.data.showing import EMPTY, Course, show
from library.data.tokens import TokenCount, TokenMeter
from library.errors import UserError

LONGEST = 288  # pixels of a picture on the page
WHOLE = 112  # and of the whole picture with the frame of the crop
SHOTS = 4  # showings of a picture that is shown in several ways
STRIPS = 2  # such pictures of each subset
THREADS = 4
MASKED = (214, 40, 120)  # lies over what the loss does not count


@dataclass(frozen=True)
class Shot:
    """One showing. ``picture`` is a data URL; ``mask`` the mean of the loss mask in 0..1, None without one. ``counts``: tokens of
    the caption for each text encoder, empty when they cannot be counted."""

    epoch: int
    picture: str
    view: View
    mask: float | None
    caption: str
    dropped: bool
    counts: Sequence[TokenCount] = field(default=())


@dataclass(frozen=True)
class Card:
    """One picture with some of its showings; ``whole`` is a data URL of all of it, "" when it cannot be drawn."""

    item: Item
    whole: str
    shots: tuple[Shot, ...]


def make_cards(items: Items, course: Course, steps_per_epoch: int, meter: TokenMeter | None,
               count: int) -> tuple[list[Card], list[UserError]]:
    """(cards of ``count`` pictures from all buckets and subsets, errors of the pictures that could not be decoded)."""
    rows = spread(items, count)
    strips: dict[int, int] = {}
    wanted = []
    for row in rows:
        item = items[row]
        several = _varies(item) and strips.setdefault(int(items.listing[row]), 0) < STRIPS
        strips[int(items.listing[row])] = strips.get(int(items.listing[row]), 0) + several
        wanted.append((item, SHOTS if several else 1))
    with ThreadPoolExecutor(THREADS) as pool:
        made = list(pool.map(lambda each: _card(*each, course, steps_per_epoch), wanted))
    cards = [card for card in made if isinstance(card, Card)]
    if meter is not None:
        counts = iter(meter([shot.caption for card in cards for shot in card.shots]))
        cards = [replace(card, shots=tuple(replace(shot, counts=next(counts)) for shot in card.shots)) for card in cards]
    return cards, [error for error in made if isinstance(error, UserError)]


def spread(items: Items, count: int) -> list[int]:
    """``count`` rows, taken in turn from every pair of subset and bucket, in the order of subsets and buckets."""
    if not len(items):
        return []
    pair = items.listing.astype(numpy.int64) * len(items.groups) + items.group
    order = numpy.lexsort((mix_array(items.column("name_hash") ^ numpy.uint64(hash64("sheet"))), pair))
    pairs, first, sizes = numpy.unique(pair[order], return_index=True, return_counts=True)
    turn = numpy.arange(len(order)) - numpy.repeat(first, sizes)
    # Among equals of a turn a hash decides, or the subsets that stand first would fill the sheet.
    chance = mix_array(pairs.astype(numpy.uint64) + numpy.uint64(hash64("pairs")))
    chosen = numpy.lexsort((numpy.repeat(chance, sizes), turn))[:count]
    return order[numpy.sort(chosen)].tolist()


def damaged(paths: Iterable[Path]) -> list[UserError]:
    """One error for each file whose pixels cannot be decoded; headers alone do not show that a download broke off."""
    def look(path: Path) -> UserError | None:
        try:
            with decoded(path, str(path), (WHOLE, WHOLE)):
                return None
        except UserError as error:
            return error
    with ThreadPoolExecutor(THREADS) as pool:
        return [error for error in pool.map(look, paths) if error is not None]


def thumbnail(path: Path, longest: int = WHOLE) -> str:
    """A data URL of the whole upright picture, "" when it cannot be read."""
    with suppress(UserError), decoded(path, str(path), (longest, longest)) as picture:  # what is wrong stands among the findings
        small = picture.on("white").copy()
        small.thumbnail((longest, longest))
        return _data_url(upright(small, picture.turn))
    return ""


def _varies(item: Item) -> bool:
    """Showings of it differ from each other."""
    augment, rules = item.subset.augment, item.subset.captions
    return augment.flip or augment.changes_pixels or rules.varies or rules.dropout_rate > 0 or rules.dropout_every_n_epochs > 0


def _card(item: Item, shots: int, course: Course, steps_per_epoch: int) -> Card | UserError:
    try:
        return Card(item, thumbnail(item.path), tuple(_shot(item, course, epoch, steps_per_epoch) for epoch in range(shots)))
    except UserError as error:
        return error


def _shot(item: Item, course: Course, epoch: int, steps_per_epoch: int) -> Shot:
    shown = show(item, 0, course, epoch, epoch * steps_per_epoch)
    pixels, mask = load_view(shown.path, shown.view, str(shown.path), shown.mask)
    share = None if mask is None else float(mask.float().mean()) / 255
    return Shot(epoch, _data_url(_small(pixels, mask)), shown.view, share, shown.caption, shown.variant == EMPTY)


def _small(pixels: torch.Tensor, mask: torch.Tensor | None) -> Image.Image:
    """(3, H, W) and (H, W) uint8 -> a small picture with a tint over what the mask leaves out."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if mask is not None:
        tinted = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, MASKED), 0.55)
        picture = Image.composite(picture, tinted, Image.fromarray(mask.numpy()))
    picture.thumbnail((LONGEST, LONGEST))
    return picture


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
