"""Caches of encoded pictures and captions: rates of writing and reading, of whole batches, and what caching adds to encoding.

    python benchmarks/data_cache.py [--memory DIR] [--disk DIR] [--records 500] [--pictures 64] [--keys 1000000] [--repeats 3]

Every measurement is a fresh process; ratios are against a naive loop over one file per picture in the same folder with the same
data. Single records are measured in ``--memory``, a memory file system (/dev/shm where it exists), so that the processor's work
is seen and not the disk's; batches and caching in ``--disk`` (the system's temporary folder), from its page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import in_process, machine, table  # noqa: E402

LATENT = (16, 128, 128)  # float16, 512 KiB: a picture of 1024 x 1024
BATCH = 2
ENCODER_SECONDS = 0.02  # what the stand-in for an autoencoder takes for each picture, without using the processor
# Reference points: performance.md 4.2 (records a second, memory file system) and peer-measured.md 6(c), 6(d)
REFERENCE = {("npz", "write"): 958, ("files", "write"): 2244, ("shards", "write"): 3647,
             ("npz", "read"): 994, ("files", "read"): 2884, ("shards", "read"): 11527}
PEER_BATCHES, PEER_BATCHES_MEMORY, PEER_BATCHES_WORKERS = 66, 320, 19


def keys(count: int, seed: int = 0):
    import numpy

    return numpy.random.default_rng(seed).integers(0, 256, (count, 16), dtype=numpy.uint8)


def make_latents(count: int):
    """Some different ones: what is compressed or cached by value would show."""
    import torch

    torch.manual_seed(0)
    return [torch.randn(LATENT).half() for _ in range(min(count, 16))]


def write_records(how: str, folder: Path, count: int) -> dict[str, float]:
    import numpy
    from safetensors.torch import save_file

    from library.data.store import Store

    latents, names = make_latents(count), keys(count)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    if how == "shards":
        with Store((folder,), "latents").writer() as writer:
            for index in range(count):
                writer.put(names[index].tobytes(), {"latents": latents[index % 16]})
    for index in range(count if how != "shards" else 0):
        if how == "npz":
            numpy.savez(folder / f"{index}.npz", latents=latents[index % 16].float().numpy())
        else:
            save_file({"latents": latents[index % 16]}, folder / f"{index}.safetensors")
    return {"seconds": time.perf_counter() - started}


def read_records(how: str, folder: Path, count: int) -> dict[str, float]:
    """In random order, batches of two in float16 each in memory of their own."""
    import numpy
    import torch
    from safetensors.torch import load_file

    from library.data.store import Store

    order, latents = numpy.random.default_rng(1).permutation(count).tolist(), make_latents(count)
    store = Store((folder,) if how == "shards" else (), "latents")
    rows = store.find(keys(count)) if how == "shards" else None
    started, last = time.perf_counter(), None
    for first in range(0, count - count % BATCH, BATCH):
        some = order[first:first + BATCH]
        if rows is not None:
            last = store.read_many(rows[some])["latents"]
        elif how == "npz":
            last = torch.stack([torch.from_numpy(numpy.load(folder / f"{index}.npz")["latents"]).half() for index in some])
        else:
            last = torch.stack([load_file(folder / f"{index}.safetensors")["latents"] for index in some])
    seconds = time.perf_counter() - started
    assert torch.equal(last[0], latents[some[0] % 16]), "what was read is not what was written"
    return {"seconds": seconds}


def batches(folder: Path, count: int) -> dict[str, float]:
    """Batches of two items with their text, from the page cache, against plain copies of the same bytes held in memory."""
    import numpy
    import torch

    from library.data.store import Store

    names, latents = keys(count), make_latents(count)
    text = [torch.randn(512, 4096).half() for _ in range(8)]
    pooled = torch.randn(768).half()
    pictures, captions = Store((folder,), "latents"), Store((folder,), "text")
    with pictures.writer() as first, captions.writer() as second:
        for index in range(count):
            first.put(names[index].tobytes(), {"latents": latents[index % 16]})
            second.put(names[index].tobytes(), {"t5": text[index % 8], "clip": pooled})
    pictures.refresh(), captions.refresh()
    rows, words = pictures.find(names), captions.find(names)
    held = [[latents[index % 16].clone(), text[index % 8].clone(), pooled.clone()] for index in range(count)]
    targets = [torch.empty(BATCH, *part.shape, dtype=part.dtype) for part in held[0]]
    order = numpy.random.default_rng(2).permutation(count).tolist()

    def cached(some):
        return pictures.read_many(rows[some]), captions.read_many(words[some])

    def copy_to_new(some):
        return [torch.stack(parts) for parts in zip(*(held[index] for index in some), strict=True)]

    def copy(some):
        for number, index in enumerate(some):
            for target, source in zip(targets, held[index], strict=True):
                target[number].copy_(source)

    result = {"bytes": float(sum(target.nbytes for target in targets))}
    for name, work in (("cached", cached), ("new", copy_to_new), ("copy", copy)) * 2:  # the first pass warms up
        started = time.perf_counter()
        for first in range(0, count - count % BATCH, BATCH):
            work(order[first:first + BATCH])
        result[name] = (time.perf_counter() - started) / (count // BATCH)
    return result


def find(folder: Path, count: int) -> dict[str, float]:
    """Rows of a million keys in random order, half of them missing."""
    import numpy

    from library.data.lookup import Lookup

    known = keys(count)
    started = time.perf_counter()
    lookup = Lookup().extended(known, numpy.arange(count))
    built = time.perf_counter() - started
    wanted = numpy.concatenate([known[::2], keys(count // 2, seed=1)])
    wanted = wanted[numpy.random.default_rng(3).permutation(len(wanted))]
    started = time.perf_counter()
    rows = lookup.find(wanted)
    seconds = time.perf_counter() - started
    assert (rows >= 0).sum() == len(known[::2])
    bytes_each = sum(column.nbytes for column in vars(lookup).values()) / count
    return {"build": built, "find": seconds, "bytes": bytes_each}


def make_pictures(folder: Path, count: int) -> None:
    import numpy
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        grid = numpy.random.default_rng(index).integers(0, 256, (24, 32, 3), dtype=numpy.uint8)
        Image.fromarray(grid).resize((1280, 1024), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg", quality=92)
        (folder / f"{index:05d}.txt").write_text(f"picture {index}", encoding="utf-8")


def caching(how: str, folder: Path, count: int) -> dict[str, float]:
    """From JPEG files to a cache on disk, with an encoder that only waits: what is above its time is our overhead."""
    import numpy
    import torch

    from library.config.data_options import CachingOptions, DatasetOptions
    from library.data import scan, spec
    from library.data.augment import plain_view
    from library.data.fill import fill_latents
    from library.data.image import load_view
    from library.data.keys import cache_folders
    from library.data.store import Store

    make_pictures(folder, count)
    config = folder.parent / "dataset.toml"
    config.write_text(f"[[datasets]]\nresolution = 1024\nenable_bucket = true\n[[datasets.subsets]]\nimage_dir = "
                      f"{json.dumps(str(folder))}\n", encoding="utf-8")
    items = scan.scan(spec.load(DatasetOptions(dataset_config=config), CachingOptions(), 16)).items
    latents = torch.randn(LATENT)

    def encode(pixels):
        time.sleep(ENCODER_SECONDS * len(pixels))
        return latents[None, :, :pixels.shape[2] // 8, :pixels.shape[3] // 8].repeat(len(pixels), 1, 1, 1)

    started = time.perf_counter()
    if how == "fill":
        distinct, folders = cache_folders(items, folder.parent / f"cache-{time.time_ns()}")
        store = Store(distinct, "latents")
        rows = fill_latents(items, store, encode, "benchmark", 1, folders=folders)
        assert (rows[:, 0] >= 0).all()
    else:
        for item in items:
            pixels, _ = load_view(item.path, plain_view(item), str(item.path))
            numpy.savez(item.path.with_suffix(".npz"), latents=encode(pixels[None])[0].float().numpy())
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "again": 0.0}
    if how == "fill":
        started = time.perf_counter()
        again = fill_latents(items, Store(distinct, "latents"), encode, "benchmark", 1, folders=folders)
        result["again"] = time.perf_counter() - started
        assert (again[:, 0] >= 0).all()
    return result


def child(action: str, folder: str, count: str) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    what, _, how = action.partition(" ")
    steps = {"write": write_records, "read": read_records, "caching": caching}
    if how:
        return steps[what](how, Path(folder), int(count))
    return {"batches": batches, "find": find}[what](Path(folder), int(count))


def measured(action: str, folder: Path, count: int) -> dict[str, float]:
    return in_process(Path(__file__), action, str(folder), str(count))


def records_table(folder: Path, count: int, repeats: int) -> None:
    rows = []
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for how in ("npz", "files", "shards"):
            shutil.rmtree(folder, ignore_errors=True)  # memory that was never touched is slow to get on a virtual machine
            for verb in ("write", "read"):
                seconds.setdefault((verb, how), []).append(measured(f"{verb} {how}", folder, count)["seconds"])
    for (verb, how), runs in sorted(seconds.items(), reverse=True, key=lambda pair: pair[0][0]):
        rows.append((f"{verb}, {how}", count / min(runs), min(seconds[verb, "npz"]) / min(runs), count / max(runs),
                     REFERENCE[how, verb]))
    table(f"{count} latents of 512 KiB, best of {repeats}: npz is float32, one file each; files are float16 safetensors",
          ("what", "records/s", "against npz", "slowest run", "reference (another machine)"), rows)


def batches_table(folder: Path, repeats: int) -> None:
    runs = [measured("batches", folder / str(number), 64) for number in range(repeats)]
    best = min(runs, key=lambda run: run["cached"])
    table(f"Batches of {BATCH} FLUX items of 1024 px with their text ({best['bytes'] / 1e6:.1f} MB) from the page cache",
          ("what", "batches/s", "ms", "time / plain copy", "time / stack"),
          [(label, 1 / best[key], best[key] * 1e3, best[key] / best["copy"], best[key] / best["new"])
           for label, key in (("store, checksums verified", "cached"), ("tensors in memory, stacked", "new"),
                              ("the same bytes, copied", "copy"))])
    print(f"\nReference: the peer reads {PEER_BATCHES} batches/s from disk, {PEER_BATCHES_MEMORY} from memory, "
          f"{PEER_BATCHES_WORKERS} with two loader processes.")


def caching_table(folder: Path, count: int, repeats: int) -> None:
    rows = []
    for label, how in (("naive loop, npz", "naive"), ("fill_latents", "fill")):
        runs = [measured(f"caching {how}", folder / f"{how}{number}" / "pictures", count) for number in range(repeats)]
        best = min(runs, key=lambda run: run["seconds"])
        each = best["seconds"] / count
        rows.append((label, each * 1e3, (each - ENCODER_SECONDS) * 1e3,
                     best["again"] / count * 1e3 if how == "fill" else "not measured"))
    table(f"Caching {count} JPEG of 1280x1024 with an encoder of {ENCODER_SECONDS * 1e3:.0f} ms a picture",
          ("what", "ms a picture", "beyond the encoder", "second start"), rows)
    print("\nReference: beyond its encoder the peer took 255 ms a picture (250 of them gc.collect) at 256 px, "
          "254 ms at 1024-1280 px.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    memory = Path("/dev/shm")
    parser.add_argument("--memory", type=Path, default=memory if memory.is_dir() else None)
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    print(machine())
    with tempfile.TemporaryDirectory(dir=arguments.memory) as name:
        records_table(Path(name) / "records", arguments.records, arguments.repeats)
    with tempfile.TemporaryDirectory(dir=arguments.disk) as name:
        batches_table(Path(name), arguments.repeats)
        runs = [measured("find", Path(name), arguments.keys) for _ in range(arguments.repeats)]
        best = min(runs, key=lambda run: run["find"])
        table(f"{arguments.keys} keys", ("build, s", f"find {arguments.keys}, s", "bytes a key"),
              [(best["build"], best["find"], best["bytes"])])
        caching_table(Path(name), arguments.pictures, arguments.repeats)


if __name__ == "__main__":
    main()
