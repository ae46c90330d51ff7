"""What a user would want to know about the data before training on it. Facts come from columns, so a million pictures take a
second or two; only files that look like duplicates of each other are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy

from library.data import select
from library.data.caption_look import unread_captions
from library.data.items import Items
from library.data.duplicates import duplicates
from library.data.mask_look import look_at_masks
from library.data.plan import StepPlan, group_facts
from library.data.scan import Scan
from library.data.select import Selection
from library.data.tokens import Counted, TokenCount
from library.errors import UserError

TINY = 3.0  # a side enlarged so many times has more made-up pixels than real ones
ENLARGED = 1.05  # from here on it is worth a word, and from the next on a warning
ENLARGED_A_LOT = 1.5
MUCH_CROPPED = 0.25  # of the picture's area
EXAMPLES = 6
QUOTED = 80  # letters of a caption
LOG_BYTES = 2**28  # read at a normal start to tell duplicates from pictures of the same size
LOG_MASKS = 32  # of each subset, looked into at a normal start

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Example:
    """One case of a finding in words; ``path`` is the picture, where there is one to show."""

    text: str
    path: Path | None = None


@dataclass(frozen=True)
class Finding:
    """``error``: a run would not start. ``warning``: it would, and probably not as meant. ``note``: good to know."""

    kind: str
    severity: Severity
    title: str
    examples: tuple[Example, ...] = ()
    remedy: str = ""


def gather(scan: Scan, selection: Selection | None, plan: StepPlan | None,
           tokens: Counted = Counted(), hash_bytes: int = LOG_BYTES, masks: int = LOG_MASKS) -> list[Finding]:
    """All findings, the worst first. ``selection`` and ``plan`` are None when nothing is left to train on.

    ``tokens``: of the captions that were counted. At most ``hash_bytes`` of pictures are read, and beside ``masks``
    pictures of each subset is looked for masks that teach nothing and captions that are not read.
    """
    found = _problems(scan)
    if selection is not None:
        items = selection.train
        found += [*_sizes(items), *_cropped(items), *_lonely(items), *_masks(items, masks), *_unread(items, masks),
                  *_dropped(scan.items, selection)]
    found += [*_duplicates(scan.items, hash_bytes), *too_long(tokens)]
    if plan is not None:
        found.append(_epoch(plan))
    return worst_first(found)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes; otherwise in the order given."""
    return sorted(findings, key=lambda each: ("error", "warning", "note").index(each.severity))


def brief(findings: Iterable[Finding]) -> list[str]:
    """A line for each finding, with one example, for the log of a run."""
    lines = []
    for each in findings:
        line = each.title
        if each.examples and line.startswith(f"{each.kind}: "):  # a problem of the scan: its first case says it all
            line = each.examples[0].text + ("" if line == f"{each.kind}: 1" else f" ({line})")
        elif each.examples and each.severity != "note":
            line += f" (such as {each.examples[0].text})" if each.examples[0].text not in line else ""
        lines.append(f"{line}; {each.remedy}" if each.remedy and each.severity != "note" else line)
    return lines


def from_errors(errors: Iterable[UserError]) -> list[Finding]:
    """Mistakes that another part of the program told about."""
    return [Finding("settings", "error", f"{each.place}: {each.message}" if each.place else each.message, (), each.remedy)
            for each in errors]


def _problems(scan: Scan) -> list[Finding]:
    """One finding for each kind of problem that the scan met."""
    kinds: dict[str, list] = {}
    for problem in scan.problems:
        kinds.setdefault(problem.kind, []).append(problem)
    found = []
    for kind, problems in kinds.items():
        first, count = problems[0].error, sum(problem.count for problem in problems)
        same_remedy = len({problem.error.remedy for problem in problems}) == 1
        examples = tuple(Example(f"{problem.error.place}: {problem.error.message}" if problem.error.place else
                                 problem.error.message) for problem in problems[:EXAMPLES])
        found.append(Finding(kind, problems[0].severity, f"{kind}: {count}", examples, first.remedy if same_remedy else ""))
    return found


def _sizes(items: Items) -> list[Finding]:
    """Pictures that are enlarged, and those of which hardly anything is left to see."""
    scale = items.resized.max(axis=1) / items.sizes.max(axis=1)  # above 1 the picture is enlarged
    area = items.sizes.astype(numpy.float64).prod(axis=1)
    wanted = numpy.array([spec.resolution[0] * spec.resolution[1] for spec in items.specs], dtype=numpy.float64)
    tiny = (scale >= TINY) | (area * TINY**2 <= wanted[items.dataset])
    grown = ~tiny & (scale > ENLARGED)
    found = []
    if tiny.any():
        title = f"{_pictures(tiny)} tiny for {_its(tiny)} training size"
        found.append(Finding("tiny", "warning", title, _examples(items, _first(tiny, area)),
                             "replace them, or leave them out with skip_image_resolution"))
    if grown.any():
        worst = float(scale[grown].max())
        examples = _examples(items, _first(grown, -scale), lambda row: f", {scale[row]:.1f} times")
        found.append(Finding("enlarged", "warning" if worst > ENLARGED_A_LOT else "note",
                             f"{_pictures(grown)} enlarged, by up to {worst:.1f} times", examples,
                             "bucket_no_upscale = true keeps their size, skip_image_resolution leaves small ones out"))
    return found


def _cropped(items: Items) -> list[Finding]:
    lost = 1 - items.kept_shares
    much = lost > MUCH_CROPPED
    if not much.any():
        return []
    one_shape = any(not items.specs[int(number)].enable_bucket for number in numpy.unique(items.dataset[much]))
    worst = items[int(lost.argmax())]
    rule = items.specs[worst.subset.dataset].rule
    limited = replace(rule, minimum=rule.step, maximum=None).place(worst.size).bucket != worst.placement.bucket
    remedy = ("enable_bucket = true gives each picture a bucket of its own shape" if one_shape else
              "wider limits give them buckets of their shape: a smaller min_bucket_reso, a larger max_bucket_reso" if limited else
              f"a smaller bucket_reso_steps (now {rule.step}) gives them buckets nearer to their shape")
    title = f"{_pictures(much, 'loses', 'lose')} more than {MUCH_CROPPED:.0%} of {_its(much)} area to the crop"
    examples = _examples(items, _first(much, -lost), lambda row: f", {lost[row]:.0%} cut away")
    return [Finding("cropped", "warning", title, examples, remedy)]


def _lonely(items: Items) -> list[Finding]:
    """Buckets that never fill a batch: their pictures are trained on in smaller batches."""
    facts = group_facts(items, [spec.batch_size for spec in items.specs])
    lonely = [each for each in facts if each.showings < each.batch_size]
    if not lonely:
        return []
    showings = sum(each.showings for each in lonely)
    return [Finding("lonely", "note", f"{len(lonely)} of {len(facts)} buckets do not fill a batch ({showings} showings in "
                    "smaller batches each epoch)", tuple(
                        Example(f"{each.bucket[0]}x{each.bucket[1]}: {each.showings} of {each.batch_size}")
                        for each in sorted(lonely, key=lambda each: each.showings)[:EXAMPLES]),
                    "a larger bucket_reso_steps makes fewer buckets; it is no harm when only a few pictures are affected")]


def _masks(items: Items, most: int) -> list[Finding]:
    """Masks that hide all of a picture, and transparency that is asked for and not there."""
    black, opaque = [], []
    for seen in look_at_masks(items, most):
        subset = items.subsets[seen.subset]
        black += seen.black
        if subset.mask == "alpha" and 0 < seen.seen == seen.plain:
            opaque.append(Example(f"{subset.image_dir or subset.metadata_file}: {_count(seen.seen)} looked at"))
    found = []
    if black:
        found.append(Finding("black masks", "warning", f"{_count(len(black))} with a mask that hides all of it: nothing is "
                             "learned there", _examples(items, black[:EXAMPLES]),
                             "white is what counts in a mask: perhaps they are the wrong way round; or remove the pictures"))
    if opaque:
        title = f"alpha_mask is set, but no picture that was looked at in {_count(len(opaque), 'subset')} has transparent parts"
        found.append(Finding("no transparency", "warning", title, tuple(opaque),
                             "leave alpha_mask out there, or save the pictures with their transparency (PNG, WebP)"))
    return found


def _unread(items: Items, most: int) -> list[Finding]:
    """Captions beside pictures that are shown with class_tokens, because the captions end otherwise."""
    found = []
    for unread in unread_captions(items, most):
        subset, count = items.subsets[unread.subset], len(unread.rows)
        found.append(Finding(
            "unread captions", "warning", f"{count} of {_count(unread.seen)} looked at {'has' if count == 1 else 'have'} a "
            f"{unread.suffix} file that is not read: “{_short(subset.class_tokens or '')}” stands in as the caption",
            _examples(items, unread.rows[:EXAMPLES]),
            (f"--caption_extension {unread.suffix}" if subset.place.startswith("--") else
             f'caption_extension = "{unread.suffix}" at {subset.place}') + " reads them; if they are no captions, all is well"))
    return found


def _dropped(items: Items, selection: Selection) -> list[Finding]:
    """What the settings take out of the training, and what else the selection has to say."""
    words = {select.SKIPPED: ("warning", "left out because of skip_image_resolution", "lower skip_image_resolution to keep them"),
             select.HELD_OUT: ("note", "held out for validation", ""),
             select.SURPLUS: ("warning", "regularisation pictures not used: there are more of them than training pictures shown",
                              "show the training pictures more often (num_repeats), or accept it")}
    found = []
    for reason, rows in selection.dropped.items():
        if len(rows):
            severity, what, remedy = words[reason]
            examples = _examples(items, rows[:EXAMPLES].tolist())
            count = f"{len(rows)} {what}" if reason == select.SURPLUS else f"{_count(len(rows))} {what}"
            found.append(Finding(reason, severity, count, examples, remedy))
    return found + [Finding(remark.reason, remark.severity, remark.text) for remark in selection.remarks]


def _duplicates(items: Items, hash_bytes: int) -> list[Finding]:
    groups, unread = duplicates(items, hash_bytes)
    found = []
    if groups:
        extra = sum(len(group) - 1 for group in groups)
        found.append(Finding("duplicates", "warning", f"{_count(extra)} {'is a copy' if extra == 1 else 'are copies'} of another "
                             "one, byte for byte", tuple(
                                 Example(" = ".join(_name(items, row) for row in group[:4]), items.path(group[0]))
                                 for group in groups[:EXAMPLES]),
                             "remove the copies; to show a picture more often, raise num_repeats of its subset"))
    if unread:
        found.append(Finding("duplicates", "note", f"{unread} pictures of equal size were not compared with each other (too many "
                             "bytes to read for that)"))
    return found


def too_long(tokens: Counted, what: str = "caption") -> list[Finding]:
    """One finding for each encoder that cuts captions, or whatever texts these are."""
    cut: dict[str, list[tuple[str, TokenCount]]] = {}
    for sample, counts in tokens.samples:
        for count in counts:
            if count.tokens > count.limit:
                cut.setdefault(count.encoder, []).append((sample, count))
    reach = max((count.limit for _, counts in tokens.samples for count in counts), default=0)
    found = []
    for encoder, cases in cut.items():
        cases.sort(key=lambda case: -case[1].tokens)
        limit = cases[0][1].limit
        examples = tuple(Example(f"{sample}: {count.tokens} tokens, lost: “{_short(count.lost)}”")
                         for sample, count in cases[:EXAMPLES])
        more = "" if tokens.complete or len(cases) < len(tokens.samples) else " or more"
        title = (f"{len(cases)}{more} {what}{'s are' if more or len(cases) > 1 else ' is'} longer than the {limit} tokens that "
                 f"{encoder} reads")
        if limit == reach:
            found.append(Finding("too long", "warning", title, examples, "shorten them, or move what matters to the front"))
        else:
            found.append(Finding("too long", "note", title, examples, "another text encoder reads more of them"))
    return found


def _short(text: str) -> str:
    return text if len(text) <= QUOTED else text[:QUOTED - 1].rstrip() + "…"


def _epoch(plan: StepPlan) -> Finding:
    showings = f"{_count(plan.samples_per_epoch, 'showing')} of {_count(len(plan.items))}"
    return Finding("epoch", "note", f"an epoch is {_count(plan.steps_per_epoch, 'step')}: {showings} in "
                                    f"{_count(plan.batches_per_epoch, 'batch', 'batches')}")


def _first(where: numpy.ndarray, keys: numpy.ndarray) -> list[int]:
    """A few of the rows, those with the lowest keys."""
    rows = numpy.flatnonzero(where)
    return rows[numpy.argsort(keys[rows], kind="stable")[:EXAMPLES]].tolist()


def _examples(items: Items, rows: Iterable[int], more: Callable[[int], str] = lambda row: "") -> tuple[Example, ...]:
    """The pictures with their sizes and what ``more`` says of each."""
    return tuple(Example(f"{_name(items, row)} ({_size(items, row)}{more(row)})", items.path(row)) for row in rows)


def _its(where: numpy.ndarray) -> str:
    return "its" if where.sum() == 1 else "their"


def _count(number: int, one: str = "picture", several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _pictures(where: numpy.ndarray, one: str = "is", several: str = "are") -> str:
    number = int(where.sum())
    return f"{_count(number)} {one if number == 1 else several}"


def _name(items: Items, row: int) -> str:
    """Relative to the subset's folder, with that folder's name where there are several."""
    name = items.sample_id(row).partition("/")[2]
    return f"{items.path(row).parent.name}/{name}" if len(items.listings) > 1 and "/" not in name else name


def _size(items: Items, row: int) -> str:
    return "x".join(str(int(side)) for side in items.listings[int(items.listing[row])].sizes[int(items.row[row])])
