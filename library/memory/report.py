"""Peak memory of this process, measured (device memory where there is a device, resident memory otherwise), beside the plan."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from library.memory.needs import Needs


def peak_bytes(device: torch.device) -> int:
    """The most bytes allocated on ``device`` so far; on a CPU the most bytes resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Linux and macOS
    except ImportError:
        import psutil  # Windows

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def beside_plan(needs: Needs, device: torch.device) -> str:
    """One line for the log: the peak so far, and what was planned.

    On a GPU what torch has allocated, which the plan knows without CUDA's own memory. On a CPU everything of the process is
    resident together, so the plan's device and host memory are added up.
    """
    measured = peak_bytes(device)
    if device.type == "cuda":
        planned, what = needs.allocated_bytes, "allocated on the card"
    else:
        planned, what = needs.device_bytes + sum(needs.pinned.values()) + sum(needs.ordinary.values()), "resident"
    difference = measured / planned - 1
    return (f"peak memory: {measured / 1e9:.2f} GB {what}, {planned / 1e9:.2f} GB planned "
            f"({'+' if difference >= 0 else '-'}{abs(difference):.0%})")
