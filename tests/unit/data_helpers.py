"""Pictures, folders, dataset files and items for the tests of library/data."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
from PIL import Image

from library.config.data_options import CachingOptions, DatasetOptions
from library.data.augment import Augment
from library.data.bucket import assign
from library.data.caption import CaptionRules
from library.data.items import Items, Listing
from library.data.keyed import hash64
from library.data.scan import Scan, scan
from library.data.spec import DatasetSpec, SubsetSpec, load
from library.data.strings import Strings

# A dataset file's keys for small pictures: an area of 64 x 64 pixels, in buckets of steps of 16.
SMALL = "enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16"


def options(**given) -> DatasetOptions:
    """The command line's dataset options; ``dataset_config`` and whatever else a test wants."""
    return DatasetOptions(**given)


def picture(path: Path, size=(96, 64), seed=0, caption: str | None = "a caption", **save) -> Path:
    """A smooth picture, so that JPEG and resizing keep it recognisable. Its time is an hour ago: the index does not trust
    files that were touched within the last seconds."""
    grid = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC).save(path, **save)
    make_older(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        make_older(path.with_suffix(".txt"))
    return path


def make_older(path: Path) -> None:
    """Puts the file's time an hour back; two calls give two times."""
    then = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(then, then))


def dataset_file(folder: Path, text: str) -> Path:
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return path


def scan_file(path: Path, *, index_dir=None, check: str = "fast", **more) -> Scan:
    """Everything a dataset file names, for a model whose sides are multiples of 16; ``index_dir`` is the folder of the index."""
    specs = load(options(dataset_config=path, **more), CachingOptions(), 16)
    return scan(specs, index_dir=lambda subset: index_dir, check=check)


def one_folder(folder: Path, resolution=64, more="", subset="", **how) -> Items:
    """The items of one folder of pictures, in buckets of steps of 16. ``more``: lines for [[datasets]]; ``subset``: for
    [[datasets.subsets]]. Raises UserErrors for whatever is wrong with the pictures."""
    found = scan_folder(folder, resolution, more, subset, **how)
    found.raise_errors()
    return found.items


def scan_folder(folder: Path, resolution=64, more="", subset="", **how) -> Scan:
    """As ``one_folder``, with the problems instead of raising them."""
    return scan_file(dataset_file(folder.parent, f"[[datasets]]\nresolution = {resolution}\n{SMALL}\n{more}\n"
                                                 f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n{subset}\n"), **how)


def subset_spec(image_dir: Path | None = None, **given) -> SubsetSpec:
    """A subset as the loader makes one that has nothing but an ``image_dir``."""
    values = dict(place="here:1", dataset=0, number=0, image_dir=image_dir, recursive=False, metadata_file=None, source=None,
                  caption_suffixes=(".txt", ".caption"), class_tokens=None, num_repeats=1, is_reg=False, loss_weight=1.0,
                  mask="none", mask_dir=None, captions=CaptionRules(), augment=Augment(), interpolation="auto",
                  cache_info=False)
    return SubsetSpec(**(values | given))


def dataset_spec(*subsets: SubsetSpec, resolution=64, **given) -> DatasetSpec:
    """A dataset of these subsets; their numbers are set."""
    number = given.pop("dataset", 0)
    numbered = tuple(dataclasses.replace(subset, dataset=number, number=index) for index, subset in enumerate(subsets))
    values = dict(resolution=(resolution, resolution), batch_size=1, enable_bucket=True, min_bucket_reso=32,
                  max_bucket_reso=None, bucket_reso_steps=16, bucket_no_upscale=False, subsets=numbered, place="here:1")
    return DatasetSpec(**(values | given))


def made_up_items(sizes: Sequence[tuple[int, int]], dataset=0, repeats=1, resolution=64) -> Items:
    """Items without files: one subset whose pictures are ``000.png``, ``001.png``, .... ``repeats`` may be a function of the
    picture's number. Datasets before number ``dataset`` have no pictures."""
    specs = tuple(dataset_spec(subset_spec(Path("made up")), resolution=resolution, dataset=number)
                  for number in range(dataset + 1))
    count = len(sizes)
    names = [f"{index:03d}.png" for index in range(count)]
    made = [made_up_listing([], []) for _ in range(dataset)] + [made_up_listing(names, sizes)]
    group, buckets = assign(made[-1].sizes, specs[-1].rule)
    shown = [repeats(index) if callable(repeats) else repeats for index in range(count)]
    return Items(specs, tuple(made), numpy.full(count, dataset, dtype=numpy.uint16), numpy.arange(count, dtype=numpy.int32),
                 numpy.array(shown, dtype=numpy.int32), group, tuple((dataset, bucket) for bucket in buckets))


def made_up_listing(names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Listing:
    """A listing of pictures that do not exist; the captions are ``caption 0``, ``caption 1``, ...."""
    count = len(names)
    return Listing(Path("made up"), Strings.of(names), Strings.of([f"caption {index}" for index in range(count)]),
                   numpy.array(sizes, dtype=numpy.int32).reshape(count, 2),
                   numpy.array([hash64(name) for name in names], dtype=numpy.uint64),
                   numpy.zeros((count, 2), dtype=numpy.int64), numpy.zeros((count, 16), dtype=numpy.uint8))
