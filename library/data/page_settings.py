"""The settings of all datasets and subsets as they came out of file, flags and defaults, as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from html import escape

import numpy

from library.data.caption import CaptionRules
from library.data.items import Items
from library.data.spec import DatasetSpec, SubsetSpec
from library.data.spec_check import RULE_KEYS

_WORDS = ("changes", "mask")  # never broken in the middle of a word
_NUMBERS = ("pictures", "repeats", "showings", "loss weight")


def settings(items: Items) -> Iterable[str]:
    """A table of subsets with what is not left at its default, and all values of each below it."""
    pictures = numpy.bincount(items.listing, minlength=len(items.listings))
    showings = numpy.bincount(items.listing, weights=items.repeats, minlength=len(items.listings))
    names = ["subset", "from", "pictures", "repeats", "showings", "captions", "changes", "mask", "loss weight"]
    yield '<div class="scroll"><table><thead><tr>'
    yield "".join(f'<th{_kind(name)}>{name}</th>' for name in names) + "</tr></thead><tbody>"
    for index, subset in enumerate(items.subsets):
        values = [subset.place, f"{_source(subset)}{' (regularisation)' if subset.is_reg else ''}", f"{pictures[index]:,}",
                  str(subset.num_repeats), f"{int(showings[index]):,}", _captions(subset), _changes(subset), _mask(subset),
                  f"{subset.loss_weight * (items.specs[subset.dataset].prior_loss_weight if subset.is_reg else 1):g}"]
        cells = "".join(f"<td{_kind(name)}>{escape(value)}</td>" for name, value in zip(names, values, strict=True))
        yield f"<tr>{cells}</tr>"
    yield "</tbody></table></div>"
    for spec in items.specs:
        yield f"<details><summary>all values of {escape(spec.place)}</summary><pre>{escape(_values(spec))}</pre></details>"


def _kind(name: str) -> str:
    return ' class="number"' if name in _NUMBERS else ' class="word"' if name in _WORDS else ""


def _source(subset: SubsetSpec) -> str:
    if subset.source is not None:
        return subset.source
    return " in ".join(str(path) for path in (subset.metadata_file, subset.image_dir) if path is not None)


def _captions(subset: SubsetSpec) -> str:
    changed = [f"{RULE_KEYS[field.name]} = {_word(getattr(subset.captions, field.name))}" for field in fields(CaptionRules)
               if getattr(subset.captions, field.name) != field.default]
    where = " or ".join(subset.caption_suffixes) if subset.metadata_file is None and subset.source is None else ""
    return "; ".join(filter(None, [where, f"else “{subset.class_tokens}”" if subset.class_tokens else "", *changed]))


def _changes(subset: SubsetSpec) -> str:
    augment = subset.augment
    names = [name for name, on in (("flip", augment.flip), ("colour", augment.color), ("random crop", augment.random_crop)) if on]
    if augment.face_crop is not None:
        names.append("face crop {:g} to {:g}".format(*augment.face_crop))
    return ", ".join(names) or "none"


def _mask(subset: SubsetSpec) -> str:
    return {"none": "none", "alpha": "transparency", "files": str(subset.mask_dir)}[subset.mask]


def _values(spec: DatasetSpec) -> str:
    lines = [f"{field.name} = {_word(getattr(spec, field.name))}" for field in fields(spec)
             if field.name not in ("subsets", "place")]
    for subset in spec.subsets:
        lines += ["", subset.place]
        for field in fields(subset):
            if field.name in ("captions", "augment"):
                rules = getattr(subset, field.name)
                lines += [f"  {field.name}.{each.name} = {_word(getattr(rules, each.name))}" for each in fields(rules)]
            elif field.name not in ("place", "dataset", "number"):
                lines.append(f"  {field.name} = {_word(getattr(subset, field.name))}")
    return "\n".join(lines)


def _word(value: object) -> str:
    """As it would stand in a dataset file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_word, value)) + "]"
    return "none" if value is None else f'"{value}"' if isinstance(value, str) else str(value)
