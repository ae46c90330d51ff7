"""What training waits for: batches from caches and decoded pictures, end to end, for numbers of worker processes.

    python benchmarks/data_loader.py [--items 48] [--seconds 4] [--pictures 48] [--folder DIR]

Cached: batches of 2 FLUX 1024 px items with their text, (16, 128, 128) + (512, 4096) + (768,) float16, from the page cache;
beside it a plain memcpy of the same bytes and a naive loop that loads one file per picture (safetensors) and stacks. Decoded:
JPEG files of 1280 x 960 pixels to 1024 px buckets. Every row is measured in the same run; rates are the best of three rounds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.measure import machine, table
from library.config.data_options import CachingOptions, DatasetOptions
from library.data import spec
from library.data.dataset import LatentCache, TextCache, TrainingData, batches
from library.data.items import Items
from library.data.keys import as_keys
from library.data.plan import StepPlan
from library.data.scan import scan
from library.data.showing import Course
from library.data.store import Store

BATCH = 2
ROUNDS = 3
FLUX = {"latents": (16, 128, 128)}, {"t5": (512, 4096), "clip_pooled": (768,)}
TINY = {"latents": (16, 8, 8)}, {"t5": (32, 64), "clip_pooled": (64,)}
SETTINGS = f"""[[datasets]]
resolution = 1024
batch_size = {BATCH}
enable_bucket = true
[[datasets.subsets]]
class_tokens = "a picture"
num_repeats = 1000
image_dir = '{{}}'
"""


def made_pictures(folder: Path, count: int) -> Items:
    """JPEG files of 1280 x 960 pixels with some detail, listed."""
    folder.mkdir(parents=True)
    generator = numpy.random.default_rng(0)
    for index in range(count):
        small = Image.fromarray(generator.integers(0, 256, (120, 160, 3), dtype=numpy.uint8))
        small.resize((1280, 960), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.jpg", quality=90)
    settings = folder.parent / "data.toml"
    settings.write_text(SETTINGS.format(folder.as_posix()))
    return scan(spec.load(DatasetOptions(dataset_config=settings), CachingOptions(), 16)).items


def cached(items: Items, folder: Path | None, shapes: tuple[dict, dict]) -> TrainingData:
    """The items with random numbers as cached latents and text."""
    stores, rows = [], []
    for kind, shape in zip(("latents", "text"), shapes, strict=True):
        store = Store(() if folder is None else (folder,), kind)
        keys = as_keys(b"".join(index.to_bytes(16, "little") for index in range(len(items))))
        with store.writer() as writer:
            for key in keys:
                writer.put(key.tobytes(), {name: torch.randn(size).half() for name, size in shape.items()})
        store.refresh()
        stores.append(store)
        rows.append(store.find(keys))
    course = Course(seed=1, total_steps=10**6, variants=1)
    return TrainingData(items, course, LatentCache(stores[0], numpy.stack([rows[0], numpy.full_like(rows[0], -1)], axis=1)),
                        TextCache(stores[1], rows[1][:, None], int(rows[1][0])))


def rate(source: Iterator[object], seconds: float) -> float:
    """Values a second after the first ones, best of three rounds."""
    for _ in islice(source, 8):
        pass
    best = 0.0
    for _ in range(ROUNDS):
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds / ROUNDS:
            next(source)
            count += 1
        best = max(best, count / (time.perf_counter() - started))
    return best


def loader_rate(data: TrainingData, workers: int, seconds: float) -> float:
    plan = StepPlan(data.items, [BATCH], seed=1)
    with closing(batches(data, plan, 0, 0, 10**9, workers)) as steps:
        return rate(steps, seconds)


def memcpy_rate(data: TrainingData, fresh: bool, seconds: float) -> float:
    """Batches a second when the same bytes are only copied, from tensors in memory: into one batch that is overwritten again
    and again, or into a ``fresh`` one of which a few are alive, as a loader that works ahead hands them out."""
    stores = ((data.latents.store, data.latents.rows[:, 0]), (data.text.store, data.text.rows[:, 0]))
    items = [[tensor for store, rows in stores for tensor in store.read(rows[index]).values()]
             for index in range(len(data.items))]
    used = [torch.empty(BATCH, *tensor.shape, dtype=tensor.dtype) for tensor in items[0]]

    def copies() -> Iterator[list]:
        alive: list[list] = []
        for index in itertools.count(0, BATCH):
            batch = [torch.empty_like(tensor) for tensor in used] if fresh else used
            for row in range(BATCH):
                for target, tensor in zip(batch, items[(index + row) % len(items)], strict=True):
                    target[row].copy_(tensor)
            alive = [*alive[-6:], batch]
            yield batch
    return rate(copies(), seconds)


def naive_rate(folder: Path, shapes: tuple[dict, dict], count: int, seconds: float) -> float:
    """A file per picture and kind, loaded whole and stacked."""
    folder.mkdir()
    for index in range(count):
        for kind, shape in zip(("latents", "text"), shapes, strict=True):
            save_file({name: torch.randn(size).half() for name, size in shape.items()}, folder / f"{index}.{kind}.safetensors")

    def loads() -> Iterator[dict]:
        generator = numpy.random.default_rng(0)
        while True:
            chosen = generator.integers(0, count, BATCH)
            values = [load_file(folder / f"{index}.latents.safetensors") | load_file(folder / f"{index}.text.safetensors")
                      for index in chosen]
            yield {name: torch.stack([value[name] for value in values]) for name in values[0]}
    return rate(loads(), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=48, help="cached items")
    parser.add_argument("--pictures", type=int, default=48, help="JPEG files")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        items = made_pictures(root / "pictures", max(options.items, options.pictures))
        some = items.take(numpy.arange(options.items))
        rows: list[tuple] = []
        for name, shapes in (("1024 px FLUX shapes", FLUX), ("tiny items", TINY)):
            label = name.split()[0]
            disk, memory = cached(some, root / f"cache-{label}", shapes), cached(some, None, shapes)
            copy, fresh = (memcpy_rate(memory, fresh, options.seconds) for fresh in (False, True))
            rows += [(name, "memcpy to one batch", copy, 1.0), (name, "memcpy to fresh batches", fresh, fresh / copy)]
            measured: list[tuple[str, Callable[[], float]]] = [
                ("naive: file per item, no thread",
                 lambda: naive_rate(root / f"naive-{label}", shapes, options.items, options.seconds)),
                ("disk cache (page cache), 0 workers", lambda: loader_rate(disk, 0, options.seconds)),
                ("disk cache (page cache), 2 workers asked", lambda: loader_rate(disk, 2, options.seconds)),
                ("memory cache", lambda: loader_rate(memory, 0, options.seconds))]
            rows += [(name, what, value := measure(), value / copy) for what, measure in measured]
        print(machine())
        table(f"Cached batches of {BATCH}", ("items", "source", "batches/s", "/ memcpy to one"), rows)
        print("\nReference (sd-scripts, measured elsewhere): 1024 px FLUX shapes on disk 66 / 19 / 19 batches/s with 0 / 1 / 2 "
              "workers, in memory 320 / 32 / 23; tiny items on disk 627 / 153 / 163, in memory 5357 / 175 / 152.")
        pictures = TrainingData(items.take(numpy.arange(options.pictures)), Course(1, 10**6))
        base = loader_rate(pictures, 0, options.seconds) * BATCH
        decoded = [("threads", base, 1.0)]
        for workers in (1, 2, 4, 8):
            if workers <= (os.cpu_count() or 1):
                value = loader_rate(pictures, workers, options.seconds) * BATCH
                decoded.append((f"{workers} worker processes", value, value / base))
        table("Decoded pictures (JPEG 1280 x 960 to 1024 px buckets)", ("how", "pictures/s", "/ threads"), decoded)


if __name__ == "__main__":
    main()
