"""Finding the pictures of a dataset: first start, second start, one picture in a hundred changed, and memory for each picture.

    python -m benchmarks.data_scan [--pictures 1e5 1e6] [--bytes 17000] [--folder DIR] [--runs 3]

A hundred thousand pictures without further words; a million are asked for, and fill 25 GB of disk at that size of file.
Each start is a fresh process. Beside it, in the same run and over the same files, a plain loop that opens each picture with
Pillow and reads each caption, as a data set class of a hundred lines does.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import in_process, machine, table  # noqa: E402

SIZES = ((640, 480), (480, 640), (1024, 768), (512, 512), (800, 1200))
PER_FOLDER = 1000  # pictures are spread over subfolders, as no file browser likes a million files in one
REFERENCES = """
Measured on 2 cores for the plan of this library (performance.md 4.2, files of 17 KB): scandir and stat 108,000 files/s, size by
Pillow 10,800/s, caption files 57,000/s. The scripts this library replaces (peer-measured.md 6b, another machine, warm): 20,000
pictures in 1.36 s (68 us each), with --cache_info 1.46 s at first and 0.45 s (22 us each) at later starts, linear.
"""


def make_pictures(folder: Path, count: int, file_bytes: int) -> None:
    """JPEG files of several sizes, padded behind their end, with captions. Their times are an hour back."""
    from PIL import Image

    bodies = []
    for size in SIZES:
        file = io.BytesIO()
        Image.new("RGB", size, "gray").save(file, "JPEG", quality=10)
        head = file.getvalue()[:max(file_bytes, 700)]
        bodies.append(head + bytes(max(file_bytes - len(head), 0)))
    then = time.time_ns() - 3600 * 10**9
    for number in range(count):
        if number % PER_FOLDER == 0:
            inner = folder / f"{number // PER_FOLDER:04d}"
            inner.mkdir(parents=True)
        for suffix, data in ((".jpg", bodies[number % len(bodies)]), (".txt", caption(number).encode())):
            path = f"{inner}/{number:07d}{suffix}"
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.write(handle, data)
            os.close(handle)
            os.utime(path, ns=(then + number, then + number))


def caption(number: int) -> str:
    return f"a photo of thing number {number}, tag {number % 17}, tag {number % 23}, in the style of a benchmark"


def touch(folder: Path, count: int) -> int:
    """Change one picture and one caption in a hundred."""
    then = time.time_ns() - 1800 * 10**9
    changed = range(0, count, 100)
    for number in changed:
        for suffix in (".jpg", ".txt"):
            path = f"{folder}/{number // PER_FOLDER:04d}/{number:07d}{suffix}"
            os.utime(path, ns=(then, then + number))
    return len(changed)


def child_scan(folder: Path, check: str) -> dict[str, float]:
    """Time and memory of one start, and a digest of what it found."""
    from library.data.scan import scan
    from tests.unit.data_helpers import dataset_spec, subset_spec

    specs = [dataset_spec(subset_spec(folder, recursive=True), resolution=1024)]
    before = memory()
    started = time.perf_counter()
    found = scan(specs, index_dir=lambda subset: folder / ".kiln_cache", check=check)
    seconds = time.perf_counter() - started
    peak = peak_bytes() - before["rss"]
    found.raise_errors()
    listing = found.items.listings[0]
    for row in range(0, len(listing), 50):  # touch all that is mapped
        number = int(Path(listing.names[row]).stem)
        assert listing.captions[row] == caption(number) and tuple(listing.sizes[row]) == SIZES[number % len(SIZES)]
    digest = int(found.items.digest()[:12], 16)
    after = memory()
    return {"seconds": seconds, "pictures": len(found.items), "digest": digest, "peak": peak,
            **{name: after[name] - before[name] for name in after}}


def child_loop(folder: Path, _: str) -> dict[str, float]:
    """The same facts by one Pillow open, one EXIF look and one read for each picture."""
    from PIL import Image

    started = time.perf_counter()
    items = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:
                width, height = height, width
        items.append((path, (width, height), path.with_suffix(".txt").read_text(encoding="utf-8").strip()))
    return {"seconds": time.perf_counter() - started, "pictures": len(items)}


def memory() -> dict[str, int]:
    """Resident bytes; ``own`` are those that no file stands behind (what is mapped from the index is shared by processes)."""
    import psutil

    info = psutil.Process().memory_info()
    return {"rss": info.rss, "own": info.rss - getattr(info, "shared", 0)}


def peak_bytes() -> int:
    """Of resident memory. Not ``ru_maxrss``, which a new process inherits from the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return memory()["rss"]
    line, = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def drop_caches() -> bool:
    """Forget the page cache, where this process may: then files come from the disk."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        return False


def measure(folder: Path, count: int, arguments: argparse.Namespace) -> list[list[object]]:
    script = Path(__file__)

    def start(kind: str, check: str = "fast") -> dict[str, float]:
        return in_process(script, str(folder), check, kind)

    def best(prepare, kind: str, check: str = "fast") -> dict[str, float]:
        runs = []
        for _ in range(arguments.runs):
            prepare()
            runs.append(start(kind, check))
        assert all(run["pictures"] == count for run in runs)
        return min(runs, key=lambda run: run["seconds"])

    def no_index() -> None:
        shutil.rmtree(folder / ".kiln_cache", ignore_errors=True)

    rows, loop = [], best(lambda: None, "loop")
    steps = [("plain loop", loop), ("first start", best(no_index, "scan")), ("second start", best(lambda: None, "scan")),
             ("second start, one in 100 changed", best(lambda: touch(folder, count), "scan")),
             ("second start, --cache_check full", best(lambda: None, "scan", "full")),
             ("second start, --cache_check none", best(lambda: None, "scan", "none"))]
    if arguments.cold and drop_caches():
        steps.append(("second start, cold disk", start("scan")))
        no_index()
        drop_caches()
        steps.append(("first start, cold disk", start("scan")))
    assert len({run["digest"] for _, run in steps if "digest" in run}) == 1, "every start finds the same"
    for name, run in steps:
        memory_of = [run[key] / count for key in ("own", "rss", "peak")] if "own" in run else ["", "", ""]
        rows.append([f"{count:,}", name, run["seconds"], run["seconds"] / count * 1e6, loop["seconds"] / run["seconds"],
                     *(f"{value:.0f}" if value != "" else "" for value in memory_of)])
    return rows


def main() -> None:
    if "--child" in sys.argv:
        folder, check, kind = sys.argv[sys.argv.index("--child") + 1:]
        print(json.dumps((child_scan if kind == "scan" else child_loop)(Path(folder), check)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=lambda words: int(float(words)), nargs="+", default=[100_000],
                        help="how many, such as 100000 or 1e6; each number is measured by itself (default: 100000)")
    parser.add_argument("--bytes", type=int, default=17_000, help="of each picture file")
    parser.add_argument("--folder", type=Path, default=None, help="where to make them (default: the system's temporary folder)")
    parser.add_argument("--runs", type=int, default=3, help="of each kind; the fastest counts")
    parser.add_argument("--cold", action="store_true", help="also with an empty page cache (Linux, as root)")
    arguments = parser.parse_args()
    print(machine())
    rows = []
    for count in arguments.pictures:
        folder = Path(tempfile.mkdtemp(prefix="kiln-scan-", dir=arguments.folder))
        try:
            make_pictures(folder, count, arguments.bytes)
            rows += measure(folder, count, arguments)
        finally:
            subprocess.run(["rm", "-rf", str(folder)], check=False) if os.name != "nt" else shutil.rmtree(folder)
    table("Finding the pictures", ["pictures", "start", "seconds", "us each", "times the loop's speed", "own bytes each",
                                   "resident bytes each", "peak bytes each"], rows)
    print(REFERENCES)


if __name__ == "__main__":
    main()
