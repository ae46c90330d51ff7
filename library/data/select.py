"""Which pictures are trained on, which are held out, and how often regularisation pictures are shown. Pure functions.

All choices follow hashes of the pictures' names, not random numbers: they do not depend on the training seed, and a picture
added or removed leaves the others where they were (save for the few at the border of a share).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy

from library.data.items import Items
from library.data.keyed import hash64, mix_array
from library.data.spec import DatasetSpec
from library.errors import UserError, raise_all

SKIPPED, HELD_OUT, SURPLUS = "skip_image_resolution", "validation_split", "regularisation"


@dataclass(frozen=True)
class Remark:
    """What the user should hear of a choice and the rows do not show. ``reason`` is a key of ``Selection.dropped``."""

    reason: str
    severity: Literal["warning", "note"]
    text: str


@dataclass(frozen=True)
class Selection:
    """``train``: with the repeats that regularisation pictures need to be shown as often as the others of their dataset.
    ``validation``: held out of ``train``, each once. ``dropped``: for each reason (a key of the dataset file, or
    ``regularisation``) the rows of the given items that are not trained on. ``remarks``: what else there is to say."""

    train: Items
    validation: Items
    dropped: Mapping[str, numpy.ndarray]
    remarks: tuple[Remark, ...]


def select(items: Items) -> Selection:
    """Leave out small pictures, hold out pictures for validation, balance regularisation pictures; in this order.

    Raises UserError when a dataset has nothing left to train on.
    """
    dataset, regular = items.dataset, numpy.array([subset.is_reg for subset in items.subsets])[items.listing]
    skipped = _skipped(items, dataset)
    held_out, remarks = _held_out(items, ~skipped & ~regular)
    repeats = numpy.where(skipped | held_out, 0, items.repeats).astype(numpy.int32)
    raise_all(_nothing_left(items, dataset, ~regular & (repeats > 0), skipped))
    surplus = numpy.zeros(len(items), dtype=bool)
    for number in range(len(items.specs)):
        rows = numpy.flatnonzero(regular & (dataset == number) & (repeats > 0))
        wanted = int(repeats[~regular & (dataset == number)].sum())
        balanced = _balanced(repeats[rows], wanted, _order_keys(items, "regularisation")[rows]) if len(rows) else rows
        repeats[rows], surplus[rows] = balanced, balanced == 0
    train = replace(items, repeats=repeats).take(repeats > 0)
    validation = replace(items, repeats=numpy.ones_like(items.repeats)).take(held_out)
    dropped = {SKIPPED: skipped, HELD_OUT: held_out, SURPLUS: surplus}
    return Selection(train, validation, {name: numpy.flatnonzero(rows) for name, rows in dropped.items()}, tuple(remarks))


def _skipped(items: Items, dataset: numpy.ndarray) -> numpy.ndarray:
    """Where a picture has at most as many pixels as its dataset's ``skip_image_resolution``."""
    skipped = numpy.zeros(len(items), dtype=bool)
    limits = [spec.skip_image_resolution for spec in items.specs]
    if not any(limits):
        return skipped
    area = items.sizes.astype(numpy.int64).prod(axis=1)
    for number, limit in enumerate(limits):
        if limit:
            skipped |= (dataset == number) & (area <= limit[0] * limit[1])
    return skipped


def _held_out(items: Items, candidates: numpy.ndarray) -> tuple[numpy.ndarray, list[Remark]]:
    """Of each subset the ``validation_split`` share of the candidate rows: those with the lowest hash of seed and name. So a
    folder that stands in several datasets gives up the same pictures in each."""
    held_out, remarks = numpy.zeros(len(items), dtype=bool), []
    shares = {index: items.specs[subset.dataset] for index, subset in enumerate(items.subsets)
              if not subset.is_reg and items.specs[subset.dataset].validation_split > 0}
    for index, spec in shares.items():
        rows = numpy.flatnonzero(candidates & (items.listing == index))
        count = min(max(round(len(rows) * spec.validation_split), 1), len(rows) - 1)
        if count < 1:
            if len(rows):
                remarks.append(Remark(HELD_OUT, "note", f"{items.subsets[index].place}: its only picture is trained on, none is "
                                                        "held out for validation"))
            continue
        names = items.listings[index].name_hash[items.row[rows]]
        keys = mix_array(names ^ numpy.uint64(hash64("validation", spec.validation_seed or 0)))
        held_out[rows[numpy.argsort(keys, kind="stable")[:count]]] = True
    return held_out, remarks + (_leaks(items) if shares else [])


def _leaks(items: Items) -> list[Remark]:
    """One folder that two subsets hold different pictures out of is validated on what it was trained on."""
    rules: dict[str, set] = {}
    splits: set[str] = set()
    for subset, listing in zip(items.subsets, items.listings, strict=True):
        spec, root = items.specs[subset.dataset], str(listing.root)
        rules.setdefault(root, set()).add((subset.is_reg, spec.validation_split, spec.validation_seed or 0,
                                           spec.skip_image_resolution, listing.name_hash.tobytes()))
        if spec.validation_split > 0 and not subset.is_reg:
            splits.add(root)
    return [Remark(HELD_OUT, "warning", f"{root}: subsets on this folder differ in validation_split, validation_seed, "
                   "skip_image_resolution or the pictures they take, so some held-out pictures may be trained on as well")
            for root in rules if root in splits and len(rules[root]) > 1]


def _nothing_left(items: Items, dataset: numpy.ndarray, trained: numpy.ndarray, skipped: numpy.ndarray) -> list[UserError]:
    """One error for each dataset without a picture to train on (regularisation pictures alone do not make one)."""
    left = numpy.bincount(dataset[trained], minlength=len(items.specs))
    small = numpy.bincount(dataset[skipped], minlength=len(items.specs))
    return [_empty(spec, int(small[number])) for number, spec in enumerate(items.specs) if not left[number]]


def _empty(spec: DatasetSpec, small: int) -> UserError:
    if all(subset.is_reg for subset in spec.subsets):
        return UserError("this dataset has regularisation pictures only, so there is nothing for them to balance",
                         place=spec.place, remedy="put the subsets with is_reg into the dataset of the pictures they "
                                                  "belong to, or take is_reg out")
    if small:
        width, height = spec.skip_image_resolution
        return UserError(f"no picture is left to train on: {small} have no more pixels than skip_image_resolution "
                         f"({width}x{height})", place=spec.place, remedy="lower skip_image_resolution or take it out")
    return UserError("this dataset has no pictures to train on", place=spec.place, remedy="check image_dir of its subsets")


def _order_keys(items: Items, purpose: str) -> numpy.ndarray:
    """(N,) uint64: a fixed order of the rows, for choices."""
    salts = [hash64(purpose, subset.dataset, subset.number) for subset in items.subsets]
    return mix_array(items.column("name_hash") ^ numpy.array(salts, dtype=numpy.uint64)[items.listing])


def _balanced(repeats: numpy.ndarray, wanted: int, keys: numpy.ndarray) -> numpy.ndarray:
    """How often each regularisation picture is shown so that together it is ``wanted`` times. Too few: all of them once more
    in turn until it is enough (as in the dialect). Too many: whole pictures in the order of ``keys``, the last cut short."""
    order = numpy.argsort(keys, kind="stable")
    given = repeats[order].astype(numpy.int64)
    rounds, extra = divmod(max(wanted - int(given.sum()), 0), len(given))
    given = numpy.clip(wanted - (numpy.cumsum(given) - given), 0, given) + rounds
    given[:extra] += 1
    result = numpy.empty_like(given)
    result[order] = given
    return result
