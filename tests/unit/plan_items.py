"""Items of made-up pictures in several datasets and subsets, for tests of the plan and the selection. No files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy

from library.data.bucket import Rule, assign
from library.data.items import Items, Listing
from library.data.keyed import hash64
from library.data.strings import Strings


def made_subset(names, sizes, repeats=1, **more):
    """One subset: ``sizes`` and ``repeats`` one for all or one for each picture."""
    names = list(names)
    sizes = [sizes] * len(names) if isinstance(sizes, tuple) else list(sizes)
    repeats = [repeats] * len(names) if isinstance(repeats, int) else list(repeats)
    return SimpleNamespace(**{"names": names, "sizes": sizes, "repeats": repeats, "is_reg": False, "root": None, **more})


def made_items(*datasets, no_upscale=False) -> Items:
    """``datasets``: lists of ``made_subset``, or tuples (list, dict of dataset keys)."""
    specs, listings, columns, groups = [], [], [], []
    for number, dataset in enumerate(datasets):
        subsets, keys = dataset if isinstance(dataset, tuple) else (dataset, {})
        rule = Rule((64, 64), True, 32, None, 16, no_upscale)
        specs.append(SimpleNamespace(**{
            "rule": rule, "batch_size": 1, "validation_split": 0.0, "validation_seed": None, "skip_image_resolution": None,
            "place": f"data.toml:{number}", **keys,
            "subsets": tuple(SimpleNamespace(dataset=number, number=index, is_reg=subset.is_reg, loss_weight=1.0, mask="none",
                                             place=f"data.toml:{number}.{index}") for index, subset in enumerate(subsets))}))
        for index, subset in enumerate(subsets):
            count = len(subset.names)
            sizes = numpy.array(subset.sizes, dtype=numpy.int32).reshape(count, 2)
            listings.append(Listing(Path(subset.root or f"/{number}/{index}"), Strings.of(subset.names), Strings.of(subset.names),
                                    sizes, numpy.array([hash64(name) for name in subset.names], dtype=numpy.uint64),
                                    numpy.zeros((count, 2), dtype=numpy.int64), numpy.zeros((count, 16), dtype=numpy.uint8)))
            group, buckets = assign(sizes, rule)
            columns.append((numpy.full(count, len(listings) - 1, dtype=numpy.uint16), numpy.arange(count, dtype=numpy.int32),
                            numpy.array(subset.repeats, dtype=numpy.int32),
                            _group_numbers(groups, [(number, bucket) for bucket in buckets])[group]))
    joined = [numpy.concatenate(parts) for parts in zip(*columns, strict=True)]
    return Items(tuple(specs), tuple(listings), *joined, tuple(groups))


def _group_numbers(groups, wanted):
    groups += [group for group in wanted if group not in groups]
    return numpy.array([groups.index(group) for group in wanted], dtype=numpy.int32)
