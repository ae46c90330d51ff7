"""The data page as HTML: one document without scripts that asks for nothing outside itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from library.data.findings import Example, Finding
from library.data.items import Items
from library.data.page_cards import sheet
from library.data.page_settings import settings
from library.data.page_sheet import Card
from library.data.page_style import STYLE
from library.data.plan import GroupFacts, StepPlan, group_facts
from library.data.select import Selection

BUCKETS = 48  # rows of a dataset's histogram; of more buckets the largest are shown
# Nothing from outside may be loaded, whatever stands in a caption.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Facts:
    """What is on the page. ``items`` are trained on, or all there are when ``selection`` and ``plan`` are None because nothing
    can be. ``thumbnails``: data URLs; ``no_counts``: why tokens were not counted, else ""; ``counted`` captions were."""

    items: Items
    selection: Selection | None
    plan: StepPlan | None
    total_steps: int
    findings: Sequence[Finding]
    cards: Sequence[Card]
    thumbnails: Mapping[Path, str]
    no_counts: str
    counted: int
    variants: int | None


def render(facts: Facts) -> str:
    """The whole document."""
    groups = group_facts(facts.items, [spec.batch_size for spec in facts.items.specs]) if len(facts.items) else ()
    parts = ["<header><h1>What the model will see</h1>",
             f'<p class="soft">{escape(", ".join(_sources(facts.items)))}</p></header>', _tiles(facts, groups),
             _section("findings", "Findings", _findings(facts)), _section("buckets", "Buckets", _buckets(facts.items, groups)),
             _section("pictures", "Pictures", sheet(facts.cards, facts.variants)),
             _section("settings", "Settings", settings(facts.items))]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">', "<title>Dataset</title>",
        f"<style>{STYLE}</style>\n</head>\n<body>", *parts, "</body>\n</html>\n"])


def _section(name: str, title: str, content: Iterable[str]) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n' + "\n".join(content) + "\n</section>"


def _sources(items: Items) -> list[str]:
    return list(dict.fromkeys(str(listing.root) for listing in items.listings))[:4]


def _tiles(facts: Facts, groups: Sequence[GroupFacts]) -> str:
    tiles = [(len(facts.items), "pictures to train on" if facts.selection is not None else "pictures found")]
    if facts.selection is not None and len(facts.selection.validation):
        tiles.append((len(facts.selection.validation), "held out for validation"))
    tiles += [(sum(each.showings for each in groups), "showings an epoch"), (len(groups), "buckets")]
    if facts.plan is not None:
        epochs = facts.total_steps / facts.plan.steps_per_epoch
        tiles += [(facts.plan.steps_per_epoch, "steps an epoch"), (facts.total_steps, f"steps in all ({epochs:,.1f} epochs)")]
    for severity in ("error", "warning"):
        count = sum(each.severity == severity for each in facts.findings)
        tiles.append((count, f"kind{'' if count == 1 else 's'} of {severity}"))
    return ('<div class="tiles">' + "".join(f'<div class="tile"><b>{number:,}</b><span class="soft small">{escape(name)}</span>'
                                            "</div>" for number, name in tiles) + "</div>")


def _findings(facts: Facts) -> Iterable[str]:
    if not any(each.severity != "note" for each in facts.findings):
        yield '<p class="soft">Nothing is wrong with the data.</p>'
    for each in facts.findings:
        remedy = f'<p class="soft">{escape(each.remedy)}</p>' if each.remedy else ""
        yield (f'<div class="finding {each.severity}" data-kind="{escape(each.kind)}"><p class="title"><span class="badge">'
               f"{each.severity}</span>{escape(each.title)}</p>{remedy}{_examples(each.examples, facts.thumbnails)}</div>")
    if facts.no_counts:
        yield f'<p class="soft">The tokens of the captions were not counted: {escape(facts.no_counts)}</p>'
    elif facts.counted:
        yield f'<p class="soft small">The tokens of the {facts.counted:,} longest captions were counted.</p>'


def _examples(examples: Sequence[Example], thumbnails: Mapping[Path, str]) -> str:
    if not examples:
        return ""
    shown = any(each.path is not None and thumbnails.get(each.path) for each in examples)
    rows = []
    for each in examples:
        picture = thumbnails.get(each.path, "") if each.path is not None else ""
        rows.append("<li>" + (f'<img src="{picture}" alt="">' if picture else "") + f"{escape(each.text)}</li>")
    return f'<ul class="{"pictures" if shown else "words"}">{"".join(rows)}</ul>'


def _buckets(items: Items, groups: Sequence[GroupFacts]) -> Iterable[str]:
    for number, spec in enumerate(items.specs):
        here = [each for each in groups if each.dataset == number]
        if not here:
            continue
        width, height = spec.resolution
        yield (f"<h3>{escape(spec.place)}: {width}x{height}, batches of {spec.batch_size}"
               f"{'' if spec.enable_bucket else ', one shape for all'}</h3>")
        shown = sorted(here, key=lambda each: -each.pictures)[:BUCKETS]
        most = max(each.showings for each in shown)
        for each in sorted(shown, key=lambda each: (each.bucket[0] / each.bucket[1], each.bucket)):
            yield _bucket(each, most)
        if len(shown) < len(here):
            rest = sum(each.pictures for each in here) - sum(each.pictures for each in shown)
            yield f'<p class="soft small">{len(here) - len(shown)} more buckets with {rest:,} pictures together</p>'


def _bucket(each: GroupFacts, most: int) -> str:
    """One row of the histogram: the bucket's shape, its size, a bar of its showings, numbers."""
    width, height = each.bucket
    scale = 20 / max(width, height)
    wide, high = width * scale, height * scale
    repeats = f", {each.showings:,} with repeats" if each.showings != each.pictures else ""
    numbers = (f"{each.pictures:,} picture{'' if each.pictures == 1 else 's'}{repeats}; {each.batches:,} "
               f"batch{'' if each.batches == 1 else 'es'}; {1 - each.kept:.0%} cut away")
    return (f'<div class="bucket"><svg class="shape" viewBox="0 0 28 22" aria-hidden="true"><rect x="{14 - wide / 2:.1f}" '
            f'y="{11 - high / 2:.1f}" width="{wide:.1f}" height="{high:.1f}"/></svg><span>{width}x{height}</span>'
            f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{each.showings} showings">'
            f'<rect width="{max(100 * each.showings / most, 0.6):.2f}" height="10" rx="0.6"/></svg>'
            f'<span class="soft numbers">{numbers}</span></div>')
