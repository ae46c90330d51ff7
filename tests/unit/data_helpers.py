"""Pictures, folders and dataset files for the tests of library/data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy
from PIL import Image

from library.data.bucket import Rule
from library.data.scan import Item, scan
from library.data.spec import load

OPTIONS = dict(resolution=None, train_batch_size=1, enable_bucket=False, min_bucket_reso=None, max_bucket_reso=None,
               bucket_reso_steps=None, bucket_no_upscale=False, caption_extension=None, dataset_repeats=1)


def options(**given):
    assert set(given) <= set(OPTIONS)
    return SimpleNamespace(**OPTIONS | given)


def picture(path: Path, size=(96, 64), seed=0, caption: str | None = "a caption", **save) -> Path:
    """A smooth picture, so that JPEG and resizing keep it recognisable."""
    grid = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC).save(path, **save)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def dataset_file(folder: Path, text: str) -> Path:
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return path


def one_folder(folder: Path, resolution=64, more="") -> tuple[Item, ...]:
    """The items of one folder of pictures, in buckets of steps of 16."""
    path = dataset_file(folder.parent, f"[[datasets]]\nresolution = {resolution}\nenable_bucket = true\n"
                                       f"min_bucket_reso = 32\n"
                                       f"bucket_reso_steps = 16\n{more}\n"
                                       f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n")
    return scan(load(path, options(), 16))


def made_up_items(sizes, dataset=0, repeats=1, resolution=64) -> tuple[Item, ...]:
    """Items without files, for plans."""
    rule = Rule((resolution, resolution), True, 32, None, 16, False)
    return tuple(Item(f"{dataset}.0/{index:03d}.png", Path(f"{index:03d}.png"), size, f"caption {index}", dataset,
                      repeats(index) if callable(repeats) else repeats, rule.place(size), "here")
                 for index, size in enumerate(sizes))
