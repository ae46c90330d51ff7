"""Shared by the benchmarks: run a piece of work in a fresh process and read its time and peak memory; print a table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """The environment of a measured process: repository importable, one OpenMP thread unless the caller says otherwise."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def in_process(script: Path, *arguments: str) -> dict[str, float]:
    """Run ``script --child arguments`` and return the JSON object of its last line of output."""
    done = subprocess.run([sys.executable, str(script), "--child", *arguments], capture_output=True, text=True,
                          env=environment(), cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def wall_seconds(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT)
    return time.perf_counter() - started


def resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    import torch

    from library.memory.report import peak_bytes

    return peak_bytes(torch.device("cpu"))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Markdown, ready for docs/benchmarks.md."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def machine() -> str:
    import torch

    processor = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores ({processor})"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"
