"""The page behind ``--debug_dataset``: one file that shows what the model will see and what is wrong with the data.

No weights are read. Mistakes in the data are shown, not raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.atomic import atomic_file
from library.data import findings
from library.data.findings import Finding
from library.data.items import Items
from library.data.page_html import Facts, render
from library.data.page_sheet import damaged, make_cards, spread, thumbnail
from library.data.plan import StepPlan
from library.data.scan import Scan
from library.data.select import Selection, select
from library.data.showing import Course
from library.data.tokens import Counted, TokenMeter, count_longest
from library.errors import UserError

MASKS = 1000  # of each subset, looked into
HASH_BYTES = 2**34  # of pictures that may be copies of each other, read to make sure
COUNTED = 20_000  # captions whose tokens are counted: the longest ones
DECODED = 2000  # pictures that are decoded to see whether they can be
PICTURES = 60


@dataclass(frozen=True)
class Run:
    """What the page has to know of the run. ``max_epochs``, where given, wins over ``max_steps``; ``variants``: cached texts of
    each caption, None when text is not cached."""

    seed: int
    max_steps: int
    max_epochs: int | None = None
    variants: int | None = None
    accumulation: int = 1
    world_size: int = 1


def write(path: Path, scan: Scan, run: Run, open_meter: Callable[[], TokenMeter], pictures: int = PICTURES) -> list[Finding]:
    """Write the page to ``path`` and return what it says is worth knowing. About ``pictures`` pictures are shown.

    ``open_meter`` may raise UserError: the page then says why there are no token counts. UserError when ``path`` cannot
    be written.
    """
    selection, errors = _select(scan.items)
    items = selection.train if selection is not None else scan.items
    sizes = [spec.batch_size for spec in items.specs]
    plan = StepPlan(items, sizes, run.seed, run.world_size, run.accumulation) if selection is not None else None
    steps = plan.steps_per_epoch if plan is not None else 1
    total = run.max_epochs * steps if run.max_epochs else run.max_steps
    course = Course(run.seed, total, run.variants, items.specs[0].prior_loss_weight)

    meter, no_counts = _open(open_meter)
    counted = Counted() if meter is None else count_longest(items, run.seed, meter, COUNTED)
    cards, broken = make_cards(items, course, steps, meter, pictures)
    looked_at = dict.fromkeys(items.path(row) for row in spread(items, DECODED))
    broken = list({error.place: error for error in [*broken, *damaged(looked_at)]}.values())
    found = findings.gather(scan, selection, plan, counted, HASH_BYTES, MASKS) + findings.from_errors(errors)
    if broken:
        of = "" if len(looked_at) < DECODED else f" of {DECODED} looked at"
        found.append(Finding("damaged", "error", f"damaged pictures: {len(broken)}{of}", tuple(
            findings.Example(f"{error.place}: {error.message}") for error in broken[:findings.EXAMPLES]), broken[0].remedy))
    found = findings.worst_first(found)
    thumbnails = {path: thumbnail(path) for path in dict.fromkeys(each.path for one in found for each in one.examples) if path}
    page = render(Facts(items, selection, plan, total, found, cards, thumbnails, no_counts, len(counted.samples), run.variants))
    with atomic_file(path) as file:
        file.write(page.encode("utf-8", "replace"))  # file names may hold bytes that are no text
    return found


def _select(items: Items) -> tuple[Selection | None, Sequence[UserError]]:
    if not len(items):
        return None, ()  # the scan says why
    try:
        return select(items), ()
    except UserError as error:
        return None, getattr(error, "errors", (error,))


def _open(open_meter: Callable[[], TokenMeter]) -> tuple[TokenMeter | None, str]:
    try:
        return open_meter(), ""
    except UserError as error:
        return None, str(error)
